"""What the cluster files promise: their GPUs, counted and named, or a question in words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from graft.core.errors import ConfigError
from graft.pipelines.cluster_file import read_cluster

CLUSTERS = Path(__file__).parents[3] / "clusters"


@pytest.mark.parametrize(
    ("name", "gpu", "promised"),
    [
        ("aws.yaml", None, "4x L4"),
        ("gcp.yaml", None, "4x L4"),
        ("azure.yaml", None, "4x A100-80GB"),
        ("onprem.yaml", "2x RTX 4090", "4x RTX 4090"),
        ("kuberay/raycluster.yaml", "H100", "4x H100"),
        ("kuberay/rayjob.yaml", "H100", "4x H100"),
    ],
)
def test_every_cluster_file_says_what_it_grows_to(
    name: str, gpu: str | None, promised: str
) -> None:
    assert str(read_cluster(CLUSTERS / name, gpu)) == promised


def test_kinds_of_nodes_share_the_limit_of_their_cluster(tmp_path: Path) -> None:
    text = (CLUSTERS / "aws.yaml").read_text()
    content = YAML(typ="safe", pure=True).load(text)
    kinds = content["available_node_types"]
    (gpus,) = (name for name in kinds if name != content["head_node_type"])
    kinds["on_demand"] = kinds[gpus]
    path = tmp_path / "cluster.yaml"
    with path.open("w") as file:
        YAML().dump(content, file)
    assert str(read_cluster(path)) == str(read_cluster(CLUSTERS / "aws.yaml")) == "4x L4"


def test_a_group_of_several_hosts_has_all_of_their_gpus(tmp_path: Path) -> None:
    text = (CLUSTERS / "kuberay" / "raycluster.yaml").read_text()
    path = tmp_path / "cluster.yaml"
    path.write_text(re.sub(r"( +)maxReplicas: (\d+)", r"\1maxReplicas: \2\n\1numOfHosts: 2", text))
    assert str(read_cluster(path, "H100")) == "8x H100"


@pytest.mark.parametrize("name", ["onprem.yaml", "kuberay/raycluster.yaml"])
def test_a_file_that_does_not_name_its_gpus_asks_for_them(name: str) -> None:
    with pytest.raises(ConfigError, match="--gpu"):
        read_cluster(CLUSTERS / name)


@pytest.mark.parametrize(
    ("product", "name"),
    [
        ("NVIDIA-A100-SXM4-40GB", "A100-40GB"),
        ("nvidia-l4", "L4"),
        ("nvidia-tesla-t4", "T4"),
        ("NVIDIA-GeForce-RTX-4090", "RTX 4090"),
    ],
)
def test_node_labels_name_the_gpus_of_kubernetes(product: str, name: str, tmp_path: Path) -> None:
    text = (CLUSTERS / "kuberay" / "raycluster.yaml").read_text()
    before, marker, after = text.partition("  workerGroupSpecs:")
    after = after.replace(
        "        spec:\n",
        f"        spec:\n          nodeSelector: {{nvidia.com/gpu.product: {product}}}\n",
    )
    path = tmp_path / "cluster.yaml"
    path.write_text(before + marker + after)
    assert str(read_cluster(path)) == f"4x {name}"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1, 2]", "holds no mapping"),
        ("kind: Deployment", "neither a `ray up` file"),
        ("cluster_name: x", "no whole cluster file"),
        ("a: [", "cannot be read as a cluster file"),
    ],
)
def test_what_is_no_cluster_file_is_refused(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_cluster(path)
