"""From the recipe's `data` section to token rows, and the proof that they are in order."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from graft.core.errors import DataError
from graft.core.files import sha256_json
from graft.core.model import StrictModel
from graft.core.progress import QUIET, Progress
from graft.data.fit import fit_row, require_right_mask
from graft.data.formats import load_examples
from graft.data.records import EvalPrompt, Example, TokenRow

if TYPE_CHECKING:
    from graft.data.section import DataSection
    from graft.data.template import ChatTemplate


class RowMaker(Protocol):
    """What this package needs of an objective."""

    def rows(self, example: Example, template: ChatTemplate) -> list[TokenRow]:
        """Turns one example into token rows."""
        ...


class Spread(StrictModel):
    """Smallest, middle and largest of a count over rows."""

    min: int
    median: float
    max: int


class SplitProof(StrictModel):
    """What one part of the data was found to be."""

    source: str
    num_examples: int
    num_rows: int
    """Token rows; an example may give several, for preferences."""
    num_tokens: int
    num_supervised_tokens: int
    tokens_per_row: Spread
    supervised_tokens_per_row: Spread
    num_truncated: int
    num_duplicates: int
    """Examples equal to an earlier one of the same part."""


class DataProof(StrictModel):
    """What was proved of the data before anything is spent on it."""

    digest: str
    """SHA-256 over all examples in order, as they are after reading; names the data."""
    template_digest: str
    max_length: int
    train: SplitProof
    eval: SplitProof | None
    num_shared_prompts: int
    """Held-out prompts that are also in training, with another answer."""


class PreparedData(NamedTuple):
    """Everything that the engine needs of the data."""

    train: list[TokenRow]
    eval: list[TokenRow]
    prompts: list[EvalPrompt]
    proof: DataProof
    preferences: Sequence[TokenRow] = ()
    """Held-out pairs, the chosen answer as branch 1 and the rejected one as 2; of whatever
    objective."""


def prepare_data(
    section: DataSection,
    objective: RowMaker,
    template: ChatTemplate,
    *,
    progress: Progress = QUIET,
) -> PreparedData:
    """Reads, checks and tokenizes training and held-out rows.

    Raises:
        DataError: Empty data, a malformed row, no supervised token in a row, a row that is too
            long, or a held-out row that is also in training. The row is named.
    """
    train = load_examples(
        section.train, section.format, system=section.system, limit=section.limit, progress=progress
    )
    held_out: list[Example] = []
    if section.eval is not None:
        held_out = load_examples(
            section.eval,
            section.format,
            system=section.system,
            limit=section.eval_limit,
            progress=progress,
        )
    num_shared = _count_shared(train, held_out)
    train_rows, train_proof = _tokenize(train, section.train, section, objective, template)
    eval_rows: list[TokenRow] = []
    eval_proof = None
    if section.eval is not None:
        eval_rows, eval_proof = _tokenize(held_out, section.eval, section, objective, template)
    proof = DataProof(
        digest=sha256_json([[_content(e) for e in part] for part in (train, held_out)]),
        template_digest=template.digest,
        max_length=section.max_length,
        train=train_proof,
        eval=eval_proof,
        num_shared_prompts=num_shared,
    )
    prompts = [prompt for e in held_out if (prompt := _eval_prompt(e, template)) is not None]
    preferences = [
        fit_row(_pair(e, template), section, template) for e in held_out if e.chosen is not None
    ]
    return PreparedData(train_rows, eval_rows, prompts, proof, preferences)


def _tokenize(
    examples: list[Example],
    source: str,
    section: DataSection,
    objective: RowMaker,
    template: ChatTemplate,
) -> tuple[list[TokenRow], SplitProof]:
    whole = [row for example in examples for row in objective.rows(example, template)]
    rows = [fit_row(row, section, template) for row in whole]
    for row in rows:
        require_right_mask(row)
    lengths = [len(row.input_ids) for row in rows]
    supervised = [sum(row.is_supervised) for row in rows]
    contents = [_content(example) for example in examples]
    proof = SplitProof(
        source=source,
        num_examples=len(examples),
        num_rows=len(rows),
        num_tokens=sum(lengths),
        num_supervised_tokens=sum(supervised),
        tokens_per_row=_spread(lengths),
        supervised_tokens_per_row=_spread(supervised),
        num_truncated=sum(a is not b for a, b in zip(whole, rows, strict=True)),
        num_duplicates=len(contents) - len(set(contents)),
    )
    return rows, proof


def _count_shared(train: list[Example], held_out: list[Example]) -> int:
    """Refuses held-out examples that were trained on; counts prompts that both parts ask."""
    known = {_content(example): example.source for example in train}
    leaked = [(e.source, known[c]) for e in held_out if (c := _content(e)) in known]
    if leaked:
        shown = "; ".join(f"{a} = {b}" for a, b in leaked[:3])
        raise DataError(
            f"{len(leaked)} held-out rows are also training rows "
            f"({shown}{' …' if leaked[3:] else ''}); "
            "figures on them would prove nothing: remove them from one side"
        )
    asked = {_prompt_key(example) for example in train}
    return sum(_prompt_key(example) in asked for example in held_out if example.text is None)


def _content(example: Example) -> str:
    return example.model_dump_json(exclude={"source"})


def _prompt_of(example: Example) -> Sequence[object]:
    return example.prompt or example.messages[:-1]


def _prompt_key(example: Example) -> str:
    return repr(_prompt_of(example))


def _eval_prompt(example: Example, template: ChatTemplate) -> EvalPrompt | None:
    """The prompt of a held-out example: everything before its last answer.

    None where no wanted answer is known: of plain text, and of an unwanted answer.
    """
    if example.text is not None or example.is_wanted is False:
        return None
    messages = example.prompt or example.messages[:-1]
    reference = example.chosen or example.answer or example.messages[-1].content
    return EvalPrompt(
        prompt_ids=template.prompt_ids(messages, source=example.source),
        reference=reference,
        source=example.source,
        messages=[{"role": turn.role, "content": turn.content} for turn in messages],
    )


def _pair(example: Example, template: ChatTemplate) -> TokenRow:
    answers = (example.chosen or "", example.rejected or "")
    return template.answers(example.prompt, answers, source=example.source)


def _spread(counts: list[int]) -> Spread:
    return Spread(min=min(counts), median=float(statistics.median(counts)), max=max(counts))
