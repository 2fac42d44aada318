"""What a device may be given, and which runs stay below it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from graft.core.errors import ConfigError
from graft.core.sizes import format_bytes, parse_bytes
from graft.engine.memory.estimate import MemoryEstimate, predict_memory
from graft.engine.memory.shape import ModelShape
from graft.engine.memory.stand_ins import DeviceType
from graft.engine.memory.standing import number_bytes, process_parts, size_of, standing_parts
from graft.recipe.sections import Recipe

_FIXED = ("process", "CUDA context")
_MARGIN = 1.02
"""A trial that ran out needed more than what it had by then."""
_PLAUSIBLE = 2.0
"""Predictions are within 15 %: what was killed on a node of more than so many times its prediction
has not filled that node by itself."""


class Limits(NamedTuple):
    """What the machines of a run have."""

    device: DeviceType
    device_bytes: int
    """Of a GPU; on CPUs, of a whole node, which its workers share."""
    host_bytes: int | None = None
    """Of a node with GPUs; None is not known, and not looked at."""
    node_workers: int | None = None
    """Workers that a node can hold: Ray Train fills one before it takes the next, so that many of
    a run share its memory. None is all of a run."""
    threads: int | None = None
    """Of a process that trains on a CPU; None means as many as this one has."""
    factor: float = 1.0
    """What predictions are multiplied by, as runs that ran out have taught."""


class MemoryCap:
    """Says which runs fit; remembers what runs that did not fit have taught.

    Args:
        shape: Of the base.
        limits: Of the machines; a recipe's `scale.device_memory` may be below.
    """

    def __init__(self, shape: ModelShape, limits: Limits) -> None:
        self._shape = shape
        self._limits = limits
        self.factor = limits.factor

    @property
    def limits(self) -> Limits:
        """The limits, with the factor as it is by now: for another process."""
        return self._limits._replace(factor=self.factor)

    @property
    def uncorrected(self) -> MemoryCap:
        """The same limits, as if no run had taught anything."""
        return MemoryCap(self._shape, self._limits._replace(factor=1.0))

    def limit(self, recipe: Recipe) -> int:
        """Returns the bytes that a worker may take on its device."""
        have, given = self._share(recipe), recipe.scale.device_memory
        return have if given is None else min(have, parse_bytes(given))

    def predict(self, recipe: Recipe, slots: int = 1) -> MemoryEstimate:
        """Predicts a run, uncorrected."""
        limits = self._limits
        return predict_memory(
            recipe, self._shape, limits.device, slots=slots, threads=limits.threads
        )

    def need(self, recipes: Sequence[Recipe]) -> float:
        """Returns the bytes that runs take together, as slots of one base; corrected."""
        fixed, predicted = self._together(recipes)
        return fixed + self.factor * predicted

    def beside_process(self, recipe: Recipe) -> int:
        """Returns the bytes that a run takes beside what its bare process has; corrected."""
        _, predicted = self._together([recipe])
        return round(self.factor * predicted)

    def fits(self, recipes: Sequence[Recipe], needs: Sequence[float | None] | None = None) -> bool:
        """Tells whether runs fit together, as slots of one base.

        Args:
            recipes: Of all.
            needs: Bytes that each takes alone; None is predicted here, which takes a second.
        """
        limit = min(self.limit(recipe) for recipe in recipes)
        known = zip(recipes, needs or [None] * len(recipes), strict=True)
        largest = max(self.need([one]) if need is None else need for one, need in known)
        if len(recipes) * largest <= limit:  # on one base they need less: no dry run of so many
            return True
        return self.need(recipes) <= limit

    def node_room(self, recipes: Sequence[Recipe]) -> float:
        """Counts the workers of runs, whichever these are, that a node has memory for."""
        limits = self._limits
        if limits.device == "cpu":
            return limits.device_bytes // max(self.need([recipe]) for recipe in recipes)
        if limits.host_bytes is None:
            return math.inf
        return limits.host_bytes // max(self.predict(recipe).host_bytes for recipe in recipes)

    def refusal(self, recipe: Recipe) -> str | None:
        """Says why a run does not fit, with its largest parts; None where it does."""
        found, limit = self.predict(recipe), self.limit(recipe)
        corrected = f", times {self.factor:.2f} as measured" if self.factor > 1 else ""
        if self.need([recipe]) > limit:
            given = recipe.scale.device_memory
            is_given = given is not None and limit < self._share(recipe)
            have = "scale.device_memory" if is_given else "what a worker has"
            words = f"it needs {found.in_words()}{corrected}; {have} is {format_bytes(limit)}"
            return words + _reference_words(found)
        host = self._limits.host_bytes
        if host is not None and found.host_bytes * self._neighbours(recipe) > host:
            return (
                f"its {self._neighbours(recipe)} workers on a node need "
                f"{format_bytes(found.host_bytes)} of host memory each; the node has "
                f"{format_bytes(host)}"
            )
        return None

    def surely_exceeds(self, recipe: Recipe) -> bool:
        """Tells quickly that a run cannot fit: what stands still is too much already."""
        limits = self._limits
        parts = [
            *standing_parts(recipe, self._shape, limits.device, slots=1),
            *process_parts(limits.device),
        ]
        on_device = sum(part.size_bytes for part in parts if part.place == "device")
        on_host = sum(part.size_bytes for part in parts if part.place == "host")
        if limits.host_bytes is not None and on_host * self._neighbours(recipe) > limits.host_bytes:
            return True
        return on_device > self.limit(recipe)

    def require(self, recipe: Recipe) -> None:
        """Refuses a run that does not fit.

        Raises:
            ConfigError: With what it needs, its largest parts and the limit.
        """
        if reason := self.refusal(recipe):
            raise ConfigError(f"not enough memory: {reason}")

    def learn(self, recipes: Sequence[Recipe], needed_bytes: int) -> str:
        """Corrects later predictions by a process that ran out; returns that in words.

        Args:
            recipes: Of all runs of that process, slots of one base.
            needed_bytes: That they asked for together at least; 0 where the process was killed
                because its node had no memory left.
        """
        fixed, rest = self._together(recipes)
        words = f"predicted were {format_bytes(fixed + rest)}"
        needed = needed_bytes or min(map(self._share, recipes))
        if self._limits.device == "cuda":  # torch counts nothing of the context
            needed += fixed
        if not needed_bytes and self._limits.device != "cpu":
            return "it was killed for the node's memory, which says nothing of its device"
        if not needed_bytes and needed > _PLAUSIBLE * (fixed + rest):
            return (
                f"it was killed for want of memory where it may have {format_bytes(needed)}, "
                f"{words}: something else holds memory on this node"
            )
        who = "it" if len(recipes) == 1 else f"{len(recipes)} trials on one base"
        words = f"{who} needed at least {format_bytes(needed)}, {words}"
        self.factor = max(self.factor, _MARGIN * (needed - fixed) / rest)
        if self.factor > 1:
            return f"{words}; predictions are multiplied by {self.factor:.2f} from now on"
        return f"{words}: something else holds memory of this device"

    def _together(self, recipes: Sequence[Recipe]) -> tuple[int, int]:
        """Bytes that programs take themselves, and those predicted, of slots of one base."""
        largest = max(recipes, key=lambda recipe: self.predict(recipe).device_bytes)
        peak = self.predict(largest, len(recipes)).peak
        learns = any(part.name == "gradients" for part in peak.parts)
        own = [self._own(recipe, learns=learns) for recipe in recipes]
        smaller = sum(self._own(largest, learns=learns) - of for of in own)
        rest = peak.total_bytes("device", exclude=_FIXED)
        return peak.total_bytes("device") - rest, rest - smaller

    def _share(self, recipe: Recipe) -> int:
        """Bytes that there are for a worker."""
        have = self._limits.device_bytes
        return have // self._neighbours(recipe) if self._limits.device == "cpu" else have

    def _own(self, recipe: Recipe, *, learns: bool) -> int:
        """Bytes of the device that a slot has for itself: tensors, moments, gradients."""
        one, two = (
            sum(
                part.size_bytes
                for part in standing_parts(recipe, self._shape, self._limits.device, slots)
                if part.place == "device"
            )
            for slots in (1, 2)
        )
        gradients = number_bytes(recipe) * size_of(recipe, self._shape).trained
        return two - one + (gradients if learns else 0)

    def _neighbours(self, recipe: Recipe) -> int:
        """Workers of a run on one node."""
        return min(recipe.scale.max_workers, self._limits.node_workers or recipe.scale.max_workers)


def _reference_words(found: MemoryEstimate) -> str:
    """Says what a reference costs that is a copy, and what does without."""
    size = sum(part.size_bytes for part in found.parts if part.name == "reference")
    if not size:
        return ""
    return (
        f". {format_bytes(size)} of it are the reference of the objective: an adapter on the base "
        "as it is needs no copy, and orpo no reference"
    )
