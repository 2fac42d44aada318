"""DeepSpeed's ops: locks of killed builds are told from living ones; training compiles nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from graft.core.errors import MissingDependencyError
from graft.engine.backends import ops
from graft.recipe.sections import ScaleSection

HOLD = "import sys, time; file = open(sys.argv[1], 'w'); print('held', flush=True); time.sleep(60)"


@pytest.fixture(autouse=True)
def extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of compiled extensions."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path


def lock_in(folder: Path) -> Path:
    """A lock as torch's builds leave it."""
    folder.mkdir(parents=True)
    lock = folder / "lock"
    lock.touch()
    return lock


def test_an_own_lock_is_stale_as_soon_as_its_build_is_gone() -> None:
    lock = lock_in(ops.ops_folder() / "cpu_adam")
    process = subprocess.Popen([sys.executable, "-c", HOLD, lock], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert ops.stale_locks() == []
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert ops.stale_locks() == [lock]
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    assert ops.clear_stale_locks() == [lock]
    assert not lock.exists()


def test_a_compiler_that_works_in_the_folder_keeps_its_lock() -> None:
    lock = lock_in(ops.ops_folder() / "cpu_adam")
    process = subprocess.Popen(["sleep", "60"], cwd=lock.parent)
    try:
        assert ops.stale_locks() == []
    finally:
        process.kill()
        process.wait()


def test_a_lock_of_others_is_stale_only_after_twenty_minutes_of_silence(extensions: Path) -> None:
    lock = lock_in(extensions / "py311_cpu" / "theirs")
    assert ops.stale_locks() == []
    long_ago = time.time() - 1300
    os.utime(lock, (long_ago, long_ago))
    assert ops.stale_locks() == [lock]
    (lock.parent / "half.o").touch()
    assert ops.stale_locks() == []


def test_training_with_an_op_that_is_not_built_is_refused_and_compiles_nothing(
    extensions: Path,
) -> None:
    scale = ScaleSection.model_validate({"zero_stage": 2, "offload": {"optimizer": "cpu"}})
    with pytest.raises(MissingDependencyError, match="graft doctor --build-ops"):
        ops.load_ops(ops.ops_of(scale))
    assert list(extensions.rglob("*")) == []


def test_a_run_asks_for_the_ops_that_its_offload_calls() -> None:
    def of(stage: int, **offload: str) -> tuple[str, ...]:
        return ops.ops_of(
            ScaleSection.model_validate({"zero_stage": stage, "offload": {**offload}})
        )

    assert of(0) == of(3) == of(3, parameters="cpu") == ()
    assert of(2, optimizer="cpu") == ("cpu_adam",)
    assert of(3, parameters="nvme", nvme_path="/fast") == ("pin_memory", "async_io")
    assert of(3, optimizer="nvme", nvme_path="/fast") == ops.OPS


def test_without_a_compiler_the_build_is_refused_before_it_begins(
    extensions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingDependencyError, match=r"C\+\+ compiler; install g\+\+"):
        ops.build_ops(("cpu_adam",))
    assert list(extensions.rglob("*")) == []


def test_a_library_of_another_surrounding_does_not_count_as_built(extensions: Path) -> None:
    elsewhere = extensions / "graft-000000000000"
    elsewhere.mkdir()
    (elsewhere / "cpu_adam.json").write_text('{"module": "cpu_adam", "library": "/bin/true"}')
    assert not ops.is_built("cpu_adam")
