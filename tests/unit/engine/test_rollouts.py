"""Rollouts in the training loop: the same packed, resumed and on workers; broken ones are told."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from graft.core.errors import DataError, ModelError, TrainingError
from graft.core.seeds import derive_seed
from graft.data.records import Example, Message, TokenRow
from graft.data.template import ChatTemplate
from graft.engine.checkpoint import load_checkpoint, save_checkpoint
from graft.engine.generate import GenerationRequest, Generator
from graft.engine.multi import MultiAdapterModel
from graft.engine.run import report_on, require_finite
from graft.engine.scoring import score_rows
from graft.engine.train import StepReport, Trainer
from graft.metrics.base import METRICS, Metric, RowOutcome
from graft.objectives.base import REFERENCE
from graft.objectives.sampling import OLD_LOGPROBS
from graft.recipe.sections import Recipe
from graft.testing import tiny_tokenizer
from graft.testing.tiny import tiny_rows
from tests.unit.engine.conftest import exact_model, make_recipe, make_rows
from tests.unit.engine.test_preference_training import OneOfTwo, largest_difference, trial

TEMPLATE = ChatTemplate(tiny_tokenizer())
SHORT = {"metric": {"type": "length", "max_chars": 6}}
GRPO = {
    "type": "grpo",
    "rewards": [SHORT, {"metric": "exact_match", "weight": 2.0}],
    "group_size": 3,
    "max_new_tokens": 8,
    "beta": 0.05,
}


def make_prompts(count: int = 9) -> list[TokenRow]:
    objective = recipe().objective
    found = []
    for number, row in enumerate(tiny_rows(count)):
        messages = tuple(Message(**message) for message in row["messages"])
        found += objective.rows(Example(source=f"t:{number}", messages=messages), TEMPLATE)
    return found


def recipe(**changes: Any) -> Recipe:
    train = {key: changes.pop(key) for key in ("seed", "steps", "batch_size") if key in changes}
    settings = {"batch_size": 3, "steps": 6, "lr": 3e-3, **train}
    return trial({**GRPO, **changes}, **settings)


ROWS = make_prompts()


def joined(*names: str, **changes: Any) -> Trainer:
    trainer = Trainer(MultiAdapterModel(exact_model()), template=TEMPLATE)
    for name in names:
        trainer.join(name, recipe(seed=ord(name), **changes), ROWS)
    return trainer


def finish(trainer: Trainer) -> dict[str, list[StepReport]]:
    reports: dict[str, list[StepReport]] = {}
    while steps := trainer.step():
        for name, report in steps.items():
            reports.setdefault(name, []).append(report)
    return reports


def sampled(trainer: Trainer, name: str) -> list[TokenRow]:
    return trainer._preparation._learners[name].sampled


def test_answers_are_what_the_slot_says_with_its_weights_and_carry_what_the_loss_reads() -> None:
    trainer = joined("a", num_iterations=2)
    reports = [trainer.step()["a"] for _ in range(3)]
    state = trainer.state("a")
    rows = sampled(trainer, "a")
    assert len(rows) == 3
    # The third step sampled with the weights of the second; they are those of a shorter run.
    other = joined("a", num_iterations=2)
    for _ in range(2):
        other.step()
    other.model.weights_changed()
    generator = Generator(other.model, TEMPLATE.tokenizer, max_length=200)
    asked = [ROWS[at] for at in trainer._preparation._learners["a"].draw(1)]
    for position, (row, prompt) in enumerate(zip(rows, asked, strict=True)):
        assert prompt.asked is not None
        assert row.source == prompt.source
        branch = row.branch or []
        ids = [[t for t, k in zip(row.input_ids, branch, strict=True) if k == n] for n in range(4)]
        assert ids[0] == prompt.asked.prompt_ids
        assert row.targets == [at for at, k in enumerate(branch) if k]
        requests = [
            GenerationRequest(
                ids[0],
                slot="a",
                max_new_tokens=8,
                temperature=1.0,
                stop_ids=TEMPLATE.stop_ids,
                seed=derive_seed("rollout", ord("a"), 2, position, sample),
            )
            for sample in range(3)
        ]
        for said, answer in zip(generator.run(requests), ids[1:], strict=True):
            assert said.token_ids + [said.stop_id] * (said.stop_id is not None) == answer
    logprobs = score_rows(other.model, "a", rows, backend=other.backend, max_tokens=500)
    bare = score_rows(other.model, None, rows, backend=other.backend, max_tokens=500)
    for row, own, reference in zip(rows, logprobs, bare, strict=True):
        extra = row.extra or {}
        assert list(extra[OLD_LOGPROBS]) == pytest.approx(list(own), abs=1e-9)
        assert list(extra[REFERENCE]) == pytest.approx(list(reference), abs=1e-9)
    assert set(state.rollout) >= {"input_ids", "branch", "extra.advantages"}
    assert reports[2].num_supervised_tokens == sum(len(row.targets) for row in rows)


def test_prompts_and_answers_change_every_num_iterations_steps() -> None:
    trainer = joined("a", num_iterations=3)
    seen = []
    for _ in range(6):
        report = trainer.step()["a"]
        seen.append([row.input_ids for row in sampled(trainer, "a")])
        assert ("reward" in report.figures) == (report.step in (1, 4))
        assert (report.figures["rollout/seconds"] > 0) == (report.step in (1, 4))
        if report.step in (1, 4):
            assert report.figures["clip_fraction"] == 0
    assert seen[0] == seen[1] == seen[2] != seen[3] == seen[4] == seen[5]


@pytest.mark.parametrize("type", ["grpo", "ppo"])
def test_slots_that_sample_together_end_as_alone(type: str) -> None:
    packed = joined("a", "b", type=type)
    packed.join("s", trial({"type": "sft"}, steps=6), make_rows(8, lengths=(5, 20)))
    finish(packed)
    for name in "ab":
        alone = joined(name, type=type)
        first = finish(alone)[name][0]
        found, expected = packed.state(name).tensors, alone.state(name).tensors
        assert largest_difference(found, expected) <= 1e-9
        assert first.figures["rollout/reward_std"] > 0


@pytest.mark.parametrize("type", ["grpo", "ppo"])
def test_a_run_resumed_amid_its_answers_ends_the_same(type: str, tmp_path: Path) -> None:
    settings = {"type": type, "num_iterations": 4}
    whole = joined("a", **settings)
    finish(whole)
    first = joined("a", **settings)
    for _ in range(2):
        first.step()
    state, _ = load_checkpoint(save_checkpoint(tmp_path, first.state("a"), {}))
    second = Trainer(MultiAdapterModel(exact_model()), template=TEMPLATE)
    second.join("a", recipe(seed=ord("a"), **settings), ROWS, state=state)
    assert sampled(second, "a") == sampled(first, "a")
    finish(second)
    assert largest_difference(second.state("a").tensors, whole.state("a").tensors) <= 1e-10
    assert whole.state("a").rollout
    assert not joined("a").state("a").rollout


class InStep(OneOfTwo):
    """Workers whose forward passes belong together, as under ZeRO-3."""

    forwards_together = True


@pytest.mark.parametrize("backend", [OneOfTwo, InStep])
@pytest.mark.parametrize("type", ["grpo", "ppo"])
def test_two_workers_sample_and_train_as_one(type: str, backend: Any) -> None:
    settings: dict[str, Any] = {"type": type, "seed": 5, "steps": 3, "num_iterations": 2}
    barrier, board = threading.Barrier(2), dict[int, Any]()
    workers = [
        Trainer(MultiAdapterModel(exact_model()), backend(rank, barrier, board), TEMPLATE)
        for rank in range(2)
    ]
    reports: dict[int, list[StepReport]] = {}

    def work(rank: int) -> None:
        workers[rank].join("a", recipe(**settings), ROWS)
        reports[rank] = finish(workers[rank])["a"]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = Trainer(MultiAdapterModel(exact_model()), template=TEMPLATE)
    alone.join("a", recipe(**settings), ROWS)
    expected = finish(alone)["a"]
    for rank, worker in enumerate(workers):
        assert sampled(worker, "a") == sampled(workers[0], "a")
        assert [row.input_ids for row in sampled(worker, "a")] == [
            row.input_ids for row in sampled(alone, "a")
        ]
        found = worker.state("a").tensors
        assert largest_difference(found, alone.state("a").tensors) <= 1e-9
        for report, other in zip(reports[rank], expected, strict=True):
            own, others = dict(report.figures), dict(other.figures)
            assert own.pop("rollout/seconds") >= 0 <= others.pop("rollout/seconds")
            assert own == pytest.approx(others, abs=1e-9)


class Moody(Metric):
    """Gives every worker something else, and fails for the first where it is told to."""

    type: Literal["moody"] = "moody"
    fails: bool = False
    needs: ClassVar[Literal["loss", "generation"]] = "generation"
    mode: ClassVar[Literal["min", "max"]] = "max"

    def score(self, rows: list[RowOutcome]) -> tuple[float, list[float]]:
        rank = int(threading.current_thread().name)
        if self.fails and rank == 0:
            raise ValueError("no mood")
        return 0.0, [float(at % 3 + 10 * rank) for at in range(len(rows))]


@pytest.mark.parametrize("fails", [False, True])
def test_one_worker_scores_for_all(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    METRICS.names()
    monkeypatch.setitem(METRICS._classes, "moody", Moody)
    rewards = [{"metric": {"type": "moody", "fails": fails}}]
    barrier, board = threading.Barrier(2), dict[int, Any]()
    found: dict[int, StepReport] = {}

    def work(rank: int) -> None:
        backend = OneOfTwo(rank, barrier, board)
        trainer = Trainer(MultiAdapterModel(exact_model()), backend, TEMPLATE)
        trainer.join("a", recipe(rewards=rewards), ROWS)
        found[rank] = trainer.step()["a"]

    threads = [threading.Thread(target=work, args=(rank,), name=str(rank)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if fails:
        assert "ValueError: no mood" in str(found[0].failure)
        assert "failed on the first worker" in str(found[1].failure)
    else:
        assert found[0].figures["reward"] == found[1].figures["reward"] == pytest.approx(1.0)


@pytest.mark.parametrize("type", ["grpo", "ppo"])
def test_the_weighted_reward_rises(type: str) -> None:
    rewards = [{"metric": {"type": "length", "max_chars": 4, "min_chars": 0}, "weight": 2.0}]
    settings: dict[str, Any] = {"type": type, "rewards": rewards, "group_size": 6, "beta": 0.0}
    settings |= {"num_iterations": 1}
    trainer = Trainer(MultiAdapterModel(exact_model()), template=TEMPLATE)
    chosen = trial({**GRPO, **settings}, steps=25, batch_size=4, lr=2e-2)
    trainer.join("a", chosen, ROWS)
    reports = finish(trainer)["a"]
    rewards_by_step = [report.figures["reward"] for report in reports]
    assert sum(rewards_by_step[-5:]) > sum(rewards_by_step[:5]) + 1.0
    for report in reports:
        assert report.figures["reward"] == pytest.approx(2 * report.figures["rollout/length"])
        assert 0 <= report.figures["rollout/truncated_fraction"] <= 1
        assert 1 <= report.figures["answer_tokens"] <= 8


def test_a_reward_that_breaks_names_the_row_and_ends_the_step() -> None:
    class BrokenMetric(Metric):
        """Gives no number for some rows."""

        type: Literal["broken"] = "broken"
        needs: ClassVar[Literal["loss", "generation", "preference"]] = "generation"
        mode: ClassVar[Literal["min", "max"]] = "max"

        def score(self, rows: list[RowOutcome]) -> tuple[float, list[float]]:
            return 0.0, [math.nan if "=" in row.reference else 1.0 for row in rows]

    METRICS.register(BrokenMetric)
    try:
        trainer = joined("a", rewards=[{"metric": "broken"}])
        trainer.join("b", recipe(seed=2), ROWS)
        before = trainer.state("a").tensors
        reports = trainer.step()
        with pytest.raises(
            TrainingError, match=r"step 1: reward 'broken' gave nan for the answer .* t:\d"
        ):
            require_finite(reports["a"], recipe())
        assert largest_difference(trainer.state("a").tensors, before) == 0
        assert reports["b"].is_finite  # its neighbour does not notice
    finally:
        del METRICS._classes["broken"]


def test_broken_weights_are_told_by_the_row_that_met_them() -> None:
    trainer = joined("a")
    with torch.no_grad():
        for parameter in trainer.model.parameters("a").values():
            parameter.fill_(math.nan)
    report = trainer.step()["a"]
    with pytest.raises(TrainingError, match=r"t:\d: 'a' gives logits that are not finite"):
        require_finite(report, recipe())


def test_an_answer_that_could_be_longer_than_the_context_is_refused_before_training() -> None:
    with pytest.raises(DataError, match=r"t:0: the prompt has \d+ tokens, an answer may have 500"):
        joined("a", max_new_tokens=500)
    virtual = recipe(max_new_tokens=450).model_copy(
        update={"method": make_recipe(method={"type": "prompt", "num_virtual_tokens": 60}).method}
    )
    trainer = Trainer(MultiAdapterModel(exact_model()), template=TEMPLATE)
    with pytest.raises(DataError, match="the adapter 60 virtual ones"):
        trainer.join("a", virtual, ROWS)
    assert not trainer.model.slots


def test_a_base_without_full_attention_and_a_trainer_without_template_are_refused() -> None:
    config = MistralConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=4,
    )
    trainer = Trainer(MultiAdapterModel(MistralForCausalLM(config)), template=TEMPLATE)
    with pytest.raises(ModelError, match="objective grpo samples with full attention only"):
        trainer.join("a", recipe(), ROWS)
    with pytest.raises(TrainingError, match="the trainer was given no chat template"):
        Trainer(MultiAdapterModel(exact_model())).join("a", recipe(), ROWS)


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ({"max_answer_tokens": 2.0}, r"answers of \S+ tokens: above max_answer_tokens 2"),
        ({"min_answer_tokens": 8.5}, r"answers of \S+ tokens: below min_answer_tokens 8.5"),
        ({"max_kl": 1e-6}, r"a divergence from the reference of \S+ a token: above max_kl 1e-06"),
    ],
)
def test_a_run_past_a_bound_ends_in_words(bounds: dict[str, float], words: str) -> None:
    chosen = recipe(seed=1, **bounds)
    trainer = Trainer(MultiAdapterModel(exact_model()), template=TEMPLATE)
    trainer.join("a", chosen, ROWS)
    reports = finish(trainer)["a"]
    with pytest.raises(TrainingError, match=rf"step 6: {words}"):
        require_finite(reports[-1], chosen)
    require_finite(reports[-1], recipe(seed=1))


def test_a_report_averages_what_was_told_of_rollouts_over_the_steps_that_had_one() -> None:
    reports = finish(joined("a", num_iterations=2))["a"]
    report = report_on(reports[:4], 1.0, 100)
    expected = (reports[0].figures["reward"] + reports[2].figures["reward"]) / 2
    assert report["objective/reward"] == pytest.approx(expected)
    elapsed = sum(step.seconds for step in reports[:4])
    sampling = sum(step.figures["rollout/seconds"] for step in reports[:4])
    assert report["rollout/seconds_fraction"] == pytest.approx(sampling / elapsed)
    assert {name for name in report if name.startswith("rollout/")} == {
        "rollout/reward_std",
        "rollout/length",
        "rollout/length_std",
        "rollout/exact_match",
        "rollout/exact_match_std",
        "rollout/truncated_fraction",
        "rollout/seconds_fraction",
    }
    assert set(reports[0].headline) == {
        "answer_tokens",
        "reward",
        "kl",
        "entropy",
        "clip_fraction",
    }


@pytest.mark.parametrize("type", ["grpo", "ppo"])
def test_without_a_use_for_the_reference_it_is_not_asked(type: str) -> None:
    chosen = recipe(type=type, beta=0.0, max_kl=None, num_iterations=1)
    whole = chosen.model_copy(update={"method": make_recipe(method={"type": "full"}).method})
    for settings in (chosen, whole):
        trainer = Trainer(MultiAdapterModel(exact_model()), template=TEMPLATE)
        trainer.join("a", settings, ROWS)
        assert not trainer._preparation._references._keys
        report = trainer.step()["a"]
        assert report.is_finite
        assert "kl" not in report.figures
        assert REFERENCE not in (sampled(trainer, "a")[0].extra or {})
