"""A base whose rotary factors change for a whole pass once one of its rows is long."""

from __future__ import annotations

import pytest
import torch

from graft.core.errors import ConfigError
from graft.data.records import TokenRow
from graft.engine.batches import RoutedRow
from graft.engine.generate import GenerationRequest, Generator
from graft.engine.logprobs import supervised_logprobs
from graft.engine.lower_states import batches_of
from graft.engine.multi import MultiAdapterModel
from graft.methods.lora import LoraMethod
from graft.methods.prompt import PromptMethod
from graft.testing import tiny_tokenizer
from tests.unit.engine.test_architectures import SMALL, base_of

SHORT = SMALL["phi3"]["original_max_position_embeddings"]


def model_of(*slots: str) -> MultiAdapterModel:
    model = MultiAdapterModel(base_of("phi3"))
    for name in slots:
        model.add_slot(name, LoraMethod(r=2, target_modules="all-linear"))
    return model


def row(slot: str, length: int, position: int = 0) -> RoutedRow:
    ids = [5 + at % 50 for at in range(length)]
    return RoutedRow(
        slot, TokenRow(ids, [at > 0 for at in range(length)], f"row {length}"), position
    )


@torch.no_grad()
def logprobs(
    model: MultiAdapterModel, rows: list[RoutedRow]
) -> dict[tuple[str | None, int], list[float]]:
    found = {}
    for batch in batches_of(model, rows, 4096):
        values = supervised_logprobs(model, batch)
        for at, routed in enumerate(batch.rows):
            of_row = values[batch.supervised_rows == at].tolist()
            found[routed.slot, len(routed.row.input_ids)] = of_row
    return found


def test_a_long_row_changes_nothing_of_its_neighbours() -> None:
    model = model_of("a", "b")
    rows = [row("a", SHORT), row("b", SHORT + 1), row("a", SHORT - 4, 1), row("b", SHORT + 9, 1)]
    batches = batches_of(model, rows, 4096)
    together = logprobs(model, rows)
    for each in rows:
        ((key, alone),) = logprobs(model, [each]).items()
        assert together[key] == pytest.approx(alone, abs=1e-5)
    lengths = [{len(r.row.input_ids) > SHORT for r in batch.rows} for batch in batches]
    assert lengths == [{False}, {True}]


def test_virtual_tokens_count_as_positions() -> None:
    model = model_of("a")
    model.add_slot("b", PromptMethod(num_virtual_tokens=4))
    rows = [row("a", SHORT - 2), row("b", SHORT - 2), row("b", SHORT - 4, 1)]
    batches = batches_of(model, rows, 4096)
    names = [[(r.slot, r.position) for r in batch.rows] for batch in batches]
    assert names == [[("a", 0), ("b", 1)], [("b", 0)]]


def test_answers_stay_within_the_short_context() -> None:
    model = model_of("a")
    model.add_slot("b", PromptMethod(num_virtual_tokens=4))
    generator = Generator(model, tiny_tokenizer(), max_length=48)
    assert [generator.max_tokens(slot) for slot in (None, "a", "b")] == [SHORT, SHORT, SHORT - 4]
    with pytest.raises(ConfigError, match=f"together may have {SHORT}"):
        generator.submit(GenerationRequest(list(range(5, 5 + SHORT)), slot="a"))
    request = GenerationRequest(list(range(5, 15)), slot="a", max_new_tokens=40)
    assert len(generator.run([request])[0].token_ids) <= SHORT - 10
