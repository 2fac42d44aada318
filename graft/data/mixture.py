"""Rows of several sources prepared together: each for its own objective, all proved as one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from graft.core.files import sha256_json
from graft.core.progress import QUIET, Progress
from graft.data.prepare import (
    DataProof,
    Examples,
    PreparedData,
    RowMaker,
    SplitProof,
    count_shared,
    count_split,
    prepare_data,
    prepare_examples,
    read_examples,
)
from graft.data.records import EvalPrompt, Example, TokenRow
from graft.data.section import DataSection

if TYPE_CHECKING:
    from graft.data.template import ChatTemplate

M_co = TypeVar("M_co", bound=RowMaker, covariant=True)
R = TypeVar("R", TokenRow, EvalPrompt)


class DataPart(NamedTuple, Generic[M_co]):
    """One source of training rows."""

    section: DataSection
    objective: M_co
    name: str = ""
    """Empty where there is one source alone."""
    weight: float = 1.0
    """Share of the rows drawn, relative to the other parts."""


def prepare_parts(
    parts: Sequence[DataPart[RowMaker]], template: ChatTemplate, *, progress: Progress = QUIET
) -> PreparedData:
    """Reads, checks and tokenizes the rows of a recipe, be they of one source or of several.

    Rows of a mixture know their part. Training rows stand part by part; held-out ones take turns,
    so that the first so many of them are of all parts.

    Raises:
        DataError: As `prepare_data`; also where a row that one source holds out is trained on in
            another.
    """
    if len(parts) == 1 and not parts[0].name:
        return prepare_data(parts[0].section, parts[0].objective, template, progress=progress)
    read = [read_examples(part.section, progress=progress) for part in parts]
    together = Examples([e for r in read for e in r.train], [e for r in read for e in r.eval])
    num_shared = count_shared(together)
    prepared = [
        prepare_examples(examples, part.section, part.objective, template)
        for examples, part in zip(read, parts, strict=True)
    ]
    _require_rows(parts, prepared)
    names = [part.name for part in parts]
    train = [row for rows in _named(names, [p.train for p in prepared]) for row in rows]
    held_out = _in_turns(_named(names, [p.eval for p in prepared]))
    proofs = dict(zip(names, (p.proof for p in prepared), strict=True))
    proof = DataProof(
        digest=sha256_json(
            [[name, proof.max_length, proof.digest] for name, proof in proofs.items()]
        ),
        template_digest=template.digest,
        max_length=max(proof.max_length for proof in proofs.values()),
        train=_sum([p.train for p in proofs.values()], together.train, train),
        eval=_sum([p.eval for p in proofs.values() if p.eval], together.eval, held_out)
        if held_out
        else None,
        num_shared_prompts=num_shared,
        parts=proofs,
    )
    return PreparedData(
        train=train,
        eval=held_out,
        prompts=_in_turns(_named(names, [p.prompts for p in prepared])),
        proof=proof,
        preferences=_in_turns(_named(names, [list(p.preferences) for p in prepared])),
    )


def _require_rows(parts: Sequence[DataPart[RowMaker]], prepared: Sequence[PreparedData]) -> None:
    """Asks each objective about its rows of all sources: what one lacks another may have."""
    for part in parts:
        own = [at for at, other in enumerate(parts) if other.objective == part.objective]
        rows = [row for at in own for row in prepared[at].train]
        part.objective.require_rows(rows, ", ".join(parts[at].section.train for at in own))


def _sum(splits: list[SplitProof], examples: list[Example], rows: list[TokenRow]) -> SplitProof:
    source = ", ".join(split.source for split in splits)
    return count_split(
        examples, rows, source, num_truncated=sum(split.num_truncated for split in splits)
    )


def _named(names: list[str], lists: list[list[R]]) -> list[list[R]]:
    """Writes on each row which part it is from."""
    return [
        [row._replace(part=name) for row in rows] for name, rows in zip(names, lists, strict=True)
    ]


def _in_turns(lists: list[list[R]]) -> list[R]:
    """One of each list, the next of each, and so on to the end of the longest."""
    return [row for turn in zip_longest(*lists) for row in turn if row is not None]
