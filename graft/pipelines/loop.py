"""`loop`: after an alarm, a small search started from the champion, a gate, a successor or none.

A renewal keeps its plan and its outcome in `loops/<name>/renewal-<number>/`. Begun again after a
crash it goes on: the plan fixes champion and rows, the search goes on by its study's name, and an
outcome that is written is returned as it is.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout

from graft.artifacts import Store
from graft.core.errors import AdapterError, ConfigError, GateRefusedError, GraftError
from graft.core.files import write_json
from graft.core.model import Listed, StrictModel
from graft.core.progress import QUIET, Progress
from graft.pipelines.forms import recipe_of, seated
from graft.pipelines.renewal_data import RenewalData
from graft.pipelines.renewal_gate import GateReport, compare, judge
from graft.pipelines.renewal_plan import RenewalPlan, make_plan
from graft.recipe.mixture import require_single
from graft.runtime.driftwatch import RenewalOutcome, RenewalRequest
from graft.runtime.loopstate import loop_folder

if TYPE_CHECKING:
    from graft.engine.run import LoadedRun
    from graft.recipe.sections import Recipe
    from graft.recipe.space import RecipeSpace, Sections

logger = logging.getLogger(__name__)

LOCK_TIMEOUT_S = 120.0
DIRECT = "direct, at the gate's word: the steps of loop.canary are not acted on"


class LoopResult(StrictModel):
    """What a renewal came to."""

    name: str
    number: int
    state: Literal["PROMOTED", "REJECTED"]
    reasons: Listed[str] = ()
    """Why it was refused."""
    study: str
    champion_version: int
    """Before."""
    champion_digest: str
    successor_version: int | None
    """None where the successor did not pass compression."""
    successor_digest: str | None
    gate: GateReport | None
    data: RenewalData
    promotion: str = DIRECT
    reference: str | None = None
    """File of the reference made of the successor's training prompts."""
    evidence: dict[str, Any] | None = None
    """The verdict that raised the alarm."""


def renew(
    space: RecipeSpace,
    *,
    home: Path,
    name: str | None = None,
    number: int | None = None,
    evidence: dict[str, Any] | None = None,
    on_evaluating: Callable[[dict[str, Any]], None] = lambda evidence: None,
    progress: Progress = QUIET,
) -> LoopResult:
    """Searches for a successor of the champion on new and old rows, and promotes it if it is one.

    Args:
        space: The recipe; `loop`, `data`, `eval`, `verify` and `search` are used. Method and
            training settings are the champion's own.
        home: Where the champion is.
        name: The served name; None means the recipe's.
        number: Which renewal this is; None continues an unfinished one or begins the next.
        evidence: Why; kept with the result.
        on_evaluating: Told when the search is over and the gate begins.
        progress: Told of every stage.

    Raises:
        ConfigError: The recipe lacks what a renewal needs, or another one is in flight.
        DataError: The new rows are unusable, or some of them are the gate's.
        AdapterError: There is no champion.
    """
    sections = space.sections()
    name = name or sections.name
    folder = loop_folder(home, name)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "renewal.lock", timeout=LOCK_TIMEOUT_S):
            number = number or _next_number(folder)
            renewal = _Renewal(space, home, name, number, evidence, progress)
            return renewal.run(on_evaluating)
    except Timeout as error:
        raise ConfigError(
            f"another renewal of {name!r} is in flight (it holds {folder / 'renewal.lock'})"
        ) from error


def renewal_task(request: RenewalRequest) -> RenewalOutcome:
    """Runs a renewal for the monitor, as a Ray task."""
    import ray
    import torch

    from graft.recipe.space import RecipeSpace
    from graft.recipe.tree import Tree
    from graft.runtime.monitor import find_monitor

    def tell(evidence: dict[str, Any]) -> None:
        monitor = find_monitor(request.name)
        if monitor is not None:
            ray.get(monitor.evaluating.remote(request.number, evidence))

    space = RecipeSpace(Tree(f"the recipe of loop {request.name}", request.recipe))
    # Ray gives a task that asks for no CPU one thread; the gate decodes hundreds of answers.
    torch.set_num_threads(space.example().scale.threads or os.cpu_count() or 1)
    result = renew(
        space,
        home=Path(request.home),
        name=request.name,
        number=request.number,
        evidence=request.evidence,
        on_evaluating=tell,
    )
    return RenewalOutcome(
        state=result.state,
        evidence=result.model_dump(mode="json", exclude={"evidence"}),
        reference=result.reference if result.state == "PROMOTED" else None,
    )


