"""One training run, from a recipe to its last checkpoint: alone, or as one of several workers.

Nothing in a run's folder depends on how many workers wrote it: a run started on two may end on one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graft.core.errors import AdapterError, TrainingError
from graft.core.files import require_writable, write_json
from graft.core.model import StrictModel
from graft.core.progress import QUIET, Progress
from graft.engine.checkpoint import newest_step
from graft.engine.costs import costs_of
from graft.engine.measurable import require_measurable
from graft.engine.multi import AdapterTensors, MultiAdapterModel
from graft.engine.recompute import recompute_layers
from graft.engine.run_folder import (
    CHECKPOINTS,
    FIGURES,
    RECIPE_FILE,
    Report,
    Resumed,
    drop_reports_after,
    read_progress,
    read_reports,
    save_between_reports,
    save_progress,
)
from graft.engine.train import StepReport, Trainer
from graft.methods.base import HEAD, split_head
from graft.objectives.base import DETAILS, ROLLOUT_SECONDS
from graft.recipe.mixture import mixture_facts

if TYPE_CHECKING:
    from graft.data.prepare import PreparedData
    from graft.data.template import ChatTemplate
    from graft.engine.backends.base import Backend
    from graft.engine.evaluate import EvalReport
    from graft.engine.reward_models import RewardModels
    from graft.metrics.base import Metric
    from graft.models import ReadyModel
    from graft.recipe.sections import Recipe

SLOT = "adapter"

_CHANGES_NO_RESULT = frozenset({"micro_batch_tokens", "report_every"})


class TrainResult(StrictModel):
    """A finished run."""

    folder: str
    """Holds `recipe.json`, `report.jsonl` and `checkpoint/`."""
    steps: int
    seconds: float
    """Of training, all attempts together; loading and evaluation excluded."""
    metrics: dict[str, float]
    """Of the last report."""


@dataclass(frozen=True)
class PreparedRun:
    """What a run stands on, checked, before any weight is loaded."""

    recipe: Recipe
    home: Path
    ready: ReadyModel
    template: ChatTemplate
    prepared: PreparedData
    start: str | None
    """Digest of the adapter that `train.init_from` names; None where it has none."""

    def load(self) -> LoadedRun:
        """Loads base and reward models.

        Raises:
            GraftError: Of the kind that fits: model or settings.
        """
        from graft.engine.memory.free import wait_until_free
        from graft.engine.reward_models import RewardModels
        from graft.models import load_model, require_device

        recipe, ready, template = self.recipe, self.ready, self.template
        wait_until_free(require_device(recipe.model))
        model = MultiAdapterModel(load_model(ready, recipe.model))
        if recipe.scale.gradient_checkpointing:
            recompute_layers(model)
        judges = RewardModels(model, ready, template, self.home)
        judges.load(recipe)
        return LoadedRun(recipe, ready, model, template, self.prepared, judges, self.start)


@dataclass(frozen=True)
class LoadedRun:
    """What a run stands on, loaded."""

    recipe: Recipe
    ready: ReadyModel
    model: MultiAdapterModel
    template: ChatTemplate
    prepared: PreparedData
    judges: RewardModels | None = None
    """Reward models that the recipe names."""
    start: str | None = None
    """Digest of the adapter that `train.init_from` names; None where it has none."""


def prepare_run(recipe: Recipe, home: Path, prepared: PreparedData | None = None) -> PreparedRun:
    """Finds base, tokenizer and rows, and checks what the recipe names; loads no weights.

    Args:
        recipe: Complete.
        home: Where base models are kept.
        prepared: Its rows, where they have been prepared already.

    Raises:
        GraftError: Of the kind that fits: model, data or settings.
    """
    from graft.data.mixture import prepare_parts
    from graft.data.template import ChatTemplate
    from graft.engine.reward_models import require_reward_models
    from graft.models import load_tokenizer, require_device, resolve_model

    require_device(recipe.model)
    ready = resolve_model(recipe.model, home)
    template = ChatTemplate(load_tokenizer(ready))
    prepared = prepared or prepare_parts(recipe.parts, template)
    require_measurable(recipe, prepared, template.context_tokens)
    require_reward_models(recipe, ready, home)
    start = start_digest(recipe, home)
    return PreparedRun(recipe, home, ready, template, prepared, start)


def load_run(recipe: Recipe, home: Path, prepared: PreparedData | None = None) -> LoadedRun:
    """Loads base, tokenizer and rows; arguments as `prepare_run` has them.

    Raises:
        GraftError: Of the kind that fits: model, data or settings.
    """
    return prepare_run(recipe, home, prepared).load()


def train_run(
    run: LoadedRun,
    folder: Path,
    *,
    home: Path,
    backend: Backend | None = None,
    eval_rows: int = 0,
    on_step: Callable[[StepReport], None] | None = None,
    on_report: Callable[[Report], None] | None = None,
    leaves: Callable[[], bool] | None = None,
) -> bool:
    """Trains to the recipe's last step, from the folder's newest whole checkpoint if there is one.

    A loss of `train.stop_at_loss` or less in a report ends it before.
    Each report comes after its checkpoint is safe. Under several workers every one of them calls
    this with the same arguments; the first alone writes.

    Args:
        run: What `load_run` made, in this process.
        folder: The run's own; every worker sees it.
        home: For `train.init_from`.
        backend: None steps with plain torch.
        eval_rows: Held-out rows measured at each report; 0 measures none.
        on_step: Told of every step.
        on_report: Told of every report.
        leaves: Asked after every step by every worker, which all get the same answer; where it is
            yes, the run writes a checkpoint and ends, to be continued from that very step.

    Returns:
        Whether the run is complete; False where it has left before.

    Raises:
        TrainingError: Loss or gradient is not finite, or a checkpoint cannot be written.
        ConfigError: The folder belongs to a different run.
        AdapterError: `train.init_from` does not fit.
    """
    trainer = Trainer(run.model, backend, run.template, run.judges)
    keeper = _Keeper(run, trainer, folder)
    past = keeper.find()
    join_run(trainer, SLOT, run, home, past)
    keeper.open(past)
    window = list(past.window) if past else []
    report: Report = past.report if past else {"steps": 0, "seconds": 0.0, "tokens": 0}
    seconds, tokens = report["seconds"], report["tokens"]
    is_complete = run.recipe.train.ends_with(report)
    while not is_complete and (steps := trainer.step()):
        last = steps[SLOT]
        require_finite(last, run.recipe)
        window.append(last)
        seconds += last.seconds
        tokens += last.num_tokens
        if on_step is not None:
            on_step(last)
        if last.step % run.recipe.train.report_every == 0 or last.is_finished:
            report = report_on(window, seconds, tokens) | measure(run, SLOT, eval_rows)
            report = keeper.keep(report)
            if on_report is not None:
                on_report(report)
            window = []
            is_complete = run.recipe.train.ends_with(report)
        if leaves is not None and not is_complete and leaves():
            reached = {"seconds": seconds, "tokens": tokens}
            keeper.keep_between_reports(report | reached, window)
            return False
    return True


def join_run(trainer: Trainer, slot: str, run: LoadedRun, home: Path, past: Resumed | None) -> None:
    """Gives a run its slot, where it left off or at its start.

    Raises:
        AdapterError: `train.init_from` is of other shapes than the recipe's method.
    """
    tensors = starting_tensors(run, home, is_resumed=past is not None)
    state = past.state if past else None
    try:
        trainer.join(slot, run.recipe, run.prepared.train, tensors=tensors, state=state)
    except AdapterError as error:
        if tensors is None:
            raise
        raise AdapterError(
            f"train.init_from {run.recipe.train.init_from!r} has other shapes than the recipe's "
            f"method: {error}; give method the settings that it was trained with"
        ) from error


class _Keeper:
    """Keeps the reports and checkpoints of a run: every worker asks it, the first one writes."""

    def __init__(self, run: LoadedRun, trainer: Trainer, folder: Path) -> None:
        self._run = run
        self._trainer = trainer
        self._folder = folder
        self._facts = run_facts(run)
        self._is_writer = trainer.backend.world_rank == 0
        self._has_kept = False

    def find(self) -> Resumed | None:
        """Finds where the run stands.

        Raises:
            TrainingError: Workers find different checkpoints.
        """
        past = read_progress(self._folder, self._facts)
        backend = self._trainer.backend
        steps = torch.zeros(backend.world_size, dtype=torch.int64)
        steps[backend.world_rank] = past.state.step if past else 0
        found = backend.all_reduce_sum(steps).tolist()
        if len(set(found)) > 1:
            told = ", ".join(f"worker {rank} step {step}" for rank, step in enumerate(found))
            raise TrainingError(
                f"the workers find different checkpoints in {self._folder} ({told}): that folder "
                "must be shared by all nodes; choose one that is with --home (or GRAFT_HOME)"
            )
        return past

    def open(self, past: Resumed | None) -> None:
        """Readies the folder for what follows."""
        self._has_kept = past is not None
        if self._is_writer:
            require_writable(self._folder, "checkpoints and reports")
            write_json(self._folder / RECIPE_FILE, self._run.recipe.model_dump(mode="json"))
            drop_reports_after(self._folder, past.state.step if past else 0)

    def keep(self, report: Report) -> Report:
        """Adds what the slot costs, keeps the report with its checkpoint, and returns it.

        Raises:
            TrainingError: Its checkpoints were removed; a search does, of what it stops for good.
        """
        state, searched = self._trainer.state(SLOT), self._run.recipe.search.objectives[0]
        report = report | costs_of(self._run, SLOT, state.tensors, report, self._folder)
        if self._is_writer:
            if not self._is_wanted:
                told = f"{self._folder / CHECKPOINTS} was removed while the run trained"
                raise TrainingError(f"{told}, so it ends; the same command begins anew")
            save_progress(self._folder, state, report, self._facts, searched)
            self._has_kept = True
        return report

    def keep_between_reports(self, report: Report, window: list[StepReport]) -> None:
        """Keeps where the run is, unless its checkpoints were removed: nobody goes on from it."""
        state = self._trainer.state(SLOT)
        if self._is_writer and self._is_wanted:
            save_between_reports(self._folder, state, report, window, self._facts)

    @property
    def _is_wanted(self) -> bool:
        return not self._has_kept or newest_step(self._folder / CHECKPOINTS) > 0


def read_result(folder: Path) -> TrainResult:
    """Reads what a run in this folder came to."""
    last = read_reports(folder)[-1]
    return TrainResult(
        folder=str(folder), steps=int(last["steps"]), seconds=last["seconds"], metrics=last
    )


def report_on(window: list[StepReport], seconds: float, tokens: float) -> Report:
    """Sums up the steps since the last report.

    Args:
        window: Those steps.
        seconds: Of the whole run so far.
        tokens: Trained on so far, of the whole run.
    """
    last = window[-1]
    elapsed = sum(step.seconds for step in window)
    names = dict.fromkeys(name for step in window for name in step.figures)
    told = {name: [s.figures[name] for s in window if name in s.figures] for name in names}
    sampling = told.pop(ROLLOUT_SECONDS, None)
    shares = {} if sampling is None else {f"{ROLLOUT_SECONDS}_fraction": sum(sampling) / elapsed}
    return {
        "steps": last.step,
        "seconds": seconds,
        "tokens": tokens,
        "train/loss": sum(step.loss for step in window) / len(window),
        "train/lr": last.lr,
        "train/grad_norm": last.grad_norm,
        "train/tokens_per_s": sum(step.num_tokens for step in window) / max(elapsed, 1e-9),
        **{
            name if name.startswith(DETAILS) else FIGURES + name: sum(values) / len(values)
            for name, values in told.items()
        },
        **shares,
    }


def require_finite(step: StepReport, recipe: Recipe) -> None:
    """Ends a run that has come to nothing.

    Raises:
        TrainingError: A sampled answer or its reward is broken, loss or gradient is not a finite
            number, or the objective says that what is learned has collapsed.
    """
    if step.failure is not None:
        raise TrainingError(f"step {step.step}: {step.failure}")
    if not step.is_finite:
        raise TrainingError(
            f"step {step.step}: loss {step.loss:.4g}, gradient norm {step.grad_norm:.4g}: not "
            f"finite; a smaller train.lr (now {recipe.train.lr:g}) or a longer warm-up may help"
        )
    collapse = recipe.objective.collapse(step.figures)
    if collapse is not None:
        raise TrainingError(
            f"step {step.step}: {collapse} (objective.{recipe.objective.type}); what is learned "
            f"has collapsed: a smaller train.lr (now {recipe.train.lr:g}), a larger beta or "
            "another reward may help"
        )


def starting_tensors(run: LoadedRun, home: Path, *, is_resumed: bool) -> AdapterTensors | None:
    """Reads what a slot is to join with: its first weights, if not resumed, and its reference."""
    if is_resumed and not run.recipe.needs_reference:
        return None
    return initial_tensors(run.recipe, run.ready, home)


def initial_tensors(recipe: Recipe, ready: ReadyModel, home: Path) -> AdapterTensors | None:
    """Reads the weights that `train.init_from` names; None where it names nothing.

    Raises:
        AdapterError: Unknown, damaged, of another method, or made for another base.
    """
    if recipe.train.init_from is None:
        return None
    from graft.artifacts import Store
    from graft.compressors.folder import load_adapter

    stored = Store(home).resolve(recipe.train.init_from, allow_folder=True)
    given = f"train.init_from {recipe.train.init_from!r}"
    if stored.record.base_digest not in (None, ready.digest):
        raise AdapterError(
            f"{given} was made for the base {stored.record.base_source} "
            f"({str(stored.record.base_digest)[:12]}), the recipe's is {ready.source} "
            f"({ready.digest[:12]}); start from an adapter of the same base"
        )
    adapter = load_adapter(stored.path)
    if adapter.method.type != recipe.method.type:
        raise AdapterError(
            f"{given} is {adapter.method.type}, the recipe's method is {recipe.method.type}"
        )
    own, head = split_head(adapter.tensors)
    tensors = recipe.method.starting_tensors(adapter.method, own)
    return tensors if head is None else {**tensors, HEAD: head}


def start_digest(recipe: Recipe, home: Path) -> str | None:
    """Names what training starts from: behind an alias or a name another adapter may come to be.

    Raises:
        AdapterError: `train.init_from` names nothing.
    """
    from graft.artifacts import Store

    if recipe.train.init_from is None:
        return None
    try:
        return Store(home).resolve(recipe.train.init_from, allow_folder=True).digest
    except AdapterError as error:
        raise AdapterError(
            f"train.init_from {recipe.train.init_from!r} names no usable adapter in {home}: "
            f"{error}; train it there first, or name another one"
        ) from error


def run_facts(run: LoadedRun) -> dict[str, Any]:
    """What must be equal for a checkpoint to be continued: all that changes a result, no more."""
    recipe = run.recipe.model_dump(mode="json")
    free = _CHANGES_NO_RESULT
    if run.recipe.train.stop_at_loss is not None:
        free -= {"report_every"}  # it is at reports that the run may stop
    train = {k: v for k, v in recipe["train"].items() if k not in free}
    train["init_from"] = run.start or train["init_from"]
    judges = run.judges.facts(run.recipe) if run.judges is not None else {}
    return {
        "base": run.ready.digest,
        "data": run.prepared.proof.digest,
        "chat template": run.prepared.proof.template_digest,
        "data.max_length": run.prepared.proof.max_length,
        **mixture_facts(run.recipe.data),
        "model.dtype": recipe["model"]["dtype"],
        **{f"model.quantization.{k}": v for k, v in recipe["model"]["quantization"].items()},
        **{f"method.{k}": v for k, v in recipe["method"].items()},
        **{f"objective.{k}": v for k, v in recipe["objective"].items()},
        **{f"train.{k}": v for k, v in train.items()},
        **{f"reward model {k}": v for k, v in judges.items()},
    }


def measure(run: LoadedRun, slot: str, num_rows: int) -> Report:
    """Measures a slot in training on the first held-out rows: what is searched, and what is cheap.

    What the method tells of itself (`method/expert_load_0`) stands beside it.
    Metrics of `eval.metrics` that need generated answers wait for the end unless they are searched.
    """
    if not num_rows or not run.prepared.eval:
        return {}
    run.model.weights_changed()
    measured = evaluate_run(run, slot, metrics=report_metrics(run.recipe), rows=num_rows)
    return measured.values | measured.observed


def evaluate_run(
    run: LoadedRun,
    slot: str | None,
    *,
    metrics: Sequence[Metric] | None = None,
    prepared: PreparedData | None = None,
    rows: int | None = None,
    progress: Progress = QUIET,
) -> EvalReport:
    """Measures a slot as the run's recipe says.

    Args:
        run: Holds the slot.
        slot: Who is measured; None is the bare base.
        metrics: None is `eval.metrics`.
        prepared: Other held-out rows than the run's own.
        rows: Only the first so many, without intervals; None is all.
        progress: Told of every row.
    """
    from graft.engine.evaluate import evaluate

    section = run.recipe.eval
    return evaluate(
        run.model,
        slot,
        prepared or run.prepared,
        section.metrics if metrics is None else metrics,
        template=run.template,
        max_new_tokens=section.max_new_tokens,
        batch_size=section.batch_size,
        confidence=section.confidence,
        rows=rows,
        scores_answers=run.recipe.objective.scores_answers,
        judges=run.judges,
        progress=progress,
    )


def report_metrics(recipe: Recipe) -> list[Metric]:
    """Returns the metrics of every report: those searched, and those that need no answers."""
    from graft.metrics.base import METRICS

    names = [objective.metric for objective in recipe.search.objectives]
    searched = [name.rpartition("/")[2] for name in names if "eval/" in name]
    listed = {metric.type: metric for metric in recipe.eval.metrics}
    cheap = [name for name, metric in listed.items() if metric.needs != "generation"]
    return [listed.get(name) or METRICS.build(name) for name in dict.fromkeys([*searched, *cheap])]
