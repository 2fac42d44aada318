"""Comparing methods on the tiny model: equal search, honest rows, resumable, refusals as rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from graft.cli.main import build_app
from graft.cli.verbs.compare import broken
from graft.core.errors import ConfigError, TrainingError
from graft.core.progress import QUIET, Progress
from graft.methods.base import METHODS
from graft.methods.lora import LoraMethod
from graft.pipelines.compare import Comparison, compare, plan_compare
from graft.pipelines.compare_contestants import contestants
from graft.pipelines.compare_process import UnitCrashError, UnitProcesses
from graft.pipelines.compare_unit import UnitRunner, UnitSpec, run_unit
from graft.recipe.load import load_recipe, to_yaml
from graft.report.comparison_facts import PointFacts, SeedFacts
from graft.report.comparison_table import columns

VARIANTS = [
    {"name": "small", "method": {"type": "lora", "r": 2}},
    {"name": "rslora", "method": {"type": "lora", "r": 4, "use_rslora": True}},
]
VARIED = ("small", "rslora")


class Units:
    """Runs units in this process, and remembers which; may break at one."""

    def __init__(self, breaks_at: int | None = None, error: BaseException | None = None) -> None:
        self.done: list[UnitSpec] = []
        self._breaks_at = breaks_at
        self._error = error

    def __call__(self, spec: UnitSpec, log: Path, progress: Progress) -> str:
        if len(self.done) == self._breaks_at and self._error is not None:
            raise self._error
        self.done.append(spec)
        return run_unit(spec, progress).model_dump_json()

    @property
    def kinds(self) -> list[str]:
        return [spec.kind for spec in self.done]


@pytest.fixture
def recipe_file(tmp_path: Path, model_folder: Path, data_folder: Path) -> Path:
    general = [{"text": "the quick brown fox jumps over the lazy dog"}, {"text": "a tiny model"}]
    (tmp_path / "general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in general))
    content: dict[str, Any] = {
        "name": "tiny",
        "model": {"source": str(model_folder), "dtype": "fp32", "device": "cpu"},
        "data": {"train": f"{data_folder}/train.jsonl", "eval": f"{data_folder}/eval.jsonl"},
        "train": {"steps": 4, "batch_size": 4, "lr": 1e-3, "report_every": 2},
        "search": {"trials": 1, "eval_rows": 4},
        "compare": {"search_steps": 2, "general": "general.jsonl", "variants": VARIANTS},
        "eval": {"metrics": ["loss"], "max_new_tokens": 4},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(content))
    return path


def compared(
    path: Path, units: Units, methods: Sequence[str] = VARIED, *overrides: str
) -> Comparison:
    space = load_recipe(path, overrides)
    return compare(space, home=path.parent / "home", methods=methods, run_unit=units)


def test_every_method_gets_the_same_search_and_a_full_row(recipe_file: Path) -> None:
    units = Units()
    result = compared(
        recipe_file, units, VARIED, "search.trials=2", "eval.metrics=[loss, exact_match]"
    )
    assert units.kinds == ["base", *["point", "point", "seed", "seed"] * 2]
    small, rslora = result.methods
    assert small.num_trainable is not None
    assert rslora.num_trainable == 2 * small.num_trainable
    base = result.bases["none"]
    assert small.trainable_share == small.num_trainable / base.num_parameters
    for row in result.methods:
        assert row.state == "done"
        assert len(row.points) == len(row.seeds) == 2
        assert [seed.seed for seed in row.seeds] == [1, 2]
        assert [point.steps for point in row.seeds[0].curve] == [0, 2, 4]
        assert {"eval/loss", "eval/perplexity", "eval/exact_match"} == set(row.metrics)
        assert row.metrics["eval/exact_match"].rows == 24
        assert row.file_bytes is not None
        assert row.file_bytes > 4 * (row.num_trainable or 0)
        assert row.peak_bytes == max(seed.peak_bytes for seed in row.seeds)
        assert row.seconds_to_loss is not None
        assert row.general is not None
        assert row.general_before == base.general.value if base.general else None
        assert row.forgetting == pytest.approx(row.general.value / (row.general_before or 1) - 1)
    assert result.front
    assert Comparison.model_validate_json(result.model_dump_json()) == result


def test_methods_are_compared_on_a_mixture_and_on_each_of_its_sources(
    recipe_file: Path, data_folder: Path
) -> None:
    texts = [{"text": f"the lamp of room {number} is blue"} for number in range(12)]
    for name, part in (("rooms.jsonl", texts[:8]), ("rooms_eval.jsonl", texts[8:])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (recipe_file.parent / name).write_text(lines)
    content = load_recipe(recipe_file).content()
    commands = {"name": "commands", **content["data"], "eval_limit": 8, "weight": 2}
    rooms = {"name": "rooms", "train": "rooms.jsonl", "eval": "rooms_eval.jsonl"}
    content["data"] = {"sources": [commands, {**rooms, "objective": {"type": "pretrain"}}]}
    content["eval"]["metrics"] = ["loss", "exact_match"]
    content["search"]["objectives"] = [{"metric": "eval/rooms/loss", "mode": "min"}]
    recipe_file.write_text(to_yaml(content))
    result = compared(recipe_file, Units())
    for row in result.methods:
        assert row.state == "done", row.reason
        assert {name: metric.rows for name, metric in row.metrics.items()} == {
            "eval/loss": 12,
            "eval/commands/loss": 8,
            "eval/rooms/loss": 4,
            "eval/perplexity": 12,
            "eval/commands/perplexity": 8,
            "eval/rooms/perplexity": 4,
            "eval/exact_match": 8,
            "eval/commands/exact_match": 8,
        }
        assert row.points[0].metrics["eval/rooms/loss"] > 0
        assert row.forgetting is not None
    assert result.quality == "eval/exact_match"
    told = {"perplexity", "commands/perplexity", "rooms/perplexity", "commands/exact match"}
    assert told <= {column.heading for column in columns(result)}
    with pytest.raises(ConfigError, match=r"begun with another data;"):
        compared(recipe_file, Units(), VARIED, "data.sources.0.weight=3")


@pytest.mark.parametrize("breaks_at", [1, 3])
def test_a_killed_comparison_goes_on_where_it_stopped(recipe_file: Path, breaks_at: int) -> None:
    first = Units(breaks_at, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        compared(recipe_file, first, ["small"])
    second = Units()
    result = compared(recipe_file, second, ["small"])
    assert first.kinds + second.kinds == ["base", "point", "seed", "seed"]
    third = Units()
    assert compared(recipe_file, third, ["small"]).methods == result.methods
    assert not third.done


def test_a_copy_of_the_folder_goes_on_elsewhere(
    recipe_file: Path, model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    first = Units(4, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):  # in the second method's only point
        compared(recipe_file, first)
    here, there = recipe_file.parent / "home" / "comparisons", tmp_path / "elsewhere"
    shutil.copytree(model_folder, there / "model")
    shutil.copytree(data_folder, there / "data")
    shutil.copy(recipe_file.parent / "general.jsonl", there)
    shutil.copytree(here, there / "home" / "comparisons")
    text = recipe_file.read_text().replace(str(model_folder), str(there / "model"))
    (there / "recipe.yaml").write_text(text.replace(str(data_folder), str(there / "data")))
    second = Units()
    result = compared(there / "recipe.yaml", second)
    assert first.kinds + second.kinds == ["base", *["point", "seed", "seed"] * 2]
    kept = Comparison.model_validate_json((here / "tiny" / "comparison.json").read_text())
    assert [row.name for row in kept.methods] == ["small"]
    assert result.methods[0].seeds == kept.methods[0].seeds
    assert [row.state for row in result.methods] == ["done", "done"]


def test_rows_under_another_chat_template_do_not_stand_beside_these(
    recipe_file: Path, model_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    source = f"model.source={tmp_path / 'model'}"
    compared(recipe_file, Units(), ["small"], source)
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text("{# mended #}" + template.read_text())
    with pytest.raises(ConfigError, match="begun with another data"):
        compared(recipe_file, Units(), ["rslora"], source)


def test_a_row_stands_until_the_next_run_comes_to_it(recipe_file: Path) -> None:
    first = compared(recipe_file, Units())
    page = recipe_file.parent / "home" / "comparisons" / "tiny" / "comparison.json"
    for record in page.parent.glob("methods/rslora/seed-*.json"):
        record.unlink()
    again = Units(0, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        compared(recipe_file, again)
    assert Comparison.model_validate_json(page.read_text()).methods == first.methods


def test_a_larger_budget_adds_points_and_no_more(recipe_file: Path) -> None:
    compared(recipe_file, Units(), ["small"])
    units = Units()
    (row,) = compared(recipe_file, units, ["small"], "search.trials=2").methods
    assert len(row.points) == 2
    was_better = row.settings == row.points[1].params
    assert units.kinds == ["point", *["seed"] * (2 if was_better else 0)]


def test_progress_counts_the_trainings_of_the_row_and_none_of_an_earlier_best(
    recipe_file: Path,
) -> None:
    (row,) = compared(recipe_file, Units(), ["small"]).methods
    plan = plan_compare(load_recipe(recipe_file), home=recipe_file.parent / "home", methods=VARIED)
    assert (plan.num_steps, plan.num_steps_done) == (2 * (2 + 2 * 4), 2 + 2 * 4)
    for seed in row.seeds:  # as a best point leaves them that another one has beaten since
        name = f"comparisons/tiny/methods/small/seed-{seed.seed}-{'0' * 12}.json"
        (recipe_file.parent / "home" / name).write_text(seed.model_dump_json())
    again = plan_compare(load_recipe(recipe_file), home=recipe_file.parent / "home", methods=VARIED)
    assert again.num_steps_done == plan.num_steps_done


def test_where_nothing_is_open_one_point_is_all_there_is(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoraMethod, "search_space", classmethod(lambda cls: {}))
    three = "search.trials=3"
    units = Units()
    (row,) = compared(recipe_file, units, ["small"], three).methods
    assert units.kinds == ["base", "point", "seed", "seed"]
    assert len(row.points) == 1
    again = Units()
    assert compared(recipe_file, again, ["small"], three).methods[0] == row
    assert not again.done
    home = recipe_file.parent / "home"
    plan = plan_compare(load_recipe(recipe_file, [three]), home=home, methods=["small"])
    assert plan.num_steps == plan.num_steps_done == 2 + 2 * 4


def test_a_budget_below_what_a_method_was_searched_is_refused(recipe_file: Path) -> None:
    compared(recipe_file, Units(), ["small"], "search.trials=2")
    units = Units()
    with pytest.raises(ConfigError, match=r"small at 2 points already.*--budget.* to 2 or more"):
        compared(recipe_file, units, VARIED)
    assert not units.done
    with pytest.raises(ConfigError, match=r"small at 2 points already"):
        plan_compare(load_recipe(recipe_file), home=recipe_file.parent / "home", methods=VARIED)


def test_rows_of_an_earlier_run_stay_on_the_page(recipe_file: Path) -> None:
    (small,) = compared(recipe_file, Units(), ["small"]).methods
    units = Units()
    result = compared(recipe_file, units, ["rslora"])
    assert units.kinds == ["point", "seed", "seed"]
    assert [row.name for row in result.methods] == ["rslora", "small"]
    assert result.methods[1].seeds == small.seeds
    assert result.bases
    page = recipe_file.parent / "home" / "comparisons" / "tiny" / "comparison.json"
    assert Comparison.model_validate_json(page.read_text()) == result


def test_rows_that_would_stay_need_the_same_budget_and_seeds(recipe_file: Path) -> None:
    compared(recipe_file, Units(), ["small"])
    for override in ("search.trials=2", "compare.seeds=3"):
        units = Units()
        with pytest.raises(ConfigError, match=r"has small with budget 1 and 2 seeds, .*name these"):
            compared(recipe_file, units, ["rslora"], override)
        assert not units.done
    (recipe_file.parent / "home" / "comparisons" / "tiny" / "comparison.json").write_text("{")
    with pytest.raises(ConfigError, match=r"no record of a comparison; remove it"):
        compared(recipe_file, Units(), ["rslora"])


def test_other_settings_under_the_same_name_are_refused_by_name(recipe_file: Path) -> None:
    compared(recipe_file, Units(), ["small"])
    with pytest.raises(ConfigError, match="another train, objective"):
        compared(recipe_file, Units(), ["small"], "train.batch_size=5")
    with pytest.raises(ConfigError, match=r"another method small"):
        compared(recipe_file, Units(), ["small"], "compare.variants.0.method.r=3")
    with pytest.raises(ConfigError, match=r"another compare\.general"):
        compared(recipe_file, Units(), ["small"], "compare.general_limit=1")


def test_a_crash_is_its_row_and_is_tried_again(recipe_file: Path) -> None:
    crash = Units(2, UnitCrashError("its process was ended by SIGKILL"))
    (row,) = compared(recipe_file, crash, ["small"]).methods
    assert row.state == "failed"
    assert "SIGKILL" in str(row.reason)
    again = Units()
    assert compared(recipe_file, again, ["small"]).methods[0].state == "done"
    assert again.kinds == ["seed", "seed"]


def test_a_point_that_diverges_is_a_result_not_an_end(recipe_file: Path) -> None:
    class Diverges(Units):
        def __call__(self, spec: UnitSpec, log: Path, progress: Progress) -> str:
            if spec.kind == "point" and "point" not in self.kinds:
                self.done.append(spec)
                raise TrainingError("step 2: loss nan")
            return super().__call__(spec, log, progress)

    (row,) = compared(recipe_file, Diverges(), ["small"], "search.trials=2").methods
    assert row.state == "done"
    assert [point.state for point in row.points] == ["failed", "complete"]
    assert row.points[0].reason == "step 2: loss nan"


def test_a_point_that_the_base_is_too_small_for_is_a_result_not_an_end(recipe_file: Path) -> None:
    (row,) = compared(recipe_file, Units(), ["lora"], "search.trials=6").methods
    assert row.state == "done"
    assert row.points[0].state == "complete", "the first is the method's own"
    reasons = {str(point.reason) for point in row.points if point.state == "failed"}
    assert reasons
    assert all("method.r: 64 is above the size" in reason for reason in reasons)


def test_bases_with_other_constants_are_other_bases(recipe_file: Path) -> None:
    stores = [{"type": "nf4"}, {"type": "nf4", "double": False}, {"type": "int8", "double": False}]
    variants = [
        {"name": f"v{at}", "method": {"type": "lora"}, "quantization": store}
        for at, store in enumerate(stores)
    ]
    space = load_recipe(recipe_file, [f"compare.variants={json.dumps(variants)}"])
    found = [one.quantization for one in contestants(space, ["v0", "v1", "v2"], budget=1)]
    assert found == ["nf4", "nf4-single", "int8"]


def test_a_method_too_long_for_the_search_is_told_how_long_that_is(recipe_file: Path) -> None:
    method = {"type": "adalora", "tinit": 2, "tfinal": 2}
    changed = f"compare.variants={json.dumps([{'name': 'ada', 'method': method}])}"
    space = load_recipe(recipe_file, [changed, "train.steps=40"])
    (ada,) = plan_compare(space, home=recipe_file.parent / "home", methods=["ada"]).methods
    assert "that is compare.search_steps, 2" in str(ada.refused)


def test_what_cannot_run_is_a_row_with_its_reason(recipe_file: Path) -> None:
    variants = [*VARIANTS, {"name": "huge", "method": {"type": "lora", "r": 4096}}]
    changed = f"compare.variants={json.dumps(variants)}"
    units = Units()
    huge, small = compared(recipe_file, units, ["huge", "small"], changed).methods
    assert huge.state == "refused"
    assert "method.r: 4096" in str(huge.reason)
    assert small.state == "done"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.eval=null", r"data\.eval is absent"),
        ("scale.workers=2", r"scale\.workers: 1"),
        ("train.steps={choice: [2, 4]}", "give one number"),
        ("train.batch_size={choice: [2, 4]}", "give one number"),
        ("train.seed={choice: [0, 1]}", "give one number"),
        ("train.init_from=some", "starts every method"),
        ("search.max_hours=2", r"search\.max_hours ends a search early"),
        ("search.objectives=[{metric: objective/reward, mode: max}]", "begins with eval/ or"),
        ("objective={type: reward}", r"compare\.general measures perplexity"),
        ("search.max_tokens=900", r"search\.max_tokens ends a search early"),
    ],
)
def test_a_recipe_that_cannot_be_compared_with_is_refused(
    recipe_file: Path, override: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        compared(recipe_file, Units(), ["small"], override)
    assert not (recipe_file.parent / "home").exists()


def test_unknown_methods_are_refused_with_the_nearest_name(recipe_file: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'rslora'"):
        compared(recipe_file, Units(), ["rslorra"])


def test_each_method_is_searched_in_its_own_space_whatever_the_recipe_says(
    recipe_file: Path,
) -> None:
    space = load_recipe(recipe_file, ["train.lr=1.0", "method={type: lora, r: 3}"])
    plan = plan_compare(space, home=recipe_file.parent / "home", methods=["lora", "small"])
    lora, small = plan.methods
    assert lora.searched == {
        "method/r": "choice [8, 16, 32, 64]",
        "train/lr": "log [5e-05, 0.005]",
    }
    assert set(small.searched) == {"train/lr"}
    assert plan.num_steps == 2 * (1 * 2 + 2 * 4)
    assert plan.num_steps_done == 0


def test_all_is_every_registered_type_and_every_variant_and_none_twice(recipe_file: Path) -> None:
    variants = [*VARIANTS, {"name": "vera", "method": {"type": "peft", "peft_type": "VERA"}}]
    space = load_recipe(recipe_file, [f"compare.variants={json.dumps(variants)}"])
    plan = plan_compare(space, home=recipe_file.parent / "home")
    names = [method.name for method in plan.methods]
    assert sorted(names) == sorted({*METHODS.names(), "small", "rslora", "vera"} - {"peft"})


def spec_of(path: Path, kind: str, method: dict[str, Any], lr: float = 1e-3) -> UnitSpec:
    recipe = load_recipe(path, [f"method={json.dumps(method)}", f"train.lr={lr}"]).recipe()
    home = str(path.parent / "home")
    return UnitSpec.model_validate(
        {"kind": kind, "recipe": recipe.model_dump(mode="json"), "home": home}
    )


def unit_processes(before: frozenset[int] = frozenset()) -> frozenset[int]:
    return frozenset(child.pid for child in psutil.Process().children()) - before


def test_points_share_a_process_and_a_final_training_has_its_own(recipe_file: Path) -> None:
    lora = {"type": "lora", "r": 2}
    log, before = recipe_file.parent / "logs" / "unit.log", unit_processes()
    with UnitProcesses() as run:
        seen = []
        for kind in ("base", "point", "point", "seed"):
            found = run(spec_of(recipe_file, kind, lora), log, QUIET)
            seen.append(unit_processes(before))
    assert [len(processes) for processes in seen] == [1, 1, 1, 1]
    assert seen[0] == seen[1] == seen[2] != seen[3]
    assert not unit_processes(before)
    seed = SeedFacts.model_validate_json(found)
    assert seed.steps == 4
    assert seed.peak_bytes >= 0.9 * seed.loaded_bytes > 0


@pytest.mark.parametrize("before", ["lora", "prompt", "full", "peft"])
def test_a_point_is_the_same_whoever_was_on_the_base_before(recipe_file: Path, before: str) -> None:
    units = UnitRunner()
    for method in ({"type": before}, {"type": "lora", "r": 2}, {"type": "full"}):
        spec = spec_of(recipe_file, "point", method)
        shared = units.run(spec, QUIET)
        alone = run_unit(spec, QUIET)
        assert isinstance(shared, PointFacts)
        assert isinstance(alone, PointFacts)
        assert shared.metrics == alone.metrics


def test_units_of_one_base_may_follow_one_another(recipe_file: Path) -> None:
    lora = spec_of(recipe_file, "point", {"type": "lora"})
    assert spec_of(recipe_file, "point", {"type": "ia3"}, lr=0.1).may_follow(lora)
    assert not spec_of(recipe_file, "seed", {"type": "lora"}).may_follow(lora)
    assert not lora.may_follow(spec_of(recipe_file, "seed", {"type": "lora"}))
    other = lora.model_copy(update={"recipe": {**lora.recipe, "model": {"source": "another"}}})
    assert not other.may_follow(lora)


def test_a_process_that_breaks_is_a_sentence_with_its_log_and_leaves_none(tmp_path: Path) -> None:
    spec = UnitSpec(kind="point", recipe={"version": 1}, home=str(tmp_path))
    before = unit_processes()
    with UnitProcesses() as run:
        with pytest.raises(UnitCrashError, match=r"exit code 1; its last words: .*log"):
            run(spec, tmp_path / "logs" / "unit.log", QUIET)
        assert "ValidationError" in (tmp_path / "logs" / "unit.log").read_text()
        assert not unit_processes(before)


def test_the_verb_plans_without_writing_and_prints_the_record(recipe_file: Path) -> None:
    home = recipe_file.parent / "home"
    args = ["compare", str(recipe_file), "--home", str(home), "--methods", "small", "--json"]
    plan = CliRunner().invoke(build_app(), [*args, "--dry-run"])
    assert plan.exit_code == 0, plan.output
    assert json.loads(plan.stdout)["num_steps"] == 10
    assert not home.exists()
    compared(recipe_file, Units(), ["small"])
    done = CliRunner().invoke(build_app(), args)
    assert done.exit_code == 0, done.output
    assert Comparison.model_validate_json(done.stdout).methods[0].state == "done"
    assert "<svg" in (home / "comparisons" / "tiny" / "comparison.html").read_text()


def test_a_method_that_broke_is_exit_code_1_and_a_refused_one_is_not(recipe_file: Path) -> None:
    refused = compared(recipe_file, Units(), ["small"], "compare.variants.0.method.r=4096")
    assert broken(refused) is None
    failed = compared(recipe_file, Units(0, UnitCrashError("gone")), ["rslora"])
    error = broken(failed)
    assert error is not None
    assert error.exit_code == 1
    assert "rslora (gone)" in str(error)
