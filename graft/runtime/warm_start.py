"""What a new study takes over from earlier ones of the same home.

A trial of the same task (base, data, metrics, rows they are measured on, settings) is history: the
sampler learns from it as from a trial of its own. Of another task only the settings carry over:
its best points are tried first, and measured anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from graft.core.errors import ConfigError
from graft.core.progress import Progress
from graft.runtime.storage import is_begun
from graft.runtime.study import Study, read_study
from graft.runtime.trials import Earlier, StudyFacts, TrialRecord

if TYPE_CHECKING:
    from graft.recipe.sections import Recipe
    from graft.recipe.space import RecipeSpace

_NUM_POINTS = 3
"""Best trials of an earlier study that are tried first."""
_SHAPING = ("method", "objective", "train")
"""Sections that give a trial its result, beside base and data."""
_NUM_SHOWN = 3


class Taken(NamedTuple):
    """What is taken over from one study."""

    what: str
    """`warm_start march`."""
    points: tuple[dict[str, Any], ...]
    trials: tuple[Earlier, ...]
    words: str


def take_over(study: Study, found: Sequence[Taken], space: RecipeSpace, progress: Progress) -> None:
    """Gives a study what `find_earlier` found for it."""
    for taken in found:
        study.take(taken.what, space, taken.points, taken.trials)
        progress.note(taken.words)


def find_earlier(space: RecipeSpace, facts: StudyFacts, folder: Path) -> list[Taken]:
    """Reads the studies that `search.points_from` and `search.warm_start` name.

    Each is read once: what a study has taken over already, it has.

    Args:
        space: Of the new study.
        facts: Of the new study.
        folder: Of the new study; earlier ones are beside it.

    Raises:
        ConfigError: Such a study is the new one itself, is not there, has no complete trial, or has
            nothing that can be taken over.
    """
    section = space.sections().search
    known: list[str] = []
    if is_begun(folder):
        with suppress(ConfigError):
            known = read_study(folder, section).taken
    found = [
        _points(what, _Study(what, folder, name), space)
        for name in section.points_from
        if (what := f"points_from {name}") not in known
    ]
    found += [
        _history(what, _Study(what, folder, name), space, facts)
        for name in section.warm_start
        if (what := f"warm_start {name}") not in known
    ]
    return found


class _Study:
    """An earlier study and the space that it searched.

    Args:
        what: How the recipe names it.
        folder: Of the new study.
        name: Its own.
    """

    def __init__(self, what: str, folder: Path, name: str) -> None:
        from graft.recipe.load import load_recipe

        if name == folder.name:
            raise ConfigError(
                f"search.{what}: that is this study itself, which goes on with what it has; leave "
                "it out, or give this recipe another name"
            )
        own = folder.parent / name
        if not (own / "recipe.yaml").is_file():
            known = sorted(path.parent.name for path in folder.parent.glob("*/recipe.yaml"))
            raise ConfigError(
                f"search.{what}: there is no such study in {folder.parent}; known: "
                f"{', '.join(known) or 'none yet'}"
            )
        self.name = name
        self.space = load_recipe(own / "recipe.yaml")
        self.study = read_study(own, self.space.sections().search)
        self.complete = [trial for trial in self.study.trials if trial.state == "complete"]
        if not self.complete:
            raise ConfigError(
                f"search.{what}: study {name!r} has no complete trial to start from; run it "
                "further, or leave it out"
            )

    def best(self) -> list[TrialRecord]:
        """Its best trials: those that no other one beats first, each part by the first metric."""
        front = {trial.number for trial in self.study.front()}
        searched = self.space.sections().search.objectives[0]
        sign = 1 if searched.mode == "min" else -1

        def place(trial: TrialRecord) -> tuple[bool, float, int]:
            return (
                trial.number not in front,
                sign * trial.metrics[searched.metric],
                trial.number,
            )

        return sorted(self.complete, key=place)[:_NUM_POINTS]


def _points(what: str, earlier: _Study, space: RecipeSpace) -> Taken:
    points = [space.params_of(earlier.space.fix(trial.params)) for trial in earlier.best()]
    points = [p for at, p in enumerate(points) if p and p not in points[:at]]
    if not points:
        raise ConfigError(
            f"search.{what}: none of its best points has a value of what is open here "
            f"({', '.join(space.holes)}); leave it out"
        )
    words = f"the {len(points)} best points of study {earlier.name!r} are tried first"
    return Taken(what, tuple(points), (), words)


def _history(what: str, earlier: _Study, space: RecipeSpace, facts: StudyFacts) -> Taken:
    known = earlier.study.facts
    if differences := known.differences(facts.model_copy(update={"space": known.space})):
        raise ConfigError(
            f"search.{what}: study {earlier.name!r} is of another task, with "
            f"{' and '.join(differences)}; its values would mislead this search. "
            f"search.points_from: [{earlier.name}] tries its best points first instead"
        )
    trials, obstacle = [], ""
    for trial in earlier.complete:
        recipe = earlier.space.fix(trial.params)
        params = space.params_of(recipe)
        if obstacle_here := _obstacle(params, recipe, space):
            obstacle = obstacle or obstacle_here
            continue
        trials.append(Earlier(f"{earlier.name}/{trial.number}", params, trial.metrics))
    if not trials:
        raise ConfigError(
            f"search.{what}: none of the {len(earlier.complete)} complete trials of study "
            f"{earlier.name!r} is a point of this space: {obstacle}. search.points_from: "
            f"[{earlier.name}] tries its best points first instead"
        )
    words = f"the sampler learns from {len(trials)} trials of study {earlier.name!r}"
    if len(trials) < len(earlier.complete):
        words += f"; {len(earlier.complete) - len(trials)} lie outside this space: {obstacle}"
    return Taken(what, (), tuple(trials), words)


def _obstacle(params: dict[str, Any], recipe: Recipe, space: RecipeSpace) -> str:
    """Says why a recipe is no point of a space; nothing where it is the point of these params."""
    try:
        here = space.fix(params)
    except ConfigError as error:
        return str(error)
    given, expected = _settings(recipe), _settings(here)
    differ = [
        f"{name} is {given.get(name, 'not set')} there and {expected.get(name, 'not set')} here"
        for name in dict.fromkeys([*given, *expected])
        if given.get(name) != expected.get(name)
    ]
    return ", ".join(differ[:_NUM_SHOWN])


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Flattens what shapes a trial: `train.steps` → 200."""
    found: dict[str, Any] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{path}.{key}", inner)
        else:
            found[path] = value

    content = recipe.model_dump(mode="json")
    for section in _SHAPING:
        walk(section, content[section])
    return found
