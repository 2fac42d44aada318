"""A study with everything in it, made up."""

from __future__ import annotations

import math

from graft.artifacts.record import MetricValue, ParityReport
from graft.report import (
    CurvePoint,
    DriftPoint,
    FormFacts,
    ObjectiveFacts,
    SplitFacts,
    StudyReport,
    TrialFacts,
    front,
    importances,
)

METRIC = "eval/exact_match"


def trial(number: int, r: int, lr: float, steps: int = 100) -> TrialFacts:
    """A trial that is best at a learning rate of 1e-3 and gains a little with r."""
    best = max(0.02, 0.97 - 0.3 * abs(math.log10(lr) + 3) ** 1.5 + 0.004 * r / 8)
    points = [
        CurvePoint(steps=step, value=best * (1 - math.exp(-step / 25)))
        for step in range(10, steps + 1, 10)
    ]
    losses = [
        CurvePoint(steps=step, value=0.02 + 2.5 * math.exp(-step / 18) * (1.3 - best))
        for step in range(10, steps + 1, 10)
    ]
    return TrialFacts(
        number=number,
        state="complete" if steps == 100 else "stopped",
        params={"method[lora]/r": r, "train.lr": lr},
        metrics={METRIC: points[-1].value, "eval/loss": losses[-1].value},
        steps=steps,
        seconds=1.4 * steps * (1 + r / 64),
        executor="packed",
        adapter_bytes=r * 1_221_120 // 4,
        searched=tuple(points),
        train_loss=tuple(losses),
    )


def trials() -> tuple[TrialFacts, ...]:
    """Twelve trials, half of them stopped, one failed."""
    settings = [
        (8, 1e-3),
        (16, 2e-3),
        (32, 5e-4),
        (8, 1e-4),
        (16, 3e-5),
        (32, 8e-3),
        (16, 1e-3),
        (32, 1.2e-3),
        (8, 4e-3),
        (8, 2e-5),
        (16, 6e-4),
    ]
    lengths = [100, 100, 100, 30, 30, 60, 100, 100, 60, 30, 100]
    made = [
        trial(n, r, lr, s) for n, ((r, lr), s) in enumerate(zip(settings, lengths, strict=True))
    ]
    failed = TrialFacts(
        number=11,
        state="failed",
        params={"method[lora]/r": 32, "train.lr": 9e-3},
        steps=20,
        reason="step 23: loss nan <not finite>",
    )
    return (*made, failed)


def drift() -> tuple[DriftPoint, ...]:
    """A quiet stretch, an alarm, a promotion, quiet again."""
    quiet = [0.41, 0.55, 0.38, 0.62, 0.49]
    points = [
        DriftPoint(
            time_s=1.79e9 + 60 * i,
            num_prompts=100 * (i + 1),
            kind="test",
            state="STABLE",
            label="mmd: no drift",
            statistic=s,
            threshold=1.0,
            p_value=0.6 - s / 2,
            detector="mmd",
        )
        for i, s in enumerate(quiet)
    ]
    points += [
        DriftPoint(
            time_s=1.79e9 + 400,
            num_prompts=600,
            kind="test",
            state="DRIFT",
            label="mmd: drift",
            statistic=2.7,
            threshold=1.0,
            p_value=0.0005,
            is_drift=True,
            is_alarm=True,
            detector="mmd",
        ),
        DriftPoint(
            time_s=1.79e9 + 401,
            num_prompts=600,
            kind="state",
            state="RETRAINING",
            label="RETRAINING",
        ),
        DriftPoint(
            time_s=1.79e9 + 700,
            num_prompts=640,
            kind="state",
            state="PROMOTED",
            label="PROMOTED",
            evidence={"successor": "c" * 64, "gain_on_new_rows": 0.46, "loss_on_old_rows": 0.004},
        ),
        DriftPoint(
            time_s=1.79e9 + 900,
            num_prompts=800,
            kind="test",
            state="STABLE",
            label="mmd: no drift",
            statistic=0.5,
            threshold=1.0,
            p_value=0.4,
            detector="mmd",
        ),
    ]
    return tuple(points)


def forms() -> tuple[FormFacts, ...]:
    """The trained adapter, its compressed form, and one that the gate refused."""
    metric = MetricValue(value=0.955, low=0.92, high=0.98, rows=240)
    parity = ParityReport(
        form="svd+int8",
        reference="trained",
        token_agreement=0.994,
        mean_kl=0.0021,
        max_kl=0.2,
        max_logit_difference=0.4,
        num_tokens=1200,
        num_prompts=32,
        min_token_agreement=0.98,
        mean_kl_limit=0.02,
    )
    refused = parity.model_copy(
        update={"form": "svd", "token_agreement": 0.91, "reasons": ("token agreement 0.91 < 0.98",)}
    )
    common = {"created_at": "2026-11-22T01:00:00+00:00"}
    return (
        FormFacts(
            digest="a" * 64,
            form="trained",
            num_bytes=9_700_000,
            metrics={METRIC: metric},
            aliases=("smart-home@previous",),
            **common,
        ),
        FormFacts(
            digest="b" * 64,
            form="svd+int8",
            parent="a" * 64,
            num_bytes=1_300_000,
            parity=(parity,),
            metrics={METRIC: metric.model_copy(update={"value": 0.95})},
            aliases=("smart-home@champion",),
            **common,
        ),
        FormFacts(digest="d" * 64, form="svd", num_bytes=600_000, parity=(refused,), **common),
    )


def example_report() -> StudyReport:
    """The whole of it."""
    objectives = (ObjectiveFacts(metric=METRIC, mode="max"),)
    rows = trials()
    return StudyReport(
        name="smart-home",
        created_at="2026-11-22 01:00 UTC",
        base="HuggingFaceTB/SmolLM2-135M-Instruct",
        objectives=objectives,
        trials=rows,
        front=front(rows, objectives),
        winner=7,
        winner_metrics={METRIC: MetricValue(value=0.955, low=0.92, high=0.98, rows=240)},
        base_metrics={METRIC: MetricValue(value=0.01, rows=240)},
        importances=importances(rows, objectives[0]),
        recipe="version: 1\nname: smart-home\nmethod: {type: lora, r: {choice: [8, 16, 32]}}\n",
        chosen_recipe="version: 1\nname: smart-home\nmethod: {type: lora, r: 32}\n",
        data=(
            SplitFacts(
                name="train",
                source="data/train.jsonl",
                num_rows=1800,
                num_tokens=98_000,
                num_supervised_tokens=31_000,
                longest_row_tokens=96,
                num_truncated=0,
                num_duplicates=0,
            ),
            SplitFacts(
                name="eval",
                source="data/eval.jsonl",
                num_rows=240,
                num_tokens=13_000,
                num_supervised_tokens=4_100,
                longest_row_tokens=91,
                num_truncated=0,
                num_duplicates=0,
            ),
        ),
        forms=forms(),
        drift=drift(),
        tool_versions={"graft": "0.1.0", "torch": "2.13.0"},
    )