class _Renewal:
    """One renewal under way."""

    def __init__(
        self,
        space: RecipeSpace,
        home: Path,
        name: str,
        number: int,
        evidence: dict[str, Any] | None,
        progress: Progress,
    ) -> None:
        self._sections = space.sections()
        self._home = home
        self._name = name
        self._number = number
        self._evidence = evidence
        self._progress = progress
        self._loop_folder = loop_folder(home, name)
        self._folder = self._loop_folder / f"renewal-{number}"
        self._store = Store(home)

    def run(self, on_evaluating: Callable[[dict[str, Any]], None]) -> LoopResult:
        """Plans, searches, judges, promotes or refuses; each once."""
        done = self._folder / "result.json"
        if done.exists():
            return LoopResult.model_validate_json(done.read_bytes())
        plan = self._plan()
        result = self._judged(plan, self._search(plan), on_evaluating)
        write_json(done, json.loads(result.model_dump_json()))
        return result

    def _plan(self) -> RenewalPlan:
        file = self._folder / "plan.json"
        if file.exists():
            return RenewalPlan.model_validate_json(file.read_bytes())
        plan = make_plan(self._store, self._name, self._sections, self._folder, self._study_name())
        write_json(file, json.loads(plan.model_dump_json()))
        return plan

    def _study_name(self) -> str:
        return f"{self._name[:48]}-renew-{self._number}"

    def _search(self, plan: RenewalPlan) -> str:
        """Returns the digest of the best trial's adapter."""
        from graft.pipelines.tune import tune
        from graft.recipe.space import RecipeSpace
        from graft.recipe.tree import Tree

        self._progress.note(
            f"renewal {self._number} of {self._name}: {plan.data.num_new} new and "
            f"{plan.data.num_old} old rows, from version {plan.champion_version}"
        )
        space = RecipeSpace(Tree(f"renewal {self._number} of {self._name}", plan.recipe))
        return tune(space, home=self._home, progress=self._progress).artifact

    def _judged(
        self,
        plan: RenewalPlan,
        trained: str,
        on_evaluating: Callable[[dict[str, Any]], None],
    ) -> LoopResult:
        from graft.engine.run import load_run

        on_evaluating({"study": self._study_name(), "trained": trained})
        recipe = recipe_of(self._store.open(trained))
        run = load_run(_on_old_rows(recipe, self._sections), self._home)
        try:
            digest = self._like_the_champion(plan, trained, run)
        except GateRefusedError as error:
            return self._result(plan, None, None, None, reasons=(f"compression: {error}",))
        version = self._store.register(self._name, digest)
        gate = self._gate(plan, digest, run)
        reasons = gate.reasons or self._promoted(plan, version)
        reference = None
        if reasons:
            self._note_challenger(version)
        else:
            reference = self._refit(plan, run)
        return self._result(plan, version, digest, gate, reasons=reasons, reference=reference)

    def _like_the_champion(self, plan: RenewalPlan, trained: str, run: LoadedRun) -> str:
        """Compresses the successor where the champion that serves is compressed too."""
        if plan.champion_digest == plan.started_from:
            return trained
        from graft.pipelines.compress import compress

        champion = recipe_of(self._store.open(plan.champion_digest))
        recipe = run.recipe.model_copy(update={"compress": champion.compress})
        return compress(trained, recipe, home=self._home, progress=self._progress, run=run).digest

    def _gate(self, plan: RenewalPlan, successor: str, run: LoadedRun) -> GateReport:
        """Judges the artifacts as they are stored, every byte of them checked."""
        from graft.compressors.folder import load_adapter
        from graft.data import load_examples
        from graft.data.prepare import Examples, prepare_examples
        from graft.engine.evaluate import EvalReport
        from graft.engine.publish import require_base
        from graft.engine.run import evaluate_run
        from graft.metrics.base import METRICS

        loop, section = self._sections.loop, self._sections.eval
        kind = loop.gate.metric.removeprefix("eval/")
        known = {metric.type: metric for metric in section.metrics}
        metric = known.get(kind) or METRICS.build(kind)
        stored = [self._store.verify(digest) for digest in (plan.champion_digest, successor)]
        for adapter in stored:
            require_base(adapter, run.ready, run.recipe.model)
        data = require_single(run.recipe.data, "a renewal")
        # Beside the rows that the successor learned from: others of the old ones may be alike.
        new_section = data.model_copy(update={"train": plan.data.train, "eval": loop.feedback_eval})
        learned = load_examples(plan.data.train, "auto")
        judged = load_examples(
            str(loop.feedback_eval), data.format, system=data.system, limit=data.eval_limit
        )
        new_rows = prepare_examples(
            Examples(learned, judged), new_section, run.recipe.objective, run.template
        )

        def measured(slot: str, rows: Any) -> EvalReport:
            return evaluate_run(run, slot, metrics=[metric], prepared=rows, progress=self._progress)

        found = []
        for adapter in stored:  # one after the other: a method that owns the base stands alone
            with seated(run, load_adapter(adapter.path)) as (slot,):
                found.append([measured(slot, rows) for rows in (new_rows, run.prepared)])
        sources = (str(loop.feedback_eval), str(self._sections.data.eval))
        new, old = (
            compare(metric, source, before, after, section.confidence)
            for source, before, after in zip(sources, *found, strict=True)
        )
        return judge(loop.gate, new=new, old=old)

    def _promoted(self, plan: RenewalPlan, version: int) -> tuple[str, ...]:
        """Promotes by compare-and-set; returns why not."""
        if self._store.aliases(self._name).get("champion") == version:
            return ()  # promoted before a crash
        if self._sections.loop.canary:
            logger.warning("loop %s: promotion is %s", self._name, DIRECT)
            self._progress.note(f"promotion is {DIRECT}")
        try:
            self._store.promote(self._name, version, expected=plan.champion_version)
        except AdapterError as error:
            return (str(error),)
        return ()

    def _note_challenger(self, version: int) -> None:
        if self._store.aliases(self._name).get("champion") != version:
            self._store.names.set_alias(self._name, "challenger", version)

    def _refit(self, plan: RenewalPlan, run: LoadedRun) -> str | None:
        """Makes the reference of the traffic that the successor was trained for.

        None keeps the old one: the successor is promoted by now, whatever becomes of this.
        """
        from graft.data import load_examples
        from graft.pipelines.reference import choose_prompts, save_reference

        file = f"reference-{self._number}.npz"
        try:
            texts = choose_prompts(load_examples(plan.data.train, "auto"), self._sections.watch)
            save_reference(self._loop_folder / file, run.model, run.template.tokenizer, texts)
        except (GraftError, OSError) as error:
            self._progress.note(f"the watch keeps its reference: {error}")
            return None
        return file

    def _result(
        self,
        plan: RenewalPlan,
        version: int | None,
        digest: str | None,
        gate: GateReport | None,
        *,
        reasons: tuple[str, ...],
        reference: str | None = None,
    ) -> LoopResult:
        return LoopResult(
            name=self._name,
            number=self._number,
            state="REJECTED" if reasons else "PROMOTED",
            reasons=reasons,
            study=self._study_name(),
            champion_version=plan.champion_version,
            champion_digest=plan.champion_digest,
            successor_version=version,
            successor_digest=digest,
            gate=gate,
            data=plan.data,
            reference=reference,
            evidence=self._evidence,
        )


def _on_old_rows(recipe: Recipe, sections: Sections) -> Recipe:
    """Returns a recipe whose held-out rows are the frozen old ones."""
    return recipe.model_copy(
        update={
            "data": sections.data,
            "eval": sections.eval,
            "verify": sections.verify,
        }
    )


def _next_number(folder: Path) -> int:
    number = 1
    while (folder / f"renewal-{number}" / "result.json").exists():
        number += 1
    return number
