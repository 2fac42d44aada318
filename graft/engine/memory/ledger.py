"""An account of the memory that tensors would take, kept while real code runs on fake ones.

torch's fake tensors have shapes, dtypes and devices but no storage, and run through autograd as
real ones do. So what is alive at any moment of a training step, which tensors the backward pass
keeps above all, is counted, not modelled.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

Scratch = Callable[[tuple[Any, ...], Any], int]
"""Bytes that a kernel takes for itself while it runs, from its arguments and its result."""

SCRATCH = "scratch of kernels"


class Ledger(TorchDispatchMode):
    """Counts the bytes of tensors made while it is on, and the highest sums.

    Every tensor belongs to the part that was current when it was made. The highest sum is noted
    for each *window* of the step by itself, with what it consisted of.

    Args:
        scratch: Of kernels that need room of their own, by name.
    """

    def __init__(self, scratch: Mapping[str, Scratch]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._scratch = scratch
        self._alive: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        self._live: Counter[str] = Counter()
        self._total = 0
        self.part = "activations"
        self.window = ""
        self.peaks: dict[str, Counter[str]] = {}
        """Window → part → bytes, when the window's sum was highest."""
        self._highest: dict[str, int] = {}

    @contextmanager
    def counting(self, part: str, window: str | None = None) -> Iterator[None]:
        """Counts what is made inside for a part."""
        before = self.part
        self.part = part
        if window is not None:
            self.enter(window)
        try:
            yield
        finally:
            self.part = before

    def enter(self, window: str) -> None:
        """Starts a window of the step."""
        self.window = window
        self._note(0)

    def assign(self, tensor: torch.Tensor, part: str) -> None:
        """Counts a tensor, made here or before, for another part from now on."""
        key = self._add(tensor)
        ref, size, old = self._alive[key]
        self._live[old] -= size
        self._live[part] += size
        self._alive[key] = (ref, size, part)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor) and not self._was_there(value, (args, kwargs)):
                self._add(value)
        scratch = self._scratch.get(func._schema.name)
        self._note(scratch(args, result) if scratch else 0)
        return result

    def _was_there(self, tensor: torch.Tensor, given: Any) -> bool:
        """Says whether it shares its memory with something made before the account was opened."""
        key = tensor.untyped_storage()._cdata
        return key not in self._alive and any(
            isinstance(value, torch.Tensor) and value.untyped_storage()._cdata == key
            for value in tree_iter(given)
        )

    def _add(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        key = int(storage._cdata)
        if key in self._alive:
            return key
        size, part = storage.nbytes(), self.part
        self._alive[key] = (weakref.ref(storage, lambda _: self._gone(key)), size, part)
        self._live[part] += size
        self._total += size
        return key

    def _gone(self, key: int) -> None:
        _, size, part = self._alive.pop(key)
        self._live[part] -= size
        self._total -= size

    def _note(self, scratch: int) -> None:
        total = self._total + scratch
        if total > self._highest.get(self.window, -1):
            self._highest[self.window] = total
            self.peaks[self.window] = Counter(self._live)
            if scratch:
                self.peaks[self.window][SCRATCH] += scratch
