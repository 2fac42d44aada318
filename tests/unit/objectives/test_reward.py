"""Reward models learn as TRL's do, and PEFT reads what they come to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForSequenceClassification,
)

from graft.artifacts import Store
from graft.compressors.base import Adapter
from graft.compressors.folder import load_adapter, save_adapter
from graft.core.errors import AdapterError, DataError
from graft.data.records import Example, Message, TokenRow
from graft.data.template import ChatTemplate
from graft.engine.answer_scores import answer_scores
from graft.engine.multi import AdapterTensors, MultiAdapterModel
from graft.methods.base import HEAD, METHODS, Method
from graft.objectives._scored import scored_row
from graft.objectives.reward import RewardObjective
from graft.pipelines.compress import compress
from graft.pipelines.evaluate import evaluate_reference
from graft.pipelines.export import export
from graft.pipelines.serve import plan_serving
from graft.pipelines.train import train
from graft.pipelines.verify import verify
from graft.recipe import load_recipe
from graft.recipe.sections import Recipe
from graft.testing import tiny_model, tiny_tokenizer
from graft.testing.tiny import save_tiny_model, tiny_rows
from tests.unit.objectives._trl import (
    METHOD,
    assert_same,
    make_pairs,
    our_step,
    parts,
    stirred_tensors,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL's and PEFT's own making


SAID = (Message(role="user", content="a"), Message(role="assistant", content="b"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base") / "model")


def with_head(tensors: AdapterTensors) -> AdapterTensors:
    generator = torch.Generator().manual_seed(8)
    return {**tensors, HEAD: {"weight": 0.3 * torch.randn(1, 64, generator=generator)}}


def stirred(method: Method) -> AdapterTensors:
    fresh = MultiAdapterModel(tiny_model()).fresh_tensors(method, seed=3)
    generator = torch.Generator().manual_seed(4)
    return with_head(
        {
            site: {k: v + 0.05 * torch.randn(v.shape, generator=generator) for k, v in of.items()}
            for site, of in fresh.items()
        }
    )


def classifier(base: Path) -> LlamaForSequenceClassification:
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)


def trl_loss(
    rows: list[TokenRow], folder: Path, base: Path, margin: float = 0.0, **settings: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, list[float]]]:
    import datasets
    from trl import RewardConfig, RewardTrainer

    save_adapter(folder / "adapter", Adapter(METHOD, with_head(stirred_tensors())), str(base))
    policy = PeftModel.from_pretrained(classifier(base), folder / "adapter", is_trainable=True)
    args = RewardConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to=[],
        gradient_checkpointing=False,
        **settings,
    )
    texts = {"prompt": ["hi"], "chosen": ["yes"], "rejected": ["no"]}
    trainer = RewardTrainer(
        model=policy,
        args=args,
        train_dataset=datasets.Dataset.from_dict(texts),
        processing_class=tiny_tokenizer(),
    )
    examples = [
        {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected, "margin": margin}
        for prompt, chosen, rejected in map(parts, rows)
    ]
    batch = trainer.data_collator(examples)
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 1)
    loss = trainer.compute_loss(trainer.model, dict(batch))
    policy.zero_grad()
    loss.backward()
    found = {}
    for key, value in policy.named_parameters():
        if value.requires_grad and value.grad is not None:
            path = key.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
            found[path.removesuffix(".default.weight")] = value.grad
    return loss, found, trainer._metrics["train"]


@pytest.mark.parametrize(("coefficient", "margin"), [(None, 0.0), (0.01, 0.0), (0.2, 0.7)])
def test_loss_gradients_and_figures_are_trls(
    coefficient: float | None, margin: float, tmp_path: Path, base: Path
) -> None:
    rows = make_pairs(5)
    settings = {"center_rewards_coefficient": coefficient}
    loss, gradients, metrics = trl_loss(rows, tmp_path, base, margin, **settings)
    assert "score.weight" in gradients
    objective = RewardObjective(margin=margin, **settings)
    tensors = with_head(stirred_tensors())
    ours = our_step(objective, [scored_row(row) for row in rows], tensors=tensors)
    assert_same(ours, loss, gradients)
    figures = ours[0].figures
    assert figures["reward_accuracy"] == pytest.approx(metrics["accuracy"][0], abs=1e-6)
    assert figures["reward_margin"] == pytest.approx(metrics["margin"][0], abs=1e-5)
    mean = (figures["chosen_reward"] + figures["rejected_reward"]) / 2
    assert mean == pytest.approx(metrics["mean_reward"][0], abs=1e-5)


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "prefix"])
def test_peft_scores_answers_as_the_adapter_does(name: str, tmp_path: Path, base: Path) -> None:
    method = METHODS.build(name)
    save_adapter(tmp_path / "adapter", Adapter(method, stirred(method)), str(base))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    loaded = load_adapter(tmp_path / "adapter")
    model = MultiAdapterModel(tiny_model())
    model.add_slot("own", loaded.method, tensors=loaded.tensors)
    rows = make_pairs(4)
    own = answer_scores(model, "own", [scored_row(row) for row in rows])
    theirs = AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "adapter", num_labels=1
    ).eval()
    for row, scores in zip(rows, own, strict=True):
        prompt, *answers = parts(row)
        for answer, score in zip(answers, scores, strict=True):
            ids = torch.tensor([prompt + answer])
            with torch.no_grad():
                expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            assert score == pytest.approx(float(expected), abs=1e-5)
            assert abs(score) > 1e-3


def write_pairs(folder: Path) -> Path:
    rows = [
        {"prompt": user["content"], "chosen": right["content"], "rejected": wrong["content"]}
        for (user, right), (_, wrong) in zip(
            (row["messages"] for row in tiny_rows(40)),
            (row["messages"] for row in tiny_rows(41)[1:]),
            strict=True,
        )
        if right != wrong
    ]
    for name, part in (("train.jsonl", rows[:28]), ("eval.jsonl", rows[28:])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def make_recipe(folder: Path, base: Path, method: str) -> Path:
    write_pairs(folder)
    path = folder / "recipe.yaml"
    path.write_text(
        f"name: judge\nmodel: {{source: {base}, dtype: fp32}}\n"
        "data: {train: train.jsonl, eval: eval.jsonl}\n"
        f"method: {{type: {method}}}\nobjective: {{type: reward}}\n"
        "train: {steps: 6, batch_size: 8, lr: 3.0e-3}\n"
        "eval: {metrics: [loss, preference_accuracy]}\n"
        "serve: {tenants: [{name: me, key_env: GRAFT_KEY_ME, models: [judge]}]}\n"
    )
    return path


def test_a_trained_reward_model_is_published_as_one_and_refused_for_talking(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    space = load_recipe(make_recipe(tmp_path, base, "lora"))
    result = train(space, home=home)
    stored = Store(home).resolve("judge/1")
    assert stored.record.purpose == "scores"
    assert load_adapter(stored.path).tensors[HEAD]["weight"].any()
    assert 0 < result.metrics["eval/loss"].value < 1
    again = evaluate_reference("judge/1", home=home)
    assert again.metrics == result.metrics
    assert verify("judge/1", home=home).parity == ()
    words = "is a reward model .objective reward.: it scores answers and gives none"
    with pytest.raises(AdapterError, match=f"export --format merged: .* {words}"):
        export("judge/1", tmp_path / "merged", home=home, format="merged")
    with pytest.raises(AdapterError, match=f"compress: .* {words}"):
        compress("judge/1", home=home)
    export("judge/1", tmp_path / "peft", home=home)
    monkeypatch.setenv("GRAFT_KEY_ME", "a-key-that-is-long-enough-to-be-one")
    with pytest.raises(AdapterError, match=f"serve judge: .* {words}"):
        plan_serving(space.recipe(), home=home, names={"judge": "judge/1"})


def test_a_reward_model_of_method_full_is_a_sequence_classifier(tmp_path: Path, base: Path) -> None:
    home = tmp_path / "home"
    train(load_recipe(make_recipe(tmp_path, base, "full")), home=home)
    stored = Store(home).resolve("judge/1")
    theirs = AutoModelForSequenceClassification.from_pretrained(stored.path).eval()
    assert theirs.config.num_labels == 1
    adapter = load_adapter(stored.path)
    model = MultiAdapterModel(tiny_model())
    model.add_slot("own", adapter.method, tensors=adapter.tensors)
    row = make_pairs(1)[0]
    (scores,) = answer_scores(model, "own", [scored_row(row)])
    for number, score in enumerate(scores, 1):
        with torch.no_grad():
            ids = torch.tensor([parts(row)[0] + parts(row)[number]])
            expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert score == pytest.approx(float(expected), abs=1e-5)


def test_a_classifier_is_read_at_the_end_of_turn_where_the_base_pads_with_that(
    tmp_path: Path,
) -> None:
    base = save_tiny_model(tmp_path / "base")
    end = ChatTemplate(tiny_tokenizer()).tokens(SAID).input_ids[-1]
    for name, key, value in (
        ("config.json", "pad_token_id", end),
        ("tokenizer_config.json", "pad_token", tiny_tokenizer().convert_ids_to_tokens(end)),
    ):
        path = base / name
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    home = tmp_path / "home"
    train(load_recipe(make_recipe(tmp_path, base, "full")), home=home)
    folder = Store(home).resolve("judge/1").path
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    theirs_of_words = AutoTokenizer.from_pretrained(folder)
    assert theirs.config.pad_token_id == theirs_of_words.pad_token_id != end
    model = MultiAdapterModel(tiny_model())
    adapter = load_adapter(folder)
    model.add_slot("own", adapter.method, tensors=adapter.tensors)
    asked = (Message(role="user", content="lamp?"),)
    row = ChatTemplate(tiny_tokenizer()).answers(asked, ["on", "off"], source="p:1")
    (scores,) = answer_scores(model, "own", [scored_row(row)])
    for number, score in enumerate(scores, 1):
        with torch.no_grad():
            ids = torch.tensor([row.take(row.branch_columns(number)).input_ids])
            assert ids[0, -1] == end
            expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert score == pytest.approx(float(expected), abs=1e-5)


def test_a_classifier_with_two_outputs_or_none_is_refused(tmp_path: Path) -> None:
    tensors = {**stirred_tensors(), HEAD: {"weight": torch.zeros(2, 64)}}
    save_adapter(tmp_path / "two", Adapter(METHOD, tensors), "tiny")
    with pytest.raises(AdapterError, match=r"score.weight has shape \(2, 64\).* one output"):
        load_adapter(tmp_path / "two")
    save_adapter(tmp_path / "none", Adapter(METHOD, stirred_tensors()), "tiny")
    config = tmp_path / "none" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "task_type": "SEQ_CLS"}))
    with pytest.raises(AdapterError, match=r"0 are a score\.weight"):
        load_adapter(tmp_path / "none")


def test_each_answer_is_scored_at_its_end_of_turn() -> None:
    template = ChatTemplate(tiny_tokenizer())
    asked = (Message(role="user", content="lamp?"),)
    example = Example(source="p:1", prompt=asked, chosen="on", rejected="off")
    (row,) = RewardObjective().rows(example, template)
    assert len(row.targets) == 2
    assert [row.input_ids[at - 1] in template.stop_ids for at in row.targets] == [True, True]
    talk = (Message(role="user", content="a"), Message(role="assistant", content="b"))
    with pytest.raises(DataError, match="t:1: objective 'reward' learns from pairs of answers"):
        RewardObjective().rows(Example(source="t:1", messages=talk), template)


def test_a_metric_of_answers_is_refused_for_a_reward_model() -> None:
    with pytest.raises(ValueError, match=r"reward model, which gives no answers, .*'exact_match'"):
        Recipe.model_validate(
            {
                "model": {"source": "tiny"},
                "data": {"train": "none.jsonl"},
                "objective": "reward",
                "eval": {"metrics": ["loss", "exact_match"]},
            }
        )
