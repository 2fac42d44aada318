"""`report`: gather what is known of a study and write `report.html` and `report.json` beside it."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.artifacts import Store
from graft.artifacts.names import require_name
from graft.artifacts.record import AdapterRecord, MetricValue, tool_versions
from graft.core.errors import AdapterError, ConfigError, GraftError
from graft.core.events import read_events
from graft.core.files import require_writable, write_atomic
from graft.core.model import StrictModel
from graft.core.progress import QUIET, Progress
from graft.pipelines.finals import read_finals
from graft.recipe.costs import ADAPTER_BYTES, unit_of
from graft.recipe.load import load_recipe, to_yaml
from graft.recipe.seeds import on_seed
from graft.report import (
    CurvePoint,
    DriftPoint,
    FormFacts,
    ObjectiveFacts,
    SplitFacts,
    StudyReport,
    TrialFacts,
    front,
    importances,
    render,
)

if TYPE_CHECKING:
    from graft.recipe.space import RecipeSpace
    from graft.runtime.study import Study
    from graft.runtime.trials import TrialRecord

logger = logging.getLogger(__name__)

PAGE, FIGURES = "report.html", "report.json"


class ReportResult(StrictModel):
    """Where a report is, and how much is in it."""

    study: str
    path: str
    """The HTML file."""
    figures: str
    """The same as JSON."""
    num_trials: int
    num_forms: int
    num_drift_points: int


def report(
    study: str,
    *,
    home: Path,
    base_metrics: dict[str, MetricValue] | None = None,
    progress: Progress = QUIET,
) -> ReportResult:
    """Writes the report of a study: search, data, adapters, drift, as far as each has come.

    May be called while the study runs, and again at any time.

    Args:
        study: Its name, or the path of its recipe.
        home: Where it is kept.
        base_metrics: The bare base on all held-out rows, where somebody has measured it.
        progress: Told what is being read.

    Raises:
        ConfigError: There is no such study, or its folder cannot be written.
    """
    name = study_name(study)
    facts = gather(name, home=home, base_metrics=base_metrics or {}, progress=progress)
    folder = home / "studies" / name
    require_writable(folder, "the report")
    write_atomic(folder / PAGE, render(facts))
    write_atomic(folder / FIGURES, facts.model_dump_json(indent=2) + "\n")
    return ReportResult(
        study=name,
        path=str(folder / PAGE),
        figures=str(folder / FIGURES),
        num_trials=len(facts.trials),
        num_forms=len(facts.forms),
        num_drift_points=len(facts.drift),
    )


def known_studies(home: Path) -> str:
    """Lists the studies of a home, for people who named another one."""
    names = sorted(path.parent.name for path in (home / "studies").glob("*/recipe.yaml"))
    return ", ".join(names) or "none yet"


def study_name(study: str) -> str:
    """Returns the name of a study from that name, or from the path of its recipe.

    Raises:
        ConfigError: The recipe cannot be read.
        AdapterError: It is neither a file nor a possible name.
    """
    if study.endswith((".yaml", ".yml")) or Path(study).is_file():
        return load_recipe(study).sections().name
    return require_name(study)


def gather(
    name: str,
    *,
    home: Path,
    base_metrics: dict[str, MetricValue],
    progress: Progress = QUIET,
) -> StudyReport:
    """Reads everything that is kept of a study.

    Raises:
        ConfigError: There is no such study.
    """
    from graft.runtime.loopstate import loop_timeline
    from graft.runtime.study import read_study

    folder = home / "studies" / name
    if not (folder / "recipe.yaml").is_file():
        told = home / "runs" / name / "report.jsonl"
        trained = f". What `graft train` told of {name!r} is in {told}" if told.is_file() else ""
        raise ConfigError(
            f"there is no study {name!r} in {home}; known: {known_studies(home)}{trained}"
        )
    space = load_recipe(folder / "recipe.yaml")
    sections = space.sections()
    study = read_study(folder, sections.search)
    objectives = tuple(
        ObjectiveFacts(metric=o.metric, mode=o.mode, unit=unit_of(o.metric))
        for o in sections.search.objectives
    )
    # One that goes on under another number is that one.
    own = [trial for trial in study.trials if trial.continued_by is None]
    trials = tuple(_trial(trial, study, objectives[0].metric) for trial in own)
    winner = study.winner
    return StudyReport(
        name=name,
        created_at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        base=space.example().model.source,
        objectives=objectives,
        trials=trials,
        front=front(trials, objectives),
        winner=winner.number if winner else None,
        winner_metrics=winner.metrics if winner else {},
        base_metrics=base_metrics,
        finals=read_finals(study, space),
        importances=importances(trials, objectives[0], seed=sections.search.seed),
        recipe=to_yaml(space.content()),
        chosen_recipe=_chosen(space, study),
        data=_data(space, home, progress),
        forms=_forms(name, home, progress),
        drift=tuple(
            DriftPoint.model_validate(entry.model_dump()) for entry in loop_timeline(home, name)
        ),
        tool_versions=tool_versions(),
    )


def _trial(trial: TrialRecord, study: Study, searched: str) -> TrialFacts:
    folder = study.trial_folder(trial.number)
    reports = [e for e in read_events(folder / "report.jsonl") if e["event"] == "report"]
    known = ("number", "state", "params", "metrics", "steps", "seconds", "executor", "reason")
    return TrialFacts(
        **trial.model_dump(include=set(known)),
        adapter_bytes=_adapter_bytes(folder, trial),
        searched=_curve(reports, searched)
        or tuple(CurvePoint(steps=s, value=v) for s, v in trial.reports.items()),
        train_loss=_curve(reports, "train/loss"),
    )


def _curve(reports: Sequence[dict[str, Any]], metric: str) -> tuple[CurvePoint, ...]:
    return tuple(
        CurvePoint(steps=int(r["steps"]), value=float(r[metric])) for r in reports if metric in r
    )


def _adapter_bytes(folder: Path, trial: TrialRecord) -> int | None:
    """Size as reported, else of the trained weights in the newest checkpoint; None without both."""
    if ADAPTER_BYTES in trial.metrics:
        return int(trial.metrics[ADAPTER_BYTES])
    kept = sorted(folder.glob("checkpoint/step-*/adapter.safetensors"))
    return kept[-1].stat().st_size if kept else None


def _chosen(space: RecipeSpace, study: Study) -> str | None:
    winner = study.winner
    if winner is None:
        return None
    recipe = space.fix(study.trial(winner.number).params)
    if winner.seed is not None:
        recipe = on_seed(recipe, winner.seed)
    return to_yaml(recipe.model_dump(mode="json"))


def _data(space: RecipeSpace, home: Path, progress: Progress) -> tuple[SplitFacts, ...]:
    """Proves the data again; files may have gone since, and then the table stays empty."""
    from graft.data.mixture import prepare_parts
    from graft.data.template import ChatTemplate
    from graft.models import load_tokenizer, resolve_model

    example = space.example()
    try:
        template = ChatTemplate(load_tokenizer(resolve_model(example.model, home)))
        proof = prepare_parts(example.parts, template).proof
    except GraftError as error:
        logger.warning("the report goes without its data table: %s", error)
        progress.note(f"the report goes without its data table: {error}")
        return ()
    return tuple(
        SplitFacts(
            name=name,
            source=split.source,
            num_rows=split.num_rows,
            num_tokens=split.num_tokens,
            num_supervised_tokens=split.num_supervised_tokens,
            longest_row_tokens=split.tokens_per_row.max,
            num_truncated=split.num_truncated,
            num_duplicates=split.num_duplicates,
        )
        for name, split in proof.splits.items()
    )


def _forms(name: str, home: Path, progress: Progress) -> tuple[FormFacts, ...]:
    """Every published adapter of the recipe's name, and every version of it, oldest first."""
    store = Store(home)
    pointers, versions = _pointers(store, name, progress)
    mine = []
    for digest in store.digests():
        try:
            record = store.open(digest).record
        except AdapterError as error:  # it may be of another name: the others are told
            progress.note(f"the report goes without adapter {digest[:12]}: {error}")
            continue
        if record.name == name or digest in versions:
            mine.append((digest, record))
    mine.sort(key=lambda item: (item[1].created_at, len(item[1].parents)))
    return tuple(
        FormFacts(
            digest=digest,
            form=_form(record),
            parent=next((p.digest for p in record.parents if p.relation == "compressed"), None),
            num_bytes=record.serving.num_bytes,
            created_at=record.created_at,
            metrics=record.metrics,
            parity=record.parity,
            aliases=tuple(pointers.get(digest, ())),
        )
        for digest, record in mine
    )


def _form(record: AdapterRecord) -> str:
    relation = record.parents[0].relation if record.parents else "trained"
    if relation == "compressed":
        return record.parity[-1].form if record.parity else f"compressed, {record.storage}"
    return relation


def _pointers(
    store: Store, own: str, progress: Progress
) -> tuple[dict[str, list[str]], frozenset[str]]:
    """Digest → `name@alias` of every alias that points at it; and all versions of one name."""
    found: dict[str, list[str]] = {}
    versions: frozenset[str] = frozenset()
    for name in store.names.names():
        try:
            state = store.names.state(name)
        except AdapterError as error:
            progress.note(f"the report goes without the aliases of {name!r}: {error}")
            continue
        if name == own:
            versions = frozenset(version.digest for version in state.versions)
        for alias, version in state.aliases.items():
            found.setdefault(state.digest(version), []).append(f"{name}@{alias}")
    return found, versions


def read_report(path: Path) -> StudyReport:
    """Reads a `report.json` back, for notebooks."""
    return StudyReport.model_validate(json.loads(path.read_text(encoding="utf-8")))
