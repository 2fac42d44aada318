"""Micro-batches side by side on a CPU: a lane is a thread with its share of the cores.

Two threads on one small product wait for each other more than they compute; two products with a
thread each do not. Gradients are added in the order of the micro-batches, so that the threads'
order changes nothing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

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


def divide(num_tokens: int, max_tokens: int, device: torch.device) -> Lanes:
    """Divides a step's rows into equal micro-batches for all lanes.

    Args:
        num_tokens: Of all rows of the step.
        max_tokens: Padded tokens of all micro-batches that run at once; bounds memory.
        device: Of the base; a GPU has one lane.
    """
    most = min(torch.get_num_threads(), _MAX_LANES, num_tokens // _MIN_TOKENS)
    if device.type != "cpu" or most < 2:
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
        while running:
            gradients, told = running.popleft().result()
            _add(parameters, gradients)
            yield told


def _add(parameters: Sequence[nn.Parameter], gradients: Sequence[torch.Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        if parameter.grad is None:
            # A copy in the parameter's own layout, which fused optimizers count on.
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        else:
            parameter.grad.add_(gradient)


@contextmanager
def _threads_of(lanes: int) -> Iterator[ThreadPoolExecutor]:
    """Divides torch's threads between lanes for as long as it lasts."""
    threads = torch.get_num_threads()
    each = max(1, threads // lanes)
    # Some kernels take the number of the process, others that of the calling thread.
    torch.set_num_threads(each)
    pool = ThreadPoolExecutor(lanes, "lane", initializer=torch.set_num_threads, initargs=(each,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
