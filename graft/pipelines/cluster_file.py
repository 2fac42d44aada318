"""What a cluster file promises: which accelerators, how many, before any of them is rented.

Reads `ray up` files and KubeRay's RayCluster, RayJob and RayService.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from graft.core.errors import ConfigError

if TYPE_CHECKING:
    from graft.engine.memory.hardware import Hardware

_GPU = "nvidia.com/gpu"
_PRODUCTS = ("nvidia.com/gpu.product", "cloud.google.com/gke-accelerator", "accelerator")
"""Node labels that name an accelerator; NVIDIA's own, Google's, Azure's."""

_MACHINES = {
    # Amazon EC2
    r"g4dn\.": "T4",
    r"g5\.": "A10G",
    r"g6\.": "L4",
    r"g6e\.": "L40S",
    r"p3\.": "V100-16GB",
    r"p3dn\.": "V100-32GB",
    r"p4d\.": "A100-40GB",
    r"p4de\.": "A100-80GB",
    r"p5\.": "H100",
    r"p5en?\.": "H200",
    # Google Compute Engine
    r"g2-": "L4",
    r"a2-(high|mega)gpu-": "A100-40GB",
    r"a2-ultragpu-": "A100-80GB",
    r"a3-(high|mega|edge)gpu-": "H100",
    r"a3-ultragpu-": "H200",
    r"a4-": "B200",
    # Azure
    r"Standard_NC\d+as_T4_v3": "T4",
    r"Standard_NC\d+ads_A100_v4": "A100-80GB",
    r"Standard_ND96asr_v4": "A100-40GB",
    r"Standard_ND96amsr_A100_v4": "A100-80GB",
    r"Standard_NC\d+ads_H100_v5": "H100 NVL",
    r"Standard_ND96isr_H100_v5": "H100",
    r"Standard_ND96isr_H200_v5": "H200",
}
"""What a machine type begins with → its accelerator, from the clouds' own lists."""


class _Group(NamedTuple):
    """Worker nodes of one kind."""

    name: str
    nodes: int
    """At most."""
    gpus: int
    """Of each node; 0 where the file does not say."""
    product: str | None
    """Accelerator, as the file names it."""


def read_cluster(path: Path, gpu: str | None = None) -> Hardware:
    """Counts the accelerators of a cluster at its largest size.

    Args:
        path: The file.
        gpu: Accelerators of one worker node, where the file does not name them.

    Raises:
        ConfigError: It is no such file, has no worker with a GPU, does not name its GPUs and
            neither does `gpu`, or has several kinds of them.
    """
    from graft.engine.memory.hardware import Hardware, parse_hardware

    groups = [group for group in _groups(_content(path), path) if group.nodes > 0]
    if gpu is not None:
        given = parse_hardware(gpu)
        counted = [group for group in groups if group.gpus] or groups
        return Hardware(
            gpu=given.gpu, count=sum((group.gpus or given.count) * group.nodes for group in counted)
        )
    with_gpus = [group for group in groups if group.gpus]
    if not with_gpus:
        raise ConfigError(
            f"{path} does not say which GPUs its workers have; name those of one node with --gpu, "
            "as in --gpu A100-40GB"
        )
    unnamed = [group.name for group in with_gpus if group.product is None]
    if unnamed:
        raise ConfigError(
            f"{path} does not name the GPUs of workers {', '.join(unnamed)}: give them with --gpu, "
            f"or in the file by nodeSelector {_PRODUCTS[0]}"
        )
    known = [parse_hardware(_plain(str(group.product))).gpu for group in with_gpus]
    names = sorted({gpu.name for gpu in known})
    if len(names) > 1:
        raise ConfigError(
            f"{path} has several kinds of GPU, {' and '.join(names)}; a plan is for one: choose it "
            "with --gpu"
        )
    return Hardware(gpu=known[0], count=sum(group.gpus * group.nodes for group in with_gpus))


def _content(path: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        content = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as a cluster file: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is no cluster file: it holds no mapping")
    return content


def _groups(content: dict[str, Any], path: Path) -> Iterator[_Group]:
    try:
        if "cluster_name" in content:
            yield from _of_ray_up(content)
        elif content.get("kind") in ("RayCluster", "RayJob", "RayService"):
            yield from _of_kuberay(content)
        else:
            raise ConfigError(
                f"{path} is neither a `ray up` file (cluster_name) nor KubeRay's RayCluster, "
                "RayJob or RayService"
            )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is no whole cluster file: {error!r}") from error


def _of_ray_up(content: dict[str, Any]) -> Iterator[_Group]:
    provider = content["provider"]
    if provider["type"] == "local":
        yield _Group("worker_ips", len(provider["worker_ips"]), 0, None)
        return
    limit = int(content.get("max_workers", 2))
    kinds = []
    for name, kind in content["available_node_types"].items():
        if name != content.get("head_node_type"):
            gpus = int(kind.get("resources", {}).get("GPU", 0))
            kinds.append((gpus, name, kind))
    left = limit
    for gpus, name, kind in sorted(kinds, key=lambda found: -found[0]):
        nodes = min(left, int(kind.get("max_workers", limit)))
        left -= nodes
        yield _Group(name, nodes, gpus, _machine(kind.get("node_config", {})))


def _machine(config: dict[str, Any]) -> str | None:
    azure = config.get("azure_arm_parameters", {})
    machine = config.get("InstanceType") or config.get("machineType") or azure.get("vmSize") or ""
    found = [gpu for begins, gpu in _MACHINES.items() if re.match(begins, str(machine))]
    return found[0] if found else None


def _of_kuberay(content: dict[str, Any]) -> Iterator[_Group]:
    spec = content["spec"]
    cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    for group in cluster["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        gpus = 0
        for container in pod["containers"]:
            resources = container.get("resources", {})
            asked = {**resources.get("requests", {}), **resources.get("limits", {})}
            gpus += int(asked.get(_GPU, 0))
        selector = pod.get("nodeSelector", {})
        product = next((str(selector[key]) for key in _PRODUCTS if key in selector), None)
        nodes = int(group["maxReplicas"]) * int(group.get("numOfHosts", 1))
        yield _Group(group["groupName"], nodes, gpus, product)


def _plain(product: str) -> str:
    """Turns `NVIDIA-A100-SXM4-40GB` and `nvidia-tesla-t4` into what people say."""
    words = re.sub(r"(?i)nvidia|tesla|geforce|SXM\d?|PCIe?|HBM\d\w?", "", product)
    return re.sub(r"[-_\s]+", " ", words).strip()
