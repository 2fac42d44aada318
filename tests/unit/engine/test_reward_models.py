"""Reward models as rewards and as held-out metrics; what is no reward model is refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from graft.artifacts import Store
from graft.compressors.base import Adapter
from graft.compressors.folder import load_adapter
from graft.core.errors import AdapterError, ConfigError, GraftError, ModelError
from graft.data.records import EvalPrompt
from graft.engine.answer_scores import answer_scores
from graft.engine.multi import AdapterTensors, MultiAdapterModel
from graft.engine.publish import publish_adapter
from graft.engine.run import evaluate_run, load_run, prepare_run
from graft.engine.train import Trainer
from graft.methods.base import HEAD, METHODS
from graft.metrics.reward_model import RewardModelMetric
from graft.models import resolve_model
from graft.objectives._scored import scored_row
from graft.pipelines.train import train
from graft.recipe import RecipeSpace, load_recipe
from graft.testing import tiny_model, tiny_tokenizer
from graft.testing.tiny import save_tiny_model, tiny_dataset
from tests.unit.objectives._trl import METHOD, stirred_tensors

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own making


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its rows, a published reward adapter, and a classifier of another size."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny_model(folder / "base")
    tiny_dataset(folder / "data")
    recipe = make_space(folder, objective="{type: reward}", eval="[loss]").recipe()
    publish(folder, recipe, with_head(stirred_tensors()), "judge")
    plain = make_space(folder, objective="{type: sft}", eval="[loss]").recipe()
    publish(folder, plain, stirred_tensors(), "talker")
    save_classifier(folder / "classifier", num_labels=1)
    save_classifier(folder / "two", num_labels=2)
    return folder


def with_head(tensors: AdapterTensors) -> AdapterTensors:
    generator = torch.Generator().manual_seed(8)
    return {**tensors, HEAD: {"weight": 0.3 * torch.randn(1, 64, generator=generator)}}


def publish(folder: Path, recipe: Any, tensors: AdapterTensors, name: str) -> None:
    store = Store(folder / "home")
    stored = publish_adapter(
        store,
        Adapter(METHOD, tensors),
        recipe=recipe,
        ready=resolve_model(recipe.model, folder / "home"),
        data_digest=None,
        metrics={},
    )
    assert stored.digest is not None
    store.promote(name, store.register(name, stored.digest))


def save_classifier(folder: Path, *, num_labels: int) -> None:
    base = tiny_model(seed=5, num_layers=1, hidden_size=32)
    base.save_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=num_labels)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def make_space(folder: Path, *, objective: str, eval: str, method: str = "lora") -> RecipeSpace:
    path = folder / "recipe.yaml"
    path.write_text(
        f"name: tiny\nmodel: {{source: {folder}/base, dtype: fp32}}\n"
        f"data: {{train: {folder}/data/train.jsonl, eval: {folder}/data/eval.jsonl}}\n"
        f"method: {{type: {method}}}\nobjective: {objective}\n"
        "train: {steps: 3, batch_size: 2, lr: 1.0e-3}\n"
        f"eval: {{metrics: {eval}, max_new_tokens: 6}}\n"
    )
    return load_recipe(path)


def sampling(source: str | Path) -> str:
    reward = f"{{metric: {{type: reward_model, source: {source}}}, weight: 0.5}}"
    return f"{{type: grpo, group_size: 3, max_new_tokens: 6, rewards: [{reward}]}}"


def asked() -> tuple[list[EvalPrompt], list[str]]:
    prompts = [
        EvalPrompt([], "", f"t:{at}", [{"role": "user", "content": f"lamp {at}"}])
        for at in range(4)
    ]
    return prompts, ["lamp=1", "no", "", "lamp=1 and more words"]


def test_an_adapter_scores_on_the_base_that_others_train_on(place: Path) -> None:
    space = make_space(place, objective=sampling("judge"), eval="[loss]")
    run = load_run(space.recipe(), place / "home")
    assert run.judges is not None
    assert not run.model.slots
    prompts, answers = asked()
    found = run.judges.scores([RewardModelMetric(source="judge")], prompts, answers)
    assert list(run.model.slots) == ["reward-model-0"]
    adapter = load_adapter(Store(place / "home").resolve("judge").path)
    other = MultiAdapterModel(tiny_model())
    other.add_slot("own", adapter.method, tensors=adapter.tensors)
    for prompt, answer, scores in zip(prompts, answers, found, strict=True):
        row = scored_row(run.template.answers(prompt.messages, [answer]))
        expected = answer_scores(other, "own", [row])[0][0]
        assert scores == {"judge": pytest.approx(expected, abs=1e-5)}
    assert len({round(scores["judge"], 6) for scores in found}) == 4


def test_a_classifier_scores_with_its_own_weights_and_template(place: Path) -> None:
    folder = place / "classifier"
    space = make_space(place, objective=sampling(folder), eval="[loss]")
    run = load_run(space.recipe(), place / "home")
    assert run.judges is not None
    prompts, answers = asked()
    found = run.judges.scores([RewardModelMetric(source=str(folder))], prompts, answers)
    assert not run.model.slots
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = tiny_tokenizer()
    for prompt, answer, scores in zip(prompts, answers, found, strict=True):
        talk = [*prompt.messages, {"role": "assistant", "content": answer}]
        text = str(tokenizer.apply_chat_template(talk, tokenize=False)).rstrip("\n")
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            expected = float(theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)
        assert scores[str(folder)] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("source", ["judge", "classifier"])
def test_training_and_held_out_rows_are_scored_by_it(source: str, place: Path) -> None:
    named = place / source if source == "classifier" else source
    metrics = f"[loss, {{type: reward_model, source: {named}}}]"
    space = make_space(place, objective=sampling(named), eval=metrics)
    run = load_run(space.recipe(), place / "home")
    trainer = Trainer(run.model, template=run.template, judges=run.judges)
    trainer.join("own", run.recipe, run.prepared.train)
    report = trainer.step()["own"]
    figures = report.figures
    assert figures["rollout/reward_model_std"] > 0
    assert figures["reward"] == pytest.approx(0.5 * figures["rollout/reward_model"])
    measured = evaluate_run(run, "own", rows=4)
    assert measured.metrics["eval/reward_model"].rows == 4
    assert measured.values["eval/reward_model"] != 0


def test_a_training_with_a_reward_model_is_published_and_knows_which_it_was(place: Path) -> None:
    home = place / "home"
    space = make_space(place, objective=sampling("judge"), eval="[loss]")
    result = train(space, home=home)
    assert Store(home).open(result.artifact).record.purpose == "answers"
    # The same name stands for another model now: that is another run.
    recipe = make_space(place, objective="{type: reward}", eval="[loss]").recipe()
    tensors = with_head(stirred_tensors())
    old = Store(home).names.state("judge").aliases["champion"]
    publish(place, recipe, {**tensors, HEAD: {"weight": tensors[HEAD]["weight"] * 2}}, "judge")
    (Path(result.folder) / "result.json").unlink()
    with pytest.raises(ConfigError, match="reward model judge"):
        train(space, home=home)
    Store(home).promote("judge", old)


@pytest.mark.parametrize(
    ("source", "method", "words"),
    [
        ("two", "lora", "its head has 2 outputs, and a reward is one number"),
        ("base", "lora", "its architecture is LlamaForCausalLM, and what gives a score is"),
        ("talker", "lora", "is an adapter that answers .objective sft."),
        ("judge", "full", "is an adapter of the base that method full trains itself"),
        ("nobody", "lora", "nobody"),
    ],
)
def test_what_is_no_reward_model_is_refused_before_anything_trains(
    source: str, method: str, words: str, place: Path
) -> None:
    named = place / source if (place / source).is_dir() else source
    space = make_space(place, objective=sampling(named), eval="[loss]", method=method)
    with pytest.raises(GraftError, match=words):
        load_run(space.recipe(), place / "home")


def test_what_is_no_reward_model_of_the_base_is_refused_before_weights_are_read(
    place: Path,
) -> None:
    space = make_space(place, objective=sampling("talker"), eval="[loss]")
    with pytest.raises(AdapterError, match="is an adapter that answers"):
        prepare_run(space.recipe(), place / "home")


def test_an_adapter_of_another_base_and_a_model_without_a_head_are_refused(
    place: Path, tmp_path: Path
) -> None:
    save_tiny_model(tmp_path / "base", seed=1)
    tiny_dataset(tmp_path / "data")
    space = make_space(tmp_path, objective=sampling("judge"), eval="[loss]")
    with pytest.raises(AdapterError, match="'judge' is an adapter of another base"):
        load_run(space.recipe(), place / "home")
    headless = tmp_path / "headless"
    tiny_model().save_pretrained(headless)
    tiny_tokenizer().save_pretrained(headless)
    config = json.loads((headless / "config.json").read_text())
    config |= {
        "architectures": ["LlamaForSequenceClassification"],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    }
    (headless / "config.json").write_text(json.dumps(config))
    space = make_space(place, objective=sampling(headless), eval="[loss]")
    with pytest.raises(ModelError, match=r"has no score\.weight in its files"):
        load_run(space.recipe(), place / "home")


def test_an_adapter_beside_virtual_tokens_keeps_its_scores(place: Path) -> None:
    space = make_space(place, objective=sampling("judge"), eval="[loss]", method="prompt")
    run = load_run(space.recipe(), place / "home")
    assert run.judges is not None
    prompts, answers = asked()
    metric = RewardModelMetric(source="judge")
    before = run.judges.scores([metric], prompts, answers)
    run.model.add_slot("own", METHODS.build("prompt"), trainable=True)
    assert run.judges.scores([metric], prompts, answers) == before
