"""The head in chunks: more supervised positions than one chunk has come to the same as at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graft.engine.batches import RoutedRow, collate
from graft.engine.logprobs import _CHUNK_POSITIONS, batch_hidden, read_positions
from graft.engine.multi import MultiAdapterModel
from graft.engine.train import Trainer
from graft.methods.base import METHODS
from tests.unit.engine.conftest import exact_model, make_recipe, make_rows
from tests.unit.engine.test_packed_equals_alone import largest_difference

ROWS = [
    row._replace(is_supervised=[True] * len(row.input_ids))
    for row in make_rows(24, lengths=(100, 100))
]
"""More than two chunks of supervised tokens, the last one not full."""
TEMPERATURE = 0.7


def stirred(slots: tuple[str, ...]) -> MultiAdapterModel:
    """The fp64 base with slots that do something."""
    model = MultiAdapterModel(exact_model())
    for at, name in enumerate(slots):
        model.add_slot(name, METHODS.build({"type": "lora", "r": 2}), seed=at, trainable=True)
        generator = torch.Generator().manual_seed(at)
        with torch.no_grad():
            for parameter in model.parameters(name).values():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("recorded", [True, False])
def test_chunks_come_to_what_the_whole_comes_to(recorded: bool) -> None:
    model = stirred(("a", "b"))
    routed = [RoutedRow("ab"[at % 2], row, at) for at, row in enumerate(ROWS)]
    batch = collate(sorted(routed, key=lambda r: (str(r.slot), r.position)), model.device)
    num_positions = len(batch.supervised_rows)
    assert num_positions > 2 * _CHUNK_POSITIONS
    assert num_positions % _CHUNK_POSITIONS
    parameters = [p for name in "ab" for p in model.parameters(name).values()]
    weight_P = torch.rand(num_positions, generator=torch.Generator().manual_seed(5)).double()
    sizes: list[int] = []
    head = model.base.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, __, out: sizes.append(out.shape[0]))

    with torch.set_grad_enabled(recorded):
        found = read_positions(model, batch, temperatures={"b": TEMPERATURE}, with_entropy=True)
        handle.remove()
        assert max(sizes) == _CHUNK_POSITIONS
        assert sum(sizes) == num_positions, "no logits are made twice"

        hidden_PH = batch_hidden(model, batch)[batch.supervised_lines, batch.predicting_tokens]
        is_b = torch.tensor([row.slot == "b" for row in batch.rows])[batch.supervised_rows]
        temperature_P = torch.ones(num_positions).double().masked_fill(is_b, TEMPERATURE)
        log_PV = (model.logits(hidden_PH) / temperature_P[:, None]).log_softmax(-1)
        targets_P = batch.input_ids[batch.supervised_lines, batch.supervised_tokens]
        expected_P = log_PV.gather(1, targets_P[:, None])[:, 0]

    torch.testing.assert_close(found.logprobs_P, expected_P, rtol=0, atol=1e-12)
    entropy_P = -(log_PV.exp() * log_PV).sum(-1).detach()
    torch.testing.assert_close(found.entropy_P, entropy_P, rtol=0, atol=1e-12)
    if recorded:
        ours = torch.autograd.grad((found.logprobs_P * weight_P).sum(), parameters)
        theirs = torch.autograd.grad((expected_P * weight_P).sum(), parameters)
        for one, other in zip(ours, theirs, strict=True):
            assert bool(one.any())
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_a_step_of_several_chunks_is_the_step_of_many_small_passes(threads: Any) -> None:
    threads(1)
    states = []
    for max_tokens, largest in ((100_000, _CHUNK_POSITIONS), (100, 100)):
        trainer = Trainer(MultiAdapterModel(exact_model()))
        sizes: list[int] = []
        head = trainer.model.base.get_output_embeddings()
        head.register_forward_hook(lambda _, __, out, sizes=sizes: sizes.append(out.shape[0]))
        train = {"steps": 3, "batch_size": 16, "lr": 3e-3, "micro_batch_tokens": max_tokens}
        method = {"type": "lora", "r": 4, "lora_dropout": 0.1}
        trainer.join("a", make_recipe(method=method, train=train), ROWS)
        reports = [trainer.step()["a"] for _ in range(3)]
        assert max(sizes) <= largest
        assert (max(sizes) == _CHUNK_POSITIONS) is (largest == _CHUNK_POSITIONS)
        states.append((trainer.state("a").tensors, [report.loss for report in reports]))
    (chunked, losses), (small, others) = states
    assert losses == pytest.approx(others, abs=1e-12)
    assert largest_difference(chunked, small) <= 1e-10
