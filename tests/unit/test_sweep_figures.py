"""What the sweep's benchmark makes of its measurements, and what it refuses to report."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The package, which is run from the top of the checkout."""
    monkeypatch.syspath_prepend(str(ROOT))
    for name in ("sweep", "_race", "_sweep_figures", "_sweep_ours"):
        importlib.import_module(f"benchmarks.{name}")
    return importlib.import_module("benchmarks")


def arm(kind: str, makespan_s: float, startup_s: float, size: int = 1, **more: Any) -> Any:
    known = {"kind": kind, "size": size, "tokens": 64, "has_asha": False, "held_out_losses": [2.0]}
    return {**known, "makespan_s": makespan_s, "startup_s": startup_s, **more}


ONE_STEP = {
    "trained_s": [1.0, 1.0, 3.0],
    "first_trained_s": 1.0,
    "after_first_report_s": 4.0,
    "until_s": {"checked": 5.0, "base": 15.0},
}
ROUNDS = [
    {
        "tokens": 64,
        "arms": [
            arm("tune", 60.0, 20.0, 1),
            arm("tune", 90.0, 20.0, 2),
            arm("trl", 200.0, 120.0),
            arm("ours", 40.0, 20.0, 8),
            arm("ours", 50.0, 20.0, 4),
            arm("ours_one_step", 25.0, 21.0, 8, **ONE_STEP),
            arm("tune", 45.0, 20.0, 1, has_asha=True),
            arm("ours", 30.0, 20.0, 8, has_asha=True),
        ],
        "winner_losses": {"tune-64-1": 1.0, "trl-64-1": 1.004, "ours-64-8": 1.008},
    },
    {
        "tokens": 64,
        "arms": [
            arm("ours", 20.0, 10.0, 8),
            arm("ours", 50.0, 20.0, 4),
            arm("trl", 200.0, 120.0),
            arm("tune", 60.0, 20.0, 1),
            arm("ours_one_step", 25.0, 23.0, 8, **ONE_STEP),
            arm("tune", 45.0, 20.0, 1, has_asha=True),
            arm("ours", 15.0, 10.0, 8, has_asha=True),
        ],
        "winner_losses": {"tune-64-1": 1.0, "ours-64-8": 1.0, "ours-64-8-asha": 2.0},
    },
]


def test_makespans_are_theirs_over_ours_against_tunes_better_setting(
    benchmarks: ModuleType,
) -> None:
    figures = benchmarks._sweep_figures.figures_of(ROUNDS)
    assert figures["tune_reused_actors_64"] == 1
    assert figures["makespan_vs_tune_reused_64"] == pytest.approx((1.5 + 3.0) / 2)
    assert figures["makespan_vs_tune_reused_64_worst"] == pytest.approx(1.5)
    assert figures["makespan_vs_tune_reused_64_best"] == pytest.approx(3.0)
    assert figures["makespan_vs_fresh_trl_64"] == pytest.approx((5.0 + 10.0) / 2)
    assert figures["makespan_vs_tune_reused_64_pack_4"] == pytest.approx(1.2)
    assert figures["makespan_vs_tune_reused_64_asha"] == pytest.approx((1.5 + 3.0) / 2)
    assert figures["steady_vs_tune_reused_64"] == pytest.approx((2.0 + 4.0) / 2)
    assert figures["startup_s_of_fresh_trl_64"] == pytest.approx(120.0)
    assert "makespan_vs_fresh_trl_64_asha" not in figures


def test_a_further_trial_costs_what_is_beside_the_steps_after_the_first_report(
    benchmarks: ModuleType,
) -> None:
    figures = benchmarks._sweep_figures.figures_of(ROUNDS)
    assert figures["further_trial_s"] == pytest.approx((4.0 - 3.0) / 2)
    assert (figures["startup_s"], figures["startup_s_worst"]) == (22.0, 23.0)
    assert (figures["until_checked_s"], figures["until_base_s"]) == (5.0, 15.0)
    assert figures["first_step_trials"] == 2


def test_a_winner_is_the_same_within_one_percent_where_nothing_was_stopped(
    benchmarks: ModuleType,
) -> None:
    figures = benchmarks._sweep_figures.figures_of(ROUNDS)
    assert figures["winner_same"] == 1.0
    assert figures["winner_loss_difference"] == pytest.approx(0.008)
    assert figures["winner_loss_difference_of_rivals"] == pytest.approx(0.004)
    assert figures["trial_loss_difference_largest"] == 0.0
    worse = [{**ROUNDS[0], "winner_losses": {"tune-64-1": 1.0, "ours-64-8": 1.02}}]
    assert benchmarks._sweep_figures.figures_of(worse)["winner_same"] == 0.0


def test_arms_whose_trials_differ_are_not_reported_on(benchmarks: ModuleType) -> None:
    options = benchmarks.sweep.options_of(["--json", "out.json"])
    arms = [arm("ours", 1.0, 0.5, 8), arm("tune", 1.0, 0.5)]
    benchmarks.sweep.require_same_trials(options, arms)
    for wrong in (2.2, float("nan")):
        with pytest.raises(SystemExit, match="differ"):
            benchmarks.sweep.require_same_trials(
                options, [arms[0], {**arms[1], "held_out_losses": [wrong]}]
            )


def test_a_few_trials_may_be_driven_apart_by_rounding_alone(benchmarks: ModuleType) -> None:
    options = benchmarks.sweep.options_of(["--json", "out.json"])

    def arms_with(*wrong: float) -> list[Any]:
        losses = [2.0] * 16
        theirs = [*wrong, *losses[len(wrong) :]]
        ours = arm("ours", 1.0, 0.5, 8, held_out_losses=losses)
        return [ours, arm("tune", 1.0, 0.5, held_out_losses=theirs)]

    benchmarks.sweep.require_same_trials(options, arms_with(2.4, 1.8))
    for wrong in ((2.4, 1.8, 1.8), (float("nan"),)):
        with pytest.raises(SystemExit, match="differ"):
            benchmarks.sweep.require_same_trials(options, arms_with(*wrong))
    options.dtype = "fp32"
    with pytest.raises(SystemExit, match="differ"):
        benchmarks.sweep.require_same_trials(options, arms_with(2.4))


def test_the_points_are_all_configurations_in_an_order_of_the_seed(benchmarks: ModuleType) -> None:
    points_of = benchmarks._sweep_ours.points_of
    assert len(set(points_of(0, 16))) == 16
    assert points_of(0, 4) == points_of(0, 16)[:4]
    assert set(points_of(1, 16)) == set(points_of(0, 16))
    assert points_of(1, 16) != points_of(0, 16)


def test_a_work_folder_of_other_settings_is_refused(benchmarks: ModuleType, tmp_path: Path) -> None:
    options = benchmarks.sweep.options_of(["--json", "out.json", "--work", str(tmp_path)])
    benchmarks.sweep.require_same_settings(options)
    benchmarks.sweep.require_same_settings(options)
    options.dtype = "fp32"
    with pytest.raises(SystemExit, match="--work"):
        benchmarks.sweep.require_same_settings(options)
