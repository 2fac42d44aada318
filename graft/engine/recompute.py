"""Gradient checkpointing: layers are computed again in the backward pass instead of being kept.

transformers' own takes the keys and values away that a layer is given, and with them every virtual
token. Here a layer runs again with all that it had: keys and values, routing, dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from graft.core.errors import ConfigError
from graft.engine.multi.attention import attention_kernel_as_now
from graft.engine.multi.lower_layers import decoder_layers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from graft.engine.multi import MultiAdapterModel


def recompute_layers(model: MultiAdapterModel) -> None:
    """Keeps only the inputs of decoder layers while training; costs a second forward pass of each.

    Evaluation and generation are not touched: only passes that record gradients recompute.

    Raises:
        ConfigError: The architecture does not support it.

    Reference:
        Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174.
    """
    layers = decoder_layers(model.base)
    if not layers or not model.base.supports_gradient_checkpointing:
        raise ConfigError(
            f"scale.gradient_checkpointing: {type(model.base).__name__} does not support it; "
            "set it to false"
        )
    for layer in layers:
        layer.forward = partial(_forward, layer.forward, partial(_contexts, model))


@contextmanager
def plain_layers(base: nn.Module) -> Iterator[None]:
    """Takes the recomputation off a base while a copy of it is made."""
    layers = [
        module for module in base.modules() if isinstance(vars(module).get("forward"), partial)
    ]
    kept = [vars(layer).pop("forward") for layer in layers]
    try:
        yield
    finally:
        for layer, forward in zip(layers, kept, strict=True):
            vars(layer)["forward"] = forward


def _forward(
    layer: Callable[..., Any],
    contexts: Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not torch.is_grad_enabled():
        return layer(*args, **kwargs)
    # Dropout is a function of seed and step, so no random state is kept.
    return checkpoint(
        layer,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=contexts,
        **kwargs,
    )


def _contexts(
    model: MultiAdapterModel,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What the two passes run under: the second has the routing and the kernels of the first."""
    return nullcontext(), _again(model.routing_as_now(), attention_kernel_as_now())


@contextmanager
def _again(
    routing: AbstractContextManager[None], kernel: AbstractContextManager[None]
) -> Iterator[None]:
    with routing, kernel:
        yield
