"""`tune`: search a recipe's holes, and publish the best trial's adapter."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple

from graft.artifacts.record import MetricValue
from graft.core.errors import ConfigError
from graft.core.files import require_writable, sha256_json, write_atomic
from graft.core.model import Listed, StrictModel
from graft.core.progress import QUIET, Progress
from graft.pipelines.finals import rerun_folder, run_finals
from graft.recipe.mixture import mixture_facts
from graft.recipe.seeds import on_seed
from graft.report.finals_facts import Finals
from graft.runtime.budget import Budget, Spending, read_spending
from graft.runtime.trials import StudyFacts, TrialRecord, Winner

if TYPE_CHECKING:
    from graft.data.prepare import PreparedData
    from graft.recipe.sections import Recipe
    from graft.recipe.space import RecipeSpace
    from graft.runtime.pack_actor import StartedPack
    from graft.runtime.session import RaySession
    from graft.runtime.shared_rows import SharedRows
    from graft.runtime.study import Study

RECIPE_FILE = "recipe.yaml"


class TuneResult(StrictModel):
    """What a search came to."""

    study: str
    folder: str
    """Holds the journal, `events.jsonl` and `trials/<number>/`."""
    trials: Listed[TrialRecord]
    """Without the points that were impossible before they were run."""
    searched: Listed[str]
    """Metrics that were searched for."""
    best: TrialRecord
    """The winner, as it was searched."""
    finals: Finals | None
    """How the best trials did on fresh seeds; None where `search.finalists` is 0."""
    front: Listed[int]
    """Numbers of the trials that no other one beats in every searched metric."""
    artifact: str
    """Digest of the winner's adapter; with finalists, of its re-run on `finals.published_seed`."""
    metrics: dict[str, MetricValue]
    """Of that adapter, over all held-out rows."""
    num_infeasible: int
    """Those points."""
    num_run: int
    """Trials that this call ended; the others had ended before."""
    spending: Spending
    ended_by: str
    """The budget that ended the search, `search.max_tokens`."""
    seconds: float
    """Of this call."""


class TunePlan(StrictModel):
    """What a search would do."""

    study: str
    folder: str
    holes: dict[str, str]
    """Parameter → its range, in words."""
    spending: Spending
    """Of the whole study, so far."""
    num_reruns: int
    """Trainings of the finalists, after its budget."""


def plan_tune(space: RecipeSpace, *, home: Path) -> TunePlan:
    """Says what `tune` would do; starts nothing and writes nothing.

    Raises:
        ConfigError: Nothing to search.
    """
    from graft.recipe.space import describe_space

    _require_holes(space)
    sections = space.sections()
    folder = home / "studies" / sections.name
    return TunePlan(
        study=sections.name,
        folder=str(folder),
        holes={name: describe_space(hole) for name, hole in space.holes.items()},
        spending=read_spending(folder, sections.search),
        num_reruns=sections.search.finalists * sections.search.finalist_seeds,
    )


def tune(
    space: RecipeSpace,
    *,
    home: Path,
    progress: Progress = QUIET,
    address: str | None = None,
    num_cpus: int | None = None,
) -> TuneResult:
    """Searches, or goes on with a search that was interrupted or is given a larger budget.

    A finished study is returned as it is. Bad input is refused before anything is written.

    Args:
        space: The recipe; `search.trials`, `max_hours` and `max_tokens` are budgets of the whole
            study, not of this call.
        home: Where the study, models and artifacts are kept; every node must see it.
        progress: Told of every trial.
        address: Of a Ray cluster; None means `RAY_ADDRESS`, then a local one for this call.
        num_cpus: Logical CPUs of a local cluster; None means the machine's.

    Raises:
        ConfigError: Nothing to search, or a budget that allows no trial; the study is another
            process's or another recipe's; its database, or a study that it starts from, cannot be
            used.
        MissingDependencyError: The driver of its database is not installed.
        TrainingError: No trial could be completed, or the study's database went away.
    """
    from graft.runtime.samplers import settled_search
    from graft.runtime.session import names_cluster, ray_session
    from graft.runtime.shared_rows import share_rows
    from graft.runtime.storage import require_storage
    from graft.runtime.study import open_study
    from graft.runtime.warm_start import find_earlier, take_over

    started = time.monotonic()
    _require_holes(space)
    sections, search = space.sections(), settled_search(space)
    require_storage(sections.search)
    folder = home / "studies" / sections.name
    require_writable(folder, "the study", keep=False)
    is_joined = names_cluster(address)
    with ExitStack() as ray_ends:
        start = cache(lambda: ray_ends.enter_context(ray_session(address, num_cpus=num_cpus)))
        # A study that is there may have nothing left to train.
        begins = not (is_joined or folder.exists())
        packs = _start_beside_imports(start, space) if begins else []
        _require_device(space, is_joined=is_joined)
        facts, prepared = prove(space, home=home, progress=progress)
        session = cache(lambda: (start(), share_rows(prepared)))
        earlier = find_earlier(space, facts, folder)
        longest = _longest_trial(space, home, prepared)
        train = partial(
            _train, longest=longest, home=home, session=session, packs=packs, progress=progress
        )
        with open_study(folder, search, facts, progress=progress) as study:
            _save_recipe(space, folder)
            study.enqueue(space.points())
            take_over(study, earlier, space, progress)
            budget = Budget(study)
            before = budget.spending
            with ray_ends:
                if budget.spent is None and study.has_work:
                    train(study, space, budget=budget)
                else:
                    progress.note(_spent_words(study, budget))
                spending, ended_by = budget.spending, budget.ended_by
                train_finals = partial(train, searched=(study, space))
                finals = run_finals(study, space, facts, train=train_finals, progress=progress)
            winner = _settle(study, space, finals, prepared, home=home, progress=progress)
            return _result(
                study,
                winner,
                finals,
                num_run=spending.num_ended - before.num_ended,
                spending=spending,
                ended_by=ended_by,
                seconds=time.monotonic() - started,
            )


