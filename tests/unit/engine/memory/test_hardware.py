"""Accelerators by name."""

from __future__ import annotations

import pytest

from graft.core.errors import ConfigError
from graft.engine.memory import GPUS, parse_hardware


@pytest.mark.parametrize(
    ("text", "count", "name"),
    [
        ("4x A100-40GB", 4, "A100-40GB"),
        ("RTX 4090", 1, "RTX 4090"),
        ("H200", 1, "H200"),
        ("8 \u00d7 nvidia h100 80gb", 8, "H100"),
        ("2*NVIDIA GeForce RTX 3090 24GB", 2, "RTX 3090"),
        ("tesla t4 16 GB", 1, "T4"),
        ("a100 80 gb", 1, "A100-80GB"),
    ],
)
def test_names_are_read_however_people_write_them(text: str, count: int, name: str) -> None:
    found = parse_hardware(text)
    assert (found.count, found.gpu.name) == (count, name)


def test_every_known_name_reads_back_as_itself() -> None:
    assert all(parse_hardware(f"3x {name}").gpu == gpu for name, gpu in GPUS.items())


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'RTX 4090'"):
        parse_hardware("rtx 4091")


def test_a_name_that_comes_in_several_sizes_is_asked_for_its_size() -> None:
    with pytest.raises(ConfigError, match="A100-40GB or A100-80GB"):
        parse_hardware("2x A100")


def test_a_size_that_the_card_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown GPU 'RTX 3090 48GB'"):
        parse_hardware("RTX 3090 48GB")


def test_no_gpu_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        parse_hardware("0x H100")
