"""Units of a comparison, and the process that does them: `python -m` this module.

The process reads a `UnitRequest` a line from stdin and writes JSON lines to stdout: a unit's
progress, then its result or its error. Units after the first one stand on the base that it loaded;
an error ends the process. When nobody writes requests or reads progress any more it ends, too: an
interrupted comparison leaves no process behind.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from graft.core.errors import GraftError
from graft.core.model import StrictModel
from graft.core.progress import Progress, Task
from graft.report.comparison_facts import BaseFacts, LossPoint, PointFacts, SeedFacts

if TYPE_CHECKING:
    from graft.artifacts import MetricValue
    from graft.engine.run import LoadedRun
    from graft.engine.train import StepReport, Trainer
    from graft.metrics.base import Metric
    from graft.recipe.sections import Recipe

_OWN_SECTIONS = ("method", "train")
"""Of a recipe: these say nothing of what is loaded."""


class UnitSpec(StrictModel):
    """What is to be done."""

    kind: Literal["base", "point", "seed"]
    recipe: dict[str, Any]
    """Resolved; its `train` section says how long and on which seed."""
    home: str

    def may_follow(self, other: UnitSpec) -> bool:
        """Tells whether it can be done in another unit's process, on what that has loaded.

        A final training never shares one: its memory is to be its own.
        """
        is_measured = "seed" in (self.kind, other.kind)
        return not is_measured and (self.home, self._loads) == (other.home, other._loads)

    @property
    def _loads(self) -> dict[str, Any]:
        return {name: part for name, part in self.recipe.items() if name not in _OWN_SECTIONS}


class UnitRequest(StrictModel):
    """What a unit's process is asked."""

    spec: UnitSpec
    log: str
    """File that takes what libraries print."""


def run_unit(spec: UnitSpec, progress: Progress) -> StrictModel:
    """Does one unit's work in this process.

    Raises:
        ConfigError: The method does not fit the base.
        TrainingError: Loss or weights are not finite.
    """
    return UnitRunner().run(spec, progress)


class UnitRunner:
    """Does units in this process, one after another; each `may_follow` the one before."""

    def __init__(self) -> None:
        self._loaded: LoadedRun | None = None

    def run(self, spec: UnitSpec, progress: Progress) -> StrictModel:
        """Does a unit's work on a bare base, loaded by the first one.

        Raises:
            ConfigError: The method does not fit the base.
            TrainingError: Loss or weights are not finite; the base is not bare any more.
        """
        recipe = _recipe(spec)
        if self._loaded is not None and self._loaded.model.slots:
            self._loaded = None  # a reward model stays on the base that it judged on
        if self._loaded is None:
            self._loaded = _load(recipe, Path(spec.home))
        return _WORK[spec.kind](replace(self._loaded, recipe=recipe), progress)


def _recipe(spec: UnitSpec) -> Recipe:
    from graft.recipe.sections import Recipe

    return Recipe.model_validate_json(json.dumps(spec.recipe))


def _load(recipe: Recipe, home: Path) -> LoadedRun:
    import torch

    from graft.engine.run import load_run

    if recipe.scale.threads is not None:
        torch.set_num_threads(recipe.scale.threads)
    return load_run(recipe, home)


def _measure_base(run: LoadedRun, progress: Progress) -> BaseFacts:
    from graft.artifacts.tensors import read_header

    files = run.ready.path.glob("*.safetensors")
    shapes = {name: info.shape for file in files for name, info in read_header(file).items()}
    return BaseFacts(
        num_parameters=sum(math.prod(shape) for shape in shapes.values()),
        metrics=_all_metrics(run, None, progress),
        general=_general_perplexity(run, None, progress),
    )


def _search_point(run: LoadedRun, progress: Progress) -> PointFacts:
    from graft.engine.run import SLOT, measure

    trainer = _joined(run)
    seconds = 0.0
    with progress.task("searching", run.recipe.train.steps, "step") as task:
        while (step := _step(trainer, run.recipe)) is not None:
            seconds += step.seconds
            task.advance(loss=step.loss)
    metrics = measure(run, SLOT, run.recipe.search.eval_rows)
    trainer.leave(SLOT)  # the next unit of this process begins with a bare base
    run.model.weights_changed()
    return PointFacts(metrics=metrics, steps=run.recipe.train.steps, seconds=seconds)


def _train_seed(run: LoadedRun, progress: Progress) -> SeedFacts:
    from graft.compressors.base import Adapter
    from graft.engine.costs import adapter_bytes
    from graft.engine.publish import finished_tensors
    from graft.engine.run import SLOT
    from graft.pipelines.compare_memory import PeakMemory
    from graft.pipelines.forms import seated

    memory = PeakMemory(run.model.device)
    loaded = memory.now_bytes()
    trainer = _joined(run)
    curve = [LossPoint(steps=0, seconds=0.0, loss=_held_out_loss(run))]
    done: list[StepReport] = []
    peak = num_trainable = 0
    memory.begin()
    with progress.task("training", run.recipe.train.steps, "step") as task:
        while (step := _step(trainer, run.recipe)) is not None:
            done.append(step)
            task.advance(loss=step.loss)
            num_trainable = max(num_trainable, _num_trainable(run))
            if step.step % run.recipe.train.report_every and not step.is_finished:
                continue
            peak = max(peak, memory.peak_bytes())
            seconds = sum(report.seconds for report in done)
            curve.append(LossPoint(steps=step.step, seconds=seconds, loss=_held_out_loss(run)))
            memory.begin()
    tensors = finished_tensors(run.recipe, trainer.state(SLOT).tensors)
    adapter = Adapter(run.recipe.method, tensors)
    trainer.leave(SLOT)
    with seated(run, adapter) as (slot,):  # as it would be served, not as it trains
        metrics = _all_metrics(run, slot, progress)
        general = _general_perplexity(run, slot, progress)
    warm = done[1:] or done
    return SeedFacts(
        seed=run.recipe.train.seed,
        steps=done[-1].step,
        seconds=sum(report.seconds for report in done),
        tokens_per_s=sum(r.num_tokens for r in warm) / sum(r.seconds for r in warm),
        train_loss=done[-1].loss,
        curve=tuple(curve),
        loaded_bytes=loaded,
        peak_bytes=peak,
        memory=memory.kind,
        num_trainable=num_trainable,
        file_bytes=adapter_bytes(run.recipe, tensors),
        metrics=metrics,
        general=general,
    )


