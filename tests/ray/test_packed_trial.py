"""A trial's seat, when Tune makes a process for it and then runs it in another."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from graft.engine.run_folder import RECIPE_FILE
from graft.recipe.load import load_recipe
from graft.runtime.pack_actor import start_pack
from graft.runtime.packed import PackedTrial
from graft.runtime.placement import PackPlace
from tests.ray.test_search import write_recipe

pytestmark = [
    pytest.mark.ray,
    # Ray's own modules set options that Ray has deprecated.
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\."),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def test_a_process_that_tune_discards_takes_no_seat_and_loses_no_report(
    model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    path = write_recipe(
        tmp_path, model_folder, data_folder, method={"type": "lora", "r": 2}, search={}
    )
    recipe = load_recipe(path, ["train.lr=0.001"]).example()
    (tmp_path / RECIPE_FILE).write_text(recipe.model_dump_json())
    place = PackPlace(ray.get_runtime_context().get_node_id(), cpus=0.5, gpus=0, threads=1)
    pack = start_pack("pack", recipe, tmp_path / "home", slots=2, place=place)
    try:
        config = {"pack": "pack", "trial": 0, "folder": str(tmp_path), "steps": 8}
        discarded = PackedTrial(config)
        assert ray.get(pack.seated.remote()) == {}
        kept = PackedTrial(config)
        assert kept.train()["steps"] == 4
        discarded.stop()
        assert kept.train()["steps"] == 8
        kept.stop()
    finally:
        ray.kill(pack)
