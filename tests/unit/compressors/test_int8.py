"""Eight bits: a bounded error, exact values, nothing lost the second time."""

from __future__ import annotations

import pytest
import torch

from graft.compressors.base import Adapter
from graft.compressors.int8 import Int8Compressor
from graft.core.errors import CompressionError


def test_every_value_is_within_half_a_step_of_the_original(adapter: Adapter) -> None:
    small = Int8Compressor(block=16).compress(adapter)
    for site, of_site in adapter.tensors.items():
        for key, value in of_site.items():
            wide = value.T if value.shape[0] > value.shape[1] else value
            other = small.tensors[site][key]
            other = other.T if value.shape[0] > value.shape[1] else other
            largest = wide.unflatten(1, (-1, 16)).abs().amax(-1, keepdim=True)
            error = (wide - other).unflatten(1, (-1, 16)).abs()
            # Half a step, and what rounding the scale to bfloat16 adds at the largest level.
            assert (error <= largest / 127 * (0.5 + 1e-3) * (1 + 2**-8)).all()


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e4])
@pytest.mark.parametrize("block", [8, 64, 100])
def test_a_second_pass_changes_no_bit(adapter: Adapter, scale: float, block: int) -> None:
    compressor = Int8Compressor(block=block)
    for of_site in adapter.tensors.values():
        of_site["lora_B"] *= scale
    once = compressor.compress(adapter)
    twice = compressor.compress(once)
    for site, of_site in once.tensors.items():
        for key, value in of_site.items():
            assert torch.equal(twice.tensors[site][key], value)


def test_encoding_and_decoding_give_the_exact_values_back() -> None:
    compressor = Int8Compressor()
    generator = torch.Generator().manual_seed(0)
    shapes = {"wide": (3, 100), "tall": (130, 5), "square": (7, 7), "vector": (33,)}
    state = {k: torch.randn(*shape, generator=generator) for k, shape in shapes.items()}
    state["zeros"] = torch.zeros(4, 70)
    decoded = compressor.decode(compressor.encode(state))
    again = compressor.decode(compressor.encode(decoded))
    for name, value in state.items():
        assert decoded[name].shape == value.shape
        assert torch.equal(decoded[name], again[name])
        torch.testing.assert_close(decoded[name], value, atol=0.02, rtol=0)


def test_a_layer_without_a_rank_is_stored_as_the_nothing_it_is(adapter: Adapter) -> None:
    of_site = next(iter(adapter.tensors.values()))
    of_site["lora_A"], of_site["lora_B"] = of_site["lora_A"][:0], of_site["lora_B"][:, :0]
    compressor = Int8Compressor()
    small = next(iter(compressor.compress(adapter).tensors.values()))
    assert small["lora_A"].shape == of_site["lora_A"].shape
    decoded = compressor.decode(compressor.encode(of_site))
    assert {key: value.shape for key, value in decoded.items()} == {
        key: value.shape for key, value in of_site.items()
    }


def test_nan_is_refused(adapter: Adapter) -> None:
    next(iter(adapter.tensors.values()))["lora_A"][0, 0] = float("inf")
    with pytest.raises(CompressionError, match="infinity"):
        Int8Compressor().compress(adapter)
