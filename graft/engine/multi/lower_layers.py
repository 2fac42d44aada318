"""The decoder layers below the lowest adapted one: no slot changes what they put out.

It is a function of a row's tokens alone (and of their branches), so it is kept, in host memory and
as long as there is room; a pass over rows whose states are kept starts at the lowest adapted layer.

Shapes: N rows, T tokens, E hidden size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from graft.core.machine import free_host_memory_bytes
from graft.models.rope import reads_rows_alone

_SHARE = 0.25
"""Of the host memory that would be free if nothing were kept."""
_PLAIN = (torch.Tensor, bool, int, float, str, type(None))


def decoder_layers(base: nn.Module) -> list[nn.Module]:
    """Returns the layers that can be computed again."""
    return [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]


class _Pass(threading.local):
    """Which part of the decoder the current pass of its thread runs; None is all of it."""

    part: Literal["below", "above"] | None = None
    states_NTE: torch.Tensor | None = None
    """What enters the lowest adapted layer."""
    is_chain = True
    """So far each layer made states of states, and got nothing beside them that it could change."""


class LowerLayers:
    """Keeps what enters the lowest adapted layer, by row.

    It is off until `switch` turns it on. While it is on and a layer is below all slots, the decoder
    layers carry a wrapper that lets a pass leave out one part of them.

    Args:
        base: The base.
        adapted: Tells the paths of the linear layers that slots adapt; None where a slot does more
            than that.
        free: Tells the free bytes of host memory.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        adapted: Callable[[], Collection[str] | None],
        free: Callable[[], int] = free_host_memory_bytes,
    ) -> None:
        self._base = base
        self._adapted = adapted
        self._free = free
        self._is_on = False
        self._is_settled = False
        self._start = 0
        self._now = _Pass()
        self._kept: dict[bytes, torch.Tensor] = {}
        self._wrapped: list[tuple[nn.Module, Any]] = []
        self.num_bytes = 0
        """Of what is kept."""
        self.is_chain: bool | None = None
        """A pass may start in the middle of this base; None: nobody has tried."""

    @property
    def start(self) -> int:
        """The lowest adapted layer; 0 where nothing is kept or slots have come and gone since."""
        return self._start if self._is_settled else 0

    def switch(self, is_on: bool) -> None:
        """Turns it on or off."""
        self._is_on = is_on
        self.forget()

    def slots_changed(self) -> None:
        """To be called when a slot has come or gone."""
        self._is_settled = False

    def forget(self) -> None:
        """Drops what is kept, and takes the wrappers off the layers."""
        self._start_at(0)
        self._is_settled = False

    def settle(self) -> bool:
        """Finds the lowest adapted layer; to be called before passes, while none runs.

        What is kept outlives slots that come and go, as long as the lowest layer stays. Memory that
        others have come to need is given back.

        Returns:
            Whether there are layers below it.
        """
        if not self._is_on or self.is_chain is False:
            return False
        if not self._is_settled:
            paths = self._adapted()
            if paths is None or paths:
                self._start_at(self._lowest(paths or ()))
            self._is_settled = True
        while self._kept and self.free_bytes() < 0:
            _, states = self._kept.popitem()
            self.num_bytes -= states.nbytes
        return self._start > 0

    def tried(self, is_chain: bool) -> None:
        """Notes whether a pass may start in the middle of this base; where not, nothing is kept."""
        self.is_chain = is_chain
        if not is_chain:
            self.forget()

    def free_bytes(self) -> int:
        """Bytes that may be kept beside those that are; negative where there are too many."""
        return int(_SHARE * (self._free() + self.num_bytes)) - self.num_bytes

    def row_bytes(self, num_tokens: int) -> int:
        """Bytes of the states of a row."""
        config = self._base.config.get_text_config()
        return int(num_tokens * config.hidden_size * self._base.dtype.itemsize)

    def has(self, key: bytes) -> bool:
        """Tells whether a row's states are kept."""
        return key in self._kept

    def keep(self, key: bytes, states_TE: torch.Tensor) -> None:
        """Keeps a copy of a row's states."""
        kept = states_TE.detach().to("cpu", copy=True)
        self._kept[key] = kept
        self.num_bytes += kept.nbytes

    def states(self, keys: Sequence[bytes]) -> torch.Tensor | None:
        """Returns the states of some rows, padded on the right with zeros; None if one is unknown.

        Nothing sees the padding: what stands there matters as little as the tokens of padding do.
        """
        found = [self._kept[key] for key in keys if key in self._kept]
        if not self.start or len(found) < len(keys):
            return None
        return pad_sequence(found, batch_first=True).to(self._base.device)

    @contextmanager
    def read(self) -> Iterator[Callable[[], torch.Tensor | None]]:
        """Lets passes of this thread end below the lowest adapted layer.

        Yields:
            What gives the states that the latest pass came to, `[N, T, E]`; None where this base
            is no chain of layers, and the pass has run to its end.
        """
        with self._running("below", None):
            yield lambda: self._now.states_NTE if self._now.is_chain else None

    @contextmanager
    def skipped(self, states_NTE: torch.Tensor) -> Iterator[None]:
        """Lets passes of this thread start at the lowest adapted layer.

        Args:
            states_NTE: What enters it, of the rows that pass.
        """
        with self._running("above", states_NTE):
            yield

    @contextmanager
    def _running(
        self, part: Literal["below", "above"], states_NTE: torch.Tensor | None
    ) -> Iterator[None]:
        now = self._now
        now.part, now.states_NTE, now.is_chain = part, states_NTE, True
        try:
            yield
        finally:
            now.part = now.states_NTE = None

    def _lowest(self, paths: Collection[str]) -> int:
        """The first layer that has one of the paths; 0 where one is outside of the layers."""
        name, layers = self._chain()
        numbers = [path.removeprefix(f"{name}.").partition(".")[0] for path in paths]
        are_inside = all(path.startswith(f"{name}.") for path in paths)
        return min(map(int, numbers), default=0) if layers and are_inside else 0

    def _chain(self) -> tuple[str, list[nn.Module]]:
        """The one list of all decoder layers, and its path; an empty one where there is none."""
        if not reads_rows_alone(self._base.config):
            return "", []
        layers = decoder_layers(self._base)
        for name, module in self._base.named_modules():
            if isinstance(module, nn.ModuleList) and list(module) == layers:
                return name, layers
        return "", []

    def _start_at(self, start: int) -> None:
        if start == self._start:
            return
        for layer, forward in self._wrapped:
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
        self._wrapped.clear()
        self._kept.clear()
        self.num_bytes = 0
        self._start = start
        for number, layer in enumerate(self._chain()[1] if start else ()):
            self._wrapped.append((layer, vars(layer).get("forward")))
            layer.forward = partial(self._run, number, layer.forward)

    def _run(self, number: int, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stands for a decoder layer; those that a pass leaves out hand on what they are given."""
        now = self._now
        if now.part is None or not now.is_chain:
            return layer(*args, **kwargs)
        states = args[0] if args else kwargs["hidden_states"]
        if now.part == "above":
            if number < self._start:
                return states
            if number == self._start:
                args = (now.states_NTE, *args[1:])
                kwargs.pop("hidden_states", None)
            return layer(*args, **kwargs)
        if number >= self._start:
            now.states_NTE = states if number == self._start else now.states_NTE
            return states
        out = layer(*args, **kwargs)
        is_state = isinstance(out, torch.Tensor) and out.shape == states.shape
        now.is_chain = is_state and _are_plain(args) and _are_plain(kwargs.values())
        return out


def _are_plain(given: Collection[Any]) -> bool:
    """Says that a layer could not leave anything in what it was given for a later one."""
    return all(
        _are_plain(value) if isinstance(value, tuple) else isinstance(value, _PLAIN)
        for value in given
    )
