"""A frozen linear layer that many adapters share.

Shapes: N rows, T tokens, I in_features, O out_features.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graft.methods.layerwise import LayerMethod
from graft.methods.routing import DropoutStream, GroupRouting, Observed

if TYPE_CHECKING:
    from graft.engine.multi.frozen import FrozenLinear
    from graft.engine.multi.model import Slot
    from graft.methods.base import Method

_SEPARATOR = "__at__"


class ActiveRouting(threading.local):
    """What the layers of one model see of the current forward pass of their thread."""

    def __init__(self) -> None:
        self.slots: list[tuple[Slot, int, int]] = []
        """Slot, first row, number of rows; rows of the bare base are in none."""
        self.streams: dict[str, DropoutStream] = {}
        self.num_rows = 0
        self.observed: Observed | None = None
        """Where methods leave figures about themselves; None where nobody asks."""
        self.real: torch.Tensor | None = None
        """Which tokens are no padding, `[rows, tokens]`; None: all, or nobody asks for figures."""

    def as_now(self) -> AbstractContextManager[None]:
        """Returns a context in which all is as it is now: for layers that run a second time."""
        return _restored(self, dict(vars(self)))


@contextmanager
def _restored(active: ActiveRouting, then: dict[str, Any]) -> Iterator[None]:
    now = dict(vars(active))
    vars(active).update(then)
    try:
        yield
    finally:
        vars(active).update(now)


@dataclass(frozen=True)
class _Group:
    """The slots of one method at one layer, and where their rows are."""

    method: type[LayerMethod]
    names: tuple[str, ...]
    routing: GroupRouting
    ranges: tuple[tuple[int, int], ...]

    def rows(self, device: torch.device) -> torch.Tensor:
        """Indices of its rows in the batch, `[rows]`."""
        return torch.cat([torch.arange(a, b, device=device) for a, b in self.ranges])


class SlotTensors(nn.Module):
    """The tensors that slots have at one layer.

    They are parameters of this module itself, so that ZeRO-3 gathers them with it.
    """

    def __init__(self, frozen: FrozenLinear) -> None:
        super().__init__()
        self._frozen = frozen
        self._tensor_names: dict[str, tuple[str, ...]] = {}
        self._stacks: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}

    def add(
        self, slot: str, tensors: dict[str, torch.Tensor], *, frozen: frozenset[str] | None
    ) -> None:
        """Takes one slot's tensors; they become parameters.

        Args:
            slot: Its name.
            tensors: By name.
            frozen: Names of those that take no gradient; None means all of them.
        """
        for key, tensor in tensors.items():
            is_trained = frozen is not None and key not in frozen
            parameter = nn.Parameter(tensor, requires_grad=is_trained)
            self.register_parameter(f"{slot}{_SEPARATOR}{key}", parameter)
        self._tensor_names[slot] = tuple(tensors)
        self._stacks.clear()

    def has(self, slot: str) -> bool:
        """Tells whether a slot adapts this layer."""
        return slot in self._tensor_names

    def remove(self, slot: str) -> None:
        """Forgets a slot."""
        for key in self._tensor_names.pop(slot):
            delattr(self, f"{slot}{_SEPARATOR}{key}")
        self._stacks.clear()

    def tensors(self, slot: str) -> dict[str, nn.Parameter]:
        """One slot's parameters by tensor name."""
        return {key: getattr(self, f"{slot}{_SEPARATOR}{key}") for key in self._tensor_names[slot]}

    def forget_stacks(self) -> None:
        """Drops cached stacks; to be called after parameters were written in place."""
        self._stacks.clear()

    def stacked(
        self,
        method: type[LayerMethod],
        names: tuple[str, ...],
        methods: tuple[Method, ...],
        dtype: torch.dtype,
    ) -> dict[str, torch.Tensor]:
        """Returns what the method made of these slots' tensors; kept while nothing trains."""
        kept = None if torch.is_grad_enabled() else self._stacks.get(names)
        if kept is not None:
            return kept
        slots: list[dict[str, torch.Tensor]] = [dict(self.tensors(name)) for name in names]
        stacked = method.stack(slots, methods, dtype, self._frozen)
        if not torch.is_grad_enabled():
            if len(self._stacks) >= _MAX_CACHED_STACKS:
                self._stacks.clear()
            self._stacks[names] = stacked
        return stacked


