"""Metrics on hand-worked rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from graft.core.errors import ConfigError, DataError
from graft.metrics.base import METRICS, Metric, RowOutcome
from graft.metrics.contains import ContainsMetric
from graft.metrics.exact_match import ExactMatchMetric
from graft.metrics.json_valid import JsonValidMetric
from graft.metrics.length import LengthMetric
from graft.metrics.loss import LossMetric
from graft.metrics.perplexity import PerplexityMetric
from graft.metrics.preference_accuracy import PreferenceAccuracyMetric
from graft.metrics.regex import RegexMetric


def losses(*rows: tuple[float, int]) -> list[RowOutcome]:
    return [RowOutcome("", None, total, count) for total, count in rows]


def answers(*rows: tuple[str, str]) -> list[RowOutcome]:
    return [RowOutcome(reference, answer, None, None) for reference, answer in rows]


def test_loss_weighs_tokens_alike_not_rows() -> None:
    value, scores = LossMetric().score(losses((2.0, 1), (3.0, 9)))
    assert value == pytest.approx(0.5)
    assert scores == [2.0, pytest.approx(1 / 3)]


def test_perplexity_of_a_uniform_guess_is_the_number_of_choices() -> None:
    value, scores = PerplexityMetric().score(losses((5 * math.log(7), 5), (2 * math.log(7), 2)))
    assert value == pytest.approx(7)
    assert scores == [pytest.approx(7), pytest.approx(7)]


def test_a_hopeless_loss_overflows_nothing() -> None:
    value, _ = PerplexityMetric().score(losses((1e6, 1)))
    assert math.isfinite(value)


def test_no_supervised_token_is_an_error() -> None:
    for metric in (LossMetric(), PerplexityMetric()):
        with pytest.raises(DataError, match="supervised"):
            metric.score(losses((0.0, 0)))


@pytest.mark.parametrize(
    ("reference", "answer", "is_match"),
    [
        ('{"a": 1, "b": [true]}', ' {"b":[true],"a":1.0}\n', True),
        ('{"a": 1}', '{"a": true}', False),
        ('{"a": 1}', '{"a": "1"}', False),
        ('{"a": 1}', '{"a": 2, "a": 1}', False),
        ('{"a": 1}', 'Sure: {"a": 1}', False),
        ('{"a": 1}', "[" * 100_000, False),
        ('{"a": 1}', '{"a": NaN}', False),
        ("[1, 2]", "[2, 1]", False),
        ("yes", " yes\n", True),
        ("yes", "Yes", False),
    ],
)
def test_exact_match_compares_json_as_values_and_text_as_text(
    reference: str, answer: str, is_match: bool
) -> None:
    assert ExactMatchMetric().score(answers((reference, answer))) == (is_match, [is_match])


def test_exact_match_is_the_share_of_matches() -> None:
    value, scores = ExactMatchMetric().score(answers(("a", "a"), ("a", "b"), ("c", "c"), ("d", "")))
    assert value == 0.5
    assert scores == [1, 0, 1, 0]


def test_exact_match_can_be_held_to_one_comparison() -> None:
    as_text = ExactMatchMetric(compare="text")
    assert as_text.score(answers(('{"a": 1}', '{"a":1}')))[0] == 0
    with pytest.raises(DataError, match="not JSON"):
        ExactMatchMetric(compare="json").score(answers(("plain", "plain")))
    assert ExactMatchMetric(ignore_case=True).score(answers(("Yes", "yES")))[0] == 1


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'perplexity'"):
        METRICS.build("perplexty")


@pytest.mark.parametrize(
    ("settings", "answer", "is_valid"),
    [
        ({}, ' {"a": [1, null]}\n', True),
        ({}, "7", True),
        ({}, "lamp", False),
        ({}, "", False),
        ({}, 'Sure: {"a": 1}', False),
        ({}, '{"a": 1, "a": 2}', False),
        ({}, '{"a": NaN}', False),
        ({}, "[" * 100_000, False),
        ({"kind": "object"}, "7", False),
        ({"kind": "object"}, "{}", True),
        ({"kind": "array"}, "{}", False),
        ({"kind": "array"}, "[]", True),
        ({"keys": ["a", "b"]}, '{"b": 1, "a": 2, "c": 3}', True),
        ({"keys": ["a", "b"]}, '{"a": 2}', False),
        ({"keys": ["a"]}, '["a"]', False),
    ],
)
def test_json_valid_tells_json_of_the_wanted_kind(
    settings: dict[str, Any], answer: str, is_valid: bool
) -> None:
    metric = JsonValidMetric.model_validate(settings)
    assert metric.score(answers(("ignored", answer))) == (is_valid, [is_valid])


@pytest.mark.parametrize(
    ("settings", "answer", "is_match"),
    [
        ({"pattern": r"\d+"}, "lamp to 7", True),
        ({"pattern": r"\d+", "full_match": True}, "lamp to 7", False),
        ({"pattern": r"\d+", "full_match": True}, " 77\n", True),
        ({"pattern": "LAMP"}, "lamp", False),
        ({"pattern": "LAMP", "ignore_case": True}, "lamp", True),
        ({"pattern": "a.b"}, "a\nb", False),
        ({"pattern": "(?s)a.b"}, "a\nb", True),
    ],
)
def test_regex_finds_its_pattern(settings: dict[str, Any], answer: str, is_match: bool) -> None:
    metric = RegexMetric.model_validate(settings)
    assert metric.score(answers(("ignored", answer))) == (is_match, [is_match])


@pytest.mark.parametrize(
    ("settings", "reference", "answer", "score"),
    [
        ({}, "four", "four", 1.0),
        ({}, "four", " fourfo\n", 0.5),  # 6 of 4 characters: half of the way to 8
        ({}, "four", "fourfour", 0.0),
        ({}, "four", "x" * 100, 0.0),
        ({}, "four", "", 0.0),
        ({"min_chars": 4}, "on", "abc", 0.75),
        ({"min_chars": 4}, "on", "abcd", 1.0),
        ({"min_chars": 4, "max_chars": 9}, "", "abcd", 1.0),
        ({"max_chars": 10, "falloff": 0.5}, "four", "x" * 10, 1.0),
        ({"max_chars": 10, "falloff": 0.5}, "four", "x" * 12, 0.6),
        ({"max_chars": 10, "falloff": 0.5}, "four", "x" * 15, 0.0),
        ({"min_chars": 0}, "four", "", 1.0),
    ],
)
def test_length_falls_linearly_outside_of_its_bounds(
    settings: dict[str, Any], reference: str, answer: str, score: float
) -> None:
    metric = LengthMetric.model_validate(settings)
    assert metric.score(answers((reference, answer)))[1] == [pytest.approx(score)]


@pytest.mark.parametrize(
    ("settings", "reference", "answer", "score"),
    [
        ({}, " lamp\n", "the lamp is on", 1.0),
        ({}, "lamp", "the Lamp is on", 0.0),
        ({"ignore_case": True}, "lamp", "the Lamp is on", 1.0),
        ({"texts": ["lamp", "on", "red", "7"]}, "", "the lamp is on", 0.5),
        ({"texts": ["LAMP"], "ignore_case": True}, "", "lamp", 1.0),
    ],
)
def test_contains_is_the_share_of_texts_found(
    settings: dict[str, Any], reference: str, answer: str, score: float
) -> None:
    metric = ContainsMetric.model_validate(settings)
    assert metric.score(answers((reference, answer))) == (score, [score])


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (ContainsMetric(), "every answer contains nothing; give `texts`"),
        (ExactMatchMetric(), "no wanted answer to compare with"),
        (LengthMetric(), "to be as long as; give `max_chars`"),
    ],
)
def test_a_row_without_a_wanted_answer_is_refused_where_one_is_compared(
    metric: Metric, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        metric.score(answers(("lamp", "lamp"), ("", "anything")))
    assert METRICS.build("json_valid").refusal("") is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"type": "regex"}, "Field required"),
        ({"type": "regex", "pattern": ""}, "at least 1 character"),
        ({"type": "regex", "pattern": "(a"}, r"'\(a' is no regular expression: missing \)"),
        ({"type": "json_valid", "kind": "array", "keys": ["a"]}, "an array has no keys"),
        ({"type": "length", "min_chars": 9, "max_chars": 4}, "max_chars 4 is below min_chars 9"),
        ({"type": "length", "falloff": 0}, "greater than 0"),
        ({"type": "contains", "texts": [""]}, "at least 1 character"),
    ],
)
def test_a_metric_refuses_settings_that_cannot_score(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        METRICS.build(settings)


def test_preference_accuracy_is_the_share_of_positive_margins_and_a_tie_is_none() -> None:
    margins = (0.2, -0.1, 0.0, 3.0)
    rows = [RowOutcome("", None, None, None, preference_margin=margin) for margin in margins]
    assert PreferenceAccuracyMetric().score(rows) == (0.5, [1.0, 0.0, 0.0, 1.0])
