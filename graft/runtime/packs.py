"""The packs of a search: one on every device of the cluster, and which trial sits in which.

A pack takes trials as soon as it has its base; a search begins with the first that has. The only
pack there is takes them before, one process at a time, so that those start on cores that its
loading leaves free. A seated trial trains up to its first report without its process. A pack that
is lost with its node, or breaks, is given up: its trials take seats in the others.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from graft.core.errors import TrainingError
from graft.core.progress import QUIET, Progress
from graft.runtime.memory import KILLED
from graft.runtime.pack_actor import StartedPack
from graft.runtime.placement import PackPlace
from graft.runtime.seats import Seats
from graft.runtime.trials import Asked, Loss

if TYPE_CHECKING:
    from graft.engine.memory.cap import MemoryCap
    from graft.recipe.sections import Recipe
    from graft.runtime.shared_rows import SharedRows

_ANSWERS_WITHIN_S = 120.0
_LOOK_EVERY_S = 0.5
_NEWS_WITHIN_S = 5.0
_SAY_AFTER_S = 30.0


@dataclass
class _Pack:
    name: str
    actor: Any
    place: PackPlace
    loaded: Any
    """Of Ray: resolves once the pack has its base."""
    is_ready: bool = False
    trials: set[int] = field(default_factory=set)
    left: list[int] = field(default_factory=list)
    """Ended, which the pack has not been told."""


class Packs(Seats):
    """Loads the packs and seats trials in them; a context manager around one turn.

    Args:
        recipe: Of any trial: its model and data are those of all.
        home: Seen by every node.
        slots: Trials in training at once in each pack.
        started: Their processes; they are ended at the end.
        memory: What the machines have, and what trials need of it.
        needed_bytes: That are to be free on a pack's device before it loads its base.
        rows: Prepared by the driver.
        progress: Told when there is no room.
        say: Told, as an event, of each pack that has its base.
    """

    def __init__(
        self,
        recipe: Recipe,
        home: Path,
        *,
        slots: int,
        started: Iterable[StartedPack],
        memory: MemoryCap | None = None,
        needed_bytes: int = 0,
        rows: SharedRows | None = None,
        progress: Progress = QUIET,
        say: Callable[..., object] = lambda event, **fields: None,
    ) -> None:
        self._slots = slots
        self._memory = memory
        self._progress = progress
        self._say = say
        self._packs: dict[str, _Pack] = {}
        self._pack_of: dict[int, str] = {}
        """Trial → the pack that it sits in, or sat in last."""
        self._next: _Pack | None = None
        """Whose seat was found free last."""
        self._starting: set[int] = set()
        """Trials that sit and have no process yet."""
        self._failure: TrainingError | None = None
        """Why the last pack that could not start did not."""
        self._has_begun = False
        """A pack has had its base."""
        self._started, self._has_said = time.monotonic(), False
        limits = memory.limits if memory is not None else None
        for name, actor, place in started:
            loaded = actor.load.remote(
                recipe.model_dump_json(),
                str(home),
                slots=slots,
                limits=limits,
                needed_bytes=needed_bytes,
                rows=rows,
            )
            self._packs[name] = _Pack(name, actor, place, loaded)

    def __enter__(self) -> Packs:
        """Waits for the first pack that has its base, unless there is but one.

        Raises:
            TrainingError: None could start, as the last of them says; or there is no node for one.
        """
        try:
            while len(self._packs) != 1 and not self._has_begun:
                self.look()
                ray.wait([pack.loaded for pack in self._packs.values()], timeout=_LOOK_EVERY_S)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._packs):
            self._give_up(name)

    @property
    def most_trials(self) -> int:
        """Trials that sit at once when all packs are there."""
        return self._slots * len(self._packs)

    def look(self) -> None:
        """Notices what becomes of packs that load their base; to be called now and then.

        Raises:
            TrainingError: None could start, as the last of them says; or there is no node for one.
        """
        if self._has_begun or any(self._answers(pack) for pack in list(self._packs.values())):
            return
        if not self._packs:
            raise self._failure or TrainingError(
                "no node of the cluster has a core for a pack of trials (on GPUs: a core and a "
                "GPU); join one, and the same command goes on"
            )
        if not self._has_said and time.monotonic() - self._started > _SAY_AFTER_S:
            self._has_said = True
            self._progress.note(self._waiting_words())

    def has_seat(self) -> bool:
        """Tells whether a pack that may take trials has a free seat."""
        self.look()
        self._next = self._freest()
        return self._next is not None

    def take(self, asked: Asked, folder: Path) -> dict[str, Any]:
        """Seats a trial where most seats were free when that was asked."""
        pack, number = self._next, asked.number
        assert pack is not None  # nobody else takes seats between the question and this
        pack.trials.add(number)
        pack.left = [other for other in pack.left if other != number]
        self._pack_of[number] = pack.name
        self._starting.add(number)
        need = self._memory.need([asked.recipe]) if self._memory is not None else None
        pack.actor.seat.remote(number, str(folder), need)
        return {"pack": pack.name}

    def arrive(self, number: int) -> None:
        """Says that a trial's process is up."""
        self._starting.discard(number)

    def leave(self, number: int) -> None:
        """Frees a trial's seat for another one; harmless twice."""
        self._starting.discard(number)
        pack = self._packs.get(self._pack_of.get(number, ""))
        if pack is not None and number in pack.trials:
            pack.trials.remove(number)
            pack.left.append(number)

    @property
    def left(self) -> list[int]:
        """Trials that have left, which their packs have not been told."""
        return [number for pack in self._packs.values() for number in pack.left]

    def tell_left(self, numbers: Collection[int]) -> None:
        """Tells the packs which trials have left: their processes may be gone."""
        for pack in self._packs.values():
            for number in sorted(set(pack.left).intersection(numbers)):
                pack.left.remove(number)
                pack.actor.leave.remote(number)

    def loss_of(self, number: int) -> Loss | None:
        """Says whether the pack of a trial is lost, and whether memory was the reason."""
        pack = self._packs.get(self._pack_of[number])
        if pack is None:
            return Loss("the pack was lost with another trial of it")
        ray.wait([pack.loaded], timeout=_NEWS_WITHIN_S)  # its trials may have heard of it first
        if not self._answers(pack):  # it never had its base: `look` says why
            return None if pack.name in self._packs else Loss("the pack could not load its base")
        loss = _loss(pack.actor)
        return loss and loss._replace(trials=loss.trials or tuple(pack.trials | {number}))

    def goes_on_without(self, number: int) -> bool:
        """Gives the lost pack of a trial up; tells whether another one is left."""
        self._give_up(self._pack_of[number])
        return any(self._answers(pack) for pack in list(self._packs.values()))

    def _freest(self) -> _Pack | None:
        open_to = [pack for pack in list(self._packs.values()) if self._answers(pack)]
        if not open_to and len(self._packs) == 1 and not self._starting:
            open_to = list(self._packs.values())
        free = [pack for pack in open_to if len(pack.trials) < self._slots]
        return min(free, key=lambda pack: len(pack.trials), default=None)

    def _answers(self, pack: _Pack) -> bool:
        """Tells whether a pack has its base; one that never will is given up."""
        if not pack.is_ready and ray.wait([pack.loaded], timeout=0)[0]:
            try:
                ray.get(pack.loaded)
            except ray.exceptions.RayError as error:
                self._failure = _in_words(error)
                self._progress.note(f"a pack could not start: {self._failure}")
                self._give_up(pack.name)
                return False
            pack.is_ready = self._has_begun = True
            loaded_s = time.monotonic() - self._started
            self._say("pack", node=pack.place.node_id, seconds=loaded_s)
        return pack.is_ready

    def _waiting_words(self) -> str:
        place = next(iter(self._packs.values())).place
        wanted = f"{place.cpus:g} CPUs" + (" and a GPU" if place.gpus else "")
        free = ray.available_resources()
        has = f"{free.get('CPU', 0.0):g} CPUs" + (
            f" and {free.get('GPU', 0.0):g} GPUs" if place.gpus else ""
        )
        return (
            f"no pack has loaded its base after {_SAY_AFTER_S:.0f} s; one takes {wanted} of a "
            f"node, and {has} of the cluster are free: end other work there if this does not pass"
        )

    def _give_up(self, name: str) -> None:
        pack = self._packs.pop(name, None)
        if pack is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(pack.actor)


def _in_words(error: ray.exceptions.RayError) -> TrainingError:
    """Finds what a pack raised while it started, which Ray passes on as the text of a trace."""
    ours = re.findall(r"^graft\.[\w.]+: (.+)$", str(error), re.MULTILINE)
    return TrainingError(ours[-1] if ours else str(error))


def _loss(actor: Any) -> Loss | None:
    try:
        loss: Loss | None = ray.get(actor.loss.remote(), timeout=_ANSWERS_WITHIN_S)
    except ray.exceptions.OutOfMemoryError as error:
        return Loss(str(error), needed_bytes=0)
    except ray.exceptions.RayActorError as error:
        return Loss(
            f"the pack's process died: {error}", needed_bytes=0 if KILLED in str(error) else None
        )
    except ray.exceptions.GetTimeoutError:
        return Loss(f"the pack has not answered for {_ANSWERS_WITHIN_S:.0f} s")
    return loss
