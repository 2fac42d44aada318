"""`run`: the whole way from data to a promoted adapter: check, search, compress, prove, publish."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from graft.core.model import StrictModel
from graft.core.progress import QUIET, Progress
from graft.pipelines.check import CheckReport
from graft.pipelines.compress import CompressResult
from graft.pipelines.tune import TuneResult
from graft.recipe.seeds import on_seed

if TYPE_CHECKING:
    from graft.recipe.sections import Recipe
    from graft.recipe.space import RecipeSpace


FULL_SUFFIX = "-full"


class RunResult(StrictModel):
    """What a run came to."""

    name: str
    """The served name; its champion is the adapter below."""
    version: int
    digest: str
    """Of the champion: the compressed adapter, or the trained one where nothing is compressed; or
    what has been promoted since, or rolled back to."""
    full: str | None
    """Name of the adapter as it was trained, where the champion is its compressed form."""
    check: CheckReport
    tune: TuneResult
    compress: CompressResult | None
    report: str
    """The study's HTML report."""


def run(
    space: RecipeSpace,
    *,
    home: Path,
    progress: Progress = QUIET,
    address: str | None = None,
) -> RunResult:
    """Does everything between data and serving; the same call goes on where it was interrupted.

    Args:
        space: The recipe, holes and all.
        home: Where all that is made is kept.
        progress: Told of every stage.
        address: Of a Ray cluster; None means `RAY_ADDRESS`, then a local one.

    Raises:
        DataError: The data does not hold what training needs.
        ConfigError: The recipe leaves nothing to search.
        GateRefusedError: The compressed adapter is not the trained one; nothing is promoted.
    """
    from graft.pipelines.check import check
    from graft.pipelines.report import report
    from graft.pipelines.tune import tune

    checked = check(space, home=home, progress=progress)
    tuned = tune(space, home=home, progress=progress, address=address)
    recipe = space.fix(tuned.best.params)
    if tuned.finals is not None and tuned.finals.published_seed is not None:
        recipe = on_seed(recipe, tuned.finals.published_seed)
    small = _compress(tuned.artifact, recipe, home=home, progress=progress)
    name, full = publish_forms(recipe.name, tuned.artifact, small, home=home)
    page = report(recipe.name, home=home, progress=progress)
    return RunResult(
        name=recipe.name,
        version=name.version,
        digest=name.digest,
        full=full,
        check=checked,
        tune=tuned,
        compress=small,
        report=page.path,
    )


def _compress(
    artifact: str, recipe: Recipe, *, home: Path, progress: Progress
) -> CompressResult | None:
    from graft.pipelines.compress import compress

    if all(step.type == "none" for step in recipe.compress):
        return None
    return compress(artifact, recipe, home=home, progress=progress)


class Published(NamedTuple):
    """A served name and what it now stands for."""

    version: int
    digest: str


def publish_forms(
    name: str, trained: str, small: CompressResult | None, *, home: Path
) -> tuple[Published, str | None]:
    """Registers and promotes what a run made.

    The champion of `name` is the compressed adapter; the one it was made from is served beside it
    as `<name>-full`. Without compression the trained adapter is the champion. A version is promoted
    once: where a successor has taken its place since, or a person another one, that stays.

    Returns:
        The champion, and the second name where there is one.
    """
    if small is None:
        return _champion(name, trained, home), None
    full = f"{name}{FULL_SUFFIX}"
    _champion(full, trained, home)
    return _champion(name, small.digest, home), full


def _champion(name: str, digest: str, home: Path) -> Published:
    from graft.artifacts import Store

    store = Store(home)
    version = store.register(name, digest)
    told = store.names.history(name)
    if not any(e["event"] == "promote" and e["version"] == version for e in told):
        store.promote(name, version)
    state = store.names.state(name)  # what came after it, or was rolled back to, stays
    champion = state.alias("champion")
    return Published(champion, state.digest(champion))
