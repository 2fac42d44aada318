from __future__ import annotations

from typing import Any

from graft.runtime.placement import PackPlace, pack_places


def node(name: str, *, alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"NodeID": name, "Alive": alive, "Resources": resources}


NODES = [
    node("head", memory=1e9),
    node("small", CPU=1),
    node("large", CPU=16),
    node("gone", alive=False, CPU=16, GPU=8),
    node("gpus", CPU=9, GPU=2),
    node("crowded", CPU=2, GPU=4),
]


def test_every_living_node_with_a_core_has_a_pack_that_leaves_a_core_of_it() -> None:
    assert pack_places(NODES, uses_gpu=False) == [
        PackPlace("small", 0.5, 0, 1),
        PackPlace("large", 15, 0, 16),
        PackPlace("gpus", 8, 0, 9),
        PackPlace("crowded", 1, 0, 2),
    ]


def test_every_gpu_has_a_pack_and_its_part_of_the_cores() -> None:
    places = pack_places(NODES, uses_gpu=True)
    assert places == [PackPlace("gpus", 4, 1, 4)] * 2 + [PackPlace("crowded", 0.5, 1, 1)] * 4