_WORK: dict[str, Callable[[LoadedRun, Progress], StrictModel]] = {
    "base": _measure_base,
    "point": _search_point,
    "seed": _train_seed,
}


def _joined(run: LoadedRun) -> Trainer:
    from graft.engine.run import SLOT
    from graft.engine.train import Trainer

    trainer = Trainer(run.model, template=run.template, judges=run.judges)
    trainer.join(SLOT, run.recipe, run.prepared.train)
    return trainer


def _step(trainer: Trainer, recipe: Recipe) -> StepReport | None:
    """Does one step; None where all are done."""
    from graft.engine.run import SLOT, require_finite

    reports = trainer.step()
    if not reports:
        return None
    require_finite(reports[SLOT], recipe)
    return reports[SLOT]


def _held_out_loss(run: LoadedRun) -> float:
    """Loss a supervised token on the first held-out rows, without an interval: it is a curve."""
    from graft.engine.evaluate import loss_outcomes
    from graft.engine.run import SLOT
    from graft.metrics.loss import LossMetric

    run.model.weights_changed()
    outcomes = loss_outcomes(
        run.model,
        SLOT,
        run.prepared.eval,
        run.recipe.search.eval_rows,
        scores_answers=run.recipe.objective.scores_answers,
    )
    return LossMetric().score(outcomes)[0]


def _all_metrics(run: LoadedRun, slot: str | None, progress: Progress) -> dict[str, MetricValue]:
    from graft.engine.run import evaluate_run

    return evaluate_run(run, slot, metrics=final_metrics(run.recipe), progress=progress).metrics


def final_metrics(recipe: Recipe) -> list[Metric]:
    """Returns what is measured at the end: `eval.metrics`, loss and perplexity among them."""
    from graft.metrics.base import METRICS

    listed = {metric.type: metric for metric in recipe.eval.metrics}
    always = {name: METRICS.build(name) for name in ("loss", "perplexity") if name not in listed}
    return [*listed.values(), *always.values()]


def _general_perplexity(run: LoadedRun, slot: str | None, progress: Progress) -> MetricValue | None:
    from graft.data.plain_text import load_text_rows
    from graft.engine.run import evaluate_run
    from graft.metrics.perplexity import PerplexityMetric

    section = run.recipe.compare
    if section.general is None:
        return None
    rows = load_text_rows(section.general, run.template, limit=section.general_limit)
    report = evaluate_run(
        run,
        slot,
        metrics=[PerplexityMetric()],
        prepared=run.prepared._replace(eval=rows, prompts=[]),
        progress=progress,
    )
    return report.metrics["eval/perplexity"]


def _num_trainable(run: LoadedRun) -> int:
    from graft.engine.run import SLOT

    return sum(p.numel() for p in run.model.parameters(SLOT).values() if p.requires_grad)


class _PipeTask(Task):
    def __init__(self, send: Callable[..., None], number: int) -> None:
        self._send = send
        self._number = number

    def advance(self, amount: float = 1, **fields: float | str) -> None:
        self._send("advance", task=self._number, amount=amount, fields=fields)

    def close(self) -> None:
        self._send("close", task=self._number)


class PipeProgress(Progress):
    """Progress as JSON lines, for the process that waits for this one."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._num_tasks = 0

    def send(self, event: str, **fields: Any) -> None:
        """Writes one line at once.

        Raises:
            BrokenPipeError: Nobody reads it any more.
        """
        self._stream.write(json.dumps({"event": event, **fields}) + "\n")
        self._stream.flush()

    def task(self, label: str, total: float | None = None, unit: str = "step") -> Task:
        """Announces a task."""
        self._num_tasks += 1
        self.send("task", task=self._num_tasks, label=label, total=total, unit=unit)
        return _PipeTask(self.send, self._num_tasks)

    def note(self, text: str) -> None:
        """Passes one line on."""
        self.send("note", text=text)


def main() -> None:
    """Does the units that stdin asks for, one after another."""
    from graft.core.process import prepare_process

    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # stdout is for progress and results alone
    prepare_process()
    progress, units = PipeProgress(stream), UnitRunner()
    for line in sys.stdin:
        request = UnitRequest.model_validate_json(line)
        _log_to(request.log)
        try:
            result = units.run(request.spec, progress)
        except GraftError as error:
            progress.send("error", type=type(error).__name__, message=str(error))
            return
        progress.send("result", result=result.model_dump(mode="json"))


def _log_to(path: str) -> None:
    """Lets what libraries print go to a file."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
    os.close(log)


if __name__ == "__main__":
    main()
