"""A pool of key/value rows that requests join and leave freely, shown to the model as its cache.

Axes: N rows of this forward, H key/value heads, T new tokens, L cached tokens, D head size.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, get_layer_types_and_kwargs

from graft.core.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from graft.engine.multi.prefix import Prefix

_FIRST_LENGTH = 128


def layer_kinds(config: PreTrainedConfig) -> set[str]:
    """Names what the layers of a base attend with; `full_attention` is every earlier token."""
    text = config.get_text_config()
    kinds = set(get_layer_types_and_kwargs(text)[0])
    if "local" in getattr(text, "attention_layers", ()):  # GPT-Neo's own way to say it
        kinds.add("local_attention")
    return kinds


def require_full_attention(base: PreTrainedModel, reason: str) -> None:
    """Refuses bases whose layers do not all attend to every earlier token.

    Args:
        base: The base.
        reason: Who asks for it, and what else there is; the end of the message.

    Raises:
        ModelError: A layer has a sliding window, a recurrent state or a shared cache.
    """
    kinds = layer_kinds(base.config) - {"full_attention"}
    takes_cache = "past_key_values" in inspect.signature(base.get_decoder().forward).parameters
    # Of a class that may mix kinds of layers, the configuration says which are there.
    names_layers = getattr(base.config.get_text_config(), "layer_types", None) is not None
    if (getattr(base, "_is_stateful", False) and not names_layers) or not takes_cache:
        kinds.add("recurrent")
    if kinds:
        named = ", ".join(sorted(kinds))
        raise ModelError(
            f"model type {base.config.model_type!r} has layers of kind {named}; {reason}"
        )


class KVCache(Cache):
    """Keys and values of at most `max_batch` running requests, one *cell* each.

    Before each forward `begin` names the cells of its rows. A cell holds one request from position
    0 on, its virtual tokens first, so there is no left padding. Memory grows with the longest
    request seen, up to `max_length` and the virtual tokens.
    A freed cell is cleared: nothing of one request, not even a NaN, reaches the next.
    """

    def __init__(self, *, max_batch: int, max_length: int) -> None:
        super().__init__(layers=[])
        self.max_batch = max_batch
        self.max_length = max_length
        self._pools: dict[int, list[torch.Tensor]] = {}
        self._capacity = min(_FIRST_LENGTH, max_length)
        self._cells = torch.empty(0, dtype=torch.long)
        self._positions = torch.empty(0, dtype=torch.long)
        self._span: slice | None = None
        self._length = 0
        self._is_prefill = False
        self._prefix: Prefix | None = None
        self._longest_prefix = 0

    def begin(
        self,
        cells: list[int],
        positions: list[int] | None,
        device: torch.device,
        prefix: Prefix | None = None,
    ) -> None:
        """Says which rows the next forward has.

        Args:
            cells: The cell of each row.
            positions: Where each row's one new token goes; None where whole prompts start at 0, or
                behind the row's virtual tokens.
            device: Of the model.
            prefix: Virtual tokens to be stored before whole prompts.
        """
        self._cells = torch.tensor(cells, device=device)
        self._is_prefill = positions is None
        first, is_run = cells[0], cells == list(range(cells[0], cells[0] + len(cells)))
        self._span = slice(first, first + len(cells)) if is_run else None
        self._prefix = prefix
        if prefix is not None:
            self._longest_prefix = max(self._longest_prefix, prefix.longest)
        if positions is not None:
            self._positions = torch.tensor(positions, device=device)
            self._length = max(positions) + 1

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores new keys and values, `[N, H, T, D]`; returns all of the rows', `[N, H, L, D]`."""
        new = (key_states, value_states)
        if self._prefix is not None:
            return self._store_behind(self._prefix, new, layer_idx)
        needed = key_states.shape[2] if self._is_prefill else self._length
        pools = self._room(layer_idx, new, needed)
        if self._is_prefill:
            for pool, states in zip(pools, new, strict=True):
                pool[self._cells, :, : states.shape[2]] = states
            return new
        for pool, states in zip(pools, new, strict=True):
            pool[self._cells, :, self._positions] = states[:, :, 0]
        return self._rows(pools[0]), self._rows(pools[1])

    def _store_behind(
        self, prefix: Prefix, new: tuple[torch.Tensor, torch.Tensor], layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores prefix and prompts without a gap, returns them as the prefix's mask has them."""
        num_new = new[0].shape[2]
        pools = self._room(layer_idx, new, prefix.longest + num_new)
        positions_NT = prefix.positions(num_new)
        before = prefix.rows(layer_idx)
        for pool, first, states in zip(pools, before, new, strict=True):
            pool[self._cells, :, : prefix.longest] = first
            pool[self._cells[:, None], :, positions_NT] = states.transpose(1, 2)
        return torch.cat([before[0], new[0]], dim=2), torch.cat([before[1], new[1]], dim=2)

    def _rows(self, pool: torch.Tensor) -> torch.Tensor:
        view = pool[:, :, : self._length]
        if self._span is not None:
            return view[self._span]
        return view.index_select(0, self._cells)

    def _room(
        self, layer_idx: int, new: tuple[torch.Tensor, torch.Tensor], length: int
    ) -> list[torch.Tensor]:
        while self._capacity < length:
            self._capacity = min(2 * self._capacity, self.max_length + self._longest_prefix)
        pools = self._pools.get(layer_idx)
        if pools is not None and pools[0].shape[2] >= length:
            return pools
        # Zeros, not empty memory: a masked key weighs 0, and 0 times a stray NaN is NaN.
        grown = [
            states.new_zeros(self.max_batch, states.shape[1], self._capacity, states.shape[3])
            for states in new
        ]
        if pools is not None:
            for pool, old in zip(grown, pools, strict=True):
                pool[:, :, : old.shape[2]] = old
        self._pools[layer_idx] = grown
        return grown

    def copy(self, source: int, target: int, length: int) -> None:
        """Gives a cell the first tokens of another one."""
        for pools in self._pools.values():
            for pool in pools:
                pool[target, :, :length] = pool[source, :, :length]

    def clear(self, cell: int) -> None:
        """Forgets what a cell holds."""
        for pools in self._pools.values():
            for pool in pools:
                pool[cell].zero_()
