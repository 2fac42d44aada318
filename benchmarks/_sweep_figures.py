"""What the rounds of the sweep come to, as flat figures; makespans are theirs over ours."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable

from benchmarks._sweep_arms import PACK, Measured

WINNERS_AGREE = 0.01
RIVALS = {"trl": "fresh_trl", "tune": "tune_reused"}
"""Arm → its name in the figures."""


def best_actors(arms: Iterable[Measured]) -> int:
    """Returns with how many actors Tune was fastest."""
    tunes = [arm for arm in arms if arm["kind"] == "tune" and not arm["has_asha"]]
    return int(min(tunes, key=lambda arm: float(arm["makespan_s"]))["size"])


def figures_of(rounds: list[Measured]) -> dict[str, float]:
    """Ratios round by round, what ours takes by itself, and whether the winners are as good."""
    figures: dict[str, float] = {}
    for tokens in dict.fromkeys(row["tokens"] for row in rounds):
        of_tokens = [row["arms"] for row in rounds if row["tokens"] == tokens]
        figures[f"tune_reused_actors_{tokens}"] = best_actors(of_tokens[0])
        for arm in of_tokens[0]:
            if arm["kind"] == "ours":
                figures |= _ratios(of_tokens, arm)
            elif arm["kind"] == "ours_one_step":
                figures |= own_costs(
                    [a for of in of_tokens for a in of if a["kind"] == arm["kind"]]
                )
    difference, of_rivals = _winner_differences(rounds)
    figures["winner_same"] = float(difference <= WINNERS_AGREE)
    figures["winner_loss_difference"] = difference
    figures["winner_loss_difference_of_rivals"] = of_rivals
    apart = _trial_differences(rounds)
    return figures | {
        "trial_loss_difference_median": statistics.median(apart),
        "trial_loss_difference_largest": max(apart),
    }


def _ratios(of_tokens: list[list[Measured]], arm: Measured) -> dict[str, float]:
    """Makespans and steady states of the rivals over those of one of our arms."""
    pack = f"_pack_{arm['size']}" if arm["size"] != PACK else ""
    suffix = f"_{arm['tokens']}{pack}{'_asha' if arm['has_asha'] else ''}"
    figures: dict[str, float] = {}
    for kind, name in RIVALS.items():
        pairs = [
            (_fastest(arms, "ours", arm["has_asha"], arm["size"]), theirs)
            for arms in of_tokens
            if (theirs := _fastest(arms, kind, arm["has_asha"])) is not None
        ]
        if not pairs:
            continue
        makespans = [b["makespan_s"] / a["makespan_s"] for a, b in pairs]
        steady = [_steady_s(b) / _steady_s(a) for a, b in pairs]
        figures |= _spread(f"makespan_vs_{name}{suffix}", makespans, worst=min)
        figures |= _spread(f"steady_vs_{name}{suffix}", steady, worst=min)
        figures[f"startup_s_of_{name}{suffix}"] = statistics.median(
            b["startup_s"] for _, b in pairs
        )
    return figures


def _fastest(
    arms: list[Measured], kind: str, has_asha: bool, size: int | None = None
) -> Measured | None:
    found = [
        arm
        for arm in arms
        if (arm["kind"], arm["has_asha"]) == (kind, has_asha) and size in (None, arm["size"])
    ]
    return min(found, key=lambda arm: float(arm["makespan_s"]), default=None)


def _steady_s(arm: Measured) -> float:
    return float(arm["makespan_s"] - arm["startup_s"])


def own_costs(arms: list[Measured]) -> dict[str, float]:
    """Start-up and its stages, and what each trial past the first costs beside its training.

    Args:
        arms: Ours, of one step.
    """
    stages = {
        f"until_{name}_s": statistics.median(arm["until_s"][name] for arm in arms)
        for name in arms[0]["until_s"]
    }
    in_first = [arm["trained_s"].count(arm["first_trained_s"]) for arm in arms]
    return {
        **stages,
        **_spread("startup_s", [arm["startup_s"] for arm in arms], worst=max),
        "first_step_trials": statistics.median(in_first),
        **_spread("further_trial_s", [_further_trial_s(arm) for arm in arms], worst=max),
    }


def _further_trial_s(arm: Measured) -> float:
    """Returns what a trial of one step costs beside that step: measuring one row is in it.

    Trials that were in one step together report the same seconds.
    """
    later_steps = {*arm["trained_s"]} - {arm["first_trained_s"]}
    beside = arm["after_first_report_s"] - sum(later_steps)
    return float(beside / (len(arm["trained_s"]) - 1))


def _winner_differences(rounds: list[Measured]) -> tuple[float, float]:
    """Returns how far winners' losses are apart at most, where no trial is stopped.

    Returns:
        Ours from the rivals', and the rivals' from one another.
    """
    differences, of_rivals = [0.0], [0.0]
    for row in rounds:
        losses = {k: v for k, v in row["winner_losses"].items() if not k.endswith("-asha")}
        ours = [loss for arm, loss in losses.items() if arm.startswith("ours")]
        theirs = [loss for arm, loss in losses.items() if not arm.startswith("ours")]
        differences += [abs(a - b) / b for a in ours for b in theirs]
        of_rivals += [abs(a - b) / b for a in theirs for b in theirs]
    return max(differences), max(of_rivals)


def _trial_differences(rounds: list[Measured]) -> list[float]:
    """Returns how far the losses of our trials are from theirs, where no trial is stopped."""
    differences = []
    for row in rounds:
        full = [arm for arm in row["arms"] if not arm["has_asha"]]
        theirs = [arm for arm in full if arm["kind"] in RIVALS]
        differences += [
            abs(a - b) / b
            for mine in full
            if mine["kind"] == "ours"
            for other in theirs
            for a, b in zip(mine["held_out_losses"], other["held_out_losses"], strict=True)
        ]
    return differences


def _spread(
    name: str, values: list[float], *, worst: Callable[[list[float]], float]
) -> dict[str, float]:
    best = max if worst is min else min
    return {
        name: statistics.median(values),
        f"{name}_worst": worst(values),
        f"{name}_best": best(values),
    }
