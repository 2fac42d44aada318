"""Import target of a Serve config file: `import_path: serve.app:build`.

The tenants' keys are read from the environment of the cluster, from the variables that the recipe
names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from graft.core.home import resolve_home
from graft.pipelines.serve import application, plan_serving, serving_recipe

if TYPE_CHECKING:
    from ray.serve import Application


def build(args: dict[str, str]) -> Application:
    """Builds the application from `args: {target: RECIPE_OR_ADAPTER, home: FOLDER}`."""
    home = resolve_home(args.get("home"))
    recipe, names = serving_recipe(args["target"], [], home=home)
    return application(*plan_serving(recipe, home=home, names=names))
