import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from graft.core.errors import ConfigError, TrainingError
from graft.engine.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from graft.engine.run_folder import read_progress, save_between_reports, save_progress
from graft.engine.train import SlotState
from graft.recipe.search import SearchObjective


def state_at(step: int) -> SlotState:
    weights = {"layer": {"A": torch.full((2, 3), float(step))}}
    moments = {"layer.A": {"step": torch.tensor(float(step)), "exp_avg": torch.ones(2, 3) * step}}
    return SlotState(step, weights, moments, {"ema": torch.ones(2)}, {})


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def truncate(folder: Path) -> None:
    file = folder / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def flip_a_bit(folder: Path) -> None:
    file = folder / "adapter.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def lose_a_file(folder: Path) -> None:
    (folder / "adapter.safetensors").unlink()


def forget_a_file(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["optimizer.safetensors"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def cut_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format": 1, "st')


def empty_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


def move(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "step": 1}))


DAMAGES = [
    truncate,
    flip_a_bit,
    lose_a_file,
    forget_a_file,
    cut_the_manifest,
    empty_the_manifest,
    move,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(
    damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(tmp_path, state_at(4), {"of": 4})
    damage(save_checkpoint(tmp_path, state_at(8), {"of": 8}))
    with caplog.at_level(logging.WARNING):
        found = newest_checkpoint(tmp_path)
    assert found is not None
    assert (found[0].step, found[1]) == (4, {"of": 4})
    assert torch.equal(found[0].tensors["layer"]["A"], torch.full((2, 3), 4.0))
    assert "passing over checkpoint" in caplog.text
    assert "step-00000008" in caplog.text


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_not_loaded_and_is_replaced_when_its_step_comes_again(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = save_checkpoint(tmp_path, state_at(4), {})
    damage(folder)
    with pytest.raises(TrainingError, match="step-00000004"):
        load_checkpoint(folder)
    save_checkpoint(tmp_path, state_at(4), {})
    assert load_checkpoint(folder)[0].step == 4


def test_where_all_are_damaged_training_does_not_start_over_unasked(tmp_path: Path) -> None:
    truncate(save_checkpoint(tmp_path, state_at(4), {}))
    flip_a_bit(save_checkpoint(tmp_path, state_at(8), {}))
    with pytest.raises(TrainingError, match=r"is whole .*step-00000008: .*truncated.*remove that"):
        newest_checkpoint(tmp_path)
    assert newest_checkpoint(tmp_path / "nothing") is None


def test_a_checkpoint_of_a_newer_format_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state_at(4), {})
    folder = save_checkpoint(tmp_path, state_at(8), {})
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(TrainingError, match="has format 2, this version of graft reads up to 1"):
        newest_checkpoint(tmp_path)


def test_a_checkpoint_of_another_base_is_refused_in_words(tmp_path: Path) -> None:
    save_progress(tmp_path, state_at(4), {"steps": 4, "seconds": 1.0}, {"base": "one"})
    with pytest.raises(ConfigError, match="base = 'one', this recipe has 'another'"):
        read_progress(tmp_path, {"base": "another"})


def test_the_newest_two_and_the_best_are_kept(tmp_path: Path) -> None:
    searched = SearchObjective(metric="eval/loss", mode="min")
    for step, loss in enumerate([3.0, 1.0, 2.0, 1.5, 4.0], start=1):
        report = {"steps": step, "seconds": 0.0, "eval/loss": loss}
        save_progress(tmp_path, state_at(step), report, {}, searched)
        assert len(names(tmp_path / "checkpoint")) <= 3
    kept = [f"step-0000000{step}" for step in (2, 4, 5)]
    assert names(tmp_path / "checkpoint") == kept
    searched = SearchObjective(metric="eval/loss", mode="max")
    for step, loss in ((6, 0.0), (7, 9.0), (8, 0.0), (9, 0.0)):
        report = {"steps": step, "seconds": 0.0, "eval/loss": loss}
        save_progress(tmp_path / "max", state_at(step), report, {}, searched)
    kept = [f"step-0000000{step}" for step in (7, 8, 9)]
    assert names(tmp_path / "max" / "checkpoint") == kept


def test_without_a_searched_metric_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in range(1, 5):
        save_checkpoint(tmp_path, state_at(step), {})
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


def test_what_a_crash_left_is_gone_after_the_next_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".step-00000002.tmp-12345678").mkdir()
    (tmp_path / ".step-00000002.tmp-12345678" / "adapter.safetensors").write_bytes(b"half")
    save_checkpoint(tmp_path, state_at(3), {})
    assert names(tmp_path) == ["step-00000003"]


def test_checkpoints_past_a_damaged_one_do_not_come_back(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state_at(4), {})
    truncate(save_checkpoint(tmp_path, state_at(8), {}))
    save_checkpoint(tmp_path, state_at(6), {})
    assert names(tmp_path) == ["step-00000004", "step-00000006"]


def test_a_run_that_left_between_reports_tells_what_its_window_held(tmp_path: Path) -> None:
    from graft.engine.train import StepReport

    step = StepReport(
        step=5,
        loss=0.25,
        lr=1e-3,
        grad_norm=1.0,
        num_tokens=3,
        num_supervised_tokens=2,
        seconds=0.5,
        is_finite=True,
        is_finished=False,
        figures={"reward": 1.0},
    )
    report = {"steps": 4, "seconds": 2.5, "tokens": 12}
    save_between_reports(tmp_path, state_at(5), report, [step], {"base": "one"})
    found = read_progress(tmp_path, {"base": "one"})
    assert found is not None
    assert (found.state.step, found.report, found.window) == (5, report, [step])


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that stops a process at its write points."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp("shim") / "write_points.so"
    source = Path(__file__).with_name("write_points.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


def test_progress_stopped_at_any_write_point_is_resumed_with_one_interval_lost_at_most(
    shim: Path, tmp_path: Path
) -> None:
    script = Path(__file__).with_name("write_points.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path],
        env={**os.environ, "LD_PRELOAD": str(shim), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    met = json.loads(done.stdout)
    assert len(met) > 30
    assert {"create", "write", "fsync", "mkdir", "rename", "unlinkat"} <= set(met)


SAVE_FOR_EVER = """
import sys
from itertools import count
from pathlib import Path
from tests.unit.engine.test_checkpoint import state_at
from graft.engine.run_folder import save_progress
for step in count(1):
    report = {"steps": step, "seconds": 0.0}
    save_progress(Path(sys.argv[1]), state_at(step), report, {})
    print(step, flush=True)
"""


def test_a_run_killed_while_it_saves_comes_back_where_it_last_said_it_was(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    with subprocess.Popen(
        [sys.executable, "-c", SAVE_FOR_EVER, tmp_path], stdout=subprocess.PIPE, cwd=root
    ) as saver:
        assert saver.stdout is not None
        told = 0
        while told < 20:
            told = int(saver.stdout.readline())
        saver.send_signal(signal.SIGKILL)
        told = int([b"20", *saver.stdout.read().split()][-1])
    found = read_progress(tmp_path, {})
    assert found is not None
    assert found.state.step in (told, told + 1)
