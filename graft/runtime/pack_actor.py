"""The process that holds a pack: it loads base and data once, and lets trials come and go."""

from __future__ import annotations

import gc
import logging
import os
import threading
import uuid
from concurrent.futures import Future
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from graft.core.errors import GraftError
from graft.recipe.sections import Recipe
from graft.runtime.placement import PackPlace, pack_places
from graft.runtime.shared_rows import SharedRows, shared_rows

if TYPE_CHECKING:
    from graft.data.prepare import PreparedData
    from graft.engine.memory.cap import Limits
    from graft.engine.run import LoadedRun
    from graft.runtime.pack import Pack
    from graft.runtime.session import RaySession
    from graft.runtime.trials import Loss

_log = logging.getLogger(__name__)


class PackActor:
    """What `ray.remote` makes an actor of; many threads call it at once.

    Its process loads its modules as soon as it is there, base and data when it is told. Whoever
    asks for something before waits, and is told of a failure.

    Args:
        threads: For torch.
    """

    def __init__(self, threads: int) -> None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read when torch is loaded
        import torch

        for name in ("graft.engine.memory.cap", "graft.engine.memory.free", "graft.runtime.pack"):
            import_module(name)
        logging.getLogger("graft").setLevel(logging.INFO)
        torch.set_num_threads(threads)
        self._lock = threading.Lock()
        self._pack: Future[Pack] = Future()

    def load(
        self,
        recipe: str,
        home: str,
        *,
        slots: int,
        limits: Limits | None = None,
        needed_bytes: int = 0,
        rows: SharedRows | None = None,
    ) -> None:
        """Loads base and data; to be called once.

        Args:
            recipe: JSON of any trial's recipe: its model and data are those of all.
            home: The home folder.
            slots: Trials in training at once.
            limits: What the machines have; None seats trials without looking at memory.
            needed_bytes: Of the device, that are to be free before the base is loaded.
            rows: Prepared by the driver; what is not among them is prepared here.

        Raises:
            GraftError: The base cannot be loaded, or there is no room for it.
        """
        try:
            self._load(Recipe.model_validate_json(recipe), Path(home), rows or {}, needed_bytes)
            self._pack.set_result(self._new_pack(slots, limits))
        except Exception as error:
            self._pack.set_exception(error)
            raise
        gc.freeze()  # modules and the base stay; going through them took a quarter of a second

    def _load(self, example: Recipe, home: Path, rows: SharedRows, needed_bytes: int) -> None:
        from graft.engine.memory.free import wait_until_free
        from graft.engine.run import load_run
        from graft.models import pick_device

        self._home, self._rows = home, rows
        wait_until_free(pick_device(example.model), needed_bytes)
        self._base = load_run(example, home, shared_rows(rows, example))
        self._prepared = {example.objective.row_key: self._base.prepared}

    def _new_pack(self, slots: int, limits: Limits | None) -> Pack:
        from graft.engine.memory.cap import MemoryCap
        from graft.engine.memory.shape import ModelShape
        from graft.runtime.pack import Pack

        cap = MemoryCap(ModelShape.of(self._base.ready), limits) if limits else None
        return Pack(
            self._base.model,
            self._run_of,
            self._home,
            slots=slots,
            template=self._base.template,
            judges=self._base.judges,
            fits=cap.fits if cap else lambda recipes, needs: True,
        )

    def seat(self, number: int, folder: str, need: float | None) -> None:
        """Seats a trial whose process may not be up yet; see `Pack.join`."""
        self._pack.result().expect(number)
        try:
            self._pack.result().join(number, folder, need)
        except GraftError as error:  # the trial's folder has it, and its process meets it again
            _log.warning("trial %d found no seat: %s", number, error)

    def join(self, number: int, folder: str) -> None:
        """Seats a trial; see `Pack.join`."""
        self._pack.result().join(number, folder)

    def next_report(self, number: int, after: int) -> dict[str, float] | None:
        """Waits for a trial's next report; see `Pack.next_report`."""
        return self._pack.result().next_report(number, after)

    def leave(self, number: int) -> None:
        """Frees a trial's seat; see `Pack.leave`."""
        self._pack.result().leave(number)

    def seated(self) -> dict[int, str]:
        """Trials in the pack and what they do; answers even while a step runs."""
        return self._pack.result().seated()

    def loss(self) -> Loss | None:
        """Why the pack broke; see `Pack.loss`."""
        return self._pack.result().loss()

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


class StartedPack(NamedTuple):
    """A pack's process."""

    name: str
    """Of its actor."""
    actor: Any  # a handle, which Ray leaves untyped
    place: PackPlace


def start_packs(recipe: Recipe, session: RaySession) -> list[StartedPack]:
    """Starts a process in each place for a pack; see `start_pack`.

    Args:
        recipe: Any trial's.
        session: On GPUs where it has any, unless the recipe wants CPUs.
    """
    import ray

    uses_gpu = recipe.model.device != "cpu" and session.num_gpus > 0
    places = pack_places(ray.nodes(), uses_gpu=uses_gpu)
    return [start_pack(recipe, place) for place in places]


def start_pack(recipe: Recipe, place: PackPlace) -> StartedPack:
    """Starts a pack's process in its place; it ends with this driver's job.

    Args:
        recipe: Any trial's.
        place: Where it stands.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    name = f"graft-pack-{uuid.uuid4().hex[:8]}"
    actor = ray.remote(PackActor).options(
        name=name,
        num_cpus=place.cpus,
        num_gpus=place.gpus,
        scheduling_strategy=NodeAffinitySchedulingStrategy(place.node_id, soft=False),
        max_concurrency=2 * recipe.search.pack_slots + 8,
    )
    return StartedPack(name, actor.remote(recipe.scale.threads or place.threads), place)


def end_packs(started: list[StartedPack]) -> None:
    """Ends processes that nobody wants, and empties the list."""
    import ray

    for pack in started:
        ray.kill(pack.actor)
    started.clear()
