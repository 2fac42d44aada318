"""Telling that a process ran out of memory, and how much it had asked for."""

from __future__ import annotations

import re
import resource
import sys

import torch

from graft.core.sizes import parse_bytes

_TRIED = re.compile(r"tried to allocate ([\d.]+ ?\w+)", re.IGNORECASE)
_WORDS = (
    "can't allocate memory",  # torch on a CPU
    "CUDA error: out of memory",
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUSPARSE_STATUS_ALLOC_FAILED",
    "cudaErrorMemoryAllocation",
)
"""Of errors that are no class of their own."""


def exhausted_bytes(error: BaseException) -> int | None:
    """Returns the memory that a process needed at least when it ran out; None where it did not.

    What had been the most in use, and what was asked for on top; of the process's own GPU, or of
    the host where it uses none.
    """
    words = str(error)
    is_allocator = isinstance(error, torch.OutOfMemoryError | MemoryError)
    is_told = isinstance(error, RuntimeError) and any(known in words for known in _WORDS)
    if not is_allocator and not is_told:
        return None
    match = _TRIED.search(words)
    tried = parse_bytes(match[1]) if match else 0
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() + tried
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit + tried