class RoutedLinear(SlotTensors):
    """Computes the frozen layer once for all rows and adds each slot's own delta to its rows."""

    def __init__(
        self, base: nn.Module, site_index: int, active: ActiveRouting, frozen: FrozenLinear
    ) -> None:
        super().__init__(frozen)
        self.base = base
        self._site_index = site_index
        self._active = active

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the layer's output with every row's own delta.

        Args:
            x: `[rows, tokens, in_features]`; some bases have `[rows * tokens, in_features]` here,
                and some `[rows, 1, tokens, in_features]`.
        """
        if x.ndim == 3 or not self._active.slots:
            return self._routed(x)
        out_NTO = self._routed(x.reshape(self._active.num_rows, -1, x.shape[-1]))
        return out_NTO.reshape(*x.shape[:-1], -1)

    def _routed(self, x_NTI: torch.Tensor) -> torch.Tensor:
        groups = [(group, self._stacked(group, x_NTI.dtype)) for group in self._groups()]
        for group, stacked in groups:
            if group.method.scales_input:
                x_NTI = self._scaled(x_NTI, group, stacked)
        base_NTO: torch.Tensor = self.base(x_NTI)
        out_NTO = base_NTO
        for group, stacked in groups:
            if self._has_all(group):
                delta = group.method.delta(x_NTI, base_NTO, stacked, group.routing)
                out_NTO = out_NTO if delta is None else out_NTO + delta.to(base_NTO.dtype)
                continue
            rows_N = group.rows(x_NTI.device)
            delta = group.method.delta(x_NTI[rows_N], base_NTO[rows_N], stacked, group.routing)
            if delta is not None:
                out_NTO = out_NTO.index_add(0, rows_N, delta.to(base_NTO.dtype))
        return out_NTO

    def _scaled(
        self, x_NTI: torch.Tensor, group: _Group, stacked: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        if self._has_all(group):
            return group.method.scale_input(x_NTI, stacked, group.routing).to(x_NTI.dtype)
        rows_N = group.rows(x_NTI.device)
        scaled = group.method.scale_input(x_NTI[rows_N], stacked, group.routing)
        return x_NTI.index_copy(0, rows_N, scaled.to(x_NTI.dtype))

    def _has_all(self, group: _Group) -> bool:
        return sum(group.routing.num_rows) == self._active.num_rows

    def _groups(self) -> list[_Group]:
        by_method: dict[type[LayerMethod], list[tuple[Slot, int, int]]] = {}
        for slot, start, rows in self._active.slots:
            if self.has(slot.name):
                assert isinstance(slot.method, LayerMethod)
                by_method.setdefault(type(slot.method), []).append((slot, start, rows))
        streams = self._active.streams
        groups = []
        for method, members in by_method.items():
            names = tuple(slot.name for slot, _, _ in members)
            routing = GroupRouting(
                slots=names,
                methods=tuple(slot.method for slot, _, _ in members),
                num_rows=tuple(rows for _, _, rows in members),
                site_index=self._site_index,
                streams=tuple(streams[name] for name in names) if streams else (),
                observed=self._active.observed,
                real=self._real_tokens(members),
            )
            ranges = tuple((start, start + rows) for _, start, rows in members)
            groups.append(_Group(method, names, routing, ranges))
        return groups

    def _real_tokens(self, members: list[tuple[Slot, int, int]]) -> torch.Tensor | None:
        if self._active.real is None:
            return None
        return torch.cat([self._active.real[start : start + rows] for _, start, rows in members])

    def _stacked(self, group: _Group, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return self.stacked(group.method, group.names, group.routing.methods, dtype)


_MAX_CACHED_STACKS = 4
"""Mixes of slots a layer remembers; a mix changes only when a request with a new adapter joins."""
