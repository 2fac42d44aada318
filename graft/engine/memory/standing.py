"""What stands still while a recipe trains, counted from shapes, as torch or ZeRO divides it.

With n trained numbers and W workers, in bytes of one worker, fp32 training with Adam (16 n in all):

    ZeRO stage        0        1          2          3
    weights           4 n      4 n        4 n        4 n / W
    gradients         4 n      4 n        4 n / W    4 n / W
    moments           8 n      8 n / W    8 n / W    8 n / W

DeepSpeed's stages 1 and 2 keep a second copy of a worker's own weights, `4 n / W`, and all stages
from 1 on a buffer in which gradients are reduced. Stage 3 divides the frozen base too and gathers
layers as they are used, so many at a time (`graft.engine.backends.buckets`).

Reference:
    ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, arXiv 1910.02054, figure
    1; ZeRO-Offload, arXiv 2101.06840; ZeRO-Infinity, arXiv 2104.07857; buffers as DeepSpeed's
    documentation of `zero_optimization` and its source have them.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from graft.core.errors import ConfigError
from graft.core.model import StrictModel
from graft.engine.backends.buckets import max_live, reduce_bucket
from graft.engine.memory.peft_size import STAND_IN, peft_size
from graft.engine.memory.shape import ModelShape
from graft.engine.memory.stand_ins import DeviceType
from graft.methods._own_weights import OwnWeightsMethod
from graft.methods.base import Method
from graft.methods.layerwise import LayerMethod
from graft.methods.peft import PeftMethod
from graft.methods.virtual import VirtualMethod
from graft.methods.whole import WholeMethod
from graft.models import torch_dtype
from graft.recipe.sections import Recipe

Place = Literal["device", "host", "nvme"]

_REDUCED_WHOLE = 500_000_000
"""Numbers that workers reduce at once where ZeRO divides nothing."""
_SUB_GROUP = 1_000_000_000
_OPTIMIZER_BUFFERS = 4
_PARAM_BUFFERS, _LAYER_BUFFERS = 5, 24
"""Of weights that are swapped in; a layer that is computed again takes its own all at once."""
_MOMENT_BLOCK = 256
_CUDA_CONTEXT = 500_000_000
"""Of the driver and of loaded kernels; it lies outside of torch's allocator."""
_CUBLAS_WORKSPACE = 32 << 20
_KERNELS = 12_000_000
"""What oneDNN compiles and keeps for bf16 products of a model's shapes (measured, to 15 MB)."""
_PROCESS = 600_000_000
"""An interpreter that has imported torch and transformers."""


class MemoryPart(StrictModel):
    """A part of what a run takes."""

    name: str
    place: Place
    size_bytes: int


class AdapterSize(NamedTuple):
    """Numbers of a slot."""

    trained: int
    frozen: int
    largest: int
    """Of the largest trained tensor."""


def adapter_size(shape: ModelShape, method: Method, *, has_head: bool = False) -> AdapterSize:
    """Counts the numbers of one slot, from the method's own shapes.

    Raises:
        ConfigError: The method does not fit the base.
    """
    trained: list[int] = []
    frozen: list[int] = []
    head = shape.base_shape.hidden_size if has_head else 0
    if isinstance(method, PeftMethod):
        found = peft_size(shape, method) or adapter_size(shape, STAND_IN)
        return AdapterSize(found.trained + head, found.frozen, max(found.largest, head))
    if isinstance(method, LayerMethod):
        of_sites = [method.shapes(site) for site in method.sites(shape.linears)]
    elif isinstance(method, VirtualMethod):
        of_sites = [method.shapes(shape.base_shape)]
    elif isinstance(method, OwnWeightsMethod):
        of_sites = [dict(shape.parameters)]
    else:
        raise ConfigError(f"method {method.type!r} has no place on a base")
    for of_site in of_sites:
        for name, size in of_site.items():
            (frozen if name in method.frozen else trained).append(math.prod(size))
    if has_head:
        trained.append(head)
    return AdapterSize(sum(trained), sum(frozen), max(trained, default=0))


def size_of(recipe: Recipe, shape: ModelShape) -> AdapterSize:
    """Counts the numbers of a recipe's slot, with its head where the objective has one."""
    has_head = any("values" in part.objective.needs for part in recipe.parts)
    return adapter_size(shape, recipe.method, has_head=has_head)


def number_bytes(recipe: Recipe) -> int:
    """Of a trained number: 4, or 8 on an fp64 base."""
    return max(4, torch_dtype(recipe.model).itemsize)


class _Parts:
    """Parts in the making; a CPU's device is the host itself."""

    def __init__(self, device: DeviceType) -> None:
        self.parts: list[MemoryPart] = []
        self._host: Place = "device" if device == "cpu" else "host"

    def add(self, name: str, place: Place, size: float) -> None:
        place = self._host if place == "host" else place
        self.parts.append(MemoryPart(name=name, place=place, size_bytes=math.ceil(size)))


