"""What a row says beside what was measured: the seconds to a loss that all methods can reach."""

from __future__ import annotations

from graft.pipelines.compare_rows import common_loss, seconds_to, with_seconds
from graft.report.comparison_facts import LossPoint, MethodFacts, SeedFacts


def test_seconds_to_a_loss_are_in_proportion_between_measurements() -> None:
    curve = [LossPoint(steps=s, seconds=2.0 * s, loss=4.0 - s) for s in range(3)]
    assert seconds_to(curve, 3.5) == 1.0
    assert seconds_to(curve, 2.0) == 4.0
    assert seconds_to(curve, 9.0) == 0.0


def trained(name: str, *losses: float) -> MethodFacts:
    points = enumerate(losses)
    curve = [LossPoint(steps=step, seconds=10.0 * step, loss=loss) for step, loss in points]
    seed = SeedFacts(
        seed=1,
        steps=len(losses) - 1,
        seconds=curve[-1].seconds,
        tokens_per_s=1.0,
        train_loss=losses[-1],
        curve=tuple(curve),
        loaded_bytes=1,
        peak_bytes=1,
        memory="process",
        num_trainable=1,
        file_bytes=1,
        metrics={},
    )
    return MethodFacts(name=name, method="lora", state="done", seeds=(seed,))


def test_a_method_that_learns_nothing_does_not_set_the_loss_to_reach() -> None:
    rows = [
        trained("worse", 3.0, 3.2),
        trained("late", 4.0, 3.1),  # its own start was worse than what others begin with
        trained("good", 3.0, 1.0),
        trained("fair", 3.0, 2.0),
    ]
    loss = common_loss(rows)
    assert loss == 2.0
    assert [with_seconds(row, loss).seconds_to_loss for row in rows] == [None, None, 5.0, 10.0]
    assert common_loss(rows[:1]) is None
    assert with_seconds(rows[0], None).seconds_to_loss is None