def _spent_words(study: Study, budget: Budget) -> str:
    name, ended_by = study.folder.name, budget.ended_by
    words = budget.spending.words
    return f"study {name!r} has spent its {ended_by}: {words}; --set {ended_by}=N continues it"


def _result(study: Study, winner: Winner, finals: Finals | None, **of_call: Any) -> TuneResult:
    """Tells what a study has come to, and what of it was this call's."""
    trials = study.trials
    return TuneResult(
        study=study.folder.name,
        folder=str(study.folder),
        trials=tuple(t for t in trials if t.uses_budget),
        searched=tuple(o.metric for o in study.section.objectives),
        best=study.trial(winner.number),
        finals=finals,
        front=tuple(t.number for t in study.front()),
        artifact=winner.artifact,
        metrics=winner.metrics,
        num_infeasible=sum(t.state == "infeasible" and not t.uses_budget for t in trials),
        **of_call,
    )


def _require_holes(space: RecipeSpace) -> None:
    if space.is_complete:
        raise ConfigError(
            "the recipe leaves nothing open to search; make a setting a hole, as in "
            "train.lr: {log: [1.0e-5, 1.0e-2]}, or set search.space to auto, or use `graft train`"
        )


def _require_device(space: RecipeSpace, *, is_joined: bool) -> None:
    """Refuses what cannot be searched, or not be published here, before anything is done.

    The best adapter is measured and published by this process; its trials run on the cluster.

    Raises:
        ConfigError: `model.device` is cuda and there is none here, or no point trains here.
    """
    from graft.engine.trainable import require_any_trainable
    from graft.models import pick_device

    device = pick_device(space.example().model)
    if not is_joined:
        require_any_trainable(space.examples(), device)


class Proved(NamedTuple):
    """What the trials of a study share."""

    facts: StudyFacts
    """Its names."""
    prepared: dict[str, PreparedData]
    """Rows, by the `row_key` of the objectives that learn from them."""


def prove(space: RecipeSpace, *, home: Path, progress: Progress = QUIET) -> Proved:
    """Checks the model and the data of a study, and names what its trials share.

    Raises:
        ModelError: The base is missing or unsuitable.
        DataError: The data is, or unsuitable for an objective that may be chosen.
    """
    from graft.data.template import ChatTemplate
    from graft.engine.reward_models import require_reward_models
    from graft.engine.run import start_digest
    from graft.models import load_tokenizer, resolve_model
    from graft.pipelines.check import prepare_for_all
    from graft.recipe.space import describe_space

    example, content = space.example(), space.content()
    ready = resolve_model(example.model, home, progress=progress)
    template = ChatTemplate(load_tokenizer(ready))
    prepared = prepare_for_all(space, template, progress=progress)
    proof = prepared[example.objective.row_key].proof
    for recipe in (example, *space.examples()):
        require_reward_models(recipe, ready, home)
    shapes = {key: content.get(key) for key in ("method", "objective", "train")}
    shapes["start"] = start_digest(example, home)
    shapes["space"] = example.search.space
    shapes["holes"] = sorted(space.holes)
    scales = {n: describe_space(hole) for n, hole in space.holes.items() if n.startswith("scale")}
    shapes |= {"scale": scales} if scales else {}  # what has no hole may change meanwhile
    shapes |= mixture_facts(example.data)
    facts = StudyFacts(
        space=sha256_json(shapes),
        model=sha256_json(
            [ready.digest, example.model.dtype, example.model.quantization.model_dump(mode="json")]
        ),
        data=sha256_json([proof.digest, proof.template_digest, proof.max_length]),
        objectives=tuple(f"{o.metric} {o.mode}" for o in example.search.objectives),
        eval_rows=example.search.eval_rows,
    )
    return Proved(facts, prepared)


