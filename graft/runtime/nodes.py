"""What each node of a cluster does or tells for itself, before a run starts on it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from graft.core.errors import GraftError, TrainingError
from graft.core.machine import gpu_memory_bytes, host_memory_bytes
from graft.core.progress import QUIET, Progress
from graft.engine.backends.nvme import require_nvme
from graft.engine.backends.ops import build_ops, is_built, ops_of
from graft.models import resolve_model
from graft.runtime.placement import (
    WorkerNeeds,
    find_room,
    node_places,
    worker_place,
    worker_resources,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from graft.engine.backends.ops import Op
    from graft.engine.memory.cap import Limits
    from graft.recipe.sections import Recipe, ScaleSection
    from graft.runtime.session import RaySession

T = TypeVar("T")

_log = logging.getLogger(__name__)


def on_every_node(function: Callable[..., T], *arguments: Any) -> dict[str, T]:
    """Runs a function once on each node that runs workers, all at the same time.

    Returns:
        Ray's id of the node → what the function returned; nodes that died meanwhile are left out.

    Raises:
        GraftError: What the function raised on a node.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(function)
    nodes = {
        str(node["NodeID"]): str(node["NodeManagerAddress"])
        for node in ray.nodes()
        if node["Alive"] and (node["Resources"].get("CPU") or node["Resources"].get("GPU"))
    }
    answers = {
        name: task.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(name, soft=False)
        ).remote(*arguments)
        for name in nodes
    }
    found = {}
    for name, answer in answers.items():
        try:
            found[name] = ray.get(answer)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if not isinstance(cause, GraftError):
                raise
            raise type(cause)(f"node {nodes[name]}: {cause}") from error
        except ray.exceptions.RayError:  # the node is gone, and runs nothing
            continue
    return found


def await_node(recipe: Recipe, session: RaySession, progress: Progress = QUIET) -> RaySession:
    """Waits for a node that holds a worker of a run, where an autoscaler has yet to make one.

    Returns:
        The session with the nodes that there are then.

    Raises:
        TrainingError: It has not come in time.
    """
    place = worker_place(recipe)
    if not any(node_places(place)):
        progress.note(
            "the cluster has no node for a worker yet; one is asked for, which takes an autoscaler "
            "some minutes (without one, join a node with ray start; min_workers: 1 keeps one ready)"
        )
        find_room(WorkerNeeds(place, 1, 1))
    return session.now()


def find_limits(recipe: Recipe, session: RaySession) -> Limits:
    """Asks the nodes what memory their devices have; the smallest counts.

    Raises:
        TrainingError: There is no node that runs workers, or it went meanwhile.
    """
    from graft.engine.memory.cap import Limits

    told = {"": _own_memory()} if session.is_local else on_every_node(_own_memory)
    if not told:
        raise TrainingError(
            "no node that runs workers has answered; the same command tries it again once the "
            "cluster has one"
        )
    gpus = [memory.gpu_bytes for memory in told.values() if memory.gpu_bytes]
    uses_gpu = recipe.model.device != "cpu" and session.num_gpus > 0 and bool(gpus)
    hosts = [of.host_bytes for of in told.values() if of.gpu_bytes or not uses_gpu]
    held = max(node_places(worker_resources(uses_gpu=uses_gpu)), default=0)
    if uses_gpu:
        return Limits("cuda", min(gpus), min(hosts), node_workers=max(1, held))
    threads = max(1, session.node_cpus)  # as a pack has them
    return Limits("cpu", min(hosts), node_workers=max(1, held), threads=threads)


class _NodeMemory(NamedTuple):
    host_bytes: int
    gpu_bytes: int
    """Of the smallest GPU; 0 without one."""


def _own_memory() -> _NodeMemory:
    return _NodeMemory(host_memory_bytes(), gpu_memory_bytes())


def prepare_ops(
    scales: Iterable[ScaleSection], say: Callable[[str], object] = _log.warning
) -> None:
    """Builds the DeepSpeed ops that runs with these settings call, on every node.

    To be called before workers start: a worker compiles nothing.

    Args:
        scales: Of the runs.
        say: Told what is built, and on how many nodes.

    Raises:
        MissingDependencyError: A node cannot build them.
    """
    ops: tuple[Op, ...] = tuple(dict.fromkeys(op for scale in scales for op in ops_of(scale)))
    if not ops:
        return
    told = on_every_node(_missing, ops)
    missing = sorted({op for of_node in told.values() for op in of_node})
    if not missing:
        return
    count = sum(bool(of_node) for of_node in told.values())
    say(
        f"building DeepSpeed's ops {', '.join(missing)} on {count} of {len(told)} nodes; it takes "
        "some minutes, once"
    )
    on_every_node(build_ops, ops)


def _missing(ops: tuple[Op, ...]) -> list[Op]:
    return [op for op in ops if not is_built(op)]


def require_disks(recipe: Recipe, home: Path) -> None:
    """Refuses a folder to swap to that a node has not, or that cannot hold what is swapped out.

    To be called before workers start.

    Raises:
        ConfigError: A node's `scale.offload.nvme_path` is absent, full or on a network disk.
    """
    from graft.engine.memory.shape import ModelShape
    from graft.engine.memory.standing import standing_parts

    offload = recipe.scale.offload
    if offload.nvme_path is None or "nvme" not in (offload.optimizer, offload.parameters):
        return
    shape = ModelShape.of(resolve_model(recipe.model, home))
    parts = standing_parts(recipe, shape, "cpu", slots=1)
    of_worker = sum(part.size_bytes for part in parts if part.place == "nvme")
    # All workers may come to sit on one node.
    on_every_node(require_nvme, Path(offload.nvme_path), of_worker * recipe.scale.min_workers)
