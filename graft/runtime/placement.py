"""Room on the cluster: what may stand where, how many workers fit now, and whether more fit later.

Drivers (the actors that start workers and wait for them) stand on the head node, for it is never a
preemptible one: a cluster does not outlive its head.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from graft.core.errors import ConfigError, NoRoomError

if TYPE_CHECKING:
    from graft.recipe.sections import Recipe

ON_HEAD = {"node:__internal_head__": 0.0001}
"""Resources of an actor that must stand on the head node; the least that Ray can count."""

_CPUS_PER_WORKER = 0.95
"""A little less than a core, so that a Tune trial beside its workers fits on the same machine."""
_SETTLE_S = 3.0
_LOOK_EVERY_S = 0.2
_SAY_AFTER_S = 5.0
_WAIT_S = 180.0
_AUTOSCALER_WAIT_S = 900.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerNeeds:
    """What the workers of one run occupy."""

    resources: dict[str, float]
    """Of each worker: CPU, and a GPU where it computes on one."""
    smallest: int
    """So many workers at least."""
    largest: int

    @property
    def uses_gpu(self) -> bool:
        """Tells whether a worker has a GPU of its own."""
        return "GPU" in self.resources


def worker_needs(recipe: Recipe) -> WorkerNeeds:
    """Says what the workers of a run occupy.

    Raises:
        ConfigError: The cluster will never have room for the smallest number of them.
    """
    smallest, largest = recipe.scale.min_workers, recipe.scale.max_workers
    most = most_resources()
    num_cpus, num_gpus = int(most.get("CPU", 0)), int(most.get("GPU", 0))
    needs = WorkerNeeds(worker_place(recipe), smallest, largest)
    if num_cpus == 0:  # nobody knows what the cluster may grow to
        return needs
    if smallest > num_cpus:
        raise ConfigError(
            f"scale.workers is {smallest} and the Ray cluster has {num_cpus} CPUs; set "
            f"scale.workers to at most {num_cpus}, or join a larger cluster (RAY_ADDRESS)"
        )
    if needs.uses_gpu and smallest > num_gpus:
        raise ConfigError(
            f"scale.workers is {smallest} and the Ray cluster has {num_gpus} GPUs; set "
            f"scale.workers to at most {num_gpus}, or model.device to cpu"
        )
    return needs


def worker_place(recipe: Recipe) -> dict[str, float]:
    """Returns what one worker of a run occupies, however many there are of them."""
    most, device = most_resources(), recipe.model.device
    is_known = most["CPU"] > 0
    return worker_resources(
        uses_gpu=device != "cpu" and most["GPU"] > 0 if is_known else device == "cuda"
    )


def worker_resources(*, uses_gpu: bool) -> dict[str, float]:
    """Returns what Ray counts for one worker."""
    return {"CPU": _CPUS_PER_WORKER} | ({"GPU": 1.0} if uses_gpu else {})


def node_places(resources: dict[str, float]) -> list[int]:
    """Counts the workers of some resources that each node could hold if it held nothing else."""
    import ray

    return _count([node["Resources"] for node in ray.nodes() if node["Alive"]], resources)


def _count(nodes: Iterable[dict[str, float]], resources: dict[str, float]) -> list[int]:
    return [
        min(int(node.get(name, 0.0) // amount) for name, amount in resources.items())
        for node in nodes
    ]


class PackPlace(NamedTuple):
    """Where a pack may stand."""

    node_id: str
    cpus: float
    """That Ray counts for it."""
    gpus: int
    threads: int
    """For torch."""


def pack_places(nodes: Iterable[Mapping[str, Any]], *, uses_gpu: bool) -> list[PackPlace]:
    """Returns a place for a pack on each device: every GPU, or every node that has a core.

    The packs of a node leave a core's worth of logical CPUs to what else stands there; their
    threads are all cores, for light trials wait while a pack computes.

    Args:
        nodes: As `ray.nodes()` describes them.
        uses_gpu: Whether a pack computes on a GPU.
    """
    places: list[PackPlace] = []
    for node in nodes:
        resources = node["Resources"]
        cores, count = int(resources.get("CPU", 0)), 1
        if uses_gpu:
            count = int(resources.get("GPU", 0))
        if not node["Alive"] or not cores or not count:
            continue
        cpus = max((cores - 1) // count, 0.5)
        of_node = PackPlace(node["NodeID"], cpus, int(uses_gpu), max(1, cores // count))
        places += [of_node] * count
    return places


class Places:
    """Places asked of the cluster, each for one worker: what is placed is kept until it is freed.

    While they are open the autoscaler, where there is one, sees what is wanted.

    Args:
        resources: Of each.
        count: So many.
        together: All are placed at once or none: of two that each kept a part, neither would ever
            be whole.
    """

    def __init__(self, resources: dict[str, float], count: int, *, together: bool = False) -> None:
        from ray.util.placement_group import placement_group

        sizes = [count] if together else [1] * count
        self._groups: list[Any] = [placement_group([resources] * size) for size in sizes]

    def num_placed(self) -> int:
        """Counts the places that there are by now."""
        from ray.util import placement_group_table

        return sum(
            group.bundle_count
            for group in self._groups
            if placement_group_table(group)["state"] == "CREATED"
        )

    def free(self) -> None:
        """Gives all places up."""
        from ray.util.placement_group import remove_placement_group

        for group in self._groups:
            remove_placement_group(group)
        self._groups = []


@contextmanager
def bare_processes() -> Iterator[None]:
    """Has Tune ask Ray for processes without an environment of their own.

    Tune gives its trials one, for PyTorch Lightning and for credentials, neither of which a packed
    trial meets; Ray then starts Python twice a process, and takes none that it has ready.
    """
    from unittest.mock import patch

    from ray.tune.execution import class_cache

    with (
        patch.object(class_cache, "DEFAULT_ENV_VARS", {}),
        patch.object(class_cache, "ENV_VARS_TO_PROPAGATE", set()),
    ):
        yield


@contextmanager
def orphans_freed() -> Iterator[None]:
    """Frees, at its end, the places that were taken inside by processes which died with them.

    Where the actor that asked for places is killed, Ray keeps them until the driver ends; Ray
    Train's own cleaner asks the dashboard, which a local session has not. Nothing that was begun
    inside may still run at the end.
    """
    from ray import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    before = _own_groups()
    try:
        yield
    finally:
        for name in _own_groups() - before:
            _log.warning("freeing places that a process left when it died")
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))


def _own_groups() -> set[str]:
    """Names the groups of places that this driver's job has: their names end with the job's."""
    import ray
    from ray.util import placement_group_table

    job = str(ray.get_runtime_context().get_job_id())
    return {
        str(name)
        for name, group in placement_group_table().items()
        if group["state"] != "REMOVED" and str(name).endswith(job)
    }


def find_room(
    needs: WorkerNeeds,
    wait_s: float | None = None,
    *,
    ask: Callable[[], None] = lambda: None,
    say: Callable[[str], object] = _log.warning,
) -> int:
    """Counts the workers that fit now, up to the largest number; waits for the smallest.

    Args:
        needs: Of the run.
        wait_s: At most so long; None waits a few minutes, longer where an autoscaler may add nodes,
            as it may where there is none to work on.
        ask: Called all the while; what it raises ends the waiting.
        say: Told once what is waited for.

    Raises:
        NoRoomError: The smallest number did not fit in time.
    """
    if wait_s is None:
        may_grow = bool(_autoscaled()) or not most_resources()["CPU"]
        wait_s = _AUTOSCALER_WAIT_S if may_grow else _WAIT_S
    started = time.monotonic()
    has_said = False
    least = Places(needs.resources, needs.smallest, together=True)
    try:
        while not least.num_placed():
            ask()
            waited_s = time.monotonic() - started
            if waited_s > wait_s:
                raise NoRoomError(f"{_missing(needs)}; gave up after {waited_s:.0f} s")
            if waited_s > _SAY_AFTER_S and not has_said:
                say(f"{_missing(needs)}; waiting up to {wait_s:.0f} s")
                has_said = True
            time.sleep(_LOOK_EVERY_S)
        return needs.smallest + _num_more(needs)
    finally:
        least.free()


def _num_more(needs: WorkerNeeds) -> int:
    """Counts the workers that fit beside the smallest number, which is placed."""
    most = needs.largest - needs.smallest
    deadline = time.monotonic() + _SETTLE_S
    more = Places(needs.resources, most)
    try:
        while (placed := more.num_placed()) < most and time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY_S)
        return placed
    finally:
        more.free()


def _missing(needs: WorkerNeeds) -> str:
    import ray
    import ray._private.state

    free_by_node = ray._private.state.available_resources_per_node()
    placed = sum(_count(free_by_node.values(), needs.resources))
    have, free = ray.cluster_resources(), ray.available_resources()
    told = [
        f"{have.get(name, 0.0):g} {name}s, {max(free.get(name, 0.0), 0.0):.3g} free"
        for name in needs.resources
    ]
    each = " and ".join(f"{amount:g} {name}" for name, amount in needs.resources.items())
    return (
        f"scale.workers needs {needs.smallest} workers and there is room for {placed} (each takes "
        f"{each}; the cluster has {', '.join(told)}): end other work, add nodes or lower "
        "scale.workers; what was trained is kept, and the same command goes on from there"
    )


def _autoscaled() -> dict[str, float]:
    """Returns what an autoscaler may grow the cluster to; nothing where there is none."""
    import ray._private.state

    found = ray._private.state.state.get_max_resources_from_cluster_config()
    return dict(found or {})


def most_resources() -> dict[str, float]:
    """Returns what the cluster has, or may grow to."""
    import ray

    have, may_have = ray.cluster_resources(), _autoscaled()
    return {name: max(have.get(name, 0), may_have.get(name, 0)) for name in ("CPU", "GPU")}
