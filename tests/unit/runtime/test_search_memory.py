"""The search and memory: what cannot fit is not proposed, what ran out is learned from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch

from graft.core.errors import ConfigError, TrainingError
from graft.data.mixture import prepare_parts
from graft.engine.memory.cap import Limits, MemoryCap
from graft.engine.memory.shape import ModelShape
from graft.engine.run import LoadedRun, load_run
from graft.engine.run_folder import CHECKPOINTS, RECIPE_FILE
from graft.methods.base import METHODS
from graft.methods.lora import LoraMethod
from graft.pipelines.tune import tune
from graft.recipe.load import load_recipe, to_yaml
from graft.recipe.sections import Recipe
from graft.recipe.space import RecipeSpace
from graft.runtime.pack import Pack
from graft.runtime.search import num_concurrent, take_turns
from graft.runtime.searcher import Executor, StudySearcher, TrialQueue, executor_of
from graft.runtime.seats import Seats
from graft.runtime.study import Study, open_study
from graft.runtime.trials import Loss, StudyFacts, fail_trial, failure_of

FACTS = StudyFacts(
    space="space", model="model", data="data", objectives=("eval/loss min",), eval_rows=64
)
RANKS = (2, 4, 8, 16, 24, 32)


@pytest.fixture
def space(model_folder: Path, data_folder: Path, tmp_path: Path) -> RecipeSpace:
    """LoRA of many ranks."""
    content: dict[str, Any] = {
        "model": {"source": str(model_folder), "dtype": "fp32", "device": "cpu"},
        "data": {
            "train": str(data_folder / "train.jsonl"),
            "eval": str(data_folder / "eval.jsonl"),
            "max_length": 64,
        },
        "method": {"type": "lora", "r": {"choice": list(RANKS)}},
        "train": {"steps": 4, "batch_size": 2, "report_every": 2},
        "search": {"trials": 12, "sampler": "random", "eval_rows": 4},
        "eval": {"metrics": ["loss"]},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(content))
    return load_recipe(path)


@pytest.fixture
def cap(space: RecipeSpace, model_folder: Path) -> MemoryCap:
    """Room for a rank of 16 and a little more."""
    shape = ModelShape.of(model_folder)
    need = MemoryCap(shape, Limits("cpu", 2**50)).predict(space.fix({"method/r": 16}))
    return MemoryCap(shape, Limits("cpu", need.device_bytes + 1000))


@pytest.fixture
def study(space: RecipeSpace, tmp_path: Path) -> Iterator[Study]:
    with open_study(tmp_path / "study", space.sections().search, FACTS) as opened:
        yield opened


class LostSeats(Seats):
    """Seats that are all lost, for one reason."""

    def __init__(self, loss: Loss) -> None:
        self._loss = loss

    def loss_of(self, number: int) -> Loss | None:
        return self._loss


def report(searcher: StudySearcher, trial_id: str, steps: int, loss: float) -> None:
    said = {"steps": steps, "seconds": 1.0, "eval/loss": loss, "train/loss": loss}
    searcher.on_trial_result(trial_id, said)
    searcher.on_trial_complete(trial_id, said)


def test_a_point_over_the_cap_is_infeasible_and_never_proposed(
    study: Study, space: RecipeSpace, cap: MemoryCap
) -> None:
    searcher = StudySearcher(TrialQueue(study, space, turn=4, memory=cap), "packed")
    proposed = []
    for number in range(12):
        config = searcher.suggest(f"t{number}")
        assert isinstance(config, dict)
        proposed.append(config["params"]["method/r"])
        report(searcher, f"t{number}", 4, 1.0)
    assert max(proposed) <= 16
    refused = [trial for trial in study.trials if trial.state == "infeasible"]
    assert {trial.params["method/r"] for trial in refused} <= {24, 32}
    assert refused
    for trial in refused:
        assert "not enough memory: it needs" in str(trial.reason)
    assert sum(trial.state == "complete" for trial in study.trials) == 12


def test_a_trial_that_ran_out_is_recorded_with_its_measurement_and_corrects_the_rest(
    study: Study, space: RecipeSpace, cap: MemoryCap, tmp_path: Path
) -> None:
    study.enqueue([{"method/r": 16}, {"method/r": 8}, {"method/r": 16}])
    queue = TrialQueue(study, space, turn=4, memory=cap)
    searcher = StudySearcher(queue, "packed")
    first, second = searcher.suggest("a"), searcher.suggest("b")
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    found = cap.predict(space.fix({"method/r": 16}))
    needed = found.device_bytes + found.peak.total_bytes("device", exclude=["process"]) // 2
    fail_trial(Path(first["folder"]), "out of memory", needed_bytes=needed)
    searcher.on_trial_complete("a", error=True)
    record = study.trial(first["trial"])
    assert record.state == "infeasible"
    assert "out of memory: it needed at least" in str(record.reason)
    assert study.memory_factor == pytest.approx(1.53)
    report(searcher, "b", 4, 1.0)
    assert study.trial(second["trial"]).state == "complete"
    with pytest.raises(Exception, match=r"times 1\.53 as measured"):
        searcher.suggest("c")  # nothing is left that fits
    assert study.trial(2).state == "infeasible"


def test_a_lost_pack_fails_its_largest_trial_alone_and_the_others_come_again(
    study: Study, space: RecipeSpace, cap: MemoryCap
) -> None:
    ranks = (4, 16, 8)
    study.enqueue([{"method/r": rank} for rank in ranks])
    roomy = MemoryCap(cap._shape, Limits("cpu", 2**40))
    together = [space.fix({"method/r": rank}) for rank in ranks]
    needed = round(1.5 * roomy.need(together))
    queue = TrialQueue(study, space, turn=4, memory=roomy)
    searcher = StudySearcher(queue, "packed", LostSeats(Loss("the pack broke", needed)))
    for name in "abc":
        searcher.suggest(name)
    for name in "abc":
        searcher.on_trial_complete(name, error=True)
    assert [trial.state for trial in study.trials] == ["running", "infeasible", "running"]
    assert "3 trials on one base needed at least" in str(study.trial(1).reason)
    assert roomy.need(together) == pytest.approx(needed, rel=0.05)
    assert searcher.suggest("d") == "FINISHED"
    queue.refill()
    assert queue.num_resumed == 2


def test_a_trial_that_waited_for_a_seat_has_no_part_in_what_the_pack_took(
    study: Study, space: RecipeSpace, cap: MemoryCap
) -> None:
    study.enqueue([{"method/r": 16}, {"method/r": 8}])
    roomy = MemoryCap(cap._shape, Limits("cpu", 2**40))
    queue = TrialQueue(study, space, turn=4, memory=roomy)
    loss = Loss(
        "the pack broke", round(1.5 * roomy.need([space.fix({"method/r": 8})])), trials=(1,)
    )
    searcher = StudySearcher(queue, "packed", LostSeats(loss))
    for name in "ab":
        searcher.suggest(name)
    for name in "ab":
        searcher.on_trial_complete(name, error=True)
    assert [trial.state for trial in study.trials] == ["running", "infeasible"]
    assert "it needed at least" in str(study.trial(1).reason)


def test_a_pack_that_broke_for_another_reason_fails_no_trial_and_says_why(
    study: Study, space: RecipeSpace, cap: MemoryCap
) -> None:
    study.enqueue([{"method/r": 4}, {"method/r": 8}])
    queue = TrialQueue(study, space, turn=4, memory=cap)
    searcher = StudySearcher(queue, "packed", LostSeats(Loss("a reward said no")))
    for name in "ab":
        searcher.suggest(name)
    for name in "ab":
        searcher.on_trial_complete(name, error=True)
    assert [trial.state for trial in study.trials] == ["running", "running"]
    assert searcher.loss is not None
    assert searcher.loss.words == "a reward said no"
    assert study.memory_factor == 1.0


def test_trials_that_are_lost_again_and_again_end_the_search_with_the_reason(
    study: Study, space: RecipeSpace, cap: MemoryCap
) -> None:
    queue, rounds = TrialQueue(study, space, turn=4, memory=cap), []

    def turn(executor: Executor) -> Loss | None:
        searcher = StudySearcher(queue, executor, LostSeats(Loss("the pack broke: KeyError")))
        searcher.suggest("a")
        searcher.on_trial_complete("a", error=True)
        rounds.append(executor)
        return searcher.loss

    with pytest.raises(TrainingError, match="lost 3 times in a row: the pack broke: KeyError"):
        take_turns(queue, turn)
    assert rounds == ["packed"] * 3
    assert not any(trial.state == "failed" for trial in study.trials)


def test_a_trial_that_ran_out_has_used_its_share_of_the_budget_and_keeps_no_checkpoint(
    study: Study, space: RecipeSpace, cap: MemoryCap
) -> None:
    study.enqueue([{"method/r": 24}, {"method/r": 8}])
    searcher = StudySearcher(TrialQueue(study, space, turn=4, memory=cap), "packed")
    config = searcher.suggest("a")
    assert isinstance(config, dict)
    (Path(config["folder"]) / CHECKPOINTS).mkdir()
    fail_trial(Path(config["folder"]), "out of memory", needed_bytes=1)
    searcher.on_trial_complete("a", error=True)
    refused, ran_out = study.trial(0), study.trial(1)
    assert (refused.state, ran_out.state) == ("infeasible", "infeasible")
    assert (refused.has_ended, ran_out.has_ended) == (False, True)
    assert study.records.num_ended == 1
    assert study.num_remaining == study.section.trials - 1
    assert not (Path(config["folder"]) / CHECKPOINTS).exists()


def test_only_the_best_trial_keeps_its_checkpoint(
    study: Study, space: RecipeSpace, cap: MemoryCap
) -> None:
    searcher = StudySearcher(TrialQueue(study, space, turn=4, memory=cap), "packed")
    folders, numbers = [], []
    for number, (steps, loss) in enumerate([(4, 2.0), (4, 1.0), (2, 3.0), (4, 1.5)]):
        config = searcher.suggest(str(number))
        assert isinstance(config, dict)
        folders.append(Path(config["folder"]) / CHECKPOINTS)
        folders[-1].mkdir(parents=True)
        numbers.append(config["trial"])
        report(searcher, str(number), steps, loss)
    assert [folder.exists() for folder in folders] == [False, True, False, False]
    assert study.best().number == numbers[1]


def on_any_device(space: RecipeSpace, folder: Path, optimizer: Any) -> RecipeSpace:
    content = space.content()
    content["model"]["device"] = "auto"
    content["train"]["optimizer"] = optimizer
    path = folder / "any-device.yaml"
    path.write_text(to_yaml(content))
    return load_recipe(path)


def test_a_point_that_trains_on_a_gpu_only_is_infeasible_where_there_is_none(
    study: Study, space: RecipeSpace, cap: MemoryCap, tmp_path: Path
) -> None:
    space = on_any_device(space, tmp_path, {"choice": ["adamw", "adamw_8bit"]})
    study.enqueue([{"train/optimizer": name} for name in ("adamw_8bit", "adamw")])
    roomy = MemoryCap(cap._shape, Limits("cpu", 2**40))
    asked = TrialQueue(study, space, turn=4, memory=roomy).next("packed")
    assert asked is not None
    assert (asked.number, asked.params["train/optimizer"]) == (1, "adamw")
    assert study.trial(0).state == "infeasible"
    assert "adamw_8bit trains on a GPU only" in str(study.trial(0).reason)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU trains it")
def test_a_space_that_trains_on_a_gpu_only_is_refused_before_there_is_a_study(
    space: RecipeSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    space = on_any_device(space, tmp_path, "adamw_8bit")
    with pytest.raises(ConfigError, match="adamw_8bit trains on a GPU only"):
        tune(space, home=tmp_path / "home")
    content = space.content()
    content["model"]["device"] = "cuda"
    path = tmp_path / "cuda.yaml"
    path.write_text(to_yaml(content))
    with pytest.raises(ConfigError, match="torch sees no GPU here; use 'auto'"):
        tune(load_recipe(path), home=tmp_path / "home", address="10.0.0.1:6379")
    assert not (tmp_path / "home").exists()


def scaled(space: RecipeSpace, folder: Path, **scale: Any) -> RecipeSpace:
    path = folder / "scaled.yaml"
    path.write_text(to_yaml({**space.content(), "scale": scale}))
    return load_recipe(path)


def test_more_workers_than_the_cluster_has_are_an_impossible_point(
    study: Study, space: RecipeSpace, tmp_path: Path
) -> None:
    def admit(recipe: Recipe) -> None:
        if recipe.scale.min_workers > 1:
            raise ConfigError("the Ray cluster has 1 CPU")

    space = scaled(space, tmp_path, workers={"choice": [1, 2]})
    study.enqueue([{"scale/workers": 2}, {"scale/workers": 1}])
    queue = TrialQueue(study, space, turn=4, admit=admit)
    asked = queue.next("packed")
    assert asked is not None
    assert asked.params["scale/workers"] == 1
    assert study.trial(0).state == "infeasible"
    assert "has 1 CPU" in str(study.trial(0).reason)
    assert queue.recipes_for("dedicated") == []


def test_a_half_trained_trial_waits_where_the_cluster_has_shrunk(
    study: Study, space: RecipeSpace, tmp_path: Path
) -> None:
    num_cpus = 2

    def admit(recipe: Recipe) -> None:
        if recipe.scale.min_workers > num_cpus:
            raise ConfigError(f"the Ray cluster has {num_cpus} CPUs")

    space = scaled(space, tmp_path, workers={"choice": [1, 2]})
    points = [(2, 2), (2, 4), (1, 4)]
    study.enqueue([{"scale/workers": workers, "method/r": r} for workers, r in points])
    study.section = study.section.model_copy(update={"trials": 3})
    queue = TrialQueue(study, space, turn=4, admit=admit)
    begun, unbegun = queue.next("dedicated"), queue.next("dedicated")
    assert begun is not None
    assert unbegun is not None
    kept = study.trial_folder(begun.number) / CHECKPOINTS / "step-2"
    kept.mkdir(parents=True)

    num_cpus = 1
    queue.refill()
    assert queue.turn_of() == "packed"
    other = StudySearcher(queue, "packed")
    assert isinstance(other.suggest("a"), dict)
    report(other, "a", 4, 1.0)
    assert [trial.state for trial in study.trials[:3]] == ["running", "infeasible", "complete"]
    study.section = study.section.model_copy(update={"trials": 2})
    with pytest.raises(ConfigError, match=r"trial 0: .* has 1 CPUs\. The checkpoints are kept"):
        queue.turn_of()
    assert kept.exists()

    num_cpus = 2
    queue.refill()
    assert queue.turn_of() == "dedicated"
    again = queue.next("dedicated")
    assert again is not None
    assert again.number == begun.number


def test_a_half_trained_trial_waits_for_memory_that_was_taken_away_but_not_for_what_was_learned(
    study: Study, space: RecipeSpace, cap: MemoryCap
) -> None:
    study.enqueue([{"method/r": 16}, {"method/r": 8}])
    roomy = MemoryCap(cap._shape, Limits("cpu", 2**40))
    queue = TrialQueue(study, space, turn=4, memory=roomy)
    for _ in range(2):
        asked = queue.next("packed")
        assert asked is not None
        (study.trial_folder(asked.number) / CHECKPOINTS / "step-2").mkdir(parents=True)
    smaller = Limits("cpu", round(roomy.need([space.fix({"method/r": 8})]) + 1000))
    queue = TrialQueue(study, space, turn=4, memory=MemoryCap(cap._shape, smaller))
    assert queue.num_resumed == 1
    assert [trial.state for trial in study.trials] == ["running", "running"]
    taught = cap.limits._replace(factor=1.2)
    TrialQueue(study, space, turn=4, memory=MemoryCap(cap._shape, taught))
    assert "times 1.20 as measured" in str(study.trial(0).reason)


def test_a_trial_that_recomputes_otherwise_than_the_pack_runs_for_itself(
    study: Study, space: RecipeSpace, tmp_path: Path
) -> None:
    space = scaled(space, tmp_path, gradient_checkpointing={"choice": [False, True]})
    name, base = "scale/gradient_checkpointing", space.example()
    other = not base.scale.gradient_checkpointing
    study.enqueue([{name: other}, {name: not other}])
    queue = TrialQueue(study, space, turn=4)
    packed, alone = queue.next("packed"), queue.next("dedicated")
    assert packed is not None
    assert alone is not None
    assert packed.params[name] == base.scale.gradient_checkpointing
    assert alone.params[name] == other
    search = alone.recipe.search.model_copy(update={"executor": "packed"})
    with pytest.raises(ConfigError, match=r"scale\.gradient_checkpointing is not"):
        executor_of(alone.recipe.model_copy(update={"search": search}), base)


def test_dedicated_trials_run_beside_each_other_as_far_as_memory_allows(
    space: RecipeSpace, cap: MemoryCap
) -> None:
    recipes = [space.fix({"method/r": rank}) for rank in (2, 16)]
    need = max(cap.need([recipe]) for recipe in recipes)
    roomy = MemoryCap(cap._shape, Limits("cpu", int(3.5 * need)))
    assert num_concurrent(recipes, roomy, [8], 1) == 3
    assert num_concurrent(recipes, roomy, [8, 2], 1) == 5
    assert num_concurrent(recipes, roomy, [8, 2], 2) == 2
    assert num_concurrent(recipes, cap, [8], 1) == 1
    on_gpus = MemoryCap(cap._shape, Limits("cuda", 2**40, 2 * 10**9))
    each = on_gpus.predict(recipes[1]).host_bytes
    assert num_concurrent(recipes, on_gpus, [8], 1) == 2 * 10**9 // each < 8


class Greedy(LoraMethod):
    """LoRA that asks for 32 TB after each step, which no shape tells."""

    type: Literal["greedy"] = "greedy"  # type: ignore[assignment]
    acts_after_step: ClassVar[bool] = True

    def after_step(self, *_: Any, **__: Any) -> None:
        torch.empty(2**45, dtype=torch.uint8)


class Fragile(LoraMethod):
    """LoRA that breaks after its first step."""

    type: Literal["fragile"] = "fragile"  # type: ignore[assignment]
    acts_after_step: ClassVar[bool] = True

    def after_step(self, *_: Any, **__: Any) -> None:
        raise ZeroDivisionError


@pytest.fixture
def loaded(space: RecipeSpace, tmp_path: Path) -> LoadedRun:
    return load_run(space.fix({"method/r": 4}), tmp_path / "home")


def seated(pack: Pack, folder: Path, number: int, recipe: Recipe) -> Path:
    trial = folder / str(number)
    trial.mkdir()
    (trial / RECIPE_FILE).write_text(recipe.model_dump_json())
    pack.join(number, str(trial))
    return trial


@pytest.fixture
def pack_of(loaded: LoadedRun, tmp_path: Path) -> Iterator[Any]:
    opened: list[Pack] = []

    def run_of(recipe: Recipe) -> LoadedRun:
        prepared = prepare_parts(recipe.parts, loaded.template)
        return replace(loaded, recipe=recipe, prepared=prepared)

    def make(fits: Any = lambda *_: True) -> Pack:
        pack = Pack(loaded.model, run_of, tmp_path, slots=4, template=loaded.template, fits=fits)
        opened.append(pack)
        return pack

    yield make
    for pack in opened:
        for number in pack.seated():
            pack.leave(number)
        pack.close()


def test_a_pack_that_runs_out_of_memory_says_how_much_it_asked_for(
    pack_of: Any, loaded: LoadedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    METHODS.names()
    monkeypatch.setitem(METHODS._classes, "greedy", Greedy)
    pack = pack_of()
    recipe = loaded.recipe.model_copy(update={"method": Greedy(r=4)})
    trial = seated(pack, tmp_path, 0, recipe)
    with pytest.raises(TrainingError, match="the pack broke: RuntimeError"):
        pack.next_report(0, 0)
    loss = pack.loss()
    assert loss.needed_bytes > 2**45
    assert loss.trials == (0,)
    assert failure_of(trial) is None, "who is to blame is for the driver, which knows all trials"


def test_a_pack_that_breaks_for_another_reason_says_it(
    pack_of: Any, loaded: LoadedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    METHODS.names()
    monkeypatch.setitem(METHODS._classes, "fragile", Fragile)
    pack = pack_of()
    seated(pack, tmp_path, 0, loaded.recipe.model_copy(update={"method": Fragile(r=4)}))
    with pytest.raises(TrainingError, match="the pack broke: ZeroDivisionError"):
        pack.next_report(0, 0)
    loss = pack.loss()
    assert "ZeroDivisionError" in loss.words
    assert loss.needed_bytes is None


def test_a_trial_waits_until_it_has_room_beside_the_others(
    pack_of: Any, loaded: LoadedRun, tmp_path: Path
) -> None:
    pack = pack_of(fits=lambda recipes, needs: len(recipes) <= 2)
    for number in range(3):
        seated(pack, tmp_path, number, loaded.recipe)
    assert pack.next_report(0, 0)["steps"] == 2
    assert pack.next_report(1, 0)["steps"] == 2
    assert pack.seated()[2] == "waiting"
    assert pack.next_report(2, 0, timeout_s=1.0) is None
    pack.leave(0)
    report = None
    while report is None:
        report = pack.next_report(2, 0)
    assert report["steps"] == 2
