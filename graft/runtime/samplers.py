"""Who fills the holes: samplers by name, and which of them suits a space and a budget.

Every draw depends on `search.seed`, the trial's number and the study's history alone: a sampler is
built anew for each trial, and what a genetic one remembers stands in the study.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

from graft.core.errors import ConfigError
from graft.core.seeds import derive_seed
from graft.core.spaces import Float

if TYPE_CHECKING:
    import optuna

    from graft.recipe.search import SearchSection
    from graft.recipe.space import RecipeSpace

_STARTUP_TRIALS = 8
"""Random points before a sampler learns from results, and a generation of a genetic one."""
_SMALL_SAMPLE = 100
"""Points to a trial from which on a budget is called small."""
_COMMON_ONLY = ("gp", "nsga2")
"""They learn of the settings that every trial has."""


class SamplerChoice(NamedTuple):
    """The sampler of a search."""

    name: str
    reason: str


def choose_sampler(space: RecipeSpace) -> SamplerChoice:
    """Says which sampler a search takes, and why.

    A space that the budget holds whole is gone through, each point once, whichever sampler is
    named: a point gives the same result again. Beside earlier studies it is not: a grid passes over
    the points that they have. Else `auto` is TPE: it learns from stopped trials,
    of settings that only some trials have, and for several objectives; the others do not.

    Raises:
        ConfigError: A grid is asked of a continuous range.
    """
    search, num_points = space.sections().search, space.num_combinations
    ranges = [name for name, hole in space.holes.items() if isinstance(hole, Float)]
    if search.sampler == "grid" and ranges:
        raise endless_grid(ranges[0])
    if num_points is not None and num_points <= search.trials and not search.warm_start:
        words = f"the space has {num_points} points for {search.trials} trials: each is tried once"
        return SamplerChoice("grid", words)
    if search.sampler != "auto":
        return SamplerChoice(search.sampler, f"search.sampler names it{_left_out(space)}")
    return SamplerChoice(
        "tpe",
        "it learns from stopped trials too, from settings that only some trials have, and for "
        "several objectives",
    )


def settled_search(space: RecipeSpace) -> SearchSection:
    """Returns the section `search` with the sampler that is taken.

    Raises:
        ConfigError: A grid is asked of a continuous range.
    """
    search = space.sections().search
    return search.model_copy(update={"sampler": choose_sampler(space).name})


def budget_warning(space: RecipeSpace) -> str | None:
    """Says in figures that a budget tries hardly anything of a space; None where it does not."""
    trials, num_points = space.sections().search.trials, space.num_combinations
    if num_points is None or num_points < _SMALL_SAMPLE * trials:
        return None
    return (
        f"the space has {num_points:,} points and search.trials is {trials}: one point in "
        f"{num_points // trials:,} is tried, so what is found is the best of a small sample. Raise "
        f"search.trials, or close some of the {len(space.holes)} open settings"
    )


def endless_grid(name: str) -> ConfigError:
    """Returns what is wrong with a grid over a continuous range."""
    return ConfigError(
        f"search.sampler grid cannot count the range of {name}; make it a choice, or use another "
        "sampler"
    )


def _left_out(space: RecipeSpace) -> str:
    own = [name for name in space.holes if space.opened_by(name)]
    name = space.sections().search.sampler
    if name not in _COMMON_ONLY or not own:
        return ""
    return (
        f"; it learns of settings that every trial has, and draws {', '.join(own)} at random (tpe "
        "learns of them too)"
    )


def seeded_sampler(section: SearchSection) -> optuna.samplers.BaseSampler:
    """Returns a sampler whose draws depend on the seed, a trial's number and the history alone."""
    import optuna

    class TrialSeededSampler(optuna.samplers.BaseSampler):
        """Builds the sampler anew for each trial."""

        def before_trial(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                self._of_trial = _build_sampler(section, trial.number)
            self._of_trial.before_trial(study, trial)

        def infer_relative_search_space(
            self, study: optuna.Study, trial: optuna.trial.FrozenTrial
        ) -> dict[str, optuna.distributions.BaseDistribution]:
            return self._of_trial.infer_relative_search_space(study, trial)

        def sample_relative(
            self,
            study: optuna.Study,
            trial: optuna.trial.FrozenTrial,
            search_space: dict[str, optuna.distributions.BaseDistribution],
        ) -> dict[str, Any]:
            return self._of_trial.sample_relative(study, trial, search_space)

        def sample_independent(
            self,
            study: optuna.Study,
            trial: optuna.trial.FrozenTrial,
            param_name: str,
            param_distribution: optuna.distributions.BaseDistribution,
        ) -> Any:
            return self._of_trial.sample_independent(study, trial, param_name, param_distribution)

    return TrialSeededSampler()


def _build_sampler(section: SearchSection, number: int) -> optuna.samplers.BaseSampler:
    """Returns the sampler of one trial."""
    from optuna import samplers

    seed = derive_seed("sampler", section.seed, number) % 2**32
    if section.sampler == "random":
        return samplers.RandomSampler(seed=seed)
    if section.sampler == "grid":
        return samplers.BruteForceSampler(seed=seed)
    if section.sampler == "qmc":
        return samplers.QMCSampler(
            scramble=True,
            seed=section.seed,
            independent_sampler=samplers.RandomSampler(seed=seed),
            warn_independent_sampling=False,
        )
    if section.sampler == "gp":
        return samplers.GPSampler(
            seed=seed, n_startup_trials=_STARTUP_TRIALS, warn_independent_sampling=False
        )
    if section.sampler == "nsga2":
        return samplers.NSGAIISampler(population_size=_STARTUP_TRIALS, seed=seed)
    several = len(section.objectives) > 1
    return samplers.TPESampler(
        seed=seed,
        n_startup_trials=_STARTUP_TRIALS,
        multivariate=not several,
        group=not several,  # a joint density for each branch of a conditional space
    )
