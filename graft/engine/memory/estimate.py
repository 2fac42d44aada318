"""How much memory a recipe takes, told before anything is loaded.

A run has a few *moments* at which memory may be highest: while the base is read, in a training
step, when a checkpoint is copied, while answers are generated. Each is made up of named parts, and
the highest moment is the peak. What autograd keeps is counted by a dry run of the real code
(`graft.engine.memory.dry_run`); what stands still is counted from shapes (`standing`).

Reference:
    Reducing Activation Recomputation in Large Transformer Models, arXiv 2205.05198, for what
    activations depend on.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import torch

from graft.core.model import Listed, StrictModel
from graft.core.sizes import format_bytes
from graft.engine.memory.dry_run import (
    Parts,
    Setting,
    answer_peaks,
    reading_peaks,
    step_peaks,
)
from graft.engine.memory.peft_size import STAND_IN
from graft.engine.memory.shape import ModelShape
from graft.engine.memory.stand_ins import DeviceType
from graft.engine.memory.standing import (
    MemoryPart,
    Place,
    checkpoint_copies,
    divided_gradients,
    loading_parts,
    number_bytes,
    process_parts,
    size_of,
    standing_parts,
)
from graft.engine.memory.workload import Answers, Workload
from graft.methods._lora_family import LoraFamily
from graft.methods.base import FusedSize, Method
from graft.methods.peft import PeftMethod
from graft.recipe.sections import Recipe


class MemoryMoment(StrictModel):
    """A moment at which memory may be highest."""

    name: str
    """`loading`, `training step`, `checkpoint`, `evaluation`, `generation`."""
    parts: Listed[MemoryPart]
    """The largest comes first."""

    def total_bytes(self, place: Place, *, exclude: Iterable[str] = ()) -> int:
        """Sums its parts in one place."""
        left_out = set(exclude)
        return sum(p.size_bytes for p in self.parts if p.place == place and p.name not in left_out)


class MemoryEstimate(StrictModel):
    """What one worker of a run takes."""

    device: DeviceType
    workers: int
    """Workers of the run; each takes as much."""
    moments: Listed[MemoryMoment]

    @property
    def peak(self) -> MemoryMoment:
        """The moment at which most is taken on the device."""
        return max(self.moments, key=lambda moment: moment.total_bytes("device"))

    @property
    def parts(self) -> tuple[MemoryPart, ...]:
        """Of the peak, the largest first."""
        return self.peak.parts

    @property
    def device_bytes(self) -> int:
        """The most that a worker takes on its device; on a CPU that is the machine's memory."""
        return self.peak.total_bytes("device")

    @property
    def host_bytes(self) -> int:
        """The most that a worker takes of its host beside the device's memory; on a CPU nothing."""
        return max(moment.total_bytes("host") for moment in self.moments)

    @property
    def nvme_bytes(self) -> int:
        """The most that a worker takes on NVMe."""
        return max(moment.total_bytes("nvme") for moment in self.moments)

    def largest(self, count: int = 3) -> tuple[MemoryPart, ...]:
        """Returns the largest parts on the device at the peak."""
        return tuple(part for part in self.parts if part.place == "device")[:count]

    def in_words(self) -> str:
        """`6.1 GB in a training step: activations 3.2 GB, weights 1.9 GB, logits 700 MB`."""
        named = ", ".join(f"{p.name} {format_bytes(p.size_bytes)}" for p in self.largest())
        return f"{format_bytes(self.device_bytes)} ({self.peak.name}): {named}"


def predict_memory(
    recipe: Recipe,
    shape: ModelShape,
    device: DeviceType,
    *,
    work: Workload | None = None,
    slots: int = 1,
    threads: int | None = None,
) -> MemoryEstimate:
    """Predicts the memory of one worker of a run; nothing is loaded.

    Args:
        recipe: Complete.
        shape: Of its base.
        device: What it runs on; `model.device: auto` does not say.
        work: Its largest micro-batch; None takes what the recipe bounds.
        slots: Slots that train together on one base, each with this recipe.
        threads: Of a worker that `scale.threads` gives none; None means this process's.

    Raises:
        ConfigError: The method does not fit the base.
        ModelError: transformers cannot make such a base.
    """
    work = work or Workload.bound(recipe, slots, device=torch.device(device), threads=threads)
    standing = [*standing_parts(recipe, shape, device, slots), *process_parts(device)]
    setting = _setting(recipe, shape, device, min(slots, work.rows))
    highest = [
        [*standing, *_moving(recipe, shape, device, _in_lanes(parts, work), slots - setting.slots)]
        for parts in _step_peaks(_Keyed(shape), setting, work)
    ]
    moments = [
        _moment("loading", [*loading_parts(recipe, shape, device), *process_parts(device)]),
        max((_moment("training step", p) for p in highest), key=_on_device),
        _moment("checkpoint", [*standing, *checkpoint_copies(recipe, shape, device)]),
    ]
    for name, peaks in _without_gradients(recipe, shape, setting._replace(slots=1)).items():
        found = [_moment(name, [*standing, *_on_the_device(parts)]) for parts in peaks]
        moments.append(max(found, key=_on_device))
    return MemoryEstimate(device=device, workers=recipe.scale.min_workers, moments=tuple(moments))


