"""`plan`: memory at the worst point, what would fit, hours as a range, a check before loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from graft.core.errors import ConfigError
from graft.engine.memory.cap import Limits, MemoryCap
from graft.engine.memory.estimate import predict_memory
from graft.engine.memory.fit import apply
from graft.engine.memory.shape import ModelShape
from graft.pipelines.plan import Plan, plan
from graft.pipelines.plan_time import PlannedTime, least_share, num_active, trial_flops
from graft.pipelines.train import train
from graft.recipe.load import load_recipe, to_yaml
from graft.recipe.search import SearchSection
from graft.recipe.sections import Recipe
from graft.recipe.space import RecipeSpace
from graft.runtime.lengths import training_rows


def space_of(folder: Path, model: Path, data: Path, **sections: Any) -> RecipeSpace:
    content: dict[str, Any] = {
        "name": "tiny",
        "model": {"source": str(model), "dtype": "fp32", "device": "cpu"},
        "data": {
            "train": str(data / "train.jsonl"),
            "eval": str(data / "eval.jsonl"),
            "max_length": 64,
        },
        "method": {"type": "lora", "r": {"choice": [2, 8]}},
        "train": {"steps": 16, "batch_size": {"int": [2, 6]}, "lr": {"log": [1e-4, 1e-2]}},
        "search": {"trials": 6, "pack_slots": 3},
        "eval": {"metrics": ["loss"]},
        **sections,
    }
    path = folder / "recipe.yaml"
    path.write_text(to_yaml(content))
    return load_recipe(path)


@pytest.fixture
def planned(model_folder: Path, data_folder: Path, tmp_path: Path) -> Plan:
    method = {"choice": [{"type": "lora", "r": {"choice": [2, 8]}}, {"type": "full"}]}
    space = space_of(tmp_path, model_folder, data_folder, method=method)
    return plan(space, home=tmp_path, gpu="2x L4", price=0.5)


def test_each_kind_of_trial_has_its_worst_point(
    planned: Plan, model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    by_method = {branch.method: branch.memory for branch in planned.branches}
    lora, full = by_method["lora"], by_method["full"]
    assert lora is not None
    assert full is not None
    assert lora.at["train/batch_size"] == "6"
    assert lora.at["method[lora]/r"] == "8"
    worst = space_of(
        tmp_path,
        model_folder,
        data_folder,
        method={"type": "lora", "r": 8},
        train={"steps": 16, "batch_size": 6},
    ).recipe()
    found = predict_memory(worst, ModelShape.of(model_folder), "cuda")
    assert lora.device_bytes == found.device_bytes
    assert list(lora.largest.values()) == sorted(lora.largest.values(), reverse=True)
    assert lora.slots == 3
    assert full.slots == 1
    assert not lora.reason


def test_hours_and_dollars_are_a_range_with_its_basis(planned: Plan) -> None:
    time = planned.time
    assert time is not None
    assert 0 < time.low_hours < time.high_hours
    assert time.low_dollars == pytest.approx(time.low_hours * time.devices * 0.5)
    assert time.high_dollars == pytest.approx(time.high_hours * time.devices * 0.5)
    assert "15% to 60% of L4's 121 TFLOP/s" in time.basis


def test_packs_of_a_search_are_on_all_devices(
    model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    space = space_of(tmp_path, model_folder, data_folder)
    one, two, many = (plan(space, home=tmp_path, gpu=f"{n}x L4").time for n in (1, 2, 8))
    assert one is not None
    assert two is not None
    assert many is not None
    assert (one.devices, two.devices, many.devices) == (1, 2, 6), "six trials"
    assert two.high_hours == pytest.approx(one.high_hours / 2)


def test_more_workers_than_the_named_devices_are_refused(
    model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    space = space_of(tmp_path, model_folder, data_folder, scale={"workers": 4})
    (branch,) = plan(space, home=tmp_path, gpu="2x L4").branches
    assert branch.executor == "refused"
    assert "needs 4 workers" in branch.reason
    assert "set scale.workers to at most 2" in branch.reason
    (branch,) = plan(space, home=tmp_path, gpu="4x L4").branches
    assert branch.executor == "dedicated"


def hours_of_grpo(
    folder: Path, model: Path, data: Path, train: dict[str, Any] | None = None, **settings: Any
) -> PlannedTime:
    rewards = [{"metric": "exact_match"}]
    objective = {"type": "grpo", "rewards": rewards, "max_new_tokens": 8, **settings}
    fixed = {"steps": 16, "batch_size": 4, "lr": 1e-3, **(train or {})}
    space = space_of(folder, model, data, objective=objective, train=fixed)
    time = plan(space, home=folder, gpu="2x L4").time
    assert time is not None
    return time


def test_hours_count_the_answers_that_are_sampled(
    planned: Plan, model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    folders = tmp_path, model_folder, data_folder
    short = hours_of_grpo(*folders)
    assert "sampled answers of 2 to 8;" in short.basis
    long = hours_of_grpo(*folders, max_new_tokens=16)
    # As many passes as an answer has tokens; on a tiny model nothing else takes time.
    assert long.high_hours == pytest.approx(2 * short.high_hours, rel=0.02)
    seldom = hours_of_grpo(*folders, num_iterations=4)
    assert seldom.high_hours == pytest.approx(short.high_hours / 4, rel=0.02)
    passes = 16 * 8 * 2 * 5e-4  # steps, tokens, layers, seconds of a layer
    assert short.high_hours * 3600 == pytest.approx(3 * passes, rel=0.02)  # six trials, two GPUs
    assert planned.time is not None
    assert "sampled" not in planned.time.basis


def test_what_does_not_fit_names_combinations_that_do(
    model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    shape = ModelShape.of(model_folder)
    method = {"type": "full"}
    space = space_of(tmp_path, model_folder, data_folder, method=method)
    worst = space.fix({"train/batch_size": 6, "train/lr": 1e-3})
    most = predict_memory(worst, shape, "cpu").device_bytes - 100_000
    cap = f"{most}B"
    tight = space_of(
        tmp_path, model_folder, data_folder, method=method, scale={"device_memory": cap}
    )
    (branch,) = plan(tight, home=tmp_path).branches
    assert branch.memory is not None
    assert "scale.device_memory" in branch.memory.reason
    assert branch.memory.alternatives
    for changes in branch.memory.alternatives:
        changed = apply(worst, changes)
        assert changed is not None
        assert predict_memory(changed, shape, "cpu").device_bytes <= most
        assert not any(name.startswith("scale.offload") for name in changes), "a CPU is the host"


def test_a_recipe_over_its_cap_is_refused_before_anything_loads(
    model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    space = space_of(
        tmp_path,
        model_folder,
        data_folder,
        method={"type": "lora"},
        train={"steps": 2},
        scale={"device_memory": "1MB"},
    )
    with pytest.raises(ConfigError, match=r"it needs .*: .*; scale\.device_memory is 1\.00 MB"):
        train(space, home=tmp_path / "home")
    assert not (tmp_path / "home" / "runs").exists()


def test_a_base_of_unknown_shape_is_planned_without_memory(
    data_folder: Path, tmp_path: Path
) -> None:
    space = space_of(tmp_path, tmp_path / "absent", data_folder)
    found = plan(space, home=tmp_path)
    assert "does not exist" in found.unknown
    assert found.time is None
    assert [branch.memory for branch in found.branches] == [None]


def test_operations_are_those_of_the_layers_counted_by_hand(
    model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    shape = ModelShape.of(model_folder)
    recipe = space_of(
        tmp_path, model_folder, data_folder, method={"type": "lora"}, train={"steps": 10}
    ).recipe()
    assert num_active(shape) == sum(out * into for out, into in shape.linears.values())
    base = shape.base_shape
    head = base.vocab_size * base.hidden_size
    heads = shape.config.num_attention_heads * base.head_dim
    forward = 2 * (num_active(shape) + head) + 4 * base.num_layers * heads * 20 / 2
    measured = 64  # one report after ten steps
    assert trial_flops(recipe, shape, 20) == pytest.approx(20 * forward * (2 * 80 + measured))
    content = recipe.model_dump(mode="json")
    content["method"] = {"type": "full"}
    full = trial_flops(Recipe.model_validate(content), shape, 20)
    assert full == pytest.approx(20 * forward * (3 * 80 + measured))


def test_halving_trains_at_least_half_of_all_steps() -> None:
    assert least_share(SearchSection()) == pytest.approx(0.25 + 0.5 * 0.25 + 0.25 * 0.5)
    off = SearchSection.model_validate({"scheduler": {"type": "none"}})
    assert least_share(off) == 1.0


def test_a_run_that_ran_out_corrects_later_predictions(
    model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    recipe = space_of(
        tmp_path, model_folder, data_folder, method={"type": "lora"}, train={"steps": 2}
    ).recipe()
    shape = ModelShape.of(model_folder)
    found = predict_memory(recipe, shape, "cpu")
    need, own = found.device_bytes, found.peak.total_bytes("device", exclude=["process"])
    cap = MemoryCap(shape, Limits("cpu", need + own // 2))
    assert cap.refusal(recipe) is None
    assert "multiplied by 2.04" in cap.learn([recipe], need + own)
    assert "times 2.04 as measured" in str(cap.refusal(recipe))
    later = MemoryCap(shape, cap.limits)
    assert later.refusal(recipe) == cap.refusal(recipe)


def test_slots_of_one_base_need_less_than_runs_for_themselves(
    model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    small, large = (
        space_of(
            tmp_path, model_folder, data_folder, method={"type": "lora", "r": r}, train={"steps": 2}
        ).recipe()
        for r in (2, 8)
    )
    cap = MemoryCap(ModelShape.of(model_folder), Limits("cpu", 2**40))
    assert cap.need([small]) == cap.predict(small).device_bytes
    assert cap.need([large, large]) == cap.predict(large, slots=2).device_bytes
    together = cap.need([small, large])
    assert cap.need([large]) < together < cap.need([large, large])
    assert together < cap.need([small]) + cap.need([large])


def test_the_worst_point_is_found_where_less_is_more(
    model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    space = space_of(
        tmp_path,
        model_folder,
        data_folder,
        method={"type": "full"},
        train={"steps": 2, "batch_size": 4},
        scale={"workers": {"int": [1, 4]}, "zero_stage": 2},
    )
    (branch,) = plan(space, home=tmp_path, gpu="4x L4").branches
    assert branch.memory is not None
    assert branch.memory.at == {"scale/workers": "1"}
    alone = predict_memory(space.fix({"scale/workers": 1}), ModelShape.of(model_folder), "cuda")
    assert branch.memory.device_bytes == alone.device_bytes


def test_a_plan_says_which_sampler_is_taken_and_what_the_budget_amounts_to(
    model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    few = space_of(tmp_path, model_folder, data_folder, train={"steps": 16, "batch_size": 2})
    record = plan(few, home=tmp_path)
    assert record.sampler == "grid: the space has 2 points for 6 trials: each is tried once"
    assert record.warning == ""
    method = {"type": "lora", "r": {"int": [1, 100]}, "lora_alpha": {"int": [1, 100]}}
    train = {"steps": 16, "batch_size": 2}
    many = space_of(tmp_path, model_folder, data_folder, method=method, train=train)
    record = plan(many, home=tmp_path)
    assert record.sampler.startswith("tpe: ")
    assert "10,000 points and search.trials is 6" in record.warning


def test_budgets_of_tokens_and_hours_bound_the_time(
    model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    def planned(**search: Any) -> PlannedTime:
        space = space_of(
            tmp_path,
            model_folder,
            data_folder,
            train={"steps": 16, "batch_size": 4, "lr": {"log": [1e-4, 1e-2]}},
            search={"trials": 6, "pack_slots": 3, "scheduler": {"type": "none"}, **search},
        )
        found = plan(space, home=tmp_path, gpu="2x L4", price=0.5)
        assert found.spending is not None
        assert found.spending.max_tokens == search.get("max_tokens")
        assert found.time is not None
        return found.time

    free = planned()
    rows = training_rows(space_of(tmp_path, model_folder, data_folder).example(), tmp_path)
    whole = 6 * 16 * 4 * sum(len(row.input_ids) for row in rows) / len(rows)
    half = planned(max_tokens=round(whole / 2))
    assert half.high_hours == pytest.approx(free.high_hours / 2, rel=1e-3)
    assert half.low_hours == pytest.approx(free.low_hours / 2, rel=1e-3)
    assert "ended by search.max_tokens" in half.basis
    assert planned(max_tokens=round(whole * 2)) == free
    short = planned(max_hours=free.low_hours / 2)
    assert short.low_hours == short.high_hours == free.low_hours / 2
    assert "ended by search.max_hours" in short.basis
    assert short.high_dollars == pytest.approx(short.high_hours * short.devices * 0.5)
