"""The finalists of a search: its best trials, trained again on fresh seeds.

The best figure of many owes something to its seed. Re-runs show how much: they are trials of a
study of their own beside the search's, with its executors, journal and checkpoints, so that an
interruption costs them no more than it costs a search. Budget, sampler and trial scheduler of the
search never see them.

Published is the run of the best finalist that came nearest to its mean, the better one of two: what
is published then does what the stated mean says. Its best run would be picked by the rows that it
is measured on, and its figure flattered once more.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, NamedTuple

from graft.core.errors import ConfigError, TrainingError
from graft.core.progress import QUIET, Progress
from graft.recipe.search import NoScheduler, SearchSection
from graft.recipe.seeds import SEED, SeededSpace, fresh_seeds
from graft.report.finals_facts import FinalistFacts, Finals, RerunFacts

if TYPE_CHECKING:
    from graft.recipe.search import SearchObjective
    from graft.recipe.space import RecipeSpace
    from graft.runtime.study import Study
    from graft.runtime.trials import StudyFacts, TrialRecord

Train = Callable[["Study", "RecipeSpace"], None]
"""Trains what a study has begun, to the end."""

_FEW_SEEDS = 2


def finals_folder(folder: Path) -> Path:
    """Where a search's folder has the study of its re-runs; its name says whose they are."""
    return folder / f"{folder.name}-finalists"


def run_finals(
    study: Study,
    space: RecipeSpace,
    facts: StudyFacts,
    *,
    train: Train,
    progress: Progress = QUIET,
) -> Finals | None:
    """Trains the finalists of a search that is over, or what is left of them.

    Args:
        study: The search, opened to be driven.
        space: What was searched.
        facts: Of the search.
        train: Is given the study of the re-runs and their space.
        progress: Told who the finalists are.

    Returns:
        How they did; None where the recipe asks for none, or no trial is complete.

    Raises:
        TrainingError: No re-run could be completed.
    """
    from graft.runtime.study import open_study

    plan = _plan(study, space)
    if plan is None:
        return None
    with open_study(
        finals_folder(study.folder), _section(study.section, plan), facts, progress=progress
    ) as reruns:
        reruns.keep_memory_factor(max(study.memory_factor, reruns.memory_factor))
        seeded = SeededSpace(space)
        if _begin(reruns, seeded, plan):
            _announce(plan, study.section, progress)
            train(reruns, seeded)
        finals = _standings(reruns, plan)
        _require_winner(finals, study)
        seed = _published_seed(finals.finalists[0], reruns, plan)
        _drop_needless(reruns, finals, plan)
        return finals.model_copy(update={"published_seed": seed})


def read_finals(study: Study, space: RecipeSpace) -> Finals | None:
    """Reads how the finalists of a search do so far; None where none was trained again."""
    from graft.runtime.storage import is_begun
    from graft.runtime.study import read_study

    folder, plan = finals_folder(study.folder), _plan(study, space)
    if plan is None or not is_begun(folder):
        return None
    finals = _standings(read_study(folder, _section(study.section, plan)), plan)
    seed, winner = None, study.winner
    if winner is not None and winner.number == finals.finalists[0].number:
        seed = winner.seed
    return finals.model_copy(update={"published_seed": seed})


def rerun_folder(study: Study, finalist: FinalistFacts, seed: int) -> Path:
    """Returns the folder of a finalist's re-run on a seed."""
    (number,) = (rerun.number for rerun in finalist.reruns if rerun.seed == seed)
    return finals_folder(study.folder) / "trials" / str(number)


class _Plan(NamedTuple):
    """Who is trained again, on which seeds."""

    finalists: list[TrialRecord]
    seeds: range
    objective: SearchObjective
    confidence: float

    def cost(self, value: float) -> float:
        """The searched metric, smaller being better."""
        return value if self.objective.mode == "min" else -value


def _plan(study: Study, space: RecipeSpace) -> _Plan | None:
    section = study.section
    finalists = choose_finalists(study.trials, section)
    if not finalists:
        return None
    seen = {space.fix(t.params).train.seed for t in study.trials if t.has_ended}
    return _Plan(
        finalists,
        fresh_seeds(seen, section.finalist_seeds),
        section.objectives[0],
        space.sections().eval.confidence,
    )


