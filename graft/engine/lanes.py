"""Work side by side on a CPU: a lane is a thread with its share of the cores.

Two threads on one small product wait for each other more than they compute; two products with a
thread each do not. Gradients are added in the order of the micro-batches, so that the threads'
order changes nothing.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from graft.engine.multi.attention import attention_kernel, keep_attention_kernel

_MIN_TOKENS = 64
"""Tokens of a micro-batch; the products of fewer are too small to be worth a lane."""
_MAX_LANES = 4
"""More threads in Python wait for one another."""

Told = TypeVar("Told")
Loss = Callable[[], tuple[torch.Tensor, Told]]
"""Runs one micro-batch: its loss, and whatever else is known of it."""


class Lanes(NamedTuple):
    """How a step's rows are divided."""

    number: int
    """Micro-batches that run at once."""
    max_tokens: int
    """Padded tokens of one."""


def num_lanes(device: torch.device, most: int, threads: int | None = None) -> int:
    """Returns how many lanes there are for work of `most` parts; a GPU has one.

    Args:
        device: Of the base.
        most: So many parts.
        threads: Of the process that works; None means this one's.
    """
    if device.type != "cpu":
        return 1
    return max(1, min(threads or torch.get_num_threads(), _MAX_LANES, most))


def divide(
    num_tokens: int, max_tokens: int, device: torch.device, threads: int | None = None
) -> Lanes:
    """Divides a step's rows into equal micro-batches for all lanes.

    Args:
        num_tokens: Of all rows of the step.
        max_tokens: Padded tokens of all micro-batches that run at once; bounds memory.
        device: Of the base; a GPU has one lane.
        threads: Of the process that trains; None means this one's.
    """
    most = num_lanes(device, num_tokens // _MIN_TOKENS, threads)
    if most == 1:
        return Lanes(1, max_tokens)
    padded = 1.05 * num_tokens
    rounds = math.ceil(padded / max_tokens)
    return Lanes(most, math.ceil(padded / (rounds * most)))


def run_in_lanes(
    losses: Sequence[Loss[Told]],
    parameters: Sequence[nn.Parameter],
    *,
    lanes: int,
    longest: int,
) -> Iterator[Told]:
    """Adds every loss's gradients to the parameters' `.grad`; yields what is told, in order.

    Args:
        losses: One a micro-batch, independent of one another.
        parameters: That take gradients.
        lanes: Micro-batches that run at once.
        longest: Tokens of the longest row: one attention kernel has to suit all.
    """

    def work(loss_of: Loss[Told]) -> tuple[tuple[torch.Tensor | None, ...], Told]:
        with keep_attention_kernel():
            loss, told = loss_of()
            return torch.autograd.grad(loss, parameters, allow_unused=True), told

    with attention_kernel(longest, parameters[0].device), _threads_of(lanes) as pool:
        running = deque(pool.submit(work, loss) for loss in losses)
        try:
            while running:
                gradients, told = running.popleft().result()
                _add(parameters, gradients)
                yield told
        finally:
            _await_rest(running)


def in_lanes(work: Sequence[Callable[[], Told]]) -> list[Told]:
    """Does several things at once, a lane each; returns what they give, in order.

    One alone has all cores, and is done by the calling thread.
    """
    if len(work) < 2:
        return [one() for one in work]
    with _threads_of(len(work)) as pool:
        running = [pool.submit(one) for one in work]
        try:
            return [future.result() for future in running]
        finally:
            _await_rest(running)


def _await_rest(running: Iterable[Future[Any]]) -> None:
    """Lets nothing go on behind the back of whoever was told of a failure."""
    wait([future for future in running if not future.cancel()])


def _add(parameters: Sequence[nn.Parameter], gradients: Sequence[torch.Tensor | None]) -> None:
    taken: set[int] = set()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        if parameter.grad is not None:
            parameter.grad.add_(gradient)
        elif _is_its_own(gradient, parameter) and gradient.data_ptr() not in taken:
            taken.add(gradient.data_ptr())
            parameter.grad = gradient
        else:
            # A copy in the parameter's own layout, which fused optimizers count on.
            parameter.grad = torch.empty_like(parameter).copy_(gradient)


def _is_its_own(gradient: torch.Tensor, parameter: nn.Parameter) -> bool:
    """Tells whether it is all of its memory, as the parameter lies: it may be kept and added to."""
    is_alike = gradient.dtype == parameter.dtype and gradient.stride() == parameter.stride()
    return is_alike and gradient.untyped_storage().nbytes() == gradient.nbytes


@contextmanager
def _threads_of(lanes: int) -> Iterator[ThreadPoolExecutor]:
    """Divides torch's threads between lanes for as long as it lasts."""
    threads = torch.get_num_threads()
    each = max(1, threads // lanes)
    # Some kernels take the number of the process, others that of the calling thread.
    torch.set_num_threads(each)
    try:
        yield _pool(lanes, each, os.getpid())
    finally:
        torch.set_num_threads(threads)


@cache
def _pool(lanes: int, threads: int, process: int) -> ThreadPoolExecutor:
    """The lanes of a process; they stay, for what a thread's allocator keeps ends up unused.

    Args:
        lanes: How many.
        threads: Of each.
        process: Whose; a fork has no threads of its parent.
    """
    return ThreadPoolExecutor(lanes, "lane", initializer=torch.set_num_threads, initargs=(threads,))
