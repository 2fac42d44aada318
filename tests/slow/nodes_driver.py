"""Trains or searches on a cluster of several nodes of one machine while one is disturbed.

    python -m tests.slow.nodes_driver SCENARIO RECIPE HOME

A process of its own, because a process can be in one Ray cluster only. Its last line of output is a
JSON object of what happened when.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private.node import Node
from ray.cluster_utils import Cluster

from graft.core.errors import ConfigError
from graft.engine.checkpoint import newest_step
from graft.engine.run_folder import CHECKPOINTS, read_reports
from graft.pipelines.tune import tune
from graft.recipe.load import load_recipe
from graft.recipe.sections import Recipe
from graft.runtime.session import ray_session
from graft.runtime.train_workers import train_on_workers

PATIENCE_S = 240.0


class Scene:
    """Two worker nodes of one CPU each beside a head that has none, and a run on them."""

    def __init__(self, recipe: Path, home: Path) -> None:
        self.recipe, self.home, self.folder = recipe, home, home / "run"
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        self.nodes = [self.cluster.add_node(num_cpus=1) for _ in range(2)]
        self.facts: dict[str, Any] = {}

    def step(self) -> int:
        """The newest step that was reported."""
        reports = read_reports(self.folder)
        return int(reports[-1]["steps"]) if reports else 0

    def await_step(self, step: int) -> None:
        """Returns once a step was reported."""
        self.wait(lambda: self.step() >= step, f"step {step}")

    def wait(self, is_so: Callable[[], bool], what: str) -> None:
        """Returns once something is so."""
        deadline = time.monotonic() + PATIENCE_S
        while not is_so():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited for {what}; the run is at step {self.step()}")
            time.sleep(0.05)

    def children(self, kind: str, *nodes: Node) -> list[psutil.Process]:
        """Processes of one kind on the worker nodes, each a child of its node's raylet."""
        found = []
        for node in nodes or self.nodes:
            raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [c for c in raylet.children() if kind in " ".join(c.cmdline())]
        return found

    def workers(self, *nodes: Node) -> list[psutil.Process]:
        """Processes of the run's workers, on all worker nodes or on some."""
        return self.children("RayTrainWorker", *nodes)

    def train(self, disturb: Callable[[Scene], None]) -> None:
        """Trains to the end while somebody else disturbs it."""
        recipe = Recipe.model_validate_json(self.recipe.read_text())

        def work() -> None:
            result = train_on_workers(recipe, home=self.home, folder=self.folder, grow_after_s=2.0)
            self.facts["steps"] = result.steps

        self._play(work, disturb)

    def search(self, disturb: Callable[[Scene], None]) -> None:
        """Searches to the end while somebody else disturbs it."""

        def work() -> None:
            result = tune(load_recipe(self.recipe), home=self.home)
            self.facts["result"] = result.model_dump_json()

        self._play(work, disturb)

    def _play(self, work: Callable[[], None], disturb: Callable[[Scene], None]) -> None:
        """Disturbs in this thread, the only one that may start nodes."""
        with ray_session(self.cluster.address), ThreadPoolExecutor(1) as threads:
            working = threads.submit(work)
            disturb(self)
            working.result()


def nothing(scene: Scene) -> None:
    """Leaves the run alone."""
    scene.wait(lambda: len(scene.workers()) == 2, "two workers")
    scene.facts["nodes"] = len({worker.ppid() for worker in scene.workers()})
    started = time.monotonic()
    scene.await_step(1)
    scene.facts["first_step_s"] = time.monotonic() - started


def worker(scene: Scene) -> None:
    """Kills a worker."""
    scene.await_step(10)
    step = scene.step()
    scene.workers()[0].send_signal(signal.SIGKILL)
    _time_recovery(scene, step)