def choose_finalists(trials: Sequence[TrialRecord], section: SearchSection) -> list[TrialRecord]:
    """Returns the best complete trials by the first searched metric, equal settings once."""
    objective = section.objectives[0]
    sign = 1 if objective.mode == "min" else -1
    complete = [t for t in trials if t.state == "complete"]
    complete.sort(key=lambda t: (sign * t.metrics[objective.metric], t.number))
    found: list[TrialRecord] = []
    for trial in complete:
        if all(trial.params != known.params for known in found):
            found.append(trial)
    return found[: section.finalists]


def _section(section: SearchSection, plan: _Plan) -> SearchSection:
    """How the re-runs are trained: as the search was, but all to their end, whatever its budget."""
    return SearchSection(
        trials=len(plan.finalists) * len(plan.seeds),
        objectives=section.objectives,
        scheduler=NoScheduler(),
        sampler="random",
        executor=section.executor,
        pack_slots=section.pack_slots,
        storage=section.storage,
        storage_password_env=section.storage_password_env,
        eval_rows=section.eval_rows,
        seed=section.seed,
    )


def _begin(reruns: Study, space: SeededSpace, plan: _Plan) -> bool:
    """Begins what is not yet known to the study; says whether anything is left to train.

    What was refused before it was run is tried again: the cluster may have grown.
    """
    known = {
        (t.rerun_of, t.params[SEED]) for t in reruns.trials if t.uses_budget or t.state == "waiting"
    }
    for trial in plan.finalists:
        for seed in plan.seeds:
            if (trial.number, seed) not in known:
                reruns.enqueue_rerun(trial.number, {**trial.params, SEED: seed})
    while any(t.state == "waiting" for t in reruns.trials):
        reruns.ask(space)
    return any(t.state == "running" for t in reruns.trials)


def _announce(plan: _Plan, section: SearchSection, progress: Progress) -> None:
    numbers = ", ".join(str(trial.number) for trial in plan.finalists)
    seeds = ", ".join(map(str, plan.seeds))
    progress.note(f"finalists: trials {numbers} are trained again on seeds {seeds}")
    if len(plan.finalists) < section.finalists:
        progress.note(
            f"search.finalists is {section.finalists}, but only {len(plan.finalists)} trials of "
            "different settings are complete"
        )
    if len(plan.seeds) == _FEW_SEEDS:
        progress.note(f"search.finalist_seeds is {_FEW_SEEDS}: {_TOO_FEW}")


_TOO_FEW = (
    "the interval of a mean of two is 13 standard errors wide on either side at 95 %; three seeds "
    "make it 4, five 3"
)


def _standings(reruns: Study, plan: _Plan) -> Finals:
    metric, mode = plan.objective.metric, plan.objective.mode
    finalists = []
    for trial in plan.finalists:
        by_seed = _by_seed(reruns, trial.number)
        facts = [_facts(by_seed.get(seed), seed, metric) for seed in plan.seeds]
        values = [rerun.value for rerun in facts if rerun.value is not None]
        low, high = t_interval(values, plan.confidence) or (None, None)
        finalists.append(
            FinalistFacts(
                number=trial.number,
                params=trial.params,
                searched=trial.metrics[metric],
                reruns=tuple(facts),
                mean=fmean(values) if values else None,
                low=low,
                high=high,
            )
        )

    def place(finalist: FinalistFacts) -> tuple[int, float, int]:
        mean = math.inf if finalist.mean is None else plan.cost(finalist.mean)
        return finalist.num_missing, mean, finalist.number

    ranked = tuple(sorted(finalists, key=place))
    return Finals(
        metric=metric,
        mode=mode,
        seeds=tuple(plan.seeds),
        confidence=plan.confidence,
        finalists=ranked,
        verdict=verdict(ranked, plan.confidence),
    )


def _by_seed(reruns: Study, number: int) -> dict[int, TrialRecord]:
    """The re-runs of one trial; of one that was tried several times, the last."""
    return {t.params[SEED]: t for t in reruns.trials if t.rerun_of == number}


