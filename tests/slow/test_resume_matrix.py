"""A run saved under one division of work goes on under any other as if it had never stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from graft.engine.backends.ops import build_ops, obstacle
from tests.slow.test_zero_stages import deepspeed_run, losses_and_weights, torch_run
from tests.slow.zero_worker import STEPS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def moments_on_the_host(folder: Path, until: int) -> None:
    """Two workers under ZeRO-1 that keep the optimizer's state on the CPU."""
    if reason := obstacle("cpu_adam"):
        pytest.skip(reason)
    build_ops(["cpu_adam"])
    deepspeed_run(folder, workers=2, stage=1, until=until, offload="cpu")


DIVISIONS: dict[str, Callable[[Path, int], None]] = {
    "two workers, ZeRO-2": lambda folder, until: deepspeed_run(
        folder, workers=2, stage=2, until=until
    ),
    "one process, torch": torch_run,
    "two workers, ZeRO-3": lambda folder, until: deepspeed_run(
        folder, workers=2, stage=3, until=until
    ),
    "two workers, ZeRO-1, optimizer on the CPU": moments_on_the_host,
}
HOME, *OTHERS = DIVISIONS


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run at home that nobody stopped."""
    folder = tmp_path_factory.mktemp("unbroken")
    DIVISIONS[HOME](folder, STEPS)
    return folder


def assert_goes_on_as_if_never_stopped(folder: Path, unbroken: Path) -> None:
    given, weights = losses_and_weights(folder)
    expected, expected_weights = losses_and_weights(unbroken)
    assert [row[0] for row in given] == list(range(1, STEPS + 1))
    assert [row[1] for row in given] == pytest.approx([row[1] for row in expected], abs=1e-4)
    for key, value in expected_weights.items():
        torch.testing.assert_close(weights[key], value, atol=1e-4, rtol=0)


@pytest.mark.parametrize("other", OTHERS)
def test_what_two_workers_under_zero_2_saved_goes_on_elsewhere_and_comes_back(
    other: str, tmp_path: Path, unbroken: Path
) -> None:
    DIVISIONS[HOME](tmp_path, 3)
    DIVISIONS[other](tmp_path, 6)
    DIVISIONS[HOME](tmp_path, STEPS)
    assert_goes_on_as_if_never_stopped(tmp_path, unbroken)
