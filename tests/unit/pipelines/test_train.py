import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from graft.artifacts import Store
from graft.cli.main import build_app
from graft.compressors.folder import load_adapter
from graft.core.errors import AdapterError, ConfigError, DataError
from graft.engine.memory.cap import Limits
from graft.engine.run_folder import read_reports
from graft.methods.base import HEAD
from graft.pipelines.adapters import promote
from graft.pipelines.room import require_room
from graft.pipelines.train import TrainedAdapter, plan_train, train
from graft.pipelines.tune import plan_tune
from graft.recipe import RecipeSpace, load_recipe


@pytest.fixture
def recipe_file(tmp_path: Path, model_folder: Path, data_folder: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: tiny\n"
        f"model: {{source: {model_folder}, dtype: fp32}}\n"
        f"data: {{train: {data_folder}/train.jsonl, eval: {data_folder}/eval.jsonl}}\n"
        "method: {type: lora, r: 4}\n"
        "train: {steps: 6, batch_size: 4, lr: 5.0e-3, report_every: 2}\n"
    )
    return path


def stop_after(space: RecipeSpace, home: Path, steps: int) -> None:
    """Trains a part of the run, as an interrupted process would have left it."""
    from graft.engine.run import load_run, train_run

    def interrupt(step: object) -> None:
        if getattr(step, "step", 0) == steps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_run(
            load_run(space.recipe(), home), home / "runs" / "tiny", home=home, on_step=interrupt
        )


def test_training_publishes_an_adapter_that_learned(recipe_file: Path, tmp_path: Path) -> None:
    result = train(load_recipe(recipe_file), home=tmp_path / "home")
    stored = Store(tmp_path / "home").resolve("tiny/1")
    assert stored.digest == result.artifact
    assert stored.record.metrics["eval/loss"].rows == 24
    assert load_adapter(stored.path).method.type == "lora"
    losses = [report["train/loss"] for report in read_reports(Path(result.folder))]
    assert len(losses) == 3
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_what_a_model_says_itself_is_learned_and_gone_on_with(
    kind: str, recipe_file: Path, tmp_path: Path
) -> None:
    objective = (
        f"objective={{type: {kind}, group_size: 3, max_new_tokens: 6, num_iterations: 4, "
        "rewards: [{metric: {type: length, max_chars: 8}}, {metric: exact_match}]}"
    )
    space = load_recipe(recipe_file, [objective])
    stop_after(space, tmp_path / "broken", 3)
    files = []
    for name in ("broken", "whole"):
        result = train(space, home=tmp_path / name)
        stored = Store(tmp_path / name).open(result.artifact)
        files.append((stored.path / "adapter_model.safetensors").read_bytes())
        assert stored.record.purpose == "answers"
        assert HEAD not in load_adapter(stored.path).tensors  # values are of training alone
    assert files[0] == files[1]
    reports = read_reports(Path(result.folder))
    assert [report["steps"] for report in reports] == [2, 4, 6]
    assert reports[0]["rollout/length"] > 0
    assert "objective/reward" not in reports[1]  # the answers were sampled before
    assert reports[2]["rollout/seconds_fraction"] > 0


def test_a_finished_training_is_returned_as_it_is(recipe_file: Path, tmp_path: Path) -> None:
    first = train(load_recipe(recipe_file), home=tmp_path / "home")
    assert train(load_recipe(recipe_file), home=tmp_path / "home") == first


def test_an_interrupted_training_goes_on_and_ends_with_the_same_weights(
    recipe_file: Path, tmp_path: Path
) -> None:
    space = load_recipe(recipe_file)
    stop_after(space, tmp_path / "cut", 5)
    assert plan_train(space, home=tmp_path / "cut").steps_done == 4
    cut, whole = (train(space, home=tmp_path / name) for name in ("cut", "whole"))
    assert cut.metrics == whole.metrics
    assert [r["steps"] for r in read_reports(Path(cut.folder))] == [2, 4, 6]


