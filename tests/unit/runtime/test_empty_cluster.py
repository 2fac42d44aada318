"""A cluster that has no node to work on yet: one is asked for, and nothing breaks meanwhile."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray._private.state
import ray.util

from graft.core.errors import TrainingError
from graft.recipe.sections import Recipe
from graft.runtime.nodes import await_node, find_limits
from graft.runtime.search import most_workers
from graft.runtime.session import RaySession

HEAD = {"NodeID": "head", "Alive": True, "Resources": {"CPU": 0.0, "memory": 1e9}}
WORKER = {"NodeID": "worker", "Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}}
SESSION = RaySession("10.0.0.1:6379", is_local=False, node_cpus=0, num_gpus=0)


def recipe(**model: Any) -> Recipe:
    return Recipe.model_validate(
        {"model": {"source": "x", **model}, "data": {"train": "t"}, "method": {"type": "lora"}}
    )


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """A Ray of a head alone, whose autoscaler adds a worker once a place is asked for."""
    places: list[dict[str, float]] = []

    def nodes() -> list[dict[str, Any]]:
        return [HEAD, WORKER] if places else [HEAD]

    def resources() -> dict[str, float]:
        return dict(nodes()[-1]["Resources"])

    def place(bundles: list[dict[str, float]]) -> SimpleNamespace:
        places.extend(bundles)
        return SimpleNamespace(bundle_count=len(bundles))

    state = ray._private.state.state
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: None)
    monkeypatch.setattr(ray, "nodes", nodes)
    monkeypatch.setattr(ray, "cluster_resources", resources)
    groups = sys.modules["ray.util.placement_group"]
    monkeypatch.setattr(groups, "placement_group", place)
    monkeypatch.setattr(groups, "remove_placement_group", lambda group: None)
    monkeypatch.setattr(ray.util, "placement_group_table", lambda group: {"state": "CREATED"})
    return places


def test_a_node_is_asked_for_where_there_is_none_and_then_counts(
    asked: list[dict[str, float]],
) -> None:
    session = await_node(recipe(), SESSION)
    assert asked == [{"CPU": 0.95}]
    assert (session.node_cpus, session.num_gpus) == (8, 1)
    assert await_node(recipe(), session) == session
    many = recipe()
    many = many.model_copy(update={"scale": many.scale.model_copy(update={"workers": 9})})
    assert await_node(many, session) == session, "a space may have points that are too large"
    assert len(asked) == 1


def test_a_node_with_a_gpu_is_asked_for_where_the_recipe_wants_one(
    asked: list[dict[str, float]],
) -> None:
    await_node(recipe(device="cuda"), SESSION)
    assert asked == [{"CPU": 0.95, "GPU": 1.0}]


@pytest.mark.usefixtures("asked")
def test_what_memory_there_is_cannot_be_told_without_a_node() -> None:
    with pytest.raises(TrainingError, match="no node that runs workers has answered"):
        find_limits(recipe(), SESSION)


def test_trials_run_one_by_one_where_all_nodes_have_gone() -> None:
    assert most_workers([recipe().scale], []) == 1
    assert most_workers([recipe().scale], [0]) == 1
