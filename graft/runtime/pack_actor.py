"""The process that holds a pack: it loads base and data once, and lets trials come and go."""

from __future__ import annotations

import gc
import logging
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.core.errors import GraftError
from graft.recipe.sections import Recipe
from graft.runtime.shared_rows import SharedRows, shared_rows

if TYPE_CHECKING:
    from graft.data.prepare import PreparedData
    from graft.engine.memory.cap import Limits
    from graft.engine.run import LoadedRun
    from graft.runtime.placement import PackPlace
    from graft.runtime.trials import Loss

_log = logging.getLogger(__name__)


class PackActor:
    """What `ray.remote` makes an actor of; many threads call it at once.

    Args:
        recipe: JSON of any trial's recipe: its model and data are those of all.
        home: The home folder.
        slots: Trials in training at once.
        threads: For torch.
        limits: What the machines have; None seats trials without looking at memory.
        needed_bytes: Of the device, that are to be free before the base is loaded.
        rows: Prepared by the driver; what is not among them is prepared here.
    """

    def __init__(
        self,
        recipe: str,
        home: str,
        *,
        slots: int,
        threads: int,
        limits: Limits | None = None,
        needed_bytes: int = 0,
        rows: SharedRows | None = None,
    ) -> None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read when torch is loaded
        import torch

        from graft.engine.memory.cap import MemoryCap
        from graft.engine.memory.free import wait_until_free
        from graft.engine.memory.shape import ModelShape
        from graft.engine.run import load_run
        from graft.models import pick_device
        from graft.runtime.pack import Pack

        logging.getLogger("graft").setLevel(logging.INFO)
        torch.set_num_threads(threads)
        self._home = Path(home)
        self._rows = rows or {}
        example = Recipe.model_validate_json(recipe)
        wait_until_free(pick_device(example.model), needed_bytes)
        self._base = load_run(example, self._home, shared_rows(self._rows, example))
        self._lock = threading.Lock()
        self._prepared = {example.objective.row_key: self._base.prepared}
        cap = MemoryCap(ModelShape.of(self._base.ready), limits) if limits else None
        self._pack = Pack(
            self._base.model,
            self._run_of,
            self._home,
            slots=slots,
            template=self._base.template,
            judges=self._base.judges,
            fits=cap.fits if cap else lambda recipes, needs: True,
        )
        gc.freeze()  # modules and the base stay; going through them took a quarter of a second

    def seat(self, number: int, folder: str, need: float | None) -> None:
        """Seats a trial whose process may not be up yet; see `Pack.join`."""
        self._pack.expect(number)
        try:
            self._pack.join(number, folder, need)
        except GraftError as error:  # the trial's folder has it, and its process meets it again
            _log.warning("trial %d found no seat: %s", number, error)

    def join(self, number: int, folder: str) -> None:
        """Seats a trial; see `Pack.join`."""
        self._pack.join(number, folder)

    def next_report(self, number: int, after: int) -> dict[str, float] | None:
        """Waits for a trial's next report; see `Pack.next_report`."""
        return self._pack.next_report(number, after)

    def leave(self, number: int) -> None:
        """Frees a trial's seat; see `Pack.leave`."""
        self._pack.leave(number)

    def seated(self) -> dict[int, str]:
        """Trials in the pack and what they do; answers even while a step runs."""
        return self._pack.seated()

    def loss(self) -> Loss | None:
        """Why the pack broke; see `Pack.loss`."""
        return self._pack.loss()

    def _run_of(self, recipe: Recipe) -> LoadedRun:
        from graft.engine.run import start_digest

        with self._lock:
            prepared = self._prepared.get(recipe.objective.row_key)
            if prepared is None:
                prepared = shared_rows(self._rows, recipe) or self._prepare(recipe)
                self._prepared[recipe.objective.row_key] = prepared
            if self._base.judges is not None:
                self._base.judges.load(recipe)
        start = start_digest(recipe, self._home)
        return replace(self._base, recipe=recipe, prepared=prepared, start=start)

    def _prepare(self, recipe: Recipe) -> PreparedData:
        from graft.data.mixture import prepare_parts

        return prepare_parts(recipe.parts, self._base.template)


def start_pack(
    name: str,
    recipe: Recipe,
    home: Path,
    *,
    slots: int,
    place: PackPlace,
    limits: Limits | None = None,
    needed_bytes: int = 0,
    rows: SharedRows | None = None,
) -> Any:  # an actor handle, which Ray leaves untyped
    """Starts a pack actor that lives as long as this driver's job, in its place."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    threads = recipe.scale.threads or place.threads
    actor = ray.remote(PackActor).options(
        name=name,
        num_cpus=place.cpus,
        num_gpus=place.gpus,
        scheduling_strategy=NodeAffinitySchedulingStrategy(place.node_id, soft=False),
        max_concurrency=2 * slots + 8,
    )
    return actor.remote(
        recipe.model_dump_json(),
        str(home),
        slots=slots,
        threads=threads,
        limits=limits,
        needed_bytes=needed_bytes,
        rows=rows,
    )
