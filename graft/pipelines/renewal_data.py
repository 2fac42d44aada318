"""The rows of a renewal: labelled new ones, a replay of old ones, some of both to search by."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.core.errors import ConfigError, DataError
from graft.core.files import sha256_file, write_atomic
from graft.core.model import StrictModel
from graft.core.seeds import derive_seed
from graft.data import Example, load_examples

if TYPE_CHECKING:
    from graft.data.section import DataSection
    from graft.recipe.operation import LoopSection

SEARCH_FRACTION = 0.125
"""Of the new and of the old rows, held out of training so that trials are compared on neither
gate set: choosing the best of many on the gate's own rows would let it through too easily."""
MIN_FEEDBACK = 8


class RenewalData(StrictModel):
    """Two files made of new and old rows; they share no row with each other or with the gate."""

    train: str
    search: str
    """Held-out rows that the trials are compared on."""
    num_new: int
    """New rows in training."""
    num_old: int
    """Old rows in training."""
    num_search: int
    sha256: str
    """Of the training file."""


def compose(
    data: DataSection,
    loop: LoopSection,
    folder: Path,
    *,
    seed: int,
    older: Sequence[DataSection] = (),
) -> RenewalData:
    """Writes `train.jsonl` and `search.jsonl` of a renewal; the same inputs give the same files.

    Args:
        data: The recipe's own: its training rows are replayed, its held-out rows stay apart.
        loop: Names the labelled new rows and how many old ones join them.
        folder: Where the files go.
        seed: Of the choice.
        older: More rows to replay, where their files are still there: those that the champion
            learned from, read as it read them.

    Raises:
        ConfigError: `loop.feedback`, `loop.feedback_eval` or `data.eval` is absent.
        DataError: Too few new rows, or one of them is in a set that the gate judges by.
    """
    feedback, _ = require_gate_rows(data, loop)
    new = _distinct(load_examples(feedback, data.format, system=data.system))
    _refuse_leaks(feedback, new, data, loop)
    if len(new) < MIN_FEEDBACK:
        raise DataError(
            f"{feedback}: {len(new)} different labelled rows are too few to renew from; give at "
            f"least {MIN_FEEDBACK}"
        )
    kept_apart = {_content(example) for example in (*new, *_gate_rows(data, loop))}
    pool = load_examples(data.train, data.format, system=data.system, limit=data.limit)
    for of in older:
        if Path(of.train).is_file():
            pool += load_examples(of.train, of.format, system=of.system, limit=of.limit)
    old = [example for example in _distinct(pool) if _content(example) not in kept_apart]

    rng = random.Random(derive_seed("renewal", seed))
    rng.shuffle(new)
    rng.shuffle(old)
    share = loop.replay_fraction
    old = old[: round(len(new) * share / (1 - share))]
    num_search_new = math.ceil(len(new) * SEARCH_FRACTION)
    num_search_old = math.ceil(len(old) * SEARCH_FRACTION)
    train = new[num_search_new:] + old[num_search_old:]
    search = new[:num_search_new] + old[:num_search_old]
    rng.shuffle(train)
    rng.shuffle(search)  # a search that reads only the first rows sees both kinds
    for name, examples in (("train", train), ("search", search)):
        lines = (json.dumps(_row(example), ensure_ascii=False) for example in examples)
        write_atomic(folder / f"{name}.jsonl", "".join(line + "\n" for line in lines))
    return RenewalData(
        train=str(folder / "train.jsonl"),
        search=str(folder / "search.jsonl"),
        num_new=len(new) - num_search_new,
        num_old=len(old) - num_search_old,
        num_search=len(search),
        sha256=sha256_file(folder / "train.jsonl"),
    )


def require_gate_rows(data: DataSection, loop: LoopSection) -> tuple[str, str]:
    """Returns the sources of new rows to learn and new rows to judge by.

    Raises:
        ConfigError: The recipe names none, or no old rows to judge by.
    """
    if loop.feedback is None or loop.feedback_eval is None:
        raise ConfigError(
            "a renewal needs loop.feedback (labelled rows of the new traffic) and "
            "loop.feedback_eval (other ones, for the gate); name both files in the recipe"
        )
    if data.eval is None:
        raise ConfigError(
            "a renewal's gate needs data.eval: the successor must not be worse on the old rows"
        )
    return loop.feedback, loop.feedback_eval


def _gate_rows(data: DataSection, loop: LoopSection) -> list[Example]:
    rows = []
    for source in (loop.feedback_eval, data.eval):
        if source is not None:
            rows += load_examples(source, data.format, system=data.system)
    return rows


def _refuse_leaks(feedback: str, new: list[Example], data: DataSection, loop: LoopSection) -> None:
    known = {_content(example): example.source for example in _gate_rows(data, loop)}
    leaked = [(e.source, known[key]) for e in new if (key := _content(e)) in known]
    if leaked:
        shown = "; ".join(f"{a} = {b}" for a, b in leaked[:3])
        raise DataError(
            f"{feedback}: {len(leaked)} rows are also rows that the gate judges by ({shown}"
            f"{' …' if leaked[3:] else ''}); a successor trained on them would pass without "
            "proof: remove them from one side"
        )


def _distinct(examples: list[Example]) -> list[Example]:
    return list({_content(example): example for example in examples}.values())


def _content(example: Example) -> str:
    return example.model_dump_json(exclude={"source"})


def _row(example: Example) -> dict[str, Any]:
    """Writes an example back in the shape that it is read from."""
    if example.text is not None:
        return {"text": example.text}
    if example.messages:
        return {"messages": [message.model_dump() for message in example.messages]}
    prompt = [message.model_dump() for message in example.prompt]
    if example.answer is not None:
        return {"prompt": prompt, "completion": example.answer, "label": example.is_wanted}
    if example.chosen is None:
        return {"prompt": prompt}
    return {"prompt": prompt, "chosen": example.chosen, "rejected": example.rejected}
