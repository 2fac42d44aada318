"""Rank reduction against a full-matrix SVD."""

from __future__ import annotations

import pytest
import torch

from graft.compressors.base import Adapter
from graft.compressors.svd import SvdCompressor
from graft.core.errors import CompressionError
from graft.methods.lora import LoraMethod
from tests.unit.compressors.conftest import make_adapter


def updates(adapter: Adapter) -> dict[str, torch.Tensor]:
    nothing = torch.empty(0)  # LoRA's update does not depend on the weight
    return {site: adapter.method.merge_delta(t, nothing) for site, t in adapter.tensors.items()}


def test_the_result_is_the_best_of_its_rank(adapter: Adapter) -> None:
    small = SvdCompressor(r=3).compress(adapter)
    for site, full in updates(adapter).items():
        u, s, v = torch.linalg.svd(full.double())
        best = (u[:, :3] * s[:3]) @ v[:3]
        torch.testing.assert_close(updates(small)[site].double(), best, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_scale_and_the_shapes_promised_are_kept(use_rslora: bool) -> None:
    adapter = make_adapter(use_rslora=use_rslora)
    small = SvdCompressor(r=2).compress(adapter)
    assert isinstance(small.method, LoraMethod)
    assert isinstance(adapter.method, LoraMethod)
    assert small.method.r == 2
    assert small.method.scale == pytest.approx(adapter.method.scale)
    for site, pair in small.tensors.items():
        assert pair["lora_A"].shape == (2, adapter.tensors[site]["lora_A"].shape[1])
        assert pair["lora_B"].shape == (adapter.tensors[site]["lora_B"].shape[0], 2)


@pytest.mark.parametrize(
    ("r", "share", "kept"), [(8, 0.4, 3), (2, 0.9, 2), (8, 0.01, 1), (8, 1.0, 8)]
)
def test_a_share_of_the_own_rank_bounds_what_is_kept(
    r: int, share: float, kept: int, adapter: Adapter
) -> None:
    assert isinstance(adapter.method, LoraMethod)
    assert adapter.method.r == 8
    small = SvdCompressor(r=r, share=share).compress(adapter)
    assert isinstance(small.method, LoraMethod)
    assert small.method.r == kept
    by_rank = SvdCompressor(r=kept).compress(adapter)
    for site, pair in by_rank.tensors.items():
        assert torch.equal(small.tensors[site]["lora_A"], pair["lora_A"])


def test_a_second_pass_changes_nothing(adapter: Adapter) -> None:
    small = SvdCompressor(r=3).compress(adapter)
    assert SvdCompressor(r=3).compress(small) is small


def test_the_given_adapter_is_not_touched(adapter: Adapter) -> None:
    before = {site: pair["lora_B"].clone() for site, pair in adapter.tensors.items()}
    SvdCompressor(r=3).compress(adapter)
    assert all(torch.equal(adapter.tensors[s]["lora_B"], b) for s, b in before.items())


def test_all_energy_of_an_update_of_true_rank_two_is_in_two_ranks(adapter: Adapter) -> None:
    for pair in adapter.tensors.values():
        pair["lora_B"][:, 2:] = 0
    small = SvdCompressor(r=8, energy=1.0 - 1e-9).compress(adapter)
    assert isinstance(small.method, LoraMethod)
    assert small.method.r == 2
    for site, full in updates(adapter).items():
        torch.testing.assert_close(updates(small)[site], full, atol=1e-6, rtol=1e-5)


def test_energy_keeps_its_promise_at_every_site(adapter: Adapter) -> None:
    small = SvdCompressor(r=8, energy=0.9).compress(adapter)
    assert isinstance(small.method, LoraMethod)
    assert small.method.r < 8
    for site, full in updates(adapter).items():
        assert updates(small)[site].norm() ** 2 >= 0.9 * full.norm() ** 2 * (1 - 1e-5)


def test_an_adapter_that_never_learned_stays_at_zero(adapter: Adapter) -> None:
    for pair in adapter.tensors.values():
        pair["lora_B"].zero_()
    small = SvdCompressor(r=2).compress(adapter)
    assert all(update.abs().max() == 0 for update in updates(small).values())


def test_nan_is_refused(adapter: Adapter) -> None:
    next(iter(adapter.tensors.values()))["lora_A"][0, 0] = float("nan")
    with pytest.raises(CompressionError, match="NaN"):
        SvdCompressor(r=2).compress(adapter)
