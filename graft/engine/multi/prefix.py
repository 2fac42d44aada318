"""What rows attend to before their own tokens.

Shapes: N rows, S slots, L layers, H key/value heads, P virtual tokens (the most of any row), T new
tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers.cache_utils import Cache


class Prefix:
    """Keys and values of the virtual tokens of each row of a forward pass.

    Rows with fewer of them, or none, are padded behind; the padding is never seen.

    Args:
        slots: Of each slot its keys and values, `[layers, 2, heads, tokens, head size]`, or None
            where it has none.
        num_rows: Rows of each slot.
    """

    def __init__(self, slots: Sequence[torch.Tensor | None], num_rows: Sequence[int]) -> None:
        found = [slot for slot in slots if slot is not None]
        self.longest = max(slot.shape[3] for slot in found)
        nothing = found[0].new_zeros(*found[0].shape[:3], 0, found[0].shape[4])
        padded = [
            functional.pad(slot, (0, 0, 0, self.longest - slot.shape[3]))
            for slot in (nothing if slot is None else slot for slot in slots)
        ]
        # Taken apart at once: the gradient of indexing one layer would be as large as all layers.
        self._layers = [layer.unbind() for layer in torch.stack(padded, dim=2).unbind()]
        lengths = [0 if slot is None else slot.shape[3] for slot in slots]
        self.num_tokens = tuple(
            length for length, rows in zip(lengths, num_rows, strict=True) for _ in range(rows)
        )
        """Virtual tokens of each row."""
        device = found[0].device
        of_rows = [at for at, rows in enumerate(num_rows) for _ in range(rows)]
        self._slot_N = torch.tensor(of_rows, device=device)
        self._lengths_N = torch.tensor(self.num_tokens, device=device)

    def rows(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of every row in one layer, each `[N, H, P, D]`."""
        keys_SHPD, values_SHPD = self._layers[layer]
        return keys_SHPD[self._slot_N], values_SHPD[self._slot_N]

    def positions(self, num_new: int, own_NT: torch.Tensor | None = None) -> torch.Tensor:
        """Positions of each row's own tokens, `[N, T]`: they stand behind its virtual tokens.

        Args:
            num_new: Own tokens.
            own_NT: Their positions without virtual tokens; None counts from 0.
        """
        if own_NT is None:
            own_NT = torch.arange(num_new, device=self._lengths_N.device)[None]
        return self._lengths_N[:, None] + own_NT

    def visible(self, num_new: int, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Which of `[virtual tokens, own tokens]` each own token sees, `[N, 1, T, P + T]`, bool.

        Args:
            num_new: Own tokens.
            attention_mask: Which of them are no padding, `[N, T]`; None means all. Or which of
                them each of them sees, `[N, 1, T, T]`.
        """
        rows, device = len(self.num_tokens), self._lengths_N.device
        own = torch.ones(num_new, num_new, dtype=torch.bool, device=device).tril()
        own = own.expand(rows, 1, num_new, num_new)
        if attention_mask is not None and attention_mask.ndim == 4:
            own = attention_mask
        elif attention_mask is not None:
            own = own & attention_mask.bool()[:, None, None]
        virtual_NP = torch.arange(self.longest, device=device) < self._lengths_N[:, None]
        virtual = virtual_NP[:, None, None].expand(rows, 1, num_new, self.longest)
        return torch.cat([virtual, own], dim=3)


class PrefixCache(Cache):
    """Shows a prefix to the layers as what came before; nothing is kept."""

    def __init__(self, prefix: Prefix) -> None:
        super().__init__(layers=[])
        self._prefix = prefix

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the prefix and the new keys and values behind it, `[N, H, P + T, D]`."""
        keys, values = self._prefix.rows(layer_idx)
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)


class RecordingCache(Cache):
    """Takes down the keys and values of one forward pass that has nothing before it.

    A layer that runs again in the backward pass finds nothing there either.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._layers: dict[int, torch.Tensor] = {}

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what it is given, each `[N, H, T, D]`."""
        if layer_idx not in self._layers:
            self._layers[layer_idx] = torch.stack([key_states, value_states])
        return key_states, value_states

    def key_values(self) -> torch.Tensor:
        """What was taken down, `[L, 2, N, H, T, D]`."""
        return torch.stack([self._layers[layer] for layer in sorted(self._layers)])
