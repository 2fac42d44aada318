"""A trial's seat, when Tune makes a process for it, pauses it, and runs it in another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from graft.core.errors import TrainingError
from graft.engine.run_folder import RECIPE_FILE, read_reports
from graft.recipe.load import load_recipe
from graft.runtime.pack_actor import StartedPack, end_packs, start_pack
from graft.runtime.packed import PackedTrial
from graft.runtime.placement import PackPlace
from tests.ray.test_search import write_recipe

pytestmark = [
    pytest.mark.ray,
    # Ray's own modules set options that Ray has deprecated.
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\."),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


STEPS = 12


@pytest.fixture(scope="module")
def packed(
    model_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[StartedPack, Path]]:
    """A pack of two slots in fp64, and a folder with a recipe for each of several trials."""
    folder = tmp_path_factory.mktemp("packed")
    path = write_recipe(
        folder,
        model_folder,
        data_folder,
        model={"source": str(model_folder), "dtype": "fp64", "device": "cpu"},
        method={"type": "lora", "r": 2, "lora_dropout": 0.1},
        train={"steps": STEPS, "batch_size": 4, "report_every": 4, "lr": 1e-3},
        search={},
    )
    for number in range(8):
        trial = folder / str(number)
        trial.mkdir()
        recipe = load_recipe(path, [f"train.seed={number % 3}"]).example()
        (trial / RECIPE_FILE).write_text(recipe.model_dump_json())
    place = PackPlace(ray.get_runtime_context().get_node_id(), cpus=0.5, gpus=0, threads=1)
    pack = start_pack(recipe, place)
    ray.get(pack.actor.load.remote(recipe.model_dump_json(), str(folder / "home"), slots=2))
    yield pack, folder
    end_packs([pack])


def config_of(pack: StartedPack, folder: Path, number: int) -> dict[str, Any]:
    return {"pack": pack.name, "trial": number, "folder": str(folder / str(number)), "steps": STEPS}


def test_a_process_that_tune_discards_takes_no_seat_and_loses_no_report(
    packed: tuple[StartedPack, Path],
) -> None:
    pack, folder = packed
    config = config_of(pack, folder, 7)
    discarded = PackedTrial(config)
    assert ray.get(pack.actor.seated.remote()) == {}
    kept = PackedTrial(config)
    assert kept.train()["steps"] == 4
    discarded.stop()
    assert kept.train()["steps"] == 8
    kept.stop()


class PauseAtEveryReport(FIFOScheduler):
    """Takes every trial's place away as often as it can."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Pauses."""
        return str(TrialScheduler.PAUSE)


def test_trials_that_tune_pauses_and_restores_end_as_undisturbed_ones(
    packed: tuple[StartedPack, Path], tmp_path: Path
) -> None:
    pack, folder = packed
    tuner = tune.Tuner(
        tune.with_resources(PackedTrial, {"CPU": 0.1}),
        param_space={
            **config_of(pack, folder, 0),
            "trial": tune.grid_search([0, 1, 2]),
            "folder": tune.sample_from(lambda config: str(folder / str(config["trial"]))),
        },
        tune_config=tune.TuneConfig(
            scheduler=PauseAtEveryReport(), max_concurrent_trials=2, reuse_actors=True
        ),
        run_config=tune.RunConfig(name="pauses", storage_path=str(tmp_path), verbose=0),
    )
    results = tuner.fit()
    assert not results.errors
    for result in results:
        assert result.metrics is not None
        assert result.metrics["steps"] == STEPS
        assert result.metrics["iterations_since_restore"] == 1
        number = int(result.metrics["config"]["trial"])
        undisturbed = PackedTrial(config_of(pack, folder, number + 3))
        for _ in range(3):
            undisturbed.train()
        undisturbed.stop()
        found, expected = (read_reports(folder / str(at)) for at in (number, number + 3))
        assert [report["steps"] for report in found] == [4, 8, 12]
        for one, other in zip(found, expected, strict=True):
            assert one["eval/loss"] == pytest.approx(other["eval/loss"], abs=1e-6)
            assert one["train/loss"] == pytest.approx(other["train/loss"], abs=1e-6)


def test_a_checkpoint_of_another_trial_is_refused(
    packed: tuple[StartedPack, Path], tmp_path: Path
) -> None:
    pack, folder = packed
    donor, other = (PackedTrial(config_of(pack, folder, number)) for number in (6, 7))
    with pytest.raises(TrainingError, match=r"trial 7 .* checkpoint of .*/6: .* its own recipe"):
        other.restore(donor.save(str(tmp_path / "saved")))
