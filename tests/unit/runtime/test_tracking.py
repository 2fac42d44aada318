"""Where trials are tracked beside the study."""

from __future__ import annotations

from pathlib import Path

import pytest

from graft.core.errors import ConfigError
from graft.recipe.operation import TrackSection
from graft.runtime.tracking import log_in


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