def _save_recipe(space: RecipeSpace, folder: Path) -> None:
    from graft.recipe.load import to_yaml

    write_atomic(folder / RECIPE_FILE, to_yaml(space.content()))


def _longest_trial(space: RecipeSpace, home: Path, prepared: Mapping[str, PreparedData]) -> int:
    """Returns its steps or tokens, whichever the search's rungs count.

    Raises:
        ConfigError: No trial is as short, or as long, as the search's budget or rungs want it.
    """
    from graft.runtime.lengths import most_steps, require_lengths, trial_tokens

    search = space.sections().search
    counts_tokens = search.scheduler.type == "asha" and search.scheduler.unit == "tokens"
    if search.max_tokens is None and not counts_tokens:
        return most_steps(space)
    tokens = trial_tokens(space, home, prepared)
    require_lengths(search, tokens)
    return tokens.most if counts_tokens else most_steps(space)


def _start_beside_imports(start: Callable[[], RaySession], space: RecipeSpace) -> list[StartedPack]:
    """Starts Ray, which is mostly waiting, while another thread loads what comes next.

    Ray wants the main thread. An import that fails there fails again where it is needed.

    Returns:
        Processes for packs, which load their modules meanwhile.
    """
    from graft.core.process import prepare_process
    from graft.runtime.pack_actor import start_packs

    def load() -> None:
        with suppress(ImportError):
            for name in ("graft.engine.run", "graft.pipelines.check", "graft.runtime.search"):
                import_module(name)

    prepare_process()
    behind = Thread(target=load, name="imports", daemon=True)
    behind.start()
    try:
        session, example = start(), space.example()
        return [] if example.search.executor == "dedicated" else start_packs(example, session)
    finally:
        behind.join()


def _train(
    study: Study,
    space: RecipeSpace,
    *,
    budget: Budget | None = None,
    searched: tuple[Study, RecipeSpace] | None = None,
    longest: int,
    home: Path,
    session: Callable[[], tuple[RaySession, SharedRows]],
    packs: list[StartedPack],
    progress: Progress,
) -> None:
    """Trains what is left of a search, or of the re-runs of one, whose budget is their number."""
    ray, rows = session()
    from graft.runtime.search import Search

    Search(
        study,
        space,
        budget=budget or Budget(study),
        longest=longest,
        home=home,
        session=ray,
        rows=rows,
        started=packs,
        progress=progress,
        searched=searched,
    ).run()


def _settle(
    study: Study,
    space: RecipeSpace,
    finals: Finals | None,
    prepared: Mapping[str, PreparedData],
    *,
    home: Path,
    progress: Progress,
) -> Winner:
    """Evaluates the winner on all held-out rows and publishes it, once."""
    from graft.artifacts import Store
    from graft.engine.run import load_run, run_facts
    from graft.engine.run_folder import read_progress
    from graft.pipelines.finish import publish_trained

    number, seed, folder, recipe = _chosen(study, space, finals)
    known, store = study.winner, Store(home)
    is_known = known is not None and (known.number, known.seed) == (number, seed)
    if known is not None and is_known and known.artifact in store.digests():
        return known
    run = load_run(recipe, home, prepared.get(recipe.objective.row_key))
    kept = read_progress(folder, run_facts(run))
    if kept is None:
        raise ConfigError(
            f"trial {number} has no whole checkpoint in {folder}; restore the folder from a copy"
        )
    published = publish_trained(run, kept.state.tensors, store=store, progress=progress)
    winner = Winner(
        number=number,
        seed=seed,
        artifact=str(published.digest),
        metrics=published.record.metrics,
    )
    study.settle(winner)
    return winner


class _Chosen(NamedTuple):
    """The run whose adapter is published."""

    number: int
    """Of its trial in the search."""
    seed: int | None
    """Fresh one of a re-run; None where it is that trial itself."""
    folder: Path
    recipe: Recipe


def _chosen(study: Study, space: RecipeSpace, finals: Finals | None) -> _Chosen:
    if finals is None or finals.published_seed is None:
        best = study.best()
        return _Chosen(best.number, None, study.trial_folder(best.number), space.fix(best.params))
    first, seed = finals.finalists[0], finals.published_seed
    folder = rerun_folder(study, first, seed)
    return _Chosen(first.number, seed, folder, on_seed(space.fix(first.params), seed))
