"""What the sweep takes from GRAFT: the search's recipe, the rivals' task, and the judge."""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks._sweep_task import Task, Trial
from graft.core.errors import DataError
from graft.recipe.sections import Recipe

if TYPE_CHECKING:
    from graft.data.records import TokenRow
    from graft.data.template import ChatTemplate
    from graft.engine.multi import MultiAdapterModel
    from graft.engine.run import LoadedRun

DATA = Path(__file__).parents[1] / "examples" / "smart_home" / "data"
ROW_TOKENS = 64
"""Of a row, where a step has as many."""
NUM_MEASURED = 8
"""Held-out rows that each trial is measured on."""
NUM_HELD_OUT = 64
"""Those that the winners are judged on."""

RANKS, ALPHAS, LRS = (8, 16), (16.0, 32.0), (2e-4, 5e-4, 1e-3, 2e-3)


class Point(NamedTuple):
    """A LoRA configuration."""

    r: int
    lora_alpha: float
    lr: float


def points_of(seed: int, number: int) -> list[Point]:
    """Returns so many of the 16 configurations, in an order of chance."""
    points = [Point(*values) for values in itertools.product(RANKS, ALPHAS, LRS)]
    random.Random(seed).shuffle(points)
    return points[:number]


class Rows(NamedTuple):
    """What a step of a trial takes."""

    length: int
    batch_size: int

    @classmethod
    def of(cls, tokens: int) -> Rows:
        """Divides a step's tokens into rows."""
        length = min(tokens, ROW_TOKENS)
        return cls(length, tokens // length)


def data_folder(options: argparse.Namespace, tokens: int) -> Path:
    """Where the rows of that many tokens a step lie."""
    return Path(options.work) / "data" / str(tokens)


def search_recipe(options: argparse.Namespace, tokens: int, **search: Any) -> dict[str, Any]:
    """The sweep as a recipe whose points are all configurations; no trial is stopped."""
    rows, folder = Rows.of(tokens), data_folder(options, tokens)
    points = points_of(options.seed, options.trials)
    return {
        "model": {"source": str(options.model_folder), "dtype": options.dtype, "device": "cpu"},
        "data": {
            "train": str(folder / "train.jsonl"),
            "eval": str(folder / "eval.jsonl"),
            "format": "text",
            "max_length": rows.length,
        },
        "method": {
            "type": "lora",
            "r": {"choice": list(RANKS)},
            "lora_alpha": {"choice": list(ALPHAS)},
        },
        "objective": {"type": "pretrain"},
        "train": {
            "steps": options.steps,
            "batch_size": rows.batch_size,
            "lr": {"choice": list(LRS)},
            "schedule": "constant",
            "warmup_fraction": 0.0,
            "report_every": options.steps,
        },
        "scale": {"threads": options.threads},
        "search": {
            "trials": len(points),
            "points": [
                {"method.r": p.r, "method.lora_alpha": p.lora_alpha, "train.lr": p.lr}
                for p in points
            ],
            "scheduler": {"type": "none"},
            "executor": "packed",
            "eval_rows": NUM_MEASURED,
            **search,
        },
        "eval": {"metrics": ["loss"]},
    }


def trial_recipe(options: argparse.Namespace, tokens: int, point: Point) -> Recipe:
    """The recipe of one trial."""
    content = search_recipe(options, tokens)
    content["search"] |= {"points": [], "trials": 1}
    content["method"] |= {"r": point.r, "lora_alpha": point.lora_alpha}
    content["train"] |= {"lr": point.lr}
    return Recipe.model_validate(content)


def make_ready(options: argparse.Namespace) -> Path:
    """Unpacks the base once; returns the folder that every arm loads."""
    from graft.models import resolve_model
    from graft.models.section import ModelSection

    section = ModelSection(source=options.model, dtype=options.dtype)
    return resolve_model(section, options.home).path.absolute()


def prepare(options: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """Writes rows, starts and the rivals' task; trains its first trial by itself.

    Returns:
        That trial's losses, and its loss on the measured rows.
    """
    from graft.compressors.base import Adapter
    from graft.compressors.folder import save_adapter
    from graft.engine.order import batch_rows
    from graft.engine.run import load_run
    from graft.engine.train import Trainer

    write_rows(options, tokens)
    points = points_of(options.seed, options.trials)
    recipes = [trial_recipe(options, tokens, point) for point in points]
    run = load_run(recipes[0], options.work / "home")
    _require_length(run, tokens)
    rows, measured = run.prepared.train, run.prepared.eval[:NUM_MEASURED]
    trainer = Trainer(run.model, template=run.template)
    trials = []
    for index, (point, recipe) in enumerate(zip(points, recipes, strict=True)):
        start = options.work / "starts" / str(index)
        if not start.exists():
            trainer.join("own", recipe, rows)
            adapter = Adapter(recipe.method, run.model.tensors("own"))
            save_adapter(start, adapter, str(options.model_folder))
            trainer.leave("own")
        trials.append(Trial(*point, start=str(start)))
    train = recipes[0].train
    taken = [batch_rows(train.seed, at, train.batch_size, len(rows)) for at in range(train.steps)]
    Task(
        model=str(options.model_folder),
        dtype={"bf16": "bfloat16", "fp32": "float32"}[options.dtype],
        rows=[rows[at].input_ids for step in taken for at in step],
        held_out=[row.input_ids for row in measured],
        batch_size=train.batch_size,
        steps=train.steps,
        report_every=train.steps,
        threads=options.threads,
        trials=trials,
    ).save(task_file(options, tokens))
    trainer.join("own", recipes[0], rows)
    losses = [trainer.step()["own"].loss for _ in range(train.steps)]
    return {"losses": losses, "held_out_loss": _mean_loss(run.model, "own", measured)}


def task_file(options: argparse.Namespace, tokens: int) -> Path:
    """Where the rivals' task lies."""
    return data_folder(options, tokens) / "task.json"


def judge(options: argparse.Namespace, tokens: int, adapters: dict[str, str]) -> dict[str, float]:
    """Returns each adapter's mean loss over all held-out rows, by arm."""
    from graft.compressors.folder import load_adapter
    from graft.engine.run import load_run

    first = points_of(options.seed, options.trials)[0]
    run = load_run(trial_recipe(options, tokens, first), options.work / "home")
    found = {}
    for arm, folder in adapters.items():
        adapter = load_adapter(Path(folder))
        run.model.add_slot(arm, adapter.method, tensors=adapter.tensors)
        found[arm] = _mean_loss(run.model, arm, run.prepared.eval)
        run.model.remove_slot(arm)
    return found


def _mean_loss(model: MultiAdapterModel, slot: str, rows: list[TokenRow]) -> float:
    from graft.engine.evaluate import row_losses

    model.weights_changed()
    sums, counts = zip(*row_losses(model, slot, rows), strict=True)
    return float(sum(sums) / sum(counts))


def write_rows(options: argparse.Namespace, tokens: int) -> None:
    """Cuts what is said in the smart home into texts of one length in tokens, each different."""
    from graft.data.template import ChatTemplate
    from graft.models import load_tokenizer, resolve_model
    from graft.models.section import ModelSection

    section = ModelSection(source=str(options.model_folder), dtype=options.dtype)
    template = ChatTemplate(load_tokenizer(resolve_model(section, options.work / "home")))
    rows, folder, known = Rows.of(tokens), data_folder(options, tokens), set[str]()
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {"train.jsonl": options.steps * rows.batch_size, "eval.jsonl": NUM_HELD_OUT}
    for name, number in numbers.items():
        texts = _texts(_said(DATA / name), template, rows.length, known)
        lines = [json.dumps({"text": text}) + "\n" for text in itertools.islice(texts, number)]
        if len(lines) < number:
            raise DataError(f"{DATA / name} gives {len(lines)} rows; {number} are needed")
        (folder / name).write_text("".join(lines), encoding="utf-8")


def _said(path: Path) -> str:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    turns = [turn for row in rows for turn in row["messages"] if turn["role"] != "system"]
    return "".join(turn["content"] + "\n" for turn in turns)


def _texts(said: str, template: ChatTemplate, length: int, known: set[str]) -> Any:
    from graft.data.plain_text import document_ids

    num_first = len(document_ids("", template))  # what a tokenizer puts before a text
    span = length - num_first - 1  # the token that ends a document comes behind
    stream, at = document_ids(said, template)[num_first:], 0
    while at + span <= len(stream):
        text = template.tokenizer.decode(stream[at : at + span], clean_up_tokenization_spaces=False)
        is_whole = len(document_ids(text, template)) == num_first + span
        if is_whole and text not in known:
            known.add(text)
            yield text
        at += span if is_whole else 1


def _require_length(run: LoadedRun, tokens: int) -> None:
    length = Rows.of(tokens).length
    lengths = {len(row.input_ids) for row in (*run.prepared.train, *run.prepared.eval)}
    if lengths != {length}:
        raise DataError(f"rows of {sorted(lengths)} tokens; all must have {length}")
