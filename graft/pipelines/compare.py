"""`compare`: every method searched alike in its own space, its best trained again, one table."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from graft.artifacts.record import tool_versions
from graft.core.errors import ConfigError, DataError
from graft.core.files import require_writable, sha256_json, write_atomic, write_json
from graft.core.model import Listed, StrictModel
from graft.core.progress import QUIET, Progress
from graft.pipelines.compare_contestants import ALL, Contestant, contestants
from graft.pipelines.compare_earlier import earlier_comparison, require_budget, with_earlier
from graft.pipelines.compare_process import RunUnit, UnitProcesses
from graft.pipelines.compare_race import Race, steps_done
from graft.pipelines.compare_rows import common_loss, front_of, with_seconds
from graft.pipelines.compare_unit import final_metrics
from graft.recipe.mixture import mixture_facts
from graft.recipe.space import describe_space
from graft.report import render_comparison
from graft.report.comparison_facts import BaseFacts, Comparison, MethodFacts
from graft.runtime.trials import StudyFacts

if TYPE_CHECKING:
    from graft.recipe.space import RecipeSpace

FACTS_FILE, RECORD_FILE, PAGE_FILE = "facts.json", "comparison.json", "comparison.html"


class PlannedMethod(StrictModel):
    """One row of a comparison to come."""

    name: str
    method: str
    """Its registered type."""
    searched: dict[str, str]
    """Parameter → its range, in words."""
    refused: str | None
    """Why it cannot run."""


class ComparePlan(StrictModel):
    """What a comparison would do."""

    name: str
    folder: str
    methods: Listed[PlannedMethod]
    budget: int
    """Searched points a method."""
    search_steps: int
    steps: int
    """Of a final training."""
    num_seeds: int
    num_steps: int
    """Training steps over all methods, points and seeds."""
    num_steps_done: int
    """Of them are done already."""


def plan_compare(
    space: RecipeSpace,
    *,
    home: Path,
    methods: Sequence[str] = (ALL,),
    budget: int | None = None,
) -> ComparePlan:
    """Says what `compare` would do; starts nothing and writes nothing.

    Raises:
        ConfigError: An unknown method, a recipe that cannot be compared with, or a budget that an
            earlier run of this comparison forbids.
    """
    from graft.runtime.storage import require_storage

    points = budget or space.sections().search.trials
    entered = contestants(space, methods, points)
    require_storage(space.sections().search)
    require_budget(_folder(space, home), entered, points)
    plan = _plan(space, home, entered, points)
    earlier_comparison(_folder(space, home) / RECORD_FILE, plan)
    return plan


def compare(
    space: RecipeSpace,
    *,
    home: Path,
    methods: Sequence[str] = (ALL,),
    budget: int | None = None,
    progress: Progress = QUIET,
    run_unit: RunUnit | None = None,
) -> Comparison:
    """Compares tuning methods, or goes on with a comparison that was interrupted.

    Units run one after another, each final training in a process of its own, so that speed and
    memory are those of one method alone. What refuses or breaks is a row with its reason; the
    others go on. Rows of methods that an earlier run had and this one does not name stay. The
    record is written after every row; a copy of the comparison's folder goes on elsewhere.

    Args:
        space: The recipe; its `method` and `train.lr` are not read.
        home: Where models and the comparison are kept.
        methods: Names of registered types and of `compare.variants`; `all` is every one.
        budget: Searched points a method; None is `search.trials`.
        progress: Told of every unit and of what it does.
        run_unit: How a unit is run; None is in processes.

    Raises:
        ConfigError: An unknown method, a recipe that cannot be compared with, or a comparison of
            this name that was begun with other settings or a larger budget, or is being run
            elsewhere.
        DataError: The data or the general text is unusable.
        ModelError: The base is missing or unsuitable.
    """
    from graft.runtime.storage import require_storage

    points = budget or space.sections().search.trials
    entered = contestants(space, methods, points)
    require_storage(space.sections().search)
    folder = _folder(space, home)
    require_writable(folder, "the comparison", keep=False)
    facts = _facts(space, home, progress)
    with _only_driver(folder), UnitProcesses() as processes:
        require_budget(folder, entered, points)
        _guard(folder, facts, entered)
        plan = _plan(space, home, entered, points)
        earlier = earlier_comparison(folder / RECORD_FILE, plan)
        left = plan.num_steps - plan.num_steps_done
        with progress.task(f"comparing {plan.name}", left, "step") as task:
            race = Race(
                folder,
                home=home,
                steps=plan.steps,
                run_unit=run_unit or processes,
                progress=progress,
                task=task,
            )
            rows: list[MethodFacts] = []
            for one in entered:
                rows.append(race.row(one, _study_facts(one, facts, space)))
                result = _summary(space, plan, *with_earlier(rows, race.bases, earlier, plan))
                _write(result, folder)
    return result


def _write(comparison: Comparison, folder: Path) -> None:
    write_atomic(folder / RECORD_FILE, comparison.model_dump_json(indent=2) + "\n")
    write_atomic(folder / PAGE_FILE, render_comparison(comparison))


def _folder(space: RecipeSpace, home: Path) -> Path:
    return home / "comparisons" / space.sections().name


def _plan(
    space: RecipeSpace, home: Path, entered: Sequence[Contestant], points: int
) -> ComparePlan:
    section, steps = space.sections().compare, space.example().train.steps
    folder = _folder(space, home)
    able = [one for one in entered if one.space is not None]
    return ComparePlan(
        name=space.sections().name,
        folder=str(folder),
        methods=tuple(
            PlannedMethod(
                name=one.name, method=one.method, searched=_ranges(one), refused=one.reason
            )
            for one in entered
        ),
        budget=points,
        search_steps=section.search_steps,
        steps=steps,
        num_seeds=section.seeds,
        num_steps=sum(one.num_points for one in able) * section.search_steps
        + len(able) * section.seeds * steps,
        num_steps_done=sum(steps_done(folder, one, steps) for one in entered),
    )


def _ranges(contestant: Contestant) -> dict[str, str]:
    if contestant.space is None:
        return {}
    return {name: describe_space(hole) for name, hole in contestant.space.holes.items()}


class _Facts(NamedTuple):
    """What the figures of a comparison depend on, beside the methods themselves."""

    model: str
    data: str
    general: str
    settings: str
    device: str


def _facts(space: RecipeSpace, home: Path, progress: Progress) -> _Facts:
    """Reads model and data once, and refuses what is wrong with them before anything runs."""
    from graft.data.mixture import prepare_parts
    from graft.data.plain_text import load_text_rows
    from graft.data.template import ChatTemplate
    from graft.engine.measurable import require_measurable
    from graft.engine.run import report_metrics
    from graft.models import load_tokenizer, pick_device, resolve_model

    example, content = space.example(), space.content()
    ready = resolve_model(example.model, home, progress=progress)
    template = ChatTemplate(load_tokenizer(ready))
    prepared = prepare_parts(example.parts, template, progress=progress)
    require_measurable(example, prepared, template.context_tokens, searched=report_metrics(example))
    if not any(any(row.is_supervised) for row in prepared.eval):
        raise DataError(
            f"{example.data.eval}: no row has an answer, and a comparison measures the loss of "
            "answers: give some"
        )
    proof = prepared.proof
    section = example.compare
    general = None
    if section.general is not None:
        general = load_text_rows(section.general, template, limit=section.general_limit)
    search = example.search
    settings: list[Any] = [
        {k: v for k, v in content.get("train", {}).items() if k != "lr"},
        content.get("objective"),
        content.get("scale"),
        example.eval.model_dump(mode="json"),
        [f"{o.metric} {o.mode}" for o in search.objectives],
        [search.eval_rows, search.sampler, search.seed, section.search_steps],
    ]
    return _Facts(
        model=sha256_json(
            [ready.digest, example.model.model_dump(mode="json", exclude={"source"})]
        ),
        data=sha256_json(
            [
                proof.digest,
                proof.template_digest,
                proof.max_length,
                *mixture_facts(example.data).values(),
            ]
        ),
        general=sha256_json(general if general is None else [row.input_ids for row in general]),
        settings=sha256_json(settings),
        device=pick_device(example.model).type,
    )


def _own_facts(contestant: Contestant) -> str:
    """Names what a method is searched over."""
    assert contestant.space is not None  # refused ones have none
    return sha256_json(
        [contestant.space.content()["method"], contestant.quantization, _ranges(contestant)]
    )


def _study_facts(contestant: Contestant, facts: _Facts, space: RecipeSpace) -> StudyFacts:
    search = space.sections().search
    return StudyFacts(
        space="" if contestant.space is None else _own_facts(contestant),
        model=facts.model,
        data=facts.data,
        objectives=tuple(f"{o.metric} {o.mode}" for o in search.objectives),
        eval_rows=search.eval_rows,
    )


def _guard(folder: Path, facts: _Facts, entered: Sequence[Contestant]) -> None:
    """Refuses records of another comparison under this name; notes what this one depends on.

    Raises:
        ConfigError: Names what has changed.
    """
    path = folder / FACTS_FILE
    known: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    given = {"base model": facts.model, "data": facts.data, "compare.general": facts.general}
    given["kind of device"] = facts.device
    given["train, objective, scale, eval, search or compare section"] = facts.settings
    given |= {f"method {one.name}": _own_facts(one) for one in entered if one.space is not None}
    changed = [name for name, digest in given.items() if known.get(name, digest) != digest]
    if changed:
        raise ConfigError(
            f"comparison {folder.name!r} was begun with another {' and another '.join(changed)}; "
            f"its rows would not compare. Give the recipe another name, or remove {folder}"
        )
    write_json(path, known | given)


@contextmanager
def _only_driver(folder: Path) -> Iterator[None]:
    import filelock

    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / "driver.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ConfigError(
            f"comparison {folder.name!r} is being run by another process; wait for it, or give "
            "this recipe another name"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _summary(
    space: RecipeSpace,
    plan: ComparePlan,
    rows: Sequence[MethodFacts],
    bases: dict[str, BaseFacts],
) -> Comparison:
    from graft.recipe.load import to_yaml

    example = space.example()
    quality, mode = _quality(space)
    loss = common_loss(rows)
    rows = [with_seconds(row, loss) for row in rows]
    return Comparison(
        name=plan.name,
        created_at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        base=example.model.source,
        bases=bases,
        budget=plan.budget,
        search_steps=plan.search_steps,
        steps=plan.steps,
        batch_size=example.train.batch_size,
        num_seeds=plan.num_seeds,
        searched=space.sections().search.objectives[0].metric,
        quality=quality,
        quality_mode=mode,
        common_loss=loss,
        methods=tuple(rows),
        front=front_of(rows, quality, mode),
        recipe=to_yaml(space.content()),
        machine=f"{os.cpu_count()} CPU cores, {platform.machine()}, {platform.system()}",
        seconds=sum(
            unit.seconds for row in rows for part in (row.points, row.seeds) for unit in part
        ),
        folder=plan.folder,
        tool_versions=tool_versions(),
    )


def _quality(space: RecipeSpace) -> tuple[str, Literal["min", "max"]]:
    """The metric of the plots: the first that needs answers, else the perplexity."""
    metrics = final_metrics(space.example())
    chosen = next((m for m in metrics if m.needs == "generation"), None)
    if chosen is None:
        return "eval/perplexity", "min"
    return f"eval/{chosen.type}", chosen.mode