def standing_parts(
    recipe: Recipe, shape: ModelShape, device: DeviceType, slots: int
) -> list[MemoryPart]:
    """Returns weights, adapter, optimizer and the buffers of ZeRO, of one worker."""
    found = _Parts(device)
    size, each = size_of(recipe, shape), number_bytes(recipe)
    base = shape.weight_bytes(recipe.model)
    is_whole = isinstance(recipe.method, OwnWeightsMethod)
    scale = recipe.scale
    own = slots * each * (size.trained + size.frozen)
    share = scale.min_workers if scale.zero_stage == 3 else 1
    weights = own if is_whole else sum(base)
    offloaded: Place = "device"
    if scale.offload.parameters != "none":
        offloaded = "nvme" if scale.offload.parameters == "nvme" else "host"
    found.add("weights", offloaded, (weights if is_whole else base.weights) / share)
    found.add("quantization constants", "device", 0 if is_whole else base.constants)
    if not is_whole:
        found.add("adapter", "device", own / share)
    if device == "cpu" and recipe.model.dtype == "bf16":
        found.add("compiled kernels", "device", _KERNELS)
    if recipe.needs_reference:
        kept_adapter = own if recipe.train.init_from is not None else 0
        copied = sum(base) if isinstance(recipe.method, WholeMethod) else 0
        found.add("reference", "device", copied + (0 if is_whole else kept_adapter))
    if scale.zero_stage:
        largest = max(math.prod(of) for of in shape.parameters.values())
        _add_zero(found, recipe, size, device, largest * torch_dtype(recipe.model).itemsize)
    else:
        _add_moments(found, recipe, slots * size.trained)
        if scale.max_workers > 1:
            found.add("ZeRO buffers", "device", each * min(size.trained, _REDUCED_WHOLE))
    if scale.zero_stage == 3:
        gathered = weights * min(1.0, max_live(shape.num_parameters) / shape.num_parameters)
        found.add("gathered weights", "device", gathered * (1 - 1 / share if share > 1 else 0))
        if offloaded != "device":
            found.add("gathered weights", "device", gathered / share)
    return found.parts


def _add_moments(found: _Parts, recipe: Recipe, count: int) -> None:
    """Adam's two numbers a weight; in 8 bits with a constant a block, or in pages of the host."""
    kind = recipe.train.optimizer
    of_number = 1 + 4 / _MOMENT_BLOCK if kind.endswith("8bit") else number_bytes(recipe)
    place: Place = "host" if kind.startswith("paged") else "device"
    found.add("optimizer", place, 2 * of_number * count)


def _add_zero(
    found: _Parts, recipe: Recipe, size: AdapterSize, device: DeviceType, largest_bytes: int
) -> None:
    """Optimizer and buffers of ZeRO 1 to 3; DeepSpeed trains in fp32, one slot."""
    scale, own = recipe.scale, size.trained / recipe.scale.min_workers
    place: Place = "device"
    if scale.offload.optimizer != "none":
        place = "nvme" if scale.offload.optimizer == "nvme" else "host"
    found.add("optimizer", place, 8 * own)
    if scale.zero_stage < 3 or place != "device":
        found.add("ZeRO copy of own weights", place, 4 * own)
    if place == "nvme":
        found.add("ZeRO buffers", "host", _OPTIMIZER_BUFFERS * 4 * min(own, _SUB_GROUP))
    if place == "host" and scale.zero_stage < 3:
        found.add("ZeRO buffers", "host", 4 * own + 4 * size.largest)
        found.add("ZeRO buffers", "device", 4 * size.largest)
    if scale.offload.parameters == "nvme":
        count = _LAYER_BUFFERS if scale.gradient_checkpointing else _PARAM_BUFFERS
        found.add("ZeRO buffers", "host", count * largest_bytes / scale.min_workers)
    # A CPU gives a page when it is first written to, so only what is used of a buffer counts.
    bucket = reduce_bucket(size.trained)
    bucket = bucket if device == "cuda" else min(size.trained, bucket)
    found.add("ZeRO buffers", "device", 4 * bucket)


def divided_gradients(
    recipe: Recipe, shape: ModelShape, device: DeviceType, counted: int, slots_elsewhere: int
) -> list[MemoryPart]:
    """Returns gradients of one worker.

    Args:
        recipe: Complete.
        shape: Of its base.
        device: What it runs on.
        counted: Bytes that a dry run counted, undivided.
        slots_elsewhere: Slots in other micro-batches of the step, whose gradients stand too.
    """
    found = _Parts(device)
    whole = number_bytes(recipe) * size_of(recipe, shape).trained
    if recipe.scale.zero_stage < 2:
        found.add("gradients", "device", counted + slots_elsewhere * whole)
        return found.parts
    place: Place = "device" if recipe.scale.offload.optimizer == "none" else "host"
    found.add("gradients", place, whole / recipe.scale.min_workers)
    return found.parts


def checkpoint_copies(recipe: Recipe, shape: ModelShape, device: DeviceType) -> list[MemoryPart]:
    """Returns the copies of weights and moments that a checkpoint is written from, on the host."""
    found = _Parts(device)
    size = size_of(recipe, shape)
    copied = number_bytes(recipe) * (3 * size.trained + size.frozen)
    found.add("checkpoint copies", "host", copied)
    return found.parts


def loading_parts(recipe: Recipe, shape: ModelShape, device: DeviceType) -> list[MemoryPart]:
    """Returns what is there while the base is read, whole in every worker.

    Files are mapped into memory. Where the base is of their dtype, weights on a CPU are those very
    pages; else both are there for a while, though the system may take back the file's.
    """
    found = _Parts(device)
    base = shape.weight_bytes(recipe.model)
    found.add("weights", "device", base.weights)
    found.add("quantization constants", "device", base.constants)
    wanted = torch_dtype(recipe.model)
    is_as_in_files = (shape.config.dtype or wanted) == wanted
    is_own = device == "cpu" and is_as_in_files and recipe.model.quantization.type == "none"
    found.add("mapped files", "host", 0 if is_own else shape.file_bytes)
    return found.parts


def process_parts(device: DeviceType) -> list[MemoryPart]:
    """Returns what programs and libraries take themselves, without which nothing runs."""
    found = _Parts(device)
    if device == "cuda":
        found.add("CUDA context", "device", _CUDA_CONTEXT + _CUBLAS_WORKSPACE)
    found.add("process", "host", _PROCESS)
    return found.parts
