"""Evaluation against transformers' own loss, and against answers generated one by one."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from graft.core.errors import DataError, TrainingError
from graft.data.records import EvalPrompt, TokenRow
from graft.data.template import ChatTemplate
from graft.engine.evaluate import evaluate, pair_margins, row_losses, wanted_rows
from graft.engine.generate import GenerationRequest, Generator
from graft.engine.multi import MultiAdapterModel
from graft.methods.lora import LoraMethod
from graft.metrics.exact_match import ExactMatchMetric
from graft.metrics.loss import LossMetric
from graft.metrics.perplexity import PerplexityMetric
from graft.metrics.preference_accuracy import PreferenceAccuracyMetric
from graft.testing import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEMPLATE = ChatTemplate(TOKENIZER)
TEXTS = ["put lamp to 7", "she sells sea shells by the sea shore", "a quick fox", "move door to 4"]


def held_out() -> Any:
    rows = []
    for index, text in enumerate(TEXTS):
        ids = TOKENIZER.encode(text)
        rows.append(TokenRow(ids, [at >= 2 for at in range(len(ids))], f"eval.jsonl:{index + 1}"))
    prompts = [EvalPrompt(row.input_ids, "whatever", row.source, []) for row in rows]
    return SimpleNamespace(eval=rows, prompts=prompts)


def model_with_adapter() -> MultiAdapterModel:
    model = MultiAdapterModel(tiny_model())
    model.add_slot("a", LoraMethod(r=4, lora_alpha=8), seed=3)
    with torch.no_grad():
        for name, parameter in model.parameters("a").items():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(5))
    return model


def test_losses_are_those_of_transformers() -> None:
    base = tiny_model()
    for (total, count), row in zip(
        row_losses(MultiAdapterModel(tiny_model()), None, held_out().eval),
        held_out().eval,
        strict=True,
    ):
        labels = [t if s else -100 for t, s in zip(row.input_ids, row.is_supervised, strict=True)]
        with torch.no_grad():
            expected = base(torch.tensor([row.input_ids]), labels=torch.tensor([labels])).loss
        assert count == sum(row.is_supervised)
        assert total / count == pytest.approx(float(expected), rel=1e-5)


def test_perplexity_is_the_exponential_of_the_loss_over_all_tokens() -> None:
    report = evaluate(
        model_with_adapter(), "a", held_out(), [LossMetric(), PerplexityMetric()], template=TEMPLATE
    )
    assert report.values["eval/perplexity"] == pytest.approx(math.exp(report.values["eval/loss"]))
    for metric in report.metrics.values():
        assert metric.low is not None
        assert metric.high is not None
        assert metric.low <= metric.value <= metric.high
        assert metric.rows == len(TEXTS)


def test_answers_are_those_of_each_prompt_alone() -> None:
    model, data = model_with_adapter(), held_out()
    alone = []
    for prompt in data.prompts:
        request = GenerationRequest(prompt.prompt_ids, "a", 8, stop_ids=TEMPLATE.stop_ids)
        alone += Generator(model, TOKENIZER, max_batch=1).run([request])
    wanted = [
        EvalPrompt(p.prompt_ids, r.text, p.source, [])
        for p, r in zip(data.prompts, alone, strict=True)
    ]
    wanted[2] = wanted[2]._replace(reference="something else")
    report = evaluate(
        model,
        "a",
        SimpleNamespace(eval=[], prompts=wanted),  # type: ignore[arg-type]
        [ExactMatchMetric()],
        template=TEMPLATE,
        max_new_tokens=8,
        batch_size=3,
    )
    assert report.answers == tuple(result.text for result in alone)
    assert report.scores["eval/exact_match"] == (1.0, 1.0, 0.0, 1.0)
    assert report.values == {"eval/exact_match": 0.75}


def held_out_pairs() -> list[TokenRow]:
    rows = held_out().eval
    pairs = []
    for one, other in zip(rows, [rows[-1], *rows[:-1]], strict=True):
        ids = [5, 6, 7, *one.input_ids, *other.input_ids]
        branch = [0] * 3 + [1] * len(one.input_ids) + [2] * len(other.input_ids)
        pairs.append(TokenRow(ids, [k > 0 for k in branch], one.source, branch))
    return pairs


@pytest.mark.parametrize("shares_prompts", [True, False])
def test_a_preference_is_a_longer_mean_log_probability_than_of_the_rejected_answer(
    shares_prompts: bool,
) -> None:
    model, pairs = model_with_adapter(), held_out_pairs()
    model.shares_prompts = shares_prompts
    expected = []
    for pair in pairs:
        alone = [pair.take(pair.branch_columns(k))._replace(branch=None) for k in (1, 2)]
        (chosen, n), (rejected, m) = row_losses(model, "a", alone)
        expected.append(rejected / m - chosen / n)
    assert pair_margins(model, "a", pairs) == pytest.approx(expected, abs=1e-6)
    data: Any = SimpleNamespace(eval=[], prompts=[], preferences=pairs)
    report = evaluate(model, "a", data, [PreferenceAccuracyMetric()], template=TEMPLATE)
    hits = [float(margin > 0) for margin in expected]
    assert report.scores["eval/preference_accuracy"] == tuple(hits)
    assert report.values["eval/preference_accuracy"] == sum(hits) / len(hits)


def test_the_loss_is_of_wanted_answers_alone() -> None:
    model, pairs = model_with_adapter(), held_out_pairs()
    chosen = [pair.take(pair.branch_columns(1)) for pair in pairs]
    plain = [row._replace(branch=None) for row in chosen]
    unwanted = [row._replace(label=0.0) for row in chosen]
    assert wanted_rows(pairs) == plain
    assert wanted_rows([*unwanted, *(row._replace(label=1.0) for row in chosen)]) == [
        row._replace(label=1.0) for row in plain
    ]
    reports = [
        evaluate(
            model, "a", SimpleNamespace(eval=rows, prompts=[]), [LossMetric()], template=TEMPLATE
        )
        for rows in (pairs, plain)
    ]
    assert reports[0].values == pytest.approx(reports[1].values)


def test_the_same_evaluation_gives_the_same_report_and_intervals() -> None:
    first, second = (
        evaluate(model_with_adapter(), "a", held_out(), [LossMetric()], template=TEMPLATE)
        for _ in range(2)
    )
    assert first == second


def test_only_the_first_rows_are_read_when_asked_without_intervals() -> None:
    report = evaluate(
        model_with_adapter(), None, held_out(), [LossMetric()], template=TEMPLATE, rows=2
    )
    measured = report.metrics["eval/loss"]
    assert (measured.rows, measured.low, measured.high) == (2, None, None)
    assert report.slot is None


def test_without_held_out_rows_the_error_names_the_field() -> None:
    empty: Any = SimpleNamespace(eval=[], prompts=[], preferences=[])
    for metric in (LossMetric(), ExactMatchMetric(), PreferenceAccuracyMetric()):
        with pytest.raises(DataError, match=r"data\.eval"):
            evaluate(model_with_adapter(), None, empty, [metric], template=TEMPLATE)


def test_a_broken_adapter_is_an_error_not_a_score() -> None:
    model = model_with_adapter()
    with torch.no_grad():
        next(iter(model.parameters("a").values())).fill_(float("nan"))
    data = held_out()
    data.preferences = held_out_pairs()
    for metric in (LossMetric(), ExactMatchMetric(), PreferenceAccuracyMetric()):
        with pytest.raises(TrainingError, match="'a'"):
            evaluate(model, "a", data, [metric], template=TEMPLATE)
