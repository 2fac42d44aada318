"""DeepSpeed's CPU Adam is really built, once; a training process then needs no compiler."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from graft.engine.backends import ops

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEP = """
import torch
from graft.engine.backends import ops
ops.import_deepspeed()
ops.load_ops(("cpu_adam",))
from deepspeed.ops.adam import DeepSpeedCPUAdam
weight = torch.nn.Parameter(torch.ones(1000))
theirs = torch.nn.Parameter(torch.ones(1000))
gradient = torch.linspace(-1, 1, 1000)
for parameter, optimizer in ((weight, DeepSpeedCPUAdam), (theirs, torch.optim.AdamW)):
    parameter.grad = gradient.clone()
    optimizer([parameter], lr=0.1, weight_decay=0.1).step()
torch.testing.assert_close(weight, theirs, rtol=1e-5, atol=1e-6)
"""


def test_a_killed_build_does_not_stop_the_next_and_workers_then_compile_nothing(
    tmp_path: Path,
) -> None:
    folder = ops.ops_folder()
    if not ops.is_built("cpu_adam"):
        code = "from graft.engine.backends.ops import build_ops; build_ops(('cpu_adam',))"
        first = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (folder / "cpu_adam" / "lock").exists() and time.monotonic() < deadline:
            assert first.poll() is None
            time.sleep(0.2)
        first.kill()
        first.wait()
        assert (folder / "cpu_adam" / "lock").exists()
        ops.build_ops(("cpu_adam",))
    assert ops.is_built("cpu_adam")
    started = time.monotonic()
    ops.build_ops(("cpu_adam",))
    assert time.monotonic() - started < 1.0, "what is built is not built again"
    environment = {"PATH": "/nowhere", "HOME": str(Path.home()), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", STEP],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
