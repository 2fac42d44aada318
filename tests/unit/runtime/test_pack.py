"""A pack without Ray: seats, reports, neighbours that do not notice, checkpoints to go on from."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from graft.core.errors import DataError, TrainingError
from graft.data.mixture import prepare_parts
from graft.engine.checkpoint import newest_checkpoint
from graft.engine.run import LoadedRun, load_run
from graft.engine.run_folder import CHECKPOINTS, RECIPE_FILE, read_reports
from graft.recipe.sections import Recipe
from graft.runtime.pack import Pack
from graft.runtime.trials import failure_of
from tests.unit.engine.conftest import keep_exact


def recipe_of(model_folder: Path, data_folder: Path, **train: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"source": str(model_folder), "dtype": "fp64", "device": "cpu"},
            "data": {
                "train": str(data_folder / "train.jsonl"),
                "eval": str(data_folder / "eval.jsonl"),
                "max_length": 64,
            },
            "method": {"type": "lora", "r": 4},
            "train": {"steps": 6, "batch_size": 2, "lr": 1e-3, "report_every": 2, **train},
            "search": {"eval_rows": 4},
        }
    )


@pytest.fixture(scope="module")
def loaded(
    model_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> LoadedRun:
    run = load_run(recipe_of(model_folder, data_folder), tmp_path_factory.mktemp("home"))
    keep_exact(run.model.base)
    return run


@pytest.fixture
def packs(loaded: LoadedRun, tmp_path: Path) -> Iterator[Any]:
    opened: list[Pack] = []

    def run_of(recipe: Recipe) -> LoadedRun:
        prepared = prepare_parts(recipe.parts, loaded.template)
        return replace(loaded, recipe=recipe, prepared=prepared)

    def make(slots: int = 4, lease_s: float = 60.0, arrives_within_s: float = 60.0) -> Pack:
        opened.append(
            Pack(
                loaded.model,
                run_of,
                tmp_path,
                slots=slots,
                template=loaded.template,
                lease_s=lease_s,
                arrives_within_s=arrives_within_s,
            )
        )
        return opened[-1]

    yield make
    for pack in opened:
        for number in pack.seated():
            pack.leave(number)
        pack.close()


def seat(pack: Pack, folder: Path, number: int, recipe: Recipe) -> Path:
    trial = folder / str(number)
    trial.mkdir(parents=True, exist_ok=True)
    (trial / RECIPE_FILE).write_text(recipe.model_dump_json())
    pack.join(number, str(trial))
    return trial


def follow(pack: Pack, number: int, *, until: int = 6, after: int = 0) -> list[dict[str, float]]:
    reports: list[dict[str, float]] = []
    while after < until:
        report = pack.next_report(number, after)
        if report is not None:
            reports.append(report)
            after = int(report["steps"])
    return reports


def weights(trial: Path) -> dict[str, torch.Tensor]:
    found = newest_checkpoint(trial / CHECKPOINTS)
    assert found is not None
    return {f"{s}.{k}": t for s, of in found[0].tensors.items() for k, t in of.items()}


def require_same_end(trial: Path, other: Path) -> None:
    """Which trials step together is a matter of time; their weights are not."""
    assert read_reports(trial)[-1]["steps"] == read_reports(other)[-1]["steps"]
    expected = weights(other)
    for name, value in weights(trial).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-10)


def test_every_report_has_metrics_and_a_checkpoint(
    packs: Any, loaded: LoadedRun, tmp_path: Path
) -> None:
    pack = packs()
    trial = seat(pack, tmp_path, 0, loaded.recipe)
    reports = follow(pack, 0)
    assert [r["steps"] for r in reports] == [2, 4, 6]
    assert all(r["eval/loss"] > 0 and r["train/tokens_per_s"] > 0 for r in reports)
    assert read_reports(trial) == reports


def test_a_trial_stands_still_until_its_next_report_is_asked_for(
    packs: Any, loaded: LoadedRun, tmp_path: Path
) -> None:
    pack = packs()
    first, second = (seat(pack, tmp_path, number, loaded.recipe) for number in (0, 1))
    follow(pack, 0, until=2)
    follow(pack, 1, until=6)
    assert [r["steps"] for r in read_reports(first)] == [2]
    assert [r["steps"] for r in read_reports(second)] == [2, 4, 6]


def test_a_trial_trains_up_to_its_first_report_before_it_asks(
    packs: Any, loaded: LoadedRun, tmp_path: Path
) -> None:
    pack = packs()
    trial = seat(pack, tmp_path, 0, loaded.recipe)
    deadline = time.monotonic() + 60
    while not read_reports(trial) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert pack.seated() == {0: "training"}
    assert [r["steps"] for r in read_reports(trial)] == [2]
    seat(pack, tmp_path, 0, loaded.recipe)  # its process, which comes later
    assert [r["steps"] for r in follow(pack, 0)] == [2, 4, 6]


def test_a_trial_that_leaves_while_it_takes_its_seat_gets_none(
    loaded: LoadedRun, tmp_path: Path
) -> None:
    begun, goes_on = threading.Event(), threading.Event()

    def slow_run_of(recipe: Recipe) -> LoadedRun:
        begun.set()
        goes_on.wait(60)
        return replace(loaded, recipe=recipe)

    pack = Pack(loaded.model, slow_run_of, tmp_path, slots=2)
    with ThreadPoolExecutor(1) as pool:
        seated = pool.submit(seat, pack, tmp_path, 0, loaded.recipe)
        assert begun.wait(60)
        pack.leave(0)
        goes_on.set()
        with pytest.raises(TrainingError, match="trial 0 has left while it took its seat"):
            seated.result()
    assert pack.seated() == {}
    pack.close()


def test_the_first_step_waits_for_the_trials_that_are_on_their_way(
    packs: Any, loaded: LoadedRun, tmp_path: Path
) -> None:
    pack = packs()
    for number in range(3):
        pack.expect(number)
    for number in range(3):
        trial = seat(pack, tmp_path, number, loaded.recipe)
        if number < 2:
            assert pack.next_report(number, 0, timeout_s=0.1) is None
            assert read_reports(trial) == []
    pack.next_report(2, 0, timeout_s=0.0)
    reports = [follow(pack, number, until=2)[0] for number in range(3)]
    assert len({report["seconds"] for report in reports}) == 1, "all were in the same steps"


@pytest.mark.parametrize("end", ["its runner dies", "its recipe is wrong"])
def test_a_trial_that_ends_on_its_way_is_not_waited_for(
    end: str, packs: Any, loaded: LoadedRun, tmp_path: Path
) -> None:
    pack = packs()
    for number in range(2):
        pack.expect(number)
    seat(pack, tmp_path, 0, loaded.recipe)
    assert pack.next_report(0, 0, timeout_s=0.1) is None
    started = time.monotonic()
    if end == "its runner dies":
        pack.leave(1)
    else:
        content = {**loaded.recipe.model_dump(mode="json"), "objective": {"type": "dpo"}}
        with pytest.raises(DataError):
            seat(pack, tmp_path, 1, Recipe.model_validate_json(json.dumps(content)))
    assert follow(pack, 0)[-1]["steps"] == 6
    assert time.monotonic() - started < 30


def test_a_trial_that_never_comes_is_waited_for_only_so_long(
    packs: Any, loaded: LoadedRun, tmp_path: Path
) -> None:
    pack = packs(arrives_within_s=0.5)
    started = time.monotonic()
    for number in range(2):
        pack.expect(number)
    seat(pack, tmp_path, 0, loaded.recipe)
    assert follow(pack, 0)[-1]["steps"] == 6
    assert time.monotonic() - started >= 0.5


def test_trials_in_training_wait_no_longer_than_a_step_for_one_that_comes_later(
    packs: Any, loaded: LoadedRun, tmp_path: Path
) -> None:
    pack = packs(slots=2)
    for number in range(2):
        seat(pack, tmp_path, number, loaded.recipe)
        pack.next_report(number, 0, timeout_s=0.0)
    for number in range(2):
        follow(pack, number, until=2)
    pack.leave(1)
    pack.expect(2)
    started = time.monotonic()
    assert follow(pack, 0, after=2, until=4)[-1]["steps"] == 4
    assert time.monotonic() - started < 30
    seat(pack, tmp_path, 2, loaded.recipe)
    assert follow(pack, 2)[-1]["steps"] == 6


def test_a_trial_that_breaks_leaves_its_neighbours_results_unchanged(
    packs: Any, loaded: LoadedRun, tmp_path: Path
) -> None:
    train = loaded.recipe.train
    broken = loaded.recipe.model_copy(
        update={"train": train.model_copy(update={"lr": 1e300, "max_grad_norm": 1e300})}
    )
    pack = packs()
    alone = seat(pack, tmp_path / "alone", 0, loaded.recipe)
    expected = follow(pack, 0)
    pack.leave(0)
    trial = seat(pack, tmp_path / "beside", 1, loaded.recipe)
    seat(pack, tmp_path / "beside", 2, broken)
    with pytest.raises(TrainingError, match="not finite"):
        follow(pack, 2)
    reports = follow(pack, 1)
    losses = [r["eval/loss"] for r in expected]
    assert [r["eval/loss"] for r in reports] == pytest.approx(losses, abs=1e-10)
    require_same_end(trial, alone)


def test_a_trial_whose_neighbour_is_stopped_and_replaced_ends_as_alone(
    packs: Any, loaded: LoadedRun, tmp_path: Path
) -> None:
    first, stopped, follower = (
        loaded.recipe.model_copy(
            update={"train": loaded.recipe.train.model_copy(update={"seed": seed, "lr": lr})}
        )
        for seed, lr in ((1, 1e-3), (2, 5e-3), (3, 2e-3))
    )
    pack = packs(slots=2)
    alone = [seat(pack, tmp_path / "alone", at, one) for at, one in ((0, first), (2, follower))]
    for number in (0, 2):
        follow(pack, number)
        pack.leave(number)
    beside = [
        seat(pack, tmp_path / "beside", at, one)
        for at, one in enumerate((first, stopped, follower), start=10)
    ]
    follow(pack, 10, until=2)
    follow(pack, 11, until=4)
    assert pack.seated() == {10: "training", 11: "training", 12: "waiting"}
    pack.leave(11)
    follow(pack, 12, until=2)
    follow(pack, 10, after=2)
    follow(pack, 12, after=2)
    require_same_end(beside[0], alone[0])
    require_same_end(beside[2], alone[1])


GRPO = {
    "type": "grpo",
    "rewards": [{"metric": {"type": "length", "max_chars": 10}}],
    "group_size": 3,
    "max_new_tokens": 8,
    "num_iterations": 4,
}


def sampling(recipe: Recipe, **settings: Any) -> Recipe:
    content = {**recipe.model_dump(mode="json"), "objective": {**GRPO, **settings}}
    return Recipe.model_validate_json(json.dumps(content))


@pytest.mark.parametrize("type", ["grpo", "ppo"])
def test_trials_that_sample_end_beside_others_as_alone_and_go_on_from_a_checkpoint(
    type: str, packs: Any, loaded: LoadedRun, tmp_path: Path
) -> None:
    chosen = sampling(loaded.recipe, type=type)
    pack = packs()
    alone = seat(pack, tmp_path / "alone", 0, chosen)
    expected = follow(pack, 0)
    pack.leave(0)
    beside = seat(pack, tmp_path / "beside", 1, chosen)
    seat(pack, tmp_path / "beside", 2, loaded.recipe)
    seat(pack, tmp_path / "beside", 3, sampling(loaded.recipe, type=type, beta=0.3))
    follow(pack, 1, until=2)  # stopped there: its answers are learned for two steps more
    pack.leave(1)
    pack.close()
    later = packs()
    later.join(1, str(beside))
    reports = follow(later, 1, after=2)
    for report, other in zip(reports, expected[1:], strict=True):
        assert report["eval/loss"] == pytest.approx(other["eval/loss"], abs=1e-10)
        assert report.get("objective/reward") == other.get("objective/reward")
    require_same_end(beside, alone)


def test_a_trial_that_collapses_fails_alone(packs: Any, loaded: LoadedRun, tmp_path: Path) -> None:
    pack = packs()
    seat(pack, tmp_path, 0, sampling(loaded.recipe, max_answer_tokens=1.0))
    seat(pack, tmp_path, 1, sampling(loaded.recipe))
    with pytest.raises(TrainingError, match=r"step 1: answers of .* above max_answer_tokens 1"):
        follow(pack, 0)
    assert [report["steps"] for report in follow(pack, 1)] == [2, 4, 6]


def test_a_trial_goes_on_from_its_checkpoint_in_another_pack(
    packs: Any, loaded: LoadedRun, tmp_path: Path
) -> None:
    pack = packs()
    whole = seat(pack, tmp_path / "whole", 0, loaded.recipe)
    expected = [report["tokens"] for report in follow(pack, 0)]
    trial = seat(pack, tmp_path / "broken", 1, loaded.recipe)
    follow(pack, 1, until=2)
    pack.leave(1)
    pack.close()
    other = packs()
    seat(other, tmp_path / "broken", 1, loaded.recipe)
    assert [r["steps"] for r in follow(other, 1)] == [4, 6]
    assert [r["steps"] for r in read_reports(trial)] == [2, 4, 6]
    assert [r["tokens"] for r in read_reports(trial)] == expected
    assert expected == sorted(set(expected))
    require_same_end(trial, whole)


def test_a_finished_trial_is_not_trained_again(
    packs: Any, loaded: LoadedRun, tmp_path: Path
) -> None:
    pack = packs()
    trial = seat(pack, tmp_path, 0, loaded.recipe)
    expected = follow(pack, 0)
    pack.leave(0)
    before = json.dumps(read_reports(trial))
    seat(pack, tmp_path, 0, loaded.recipe)
    assert follow(pack, 0) == expected[-1:]
    assert json.dumps(read_reports(trial)) == before


def test_a_trial_that_has_learned_enough_is_done_and_stays_so(
    packs: Any, loaded: LoadedRun, tmp_path: Path
) -> None:
    pack = packs()
    seat(pack, tmp_path, 0, loaded.recipe)
    whole = follow(pack, 0)
    enough = loaded.recipe.train.model_copy(update={"stop_at_loss": whole[1]["train/loss"]})
    recipe = loaded.recipe.model_copy(update={"train": enough})
    seat(pack, tmp_path, 1, recipe)
    assert follow(pack, 1, until=4)[-1]["train/loss"] == whole[1]["train/loss"]
    assert pack.seated()[1] == "done"
    pack.leave(1)
    seat(pack, tmp_path, 1, recipe)
    assert [r["steps"] for r in follow(pack, 1, until=4)] == [4]
    assert pack.seated()[1] == "done"


def test_more_trials_than_slots_wait_for_a_seat(
    packs: Any, loaded: LoadedRun, tmp_path: Path
) -> None:
    pack = packs(slots=1)
    for number in range(3):
        seat(pack, tmp_path, number, loaded.recipe)
    assert pack.next_report(2, 0, timeout_s=0.2) is None
    for number in range(3):
        assert follow(pack, number)[-1]["steps"] == 6
        pack.leave(number)
        pack.leave(number)


def test_a_full_disk_is_the_packs_end_and_no_trials_fault(
    packs: Any, loaded: LoadedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_file(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", save_file)
    pack = packs(slots=2)
    folders = [seat(pack, tmp_path, number, loaded.recipe) for number in range(2)]
    for number in range(2):
        with pytest.raises(TrainingError, match="make room there"):
            follow(pack, number)
    assert "No space left" in pack.loss().words
    assert [failure_of(folder) for folder in folders] == [None, None]
    for slot in list(pack._trainer.slots):  # other tests have the same base
        pack._trainer.leave(slot)


def test_an_abandoned_seat_is_freed(packs: Any, loaded: LoadedRun, tmp_path: Path) -> None:
    pack = packs(slots=1, lease_s=5.0)
    seat(pack, tmp_path, 0, loaded.recipe)
    follow(pack, 0, until=2)  # and then its runner is gone
    seat(pack, tmp_path, 1, loaded.recipe)
    assert follow(pack, 1)[-1]["steps"] == 6
    with pytest.raises(TrainingError, match="no seat"):
        pack.next_report(0, 2)


def test_an_objective_that_the_rows_do_not_suit_fails_its_trial_with_the_reason(
    packs: Any, loaded: LoadedRun, tmp_path: Path
) -> None:
    content = {**loaded.recipe.model_dump(mode="json"), "objective": {"type": "dpo"}}
    pack = packs()
    with pytest.raises(DataError, match="learns from pairs"):
        seat(pack, tmp_path, 0, Recipe.model_validate_json(json.dumps(content)))
    failure = failure_of(tmp_path / "0")
    assert failure is not None
    assert "train.jsonl:1: objective 'dpo'" in failure.reason
    seat(pack, tmp_path, 1, loaded.recipe)
    assert follow(pack, 1)[-1]["steps"] == 6


def test_wrong_settings_fail_one_trial_with_the_reason(
    packs: Any, loaded: LoadedRun, tmp_path: Path
) -> None:
    pack = packs()
    wrong = loaded.recipe.model_copy(
        update={"method": loaded.recipe.method.model_copy(update={"target_modules": ("nowhere",)})}
    )
    alone = seat(pack, tmp_path / "alone", 1, loaded.recipe)
    follow(pack, 1)
    pack.leave(1)
    trial = seat(pack, tmp_path / "beside", 1, loaded.recipe)
    follow(pack, 1, until=2)
    seat(pack, tmp_path, 0, wrong)
    with pytest.raises(TrainingError, match="nowhere"):
        follow(pack, 0)
    follow(pack, 1, after=2)
    require_same_end(trial, alone)


def test_a_trial_that_is_being_seated_when_memory_runs_out_has_its_part_in_that(
    packs: Any, loaded: LoadedRun, model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    def run_out(*_: Any) -> None:
        if not torch.is_grad_enabled():  # it looks at its inputs
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    pack = packs()
    seat(pack, tmp_path, 0, loaded.recipe)
    follow(pack, 0, until=2)
    content = recipe_of(model_folder, data_folder).model_dump(mode="json")
    content["method"] = {"type": "lora", "r": 2, "init_lora_weights": "eva"}
    layer = loaded.model.base.get_submodule(next(iter(loaded.model.linears)))
    hook = layer.register_forward_pre_hook(run_out)
    try:
        seat(pack, tmp_path, 1, Recipe.model_validate(content))
        with pytest.raises(TrainingError, match="the pack broke: OutOfMemoryError"):
            follow(pack, 1)
    finally:
        hook.remove()
    loss = pack.loss()
    assert loss is not None
    assert loss.trials == (0, 1)
    assert loss.needed_bytes is not None
    for number in (0, 1):
        if str(number) in loaded.model.slots:
            loaded.model.remove_slot(str(number))
