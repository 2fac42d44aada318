"""Sizes of memory: what people write is what is meant."""

from __future__ import annotations

import pytest

from graft.core.sizes import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("40GB", 40_000_000_000),
        ("24 GiB", 24 * 2**30),
        ("1.5tb", 1_500_000_000_000),
        ("512MiB", 512 * 2**20),
        ("2048", 2048),
        ("12 bytes", 12),
    ],
)
def test_a_size_is_read_in_decimal_and_binary_units(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "0GB", "40 gigs", "4 0GB", "1e9"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="write it as 40GB, 24GiB or 512MB"):
        parse_bytes(text)


def test_a_formatted_size_reads_back_within_a_twentieth() -> None:
    for size in (999, 1_000, 12_345, 9_990_000, 10_100_000, 7_654_321_000, 3_210_000_000_000):
        assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.05)
