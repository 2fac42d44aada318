"""The drift watch and its journal: one alarm, no verdict twice, nothing lost by a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graft.core.errors import DataError, ServingError
from graft.core.events import read_events
from graft.recipe.operation import WatchSection
from graft.runtime.driftwatch import DriftWatch, MonitorSettings, Reference, RenewalOutcome
from graft.runtime.loopstate import (
    JOURNAL,
    append_by_hand,
    fold,
    loop_folder,
    loop_timeline,
    read_status,
)

NAME = "house"
NUM_FEATURES = 6


def rows(seed: int, number: int, shift: float = 0.0) -> np.ndarray:
    """Embeddings of served prompts."""
    drawn = np.random.default_rng(seed).standard_normal((number, NUM_FEATURES)) + shift
    return drawn.astype(np.float32)


def settings(home: Path, **changes: Any) -> MonitorSettings:
    """A monitor of windows of 20 with false alarms 40,000 prompts apart."""
    folder = loop_folder(home, NAME)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "reference.npz").exists():
        np.savez(folder / "reference.npz", x_ref=rows(0, 60))
    watch = {"detectors": [{"type": "mmd", "window": 20}], "expected_run_length": 40_000}
    given: dict[str, Any] = {
        "name": NAME,
        "home": str(home),
        "recipe": {},
        "watch": WatchSection.model_validate(watch),
        "cooldown_s": 600.0,
        "reference": Reference(file="reference.npz", num_rows=60, key="a", source="test rows"),
        "renews": True,
    }
    return MonitorSettings.model_validate(given | changes)


def events_of(home: Path, *kinds: str) -> list[dict[str, Any]]:
    """The journal's events of these kinds."""
    found = read_events(loop_folder(home, NAME) / JOURNAL)
    return [event for event in found if event["event"] in kinds]


