from __future__ import annotations

import json
import os
import time

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from graft.cli.console import verb
from graft.cli.options import AsJson
from graft.cli.progress import BarProgress, LineProgress, format_duration, format_fields
from graft.core.errors import (
    ConfigError,
    GateRefusedError,
    GraftError,
    StoppedError,
    TrainingError,
)
from graft.core.model import StrictModel
from graft.core.progress import QUIET


class Sum(StrictModel):
    total: int


class RemoteError(Exception):
    """As Ray wraps what a task raised."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("a remote traceback")
        self.cause = cause


def run(raised: BaseException | None = None, *args: str, refusal: str | GraftError | None = None):  # type: ignore[no-untyped-def]
    def show(record: Sum, console: Console) -> None:
        console.print(f"the sum is [bold]{record.total}")

    @verb(show, refusal=lambda record: refusal)
    def command(as_json: AsJson = False) -> Sum:
        """Add."""
        print("chatter")
        os.write(1, b"native chatter\n")
        if raised is not None:
            raise raised
        return Sum(total=3)

    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, list(args))


def test_a_record_is_shown_to_people_and_text_is_taken_literally() -> None:
    done = run()
    assert done.exit_code == 0
    assert done.stdout.endswith("the sum is [bold]3\n")


def test_json_is_alone_on_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    done = run(None, "--json")
    assert json.loads(done.stdout) == {"total": 3}
    assert "native chatter" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ConfigError("train.lr: wrong"), 2, "error: train.lr: wrong"),
        (TrainingError("loss is NaN"), 1, "error: loss is NaN"),
        (GateRefusedError("worse by 0.1"), 3, "refused: worse by 0.1"),
        (RemoteError(ConfigError("far away")), 2, "error: far away"),
        (ZeroDivisionError("oh"), 1, "error: ZeroDivisionError: oh"),
        (StoppedError("a person stopped it"), 130, "a person stopped it"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_each_kind_of_error_has_its_exit_code(error: BaseException, code: int, words: str) -> None:
    done = run(error)
    assert done.exit_code == code
    assert words in done.stderr
    assert ("Traceback" in done.stderr) == isinstance(error, ZeroDivisionError)


def test_a_refusal_comes_after_the_record() -> None:
    done = run(None, "--json", refusal="agreement 0.9 is below 0.98")
    assert done.exit_code == 3
    assert json.loads(done.stdout) == {"total": 3}
    assert "refused: agreement 0.9 is below 0.98" in done.stderr
    assert run(None, refusal=ConfigError("broken: home")).exit_code == 2


def test_lines_are_written_now_and_then_with_fields_and_time_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console = Console(width=200)
    with LineProgress(console, interval_s=0.0).task("train", total=4) as task:
        time.sleep(0.01)
        task.advance(1, loss=0.51234, phase="warm-up")
        task.advance(1, loss=0.4)
    task.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("train: 1/4 step  loss 0.5123  phase warm-up  0:00 elapsed")
    assert "left" not in lines[0], "the first may be what was done before"
    assert lines[1].endswith(" left")
    assert lines[-1].startswith("train: 2/4 step  loss 0.4")
    assert len(lines) == 3
    with LineProgress(console).task("quick", total=2) as quiet:
        quiet.advance(2)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_what_is_left_is_told_by_what_is_done_here(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(width=200)
    with LineProgress(console, interval_s=0.0).task("train", total=1000) as task:
        task.advance(900)  # by an earlier process
        started = time.monotonic()
        time.sleep(0.1)
        task.advance(1)
        waited_s = time.monotonic() - started
    lines = capsys.readouterr().out.splitlines()
    minutes, seconds = map(int, lines[1].split()[-2].split(":"))
    assert 9 <= 60 * minutes + seconds < 60 + 99 * waited_s, "99 steps of a tenth and more"


def test_bars_nest_and_end_with_the_last_task(capsys: pytest.CaptureFixture[str]) -> None:
    progress = BarProgress(Console(force_terminal=True, width=120, highlight=False))
    with progress.task("search", total=2, unit="trial") as outer:
        with progress.task("train", total=None) as inner:
            inner.advance(3, loss=0.25)
        progress.note("trial 0 ended [early]")
        outer.advance(1)
    with progress.task("again") as later:
        later.advance()
    text = capsys.readouterr().out
    assert "3 step" in text
    assert "1/2 trial" in text
    assert "loss 0.25" in text
    assert "trial 0 ended [early]" in text


def test_a_table_changes_in_place_above_the_bars(capsys: pytest.CaptureFixture[str]) -> None:
    progress = BarProgress(Console(force_terminal=True, width=120, highlight=False))
    table = progress.table("study tiny")
    with progress.task("search", total=2, unit="trial") as whole:
        table.update(["trial", "eval/loss"], [["0", "0.9"], ["*1", "0.3 [b]"]], 1)
        whole.advance(1)
    table.close()
    table.close()
    with progress.task("again") as later:
        later.advance()
    shown = capsys.readouterr().out
    assert "study tiny" in shown
    assert "\x1b[1m" in shown
    last = shown[: shown.index("again")]
    assert last.rindex("0.3 [b]") < last.rindex("1/2 trial")
    assert LineProgress(Console()).table("study tiny") is None


def test_durations_and_fields_are_short() -> None:
    assert [format_duration(s) for s in (9, 309, 3909)] == ["0:09", "5:09", "1:05:09"]
    assert (
        format_fields({"loss": 0.123456, "step": 7, "note": "ok"}) == "loss 0.1235  step 7  note ok"
    )


def test_the_silent_progress_takes_everything() -> None:
    with QUIET.task("x", total=3) as task:
        task.advance(1, loss=1.0)
    QUIET.note("nothing")
