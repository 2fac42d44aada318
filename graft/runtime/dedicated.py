"""The dedicated executor: a Tune trial is a Ray Train run of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graft.core.errors import DeviceMemoryError, GraftError
from graft.runtime.trials import fail_trial, failure_of


def dedicated_trial(config: dict[str, Any]) -> None:
    """A Tune function: trains one trial on its own workers and passes their reports on.

    The config has the trial's `folder`, which holds its recipe and will hold its state, `home`, and
    `threads`, the share of a worker in the cluster's cores while others train beside it.

    Raises:
        GraftError: What the workers raised; its message is left in the folder for the driver.
    """
    from ray.tune.integration.ray_train import TuneReportCallback

    from graft.engine.run_folder import RECIPE_FILE
    from graft.recipe.sections import Recipe
    from graft.runtime.train_workers import train_on_workers

    folder = Path(config["folder"])
    recipe = Recipe.model_validate_json((folder / RECIPE_FILE).read_text())
    if recipe.scale.threads is None:
        scale = recipe.scale.model_copy(update={"threads": config["threads"]})
        recipe = recipe.model_copy(update={"scale": scale})
    try:
        train_on_workers(
            recipe,
            home=Path(config["home"]),
            folder=folder,
            eval_rows=recipe.search.eval_rows,
            callbacks=[TuneReportCallback()],
        )
    except GraftError as error:
        if failure_of(folder) is None:  # else a worker has left its own, with a measurement
            is_killed = isinstance(error, DeviceMemoryError)
            fail_trial(folder, str(error), needed_bytes=0 if is_killed else None)
        raise