def untimed(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events without what a second run may differ in."""
    return [{key: value for key, value in event.items() if key != "time_s"} for event in events]


def test_clean_prompts_bring_verdicts_and_no_alarm_then_drift_brings_one(tmp_path: Path) -> None:
    watch = DriftWatch(settings(tmp_path))
    assert watch.observe(rows(1, 100)) == 100
    assert read_status(tmp_path, NAME).state == "STABLE"
    assert watch.next_renewal() is None

    watch.observe(rows(2, 40, shift=2.0))
    status = read_status(tmp_path, NAME)
    assert (status.state, status.num_tests, status.num_alarms) == ("DRIFT", 7, 1)
    verdicts = events_of(tmp_path, "verdict")
    assert [event["num_prompts"] for event in verdicts] == [20, 40, 60, 80, 100, 120, 140]
    assert [event["is_alarm"] for event in verdicts] == [False] * 5 + [True, False]
    assert verdicts[-1]["held_back"] == "already DRIFT"
    for event in verdicts:
        assert {"statistic", "threshold", "p_value", "num_prompts", "detector"} <= event.keys()


@pytest.mark.parametrize("cuts", [(7,), (20,), (39, 41, 119), tuple(range(1, 140, 9))])
def test_killed_anywhere_it_gives_the_undisturbed_verdicts(
    tmp_path: Path, cuts: tuple[int, ...]
) -> None:
    stream = np.concatenate([rows(1, 90), rows(2, 60, shift=2.0)])
    undisturbed = DriftWatch(settings(tmp_path / "one"))
    undisturbed.observe(stream)

    watch = DriftWatch(settings(tmp_path / "two"))
    for start, end in zip((0, *cuts), (*cuts, len(stream)), strict=True):
        watch.observe(stream[start:end])
        watch = DriftWatch(settings(tmp_path / "two"))
    assert watch.num_prompts == 150
    assert watch.status.incarnation == len(cuts) + 2
    assert untimed(events_of(tmp_path / "two", "verdict")) == untimed(
        events_of(tmp_path / "one", "verdict")
    )


def test_killed_between_a_verdict_and_its_checkpoint_it_tells_the_alarm_once(
    tmp_path: Path,
) -> None:
    watch = DriftWatch(settings(tmp_path))
    folder = loop_folder(tmp_path, NAME)
    watch.observe(rows(2, 19, shift=2.0))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    last = rows(3, 1, shift=2.0)
    watch.observe(last)
    journal = (folder / JOURNAL).read_bytes()
    for path in folder.iterdir():
        path.unlink()
    for path, data in before.items():
        path.write_bytes(data)
    (folder / JOURNAL).write_bytes(journal + b'{"event": "verd')
    with (folder / "observations-1.f32").open("ab") as file:
        file.write(last.tobytes() + b"\x00\x01")

    again = DriftWatch(settings(tmp_path))
    assert again.num_prompts == 20
    assert again.status.state == "DRIFT"
    assert again.status.num_alarms == len(events_of(tmp_path, "verdict")) == 1


def test_an_older_monitor_may_write_no_more(tmp_path: Path) -> None:
    old = DriftWatch(settings(tmp_path))
    new = DriftWatch(settings(tmp_path))
    with pytest.raises(ServingError, match="monitor 2 has taken over from monitor 1"):
        old.observe(rows(1, 20))
    with pytest.raises(ServingError, match="taken over"):
        old.settle(RenewalOutcome(state="PROMOTED", evidence={}))
    assert events_of(tmp_path, "verdict", "state") == []
    assert new.observe(rows(1, 20)) == 20
    assert len(events_of(tmp_path, "verdict")) == 1


def test_bad_observations_are_counted_and_told_and_stop_nothing(tmp_path: Path) -> None:
    watch = DriftWatch(settings(tmp_path))
    bad = rows(1, 3)
    bad[1, 2] = np.nan
    assert watch.observe(bad) == 2
    assert watch.observe(np.zeros((2, NUM_FEATURES + 1))) == 0
    assert watch.observe(rows(2, 18)[0]) == 1
    assert watch.status.num_refused == 3
    assert watch.num_prompts == 3
    reasons = [event["reason"] for event in events_of(tmp_path, "refused")]
    assert "NaN" in reasons[0]
    assert "7 features where the reference has 6" in reasons[1]


def test_a_renewal_is_one_at_a_time_resumes_by_its_number_and_cools_down(tmp_path: Path) -> None:
    watch = DriftWatch(settings(tmp_path))
    watch.observe(rows(2, 20, shift=2.0))
    first = watch.next_renewal()
    assert first is not None
    assert first.number == 1
    assert first.evidence is not None
    assert first.evidence["is_alarm"]
    assert watch.status.state == "RETRAINING"

    watch = DriftWatch(settings(tmp_path))
    again = watch.next_renewal()
    assert again is not None
    assert again.number == 1
    assert len(events_of(tmp_path, "state")) == 1

    watch.settle(RenewalOutcome(state="REJECTED", evidence={"reasons": ["no better"]}))
    assert watch.next_renewal() is None
    watch.observe(rows(3, 20, shift=2.0))
    assert watch.status.state == "REJECTED"
    assert events_of(tmp_path, "verdict")[-1]["held_back"].startswith("cool-down")

    cooled = DriftWatch(settings(tmp_path, cooldown_s=0.0))
    cooled.calm()
    assert cooled.status.state == "STABLE"
    cooled.observe(rows(4, 20, shift=2.0))
    second = cooled.next_renewal()
    assert second is not None
    assert second.number == 2


def test_a_renewal_begun_by_hand_is_no_answer_to_a_later_alarm(tmp_path: Path) -> None:
    for number in (1, 2):
        folder = loop_folder(tmp_path, NAME) / f"renewal-{number}"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text("{}")
    watch = DriftWatch(settings(tmp_path))
    watch.observe(rows(2, 20, shift=2.0))
    asked = watch.next_renewal()
    assert asked is not None
    assert asked.number == 3
    again = DriftWatch(settings(tmp_path)).next_renewal()
    assert again is not None
    assert again.number == 3


def test_after_a_promotion_the_new_traffic_is_the_reference(tmp_path: Path) -> None:
    watch = DriftWatch(settings(tmp_path, cooldown_s=0.0))
    watch.observe(rows(2, 25, shift=2.0))
    np.savez(loop_folder(tmp_path, NAME) / "reference-1.npz", x_ref=rows(5, 60, shift=2.0))
    outcome = RenewalOutcome(state="PROMOTED", evidence={}, reference="reference-1.npz")
    watch.settle(outcome)

    watch = DriftWatch(settings(tmp_path, cooldown_s=0.0))
    assert watch.status.reference == "reference-1.npz"
    watch.calm()
    watch.observe(rows(6, 60, shift=2.0))
    assert not any(event["is_drift"] for event in events_of(tmp_path, "verdict")[1:])
    watch.observe(rows(7, 40))
    assert watch.status.state == "DRIFT"


def test_a_paused_loop_keeps_its_alarm_until_it_is_approved(tmp_path: Path) -> None:
    watch = DriftWatch(settings(tmp_path))
    append_by_hand(tmp_path, NAME, "paused")
    watch.observe(rows(2, 20, shift=2.0))
    assert watch.status.state == "DRIFT"
    assert watch.next_renewal() is None
    assert append_by_hand(tmp_path, NAME, "approved").state == "DRIFT"
    assert watch.next_renewal() is not None


def test_a_changed_recipe_fits_a_new_reference_and_a_damaged_one_is_refused(
    tmp_path: Path,
) -> None:
    DriftWatch(settings(tmp_path)).observe(rows(1, 7))
    np.savez(loop_folder(tmp_path, NAME) / "other.npz", x_ref=rows(8, 60)[:, :4])
    other = Reference(file="other.npz", num_rows=60, key="b", source="other rows")
    watch = DriftWatch(settings(tmp_path, reference=other))
    assert watch.num_prompts == 7
    assert watch.observe(rows(9, 20)[:, :4]) == 20

    (loop_folder(tmp_path, NAME) / "other.npz").write_bytes(b"not an archive")
    with pytest.raises(DataError, match="cannot be read"):
        DriftWatch(settings(tmp_path, reference=other))


def test_the_timeline_tells_tests_states_and_notes_in_order(tmp_path: Path) -> None:
    watch = DriftWatch(settings(tmp_path))
    watch.observe(np.concatenate([rows(1, 20), rows(2, 20, shift=2.0)]))
    watch.next_renewal()
    watch.move("EVALUATING", {"successor": "abc"})
    watch.settle(RenewalOutcome(state="REJECTED", evidence={"reasons": ["worse on old rows"]}))
    timeline = loop_timeline(tmp_path, NAME)
    assert [(entry.kind, entry.state) for entry in timeline] == [
        ("note", "STABLE"),
        ("note", "STABLE"),
        ("test", "STABLE"),
        ("test", "DRIFT"),
        ("state", "RETRAINING"),
        ("state", "EVALUATING"),
        ("state", "REJECTED"),
    ]
    assert timeline[3].is_alarm
    assert timeline[3].num_prompts == 40
    assert timeline[-1].label == "REJECTED: worse on old rows"
    status = read_status(tmp_path, NAME)
    assert status == watch.status
    assert status == fold(NAME, read_events(loop_folder(tmp_path, NAME) / JOURNAL))
    assert loop_timeline(tmp_path, "unknown") == []