def _facts(record: TrialRecord | None, seed: int, metric: str) -> RerunFacts:
    if record is None:
        return RerunFacts(seed=seed)
    return RerunFacts(
        seed=seed,
        number=record.number,
        state=record.state,
        value=record.metrics[metric] if record.state == "complete" else None,
        reason=record.reason,
    )


def t_interval(values: Sequence[float], confidence: float) -> tuple[float, float] | None:
    """Returns Student's interval of the mean of values; None for fewer than two.

    Reference:
        Student, The Probable Error of a Mean, Biometrika 6(1), 1908.
    """
    if len(values) < 2:
        return None
    from scipy import stats

    quantile = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1))
    half = quantile * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def verdict(finalists: Sequence[FinalistFacts], confidence: float) -> str:
    """Says in words whether the first finalist is told apart from the others.

    Args:
        finalists: Best first.
        confidence: Of their intervals.
    """
    first, others = finalists[0], finalists[1:]
    if first.mean is None:
        return "no re-run is complete yet"
    num, rivals = len(first.values), [other for other in others if not other.num_missing]
    if first.num_missing:
        words = f"trial {first.number} leads with {num} of {len(first.reruns)} re-runs complete"
    elif not rivals:
        words = f"trial {first.number} is the only finalist that was trained on {num} seeds"
    elif near := [other.number for other in rivals if first.overlaps(other)]:
        words = (
            f"trial {first.number} has the best mean, but is not told apart from {_trials(near)}: "
            f"their {confidence:.0%} intervals over {num} seeds overlap"
        )
    else:
        words = (
            f"trial {first.number} is better than {_trials([r.number for r in rivals])}: its "
            f"{confidence:.0%} interval over {num} seeds meets no other"
        )
    if broken := [other.number for other in others if other.num_missing]:
        words += f"; {_trials(broken)} did not complete every re-run"
    return words + (f" ({_TOO_FEW})" if len(first.reruns) == _FEW_SEEDS else "")


def _trials(numbers: Sequence[int]) -> str:
    return f"trial{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _require_winner(finals: Finals, study: Study) -> None:
    if finals.finalists[0].mean is not None:
        return
    reasons = sorted({r.reason for f in finals.finalists for r in f.reruns if r.reason})
    raise TrainingError(
        f"no re-run of the finalists of study {study.folder.name!r} is complete: "
        f"{'; '.join(reasons)}. search.finalists=0 publishes the best trial as it was searched"
    )


def _published_seed(finalist: FinalistFacts, reruns: Study, plan: _Plan) -> int:
    """The seed whose run is nearest to the mean, the better one of two, of those still kept."""
    seed = _typical_seed(finalist, reruns, plan)
    if seed is None:
        raise ConfigError(
            f"no re-run of trial {finalist.number} has a checkpoint in {reruns.folder}; restore "
            "the folder from a copy"
        )
    return seed


def _typical_seed(finalist: FinalistFacts, reruns: Study, plan: _Plan) -> int | None:
    from graft.engine.checkpoint import newest_step
    from graft.engine.run_folder import CHECKPOINTS

    mean, values = finalist.mean or 0.0, finalist.values
    spread = max(values, default=0.0) - min(values, default=0.0) or 1.0
    distances = {
        # Rounded, for the two of a pair are equally far but for their last bits.
        rerun.seed: (round(abs(rerun.value - mean) / spread, 9), plan.cost(rerun.value))
        for rerun in finalist.reruns
        if rerun.value is not None
        and rerun.number is not None
        and newest_step(reruns.trial_folder(rerun.number) / CHECKPOINTS) > 0
    }
    return min(distances, key=lambda seed: distances[seed], default=None)


def _drop_needless(reruns: Study, finals: Finals, plan: _Plan) -> None:
    """Keeps one run's weights a finalist: a larger budget may make another one the best."""
    from graft.engine.run_folder import CHECKPOINTS

    for finalist in finals.finalists:
        kept = _typical_seed(finalist, reruns, plan)
        for seed, record in _by_seed(reruns, finalist.number).items():
            if record.has_ended and seed != kept:
                shutil.rmtree(reruns.trial_folder(record.number) / CHECKPOINTS, ignore_errors=True)
