"""From the recipe's `data` section to token rows, and the proof that they are in order."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

from pydantic import Field

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

    def pack(self, rows: list[TokenRow], max_length: int) -> list[TokenRow]:
        """Puts rows together into longer ones, or cuts them."""
        ...

    def require_rows(self, rows: list[TokenRow], source: str) -> None:
        """Refuses training rows that teach nothing together."""
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
    """Token rows: several of one example, or one of several examples where they are packed."""
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
    parts: dict[str, DataProof] = Field(default_factory=dict)
    """Of each source of a mixture, by name; the counts above are of all together."""

    @property
    def splits(self) -> dict[str, SplitProof]:
        """All counts by name: `train`, `held out`, and of a mixture's sources `wiki train`."""
        own = {"train": self.train, **({"held out": self.eval} if self.eval else {})}
        return own | {
            f"{part} {name}": split
            for part, proof in self.parts.items()
            for name, split in proof.splits.items()
        }


class PreparedData(NamedTuple):
    """Everything that the engine needs of the data."""

    train: list[TokenRow]
    eval: list[TokenRow]
    prompts: list[EvalPrompt]
    proof: DataProof
    preferences: Sequence[TokenRow] = ()
    """Held-out pairs, the chosen answer as branch 1 and the rejected one as 2; of whatever
    objective."""


class Examples(NamedTuple):
    """What was read of one source."""

    train: list[Example]
    eval: list[Example]


def prepare_data(
    section: DataSection,
    objective: RowMaker,
    template: ChatTemplate,
    *,
    progress: Progress = QUIET,
) -> PreparedData:
    """Reads, checks and tokenizes training and held-out rows of one source.

    Raises:
        DataError: Empty data, a malformed row, no supervised token in a row, a row that is too
            long, or a held-out row that is also in training. The row is named.
    """
    examples = read_examples(section, progress=progress)
    prepared = prepare_examples(examples, section, objective, template)
    objective.require_rows(prepared.train, section.train)
    return prepared


def read_examples(section: DataSection, *, progress: Progress = QUIET) -> Examples:
    """Reads training and held-out rows.

    Raises:
        DataError: Empty data or a malformed row; the row is named.
    """
    load = partial(load_examples, format=section.format, system=section.system, progress=progress)
    train = load(section.train, limit=section.limit)
    held_out = [] if section.eval is None else load(section.eval, limit=section.eval_limit)
    return Examples(train, held_out)


def prepare_examples(
    examples: Examples, section: DataSection, objective: RowMaker, template: ChatTemplate
) -> PreparedData:
    """Tokenizes and proves what was read, row by row; see `prepare_data`."""
    train, held_out = examples
    num_shared = count_shared(examples)
    limit = min(section.max_length, template.context_tokens)
    whole = [row for example in train for row in objective.rows(example, template)]
    packed = objective.pack(whole, limit)
    train_rows, train_proof = _prove(train, packed, section.train, section, template)
    eval_rows: list[TokenRow] = []
    eval_proof = None
    if section.eval is not None:
        # Held-out rows stay apart: each one's score is its own.
        alone = [row for example in held_out for row in objective.rows(example, template)]
        cut = [piece for row in alone for piece in objective.pack([row], limit)]
        eval_rows, eval_proof = _prove(held_out, cut, section.eval, section, template)
    proof = DataProof(
        digest=sha256_json([[_content(e) for e in part] for part in examples]),
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


def _prove(
    examples: list[Example],
    whole: list[TokenRow],
    source: str,
    section: DataSection,
    template: ChatTemplate,
) -> tuple[list[TokenRow], SplitProof]:
    rows = [fit_row(row, section, template) for row in whole]
    for row in rows:
        require_right_mask(row)
    num_truncated = sum(a is not b for a, b in zip(whole, rows, strict=True))
    return rows, count_split(examples, rows, source, num_truncated=num_truncated)


def count_split(
    examples: list[Example], rows: list[TokenRow], source: str, *, num_truncated: int
) -> SplitProof:
    """Counts what one part of the data holds."""
    lengths = [len(row.input_ids) for row in rows]
    # Where answers are sampled, the one that is known is not learned.
    supervised = [0 if row.asked is not None else sum(row.is_supervised) for row in rows]
    contents = [_content(example) for example in examples]
    return SplitProof(
        source=source,
        num_examples=len(examples),
        num_rows=len(rows),
        num_tokens=sum(lengths),
        num_supervised_tokens=sum(supervised),
        tokens_per_row=_spread(lengths),
        supervised_tokens_per_row=_spread(supervised),
        num_truncated=num_truncated,
        num_duplicates=len(contents) - len(set(contents)),
    )


def count_shared(examples: Examples) -> int:
    """Counts prompts that both training and held-out examples ask.

    Raises:
        DataError: A held-out example is trained on.
    """
    train, held_out = examples
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
    """The prompt of a held-out example, where no unwanted answer is all that is known."""
    if example.text is not None or example.is_wanted is False:
        return None
    return prompt_of(example, template)


def prompt_of(example: Example, template: ChatTemplate) -> EvalPrompt:
    """Returns what a conversation asks: everything before its last answer, and that answer.

    Without a wanted answer the reference is empty.
    """
    messages = example.prompt or example.messages[:-1]
    last = example.messages[-1].content if example.messages else None
    wanted = example.answer if example.is_wanted else None
    return EvalPrompt(
        prompt_ids=template.prompt_ids(messages, source=example.source),
        reference=example.chosen or wanted or last or "",
        source=example.source,
        messages=[{"role": turn.role, "content": turn.content} for turn in messages],
    )


def _pair(example: Example, template: ChatTemplate) -> TokenRow:
    answers = (example.chosen or "", example.rejected or "")
    return template.answers(example.prompt, answers, source=example.source)


def _spread(counts: list[int]) -> Spread:
    return Spread(min=min(counts), median=float(statistics.median(counts)), max=max(counts))