def test_a_training_that_has_learned_enough_ends_there_and_stays_so(
    recipe_file: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    whole = train(load_recipe(recipe_file, ["name=whole"]), home=home)
    reports = read_reports(Path(whole.folder))
    enough = f"train.stop_at_loss={reports[1]['train/loss']}"
    space = load_recipe(recipe_file, [enough])
    stop_after(space, home, 3)
    first = train(space, home=home)
    assert first.steps == 4
    (home / "runs" / "tiny" / "result.json").unlink()
    again = train(space, home=home)
    assert (again.steps, again.loss, again.metrics) == (first.steps, first.loss, first.metrics)
    with pytest.raises(ConfigError, match=r"train\.report_every"):
        train(load_recipe(recipe_file, [enough, "train.report_every=3"]), home=home)


def test_plain_text_trains_to_an_adapter_and_its_rows_keep_their_length(
    recipe_file: Path, tmp_path: Path
) -> None:
    for name, numbers in (("train", range(40)), ("eval", range(40, 50))):
        lines = (json.dumps({"text": f"the lamp of room {n} is number {n * n}"}) for n in numbers)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    data = f"data={{train: {tmp_path}/train.jsonl, eval: {tmp_path}/eval.jsonl, max_length: 64}}"
    objective, home = "objective=pretrain", tmp_path / "home"
    result = train(load_recipe(recipe_file, [data, objective]), home=home)
    losses = [report["train/loss"] for report in read_reports(Path(result.folder))]
    assert losses[-1] < losses[0]
    assert result.metrics["eval/loss"].rows == 10
    with pytest.raises(ConfigError, match=r"data\.max_length = 64, this recipe has 32"):
        train(load_recipe(recipe_file, [data, objective, "data.max_length=32"]), home=home)


def test_preferences_are_learned_from_an_adapter_on_and_after_an_interruption(
    recipe_file: Path, tmp_path: Path
) -> None:
    for name, numbers in (("train", range(40)), ("eval", range(40, 52))):
        pairs = (
            {"prompt": f"put lamp to {n}", "chosen": f"lamp={n}", "rejected": f"door={n}"}
            for n in numbers
        )
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    pairs_given = [
        f"data={{train: {tmp_path}/train.jsonl, eval: {tmp_path}/eval.jsonl}}",
        "objective={type: dpo, beta: 0.5}",
        "eval.metrics=[loss, preference_accuracy]",
    ]
    reports = {}
    for name in ("cut", "whole"):
        home = tmp_path / name
        start = train(load_recipe(recipe_file, ["name=start"]), home=home).artifact
        space = load_recipe(recipe_file, [*pairs_given, f"train.init_from={start}"])
        if name == "cut":
            stop_after(space, home, 5)
        result = train(space, home=home)
        assert result.metrics["eval/preference_accuracy"].rows == 12
        reports[name] = [
            {key: value for key, value in report.items() if key.startswith(("objective/", "eval/"))}
            for report in read_reports(Path(result.folder))
        ]
    assert reports["cut"] == reports["whole"]
    margins = [report["objective/reward_margin"] for report in reports["whole"]]
    assert margins[0] < margins[-1]


def test_a_run_does_not_go_on_from_another_adapter_of_the_same_name(
    recipe_file: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    first = train(load_recipe(recipe_file, ["name=start"]), home=home).artifact
    promote("start", 1, home=home)
    space = load_recipe(recipe_file, ["train.init_from=start"])
    stop_after(space, home, 3)
    shutil.rmtree(home / "runs" / "start")
    train(load_recipe(recipe_file, ["name=start", "train.seed=8"]), home=home)
    promote("start", 2, home=home)
    with pytest.raises(ConfigError, match=rf"train\.init_from = .{first[:8]}"):
        train(space, home=home)


def test_a_finished_training_from_another_start_is_not_returned(
    recipe_file: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    train(load_recipe(recipe_file, ["name=start"]), home=home)
    promote("start", 1, home=home)
    space = load_recipe(recipe_file, ["train.init_from=start"])
    first = train(space, home=home)
    assert train(space, home=home) == first
    shutil.rmtree(home / "runs" / "start")
    train(load_recipe(recipe_file, ["name=start", "train.seed=8"]), home=home)
    promote("start", 2, home=home)
    with pytest.raises(ConfigError, match=r"train\.init_from = "):
        train(space, home=home)


def test_a_run_does_not_go_on_under_another_chat_template(
    recipe_file: Path, model_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    space = load_recipe(recipe_file, [f"model.source={tmp_path / 'model'}"])
    train(space, home=tmp_path / "home")
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text("{# mended #}" + template.read_text())
    with pytest.raises(ConfigError, match="holds a run with chat template ="):
        train(space, home=tmp_path / "home")


def test_an_experts_load_stands_in_every_report(recipe_file: Path, tmp_path: Path) -> None:
    from graft.engine.run import load_run, train_run

    method = "method={type: mixture, num_experts: 2, r: 2}"
    run = load_run(load_recipe(recipe_file, [method]).recipe(), tmp_path)
    train_run(run, tmp_path / "run", home=tmp_path, eval_rows=8)
    for report in read_reports(tmp_path / "run"):
        loads = [report[f"method/expert_load_{at}"] for at in range(2)]
        assert sum(loads) == pytest.approx(1.0)
        assert max(loads) - 1e-6 <= report["method/top_expert_load"] <= 1.0


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    recipe_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    space = load_recipe(recipe_file)
    stop_after(space, tmp_path / "home", 5)
    newest = max((tmp_path / "home/runs/tiny/checkpoint").glob("step-*"))
    (newest / "adapter.safetensors").write_bytes(b"torn")
    result = train(space, home=tmp_path / "home")
    assert "passing over checkpoint" in caplog.text
    assert result.metrics == train(space, home=tmp_path / "whole").metrics


def test_another_recipe_under_the_same_name_is_refused_with_the_field(
    recipe_file: Path, tmp_path: Path
) -> None:
    train(load_recipe(recipe_file), home=tmp_path / "home")
    with pytest.raises(ConfigError, match=r"train\.lr = 0\.005, this recipe has 0\.001"):
        train(load_recipe(recipe_file, ["train.lr=0.001"]), home=tmp_path / "home")


def test_a_recipe_with_holes_is_sent_to_tune(recipe_file: Path, tmp_path: Path) -> None:
    space = load_recipe(recipe_file, ["train.lr={log: [1.0e-4, 1.0e-2]}"])
    with pytest.raises(ConfigError, match=r"train/lr.*graft tune"):
        train(space, home=tmp_path / "home")


def test_the_verb_prints_one_json_record(recipe_file: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    command = ["train", str(recipe_file), "--home", str(home), "--json"]
    done = CliRunner().invoke(build_app(), command)
    assert done.exit_code == 0, done.output
    assert TrainedAdapter.model_validate(json.loads(done.stdout)).steps == 6


def test_bad_input_leaves_nothing_in_the_home(
    recipe_file: Path, tmp_path: Path, model_folder: Path
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    home = tmp_path / "home"
    with pytest.raises(DataError, match="holds no rows"):
        train(load_recipe(recipe_file, [f"data.train={empty}"]), home=home)
    words = r"train\.init_from 'nobody' names .* no adapter is registered .* train it there"
    with pytest.raises(AdapterError, match=words):
        train(load_recipe(recipe_file, ["train.init_from=nobody"]), home=home)
    assert [path.name for path in home.iterdir()] == ["models"]


def test_a_start_of_another_rank_is_refused_by_its_name(recipe_file: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    train(load_recipe(recipe_file, ["train.steps=1"]), home=home)
    given = ["name=other", "method.r=8", "train.init_from=tiny/1"]
    words = r"train\.init_from 'tiny/1' has other shapes .*lora_A should be \(8, 64\), is \(4"
    with pytest.raises(AdapterError, match=words):
        train(load_recipe(recipe_file, given), home=home)


def test_a_search_of_a_recipe_without_holes_is_not_even_planned(
    recipe_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="leaves nothing open to search"):
        plan_tune(load_recipe(recipe_file), home=tmp_path / "home")


def test_a_finished_training_whose_adapter_is_damaged_is_refused(
    recipe_file: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    weights = Store(home).open(train(load_recipe(recipe_file), home=home).artifact).path
    weights /= "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(AdapterError, match="has changed since it was published"):
        train(load_recipe(recipe_file), home=home)


def test_room_is_asked_of_the_machines_that_train_not_of_this_one(
    recipe_file: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(recipe_file).recipe()
    require_room(recipe, tmp_path, limits=Limits("cuda", 2**40, 2**40))
    with pytest.raises(ConfigError, match=r"not enough memory: it needs .*what a worker has"):
        require_room(recipe, tmp_path, limits=Limits("cuda", 10**6, 2**40))
    with pytest.raises(ConfigError, match=r"workers on a node need .* of host memory"):
        require_room(recipe, tmp_path, limits=Limits("cuda", 2**40, 10**6))
