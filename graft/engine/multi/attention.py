"""How attention is computed and masked, wherever the base runs."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from graft.engine.kv_cache import layer_kinds

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHORT_TOKENS = 256


class _Kept(threading.local):
    """Whether this thread leaves the kernel as it is."""

    is_on = False


_kept = _Kept()


class _PlainProducts:
    """Attention without a fused kernel for as long as any thread wants that.

    The choice is the process's: threads that each put back what they found would put back one
    another's.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._choice = ExitStack()
        self._users = 0

    @property
    def are_chosen(self) -> bool:
        """Whether a thread wants them now."""
        return self._users > 0

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """Chooses them."""
        with self._lock:
            if not self._users:
                self._choice.enter_context(sdpa_kernel(SDPBackend.MATH))
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._choice.close()


_plain_products = _PlainProducts()


@contextmanager
def keep_attention_kernel() -> Iterator[None]:
    """Keeps this thread from choosing kernels: a choice is for all threads of the process."""
    _kept.is_on = True
    try:
        yield
    finally:
        _kept.is_on = False


def attention_kernel(num_tokens: int, device: torch.device) -> AbstractContextManager[None]:
    """On a CPU, plain products for short rows: the fused kernel's backward pass is slower there."""
    if _kept.is_on:
        return nullcontext()
    is_short = device.type == "cpu" and num_tokens <= _SHORT_TOKENS
    if is_short and torch.is_grad_enabled():
        return _plain_products.chosen()
    return nullcontext()


def attention_kernel_as_now() -> AbstractContextManager[None]:
    """The choice that holds now, to make again later."""
    return _plain_products.chosen() if _plain_products.are_chosen else nullcontext()


def takes_any_mask(base: PreTrainedModel) -> bool:
    """Tells whether each token may be told what it sees and at which position it stands.

    It may where all layers have full attention by a kernel that takes such a mask. A sliding
    window or chunk would be counted in columns, a recurrent state runs over all of them, and a
    bias by distance (ALiBi) takes no positions.
    """
    config = base.config.get_text_config()
    settings = inspect.signature(base.get_decoder().forward).parameters
    return (
        config._attn_implementation in ("sdpa", "eager")
        and layer_kinds(config) == {"full_attention"}
        and {"position_ids", "attention_mask"} <= settings.keys()
        and not getattr(config, "alibi", False)
        and not getattr(base, "_is_stateful", False)
    )


def branch_mask(branches: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Returns what each token sees where rows branch, `[rows, 1, tokens, tokens]`, bool.

    Args:
        branches: Branch of each token, `[rows, tokens]`; all see branch 0, the prompt.
        attention_mask: Which tokens are no padding, `[rows, tokens]`; None means all.
    """
    num_tokens = branches.shape[1]
    key, query = branches[:, None, None, :], branches[:, None, :, None]
    causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=branches.device).tril()
    visible = causal & ((key == 0) | (key == query))
    return visible if attention_mask is None else visible & attention_mask.bool()[:, None, None]


def as_mask(is_visible: torch.Tensor, base: PreTrainedModel) -> torch.Tensor:
    """Returns a mask as the base's attention takes it.

    Args:
        is_visible: Which keys each token sees, `[rows, 1, tokens, keys]`, bool.
        base: Eager attention adds its mask.
    """
    if base.config._attn_implementation != "eager":
        return is_visible
    added = torch.zeros(is_visible.shape, dtype=base.dtype, device=is_visible.device)
    return added.masked_fill(~is_visible, torch.finfo(base.dtype).min)
