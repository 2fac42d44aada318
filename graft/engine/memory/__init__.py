"""How much memory a recipe takes, and what hardware has, told before anything is loaded."""

from graft.engine.memory.estimate import MemoryEstimate, MemoryMoment, predict_memory
from graft.engine.memory.hardware import GPUS, Gpu, Hardware, parse_hardware
from graft.engine.memory.shape import ModelShape
from graft.engine.memory.standing import MemoryPart
from graft.engine.memory.workload import Workload

__all__ = [
    "GPUS",
    "Gpu",
    "Hardware",
    "MemoryEstimate",
    "MemoryMoment",
    "MemoryPart",
    "ModelShape",
    "Workload",
    "parse_hardware",
    "predict_memory",
]
