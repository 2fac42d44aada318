"""Every cluster, job and Serve file is what the program that reads it wants."""

from __future__ import annotations

import ast
import importlib.util
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
RAY_UP = sorted((ROOT / "clusters").glob("*.yaml"))
KUBERAY = sorted((ROOT / "clusters" / "kuberay").glob("ray*.yaml"))


def read(path: Path) -> Any:
    """One YAML document; duplicate keys are refused."""
    return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    """For test ids."""
    return str(path.relative_to(ROOT))


class Fields(BaseModel):
    """A Kubernetes object: fields that the API does not know are refused."""

    model_config = ConfigDict(extra="forbid")


class AuthOptions(Fields):
    mode: Literal["token"]
    secretName: str


class AutoscalerOptions(Fields):
    version: Literal["v2"]
    upscalingMode: Literal["Default", "Conservative", "Aggressive"]
    idleTimeoutSeconds: int


class HeadGroup(Fields):
    rayStartParams: dict[str, str]
    template: dict[str, Any]


class WorkerGroup(HeadGroup):
    groupName: str
    replicas: int
    minReplicas: int
    maxReplicas: int


class ClusterSpec(Fields):
    rayVersion: str
    enableInTreeAutoscaling: Literal[True]
    autoscalerOptions: AutoscalerOptions
    authOptions: AuthOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class JobSpec(Fields):
    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
    backoffLimit: int
    activeDeadlineSeconds: int
    preRunningDeadlineSeconds: int
    shutdownAfterJobFinishes: Literal[True]
    ttlSecondsAfterFinished: int
    rayClusterSpec: ClusterSpec


class UpgradeStrategy(Fields):
    type: Literal["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]


class ServiceSpec(Fields):
    serveConfigV2: str
    upgradeStrategy: UpgradeStrategy
    excludeHeadPodFromServeSvc: bool
    rayClusterDeletionDelaySeconds: int
    rayClusterConfig: ClusterSpec


SPECS: dict[str, type[Fields]] = {
    "RayCluster": ClusterSpec,
    "RayJob": JobSpec,
    "RayService": ServiceSpec,
}


def cluster_of(path: Path) -> ClusterSpec:
    """The cluster inside any of the three kinds."""
    document = read(path)
    assert document["apiVersion"] == "ray.io/v1"
    assert set(document) == {"apiVersion", "kind", "metadata", "spec"}
    spec = SPECS[document["kind"]].model_validate(document["spec"])
    if isinstance(spec, JobSpec):
        return spec.rayClusterSpec
    if isinstance(spec, ServiceSpec):
        return spec.rayClusterConfig
    assert isinstance(spec, ClusterSpec)
    return spec


@pytest.mark.parametrize("path", RAY_UP, ids=name_of)
def test_ray_up_accepts_the_file(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(read(path))
    validate_config(config)
    assert config["head_node_type"] in config["available_node_types"]
    assert config["max_workers"] >= 1


@pytest.mark.parametrize("path", RAY_UP, ids=name_of)
def test_ray_up_nodes_ask_for_the_token_and_keep_the_head_free(path: Path) -> None:
    config = read(path)
    starts = [config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]]
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    head = config.get("available_node_types", {}).get("head", {}).get("resources", {})
    assert head.get("CPU") == 0 or "--num-cpus=0" in starts[0]
    assert any("mountpoint -q /mnt/graft" in command for command in config["setup_commands"])


@pytest.mark.parametrize("path", [p for p in RAY_UP if p.stem != "onprem"], ids=name_of)
def test_nodes_that_ray_up_makes_have_what_offload_is_compiled_with(path: Path) -> None:
    (installed,) = [c for c in read(path)["setup_commands"] if "apt-get install" in c]
    assert {"g++", "libaio-dev"} <= set(installed.split())


@pytest.mark.parametrize("path", KUBERAY, ids=name_of)
def test_kuberay_files_have_known_fields_a_token_and_a_free_head(path: Path) -> None:
    cluster = cluster_of(path)
    assert cluster.rayVersion == version("ray")
    assert cluster.headGroupSpec.rayStartParams["num-cpus"] == "0"
    for group in cluster.workerGroupSpecs:
        assert group.minReplicas <= group.replicas <= group.maxReplicas


@pytest.mark.parametrize("path", KUBERAY, ids=name_of)
def test_kuberay_pods_share_the_home_and_say_what_they_need(path: Path) -> None:
    cluster = cluster_of(path)
    claim = read(ROOT / "clusters" / "kuberay" / "home.yaml")["metadata"]["name"]
    images = set()
    for group in (cluster.headGroupSpec, *cluster.workerGroupSpecs):
        pod = group.template["spec"]
        (container,) = pod["containers"]
        images.add(container["image"])
        resources = container["resources"]
        assert resources["requests"] == resources["limits"]
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim
        assert container["volumeMounts"][0]["mountPath"] == "/graft"
        assert {"name": "GRAFT_HOME", "value": "/graft"} in container["env"]
        assert all(len(port["name"]) <= 15 for port in container.get("ports", ()))
    assert len(images) == 1


def serve_configs() -> dict[str, Any]:
    """Serve configurations by the file that holds them."""
    service = ROOT / "clusters" / "kuberay" / "rayservice.yaml"
    inner = YAML(typ="safe", pure=True).load(read(service)["spec"]["serveConfigV2"])
    return {"serve/config.yaml": read(ROOT / "serve" / "config.yaml"), name_of(service): inner}


@pytest.mark.parametrize("name", ["serve/config.yaml", "clusters/kuberay/rayservice.yaml"])
def test_serve_accepts_the_configuration_and_its_target_exists(name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    raw = serve_configs()[name]
    schema = ServeDeploySchema.model_validate(raw)
    assert set(raw) <= set(ServeDeploySchema.model_fields)
    (application,) = schema.applications
    module, _, target = application.import_path.partition(":")
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    assert target in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    recipe = application.args["target"].removeprefix("/opt/graft/")
    assert (ROOT / recipe).is_file()


def test_the_image_has_the_pinned_ray() -> None:
    base = (ROOT / "clusters" / "Dockerfile").read_text(encoding="utf-8")
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    (tag,) = re.findall(r"^FROM rayproject/ray:([\d.]+)-", base, re.MULTILINE)
    assert f"ray=={tag}\n" in pins


@pytest.mark.parametrize("verb", ["run", "tune", "serve"])
def test_each_job_is_a_verb_of_the_command_line(verb: str) -> None:
    source = (ROOT / "jobs" / f"{verb}.py").read_text(encoding="utf-8")
    assert f'["{verb}", *sys.argv[1:]]' in source
    assert importlib.util.find_spec(f"graft.cli.verbs.{verb}") is not None


def test_every_entry_point_in_a_manifest_exists() -> None:
    for path in KUBERAY:
        for script in re.findall(r"/opt/graft/([\w/]+\.(?:py|yaml))", path.read_text()):
            assert (ROOT / script).is_file(), f"{name_of(path)} names {script}"
