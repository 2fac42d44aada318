"""Where trials are tracked beside the study."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb

from graft.core.errors import ConfigError
from graft.core.progress import Progress
from graft.recipe.operation import TrackSection
from graft.runtime import tracking
from graft.runtime.tracking import WandbTracker, log_in
from tests.unit.runtime.test_study import Grid, opened


class Notes(Progress):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def test_runs_that_cannot_be_sent_are_refused_before_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"track\.wandb: online: .*wandb login"):
        log_in(TrackSection(wandb="online"))


def test_runs_that_stay_here_need_no_key() -> None:
    log_in(TrackSection(wandb="offline"))


def test_a_search_outlives_its_way_to_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    wandb.teardown()  # it reads the environment once
    monkeypatch.setattr(tracking, "log_in", lambda section: None)  # it was there at the start
    progress = Notes()
    with opened(tmp_path) as study:
        tracker = WandbTracker(study, TrackSection(wandb="online"), progress)
        for _ in range(2):
            asked = study.ask(Grid())
            assert asked is not None
            trial = SimpleNamespace(config={"trial": asked.number, "params": asked.params})
            tracker.log_trial_start(trial)
            tracker.log_trial_result(1, trial, {"steps": 4, "train/loss": 1.0})
            study.tell(asked.number, "complete")
            tracker.log_trial_end(trial)
        runs = {path.stem for path in (study.folder / "wandb").rglob("*.wandb")}
    assert {"run-study-0-offline", "run-study-1"} <= runs
    assert len(progress.said) == 1
    assert "wandb sync" in progress.said[0]
    wandb.teardown()
