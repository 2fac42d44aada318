"""Trains with offload on two nodes of one machine that keep what they compile in different places.

    python -m tests.slow.ops_driver RECIPE HOME

A process of its own, because a process can be in one Ray cluster only. Its last line of output is a
JSON object of what was built where.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from graft.engine.backends import ops
from graft.recipe.sections import Recipe
from graft.runtime.nodes import on_every_node, prepare_ops
from graft.runtime.session import ray_session
from graft.runtime.train_workers import train_on_workers


def built() -> dict[str, float]:
    """Everything that was ever compiled for us on a node, and when."""
    folder = ops.ops_folder()
    found = {str(path): path.stat().st_mtime for path in folder.glob("*/*") if path.is_file()}
    return found if ops.is_built("cpu_adam") else {}


def main() -> None:
    """Makes the ops ready on both nodes, then trains on both."""
    recipe = Recipe.model_validate_json(Path(sys.argv[1]).read_text())
    home = Path(sys.argv[2])
    roots = [str(ops.extensions_root()), str(home / "extensions")]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for root in roots:
        cluster.add_node(num_cpus=1, env_vars={"TORCH_EXTENSIONS_DIR": root})
    said: list[str] = []
    try:
        with ray_session(cluster.address):
            before = on_every_node(built)
            prepare_ops([recipe.scale], said.append)
            prepare_ops([recipe.scale], said.append)
            ready = on_every_node(built)
            result = train_on_workers(recipe, home=home, folder=home / "run")
            after = on_every_node(built)
    finally:
        ray.shutdown()
        cluster.shutdown()
    facts = {
        "said": said,
        "nodes_without": sum(not files for files in before.values()),
        "nodes_with": sum(bool(files) for files in ready.values()),
        "folders": len({str(Path(next(iter(files))).parents[2]) for files in ready.values()}),
        "was_compiled_in_training": after != ready,
        "steps": result.steps,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