def node(scene: Scene) -> None:
    """Kills a node, waits until the rest goes on, and brings another."""
    scene.await_step(10)
    step = scene.step()
    scene.cluster.remove_node(scene.nodes.pop(), allow_graceful=False)
    _time_recovery(scene, step)
    scene.facts["workers_after_loss"] = len(scene.workers())
    scene.nodes.append(scene.cluster.add_node(num_cpus=1))
    scene.wait(lambda: len(scene.workers()) == 2, "two workers again")
    scene.facts["workers_after_return"] = 2


def notice(scene: Scene) -> None:
    """Tells the cluster that a node is going to be taken away, and takes it once it is left."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    scene.await_step(10)
    leaving = scene.nodes.pop()
    is_accepted, words = GcsClient(address=scene.cluster.address).drain_node(
        leaving.node_id,
        DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "the machine is wanted elsewhere",
        int((time.time() + 60) * 1000),
    )
    assert is_accepted, words
    scene.wait(lambda: not scene.workers(leaving), "the workers to leave the node")
    scene.facts["step_when_left"] = scene.step()
    scene.cluster.remove_node(leaving, allow_graceful=False)
    _time_recovery(scene, scene.step())
    scene.facts["workers_after_loss"] = len(scene.workers())


def _time_recovery(scene: Scene, step: int) -> None:
    """Notes how long it took to come further than the run has been."""
    started = time.monotonic()
    scene.wait(lambda: scene.step() > step + 5, "the run to go on")
    scene.facts["recovery_s"] = time.monotonic() - started


def packs(scene: Scene) -> None:
    """Waits until every node has a pack."""
    scene.wait(lambda: len(scene.children("PackActor")) == 2, "two packs")
    scene.facts["pack_nodes"] = len({pack.ppid() for pack in scene.children("PackActor")})


def lost_pack(scene: Scene) -> None:
    """Kills a node once trials have trained on both."""
    packs(scene)
    trials = scene.home / "studies" / "tiny" / "trials"
    scene.wait(lambda: len(list(trials.glob("*/report.jsonl"))) == 4, "four trials in training")
    scene.cluster.remove_node(scene.nodes.pop(), allow_graceful=False)


def lost_dedicated(scene: Scene) -> None:
    """Kills a node once a trial of its own workers has trained on each."""
    _await_checkpoints(scene, 2)
    scene.wait(lambda: len(scene.workers()) == 2, "two workers")
    scene.cluster.remove_node(scene.nodes.pop(), allow_graceful=False)


def lost_half(scene: Scene) -> None:
    """Kills one of the two nodes that the workers of a trial are on, once it has trained."""
    _await_checkpoints(scene, 1)
    scene.cluster.remove_node(scene.nodes.pop(), allow_graceful=False)


def shrunk(scene: Scene) -> None:
    """Searches on what is too small by then, and once more on a cluster that is whole again."""
    try:
        scene.search(lost_half)
    except ConfigError as error:
        scene.facts["refused"] = str(error)
    scene.nodes.append(scene.cluster.add_node(num_cpus=1))
    scene.search(lambda scene: None)


def _await_checkpoints(scene: Scene, count: int) -> None:
    trials = scene.home / "studies" / "tiny" / "trials"
    scene.wait(
        lambda: sum(newest_step(path) > 0 for path in trials.glob(f"*/{CHECKPOINTS}")) == count,
        f"checkpoints of {count} trials",
    )


TRAININGS = {"nothing": nothing, "worker": worker, "node": node, "notice": notice}
SEARCHES = {"search": packs, "search-node": lost_pack, "search-dedicated": lost_dedicated}
STORIES = {"search-shrunk": shrunk}


def main() -> None:
    """Runs the scenario that is named."""
    scenario, recipe, home = sys.argv[1:]
    scene = Scene(Path(recipe), Path(home))
    try:
        if scenario in STORIES:
            STORIES[scenario](scene)
        elif scenario in SEARCHES:
            scene.search(SEARCHES[scenario])
        else:
            scene.train(TRAININGS[scenario])
    finally:
        ray.shutdown()
        scene.cluster.shutdown()
    print(json.dumps(scene.facts))


if __name__ == "__main__":
    main()