def _without_gradients(
    recipe: Recipe, shape: ModelShape, setting: Setting
) -> dict[str, list[Parts]]:
    """Peaks of reading held-out rows, and of generating answers, where the recipe does either."""
    found = {}
    if any(part.section.eval for part in recipe.parts):
        found["evaluation"] = _reading_peaks(_Keyed(shape), setting, Workload.held_out(recipe))
    answers = Answers.bound(recipe)
    if answers is not None:
        found["generation"] = _answer_peaks(_Keyed(shape), setting, answers)
    return found


class _Keyed:
    """A shape that is remembered by what it is."""

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape

    def __hash__(self) -> int:
        return hash(self.shape.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Keyed) and other.shape.key == self.shape.key


@lru_cache(maxsize=512)
def _step_peaks(keyed: _Keyed, setting: Setting, work: Workload) -> list[Parts]:
    return step_peaks(keyed.shape, setting, work)


@lru_cache(maxsize=128)
def _reading_peaks(keyed: _Keyed, setting: Setting, work: Workload) -> list[Parts]:
    return reading_peaks(keyed.shape, setting, work)


@lru_cache(maxsize=128)
def _answer_peaks(keyed: _Keyed, setting: Setting, answers: Answers) -> list[Parts]:
    return answer_peaks(keyed.shape, setting, answers)


def _setting(recipe: Recipe, shape: ModelShape, device: DeviceType, slots: int) -> Setting:
    needs = {need for part in recipe.parts for need in part.objective.needs}
    train_free = recipe.model.model_copy(update={"source": "", "revision": None, "device": "auto"})
    return Setting(
        section=train_free,
        method=_stand_in(recipe.method, shape),
        device=device,
        checkpoints=recipe.scale.gradient_checkpointing,
        has_head="values" in needs,
        needs_entropy="entropy" in needs,
        slots=slots,
    )


def _stand_in(method: Method, shape: ModelShape) -> Method:
    """What the dry run puts on the base: the method itself, or what keeps about as much.

    A method that reaches into experts stands beside them: which of them a token takes is not known
    before it runs. Low-rank states of the few tokens of an expert are all that is left out.
    """
    if isinstance(method, PeftMethod):
        return STAND_IN
    if not isinstance(method, LoraFamily):
        return method
    # What changes no size would make another dry run for each of many trials.
    dropout = 0.5 if method.lora_dropout else 0.0
    method = method.model_copy(update={"lora_alpha": 1.0, "lora_dropout": dropout})
    sizes = [shape.linears[site.name] for site in method.sites(shape.linears)]
    if not any(isinstance(size, FusedSize) for size in sizes):
        return method
    return method.model_copy(update={"target_modules": "all-linear"})


def _moving(
    recipe: Recipe, shape: ModelShape, device: DeviceType, parts: Parts, elsewhere: int
) -> list[MemoryPart]:
    """What a step makes, its gradients divided as ZeRO divides them."""
    counted = parts["gradients"]
    if isinstance(recipe.method, PeftMethod):  # the dry run had a stand-in
        counted = number_bytes(recipe) * size_of(recipe, shape).trained
    gradients = divided_gradients(recipe, shape, device, counted, elsewhere)
    others = Parts({name: size for name, size in parts.items() if name != "gradients"})
    return [*_on_the_device(others), *gradients]


def _in_lanes(parts: Parts, work: Workload) -> Parts:
    """Each lane has all of its own, and gradients beside those that are summed up."""
    if work.lanes == 1:
        return parts
    found = Parts({name: work.lanes * size for name, size in parts.items()})
    found["gradients"] += parts["gradients"]
    return found


def _on_the_device(parts: Parts) -> list[MemoryPart]:
    return [MemoryPart(name=name, place="device", size_bytes=size) for name, size in parts.items()]


def _moment(name: str, parts: Iterable[MemoryPart]) -> MemoryMoment:
    found = sorted((part for part in parts if part.size_bytes), key=lambda part: -part.size_bytes)
    return MemoryMoment(name=name, parts=tuple(found))


def _on_device(moment: MemoryMoment) -> int:
    return moment.total_bytes("device")
