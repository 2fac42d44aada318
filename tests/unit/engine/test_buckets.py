"""ZeRO's buffers stay small beside what it divides, and large enough for a transfer."""

from __future__ import annotations

import pytest

from graft.engine.backends.buckets import max_live, prefetch_bucket, reduce_bucket


@pytest.mark.parametrize("num_trained", [0, 1, 5_000_001, 134_515_009, 7_000_000_000])
def test_a_bucket_is_a_part_of_what_trains_and_even(num_trained: int) -> None:
    bucket = reduce_bucket(num_trained)
    assert 1_000_000 <= bucket <= 50_000_000
    assert bucket <= max(1_000_000, num_trained / 8)
    assert bucket % 2 == 0


@pytest.mark.parametrize("num_weights", [1, 134_515_008, 1_700_000_000, 70_000_000_000])
def test_stage_3_holds_a_quarter_of_a_base_at_most(num_weights: int) -> None:
    assert max_live(num_weights) <= max(1_000_000, num_weights / 4)
    assert max_live(num_weights) <= 1_000_000_000, "what DeepSpeed holds of any model"
    assert prefetch_bucket(num_weights) <= max_live(num_weights)
