"""The parity gate: does a compressed, merged or exported form still say what was trained?

The reference form answers each prompt greedily. Then both forms read the reference's own answers,
teacher-forced, and at every position of an answer (the end of turn included) the likeliest tokens
and the next-token distributions are compared. One early disagreement therefore does not spoil the
rest of its row, and the figures depend on nothing but the two forms. Anything that is not a number,
and having nothing to compare, is a refusal.

Shapes: P positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from graft.artifacts.record import ParityReport
from graft.core.errors import GateRefusedError
from graft.core.progress import QUIET, Progress
from graft.data.records import TokenRow
from graft.engine.batches import MicroBatch, RoutedRow, micro_batches
from graft.engine.generate import GenerationRequest, generate
from graft.engine.multi import MultiAdapterModel, Routing

if TYPE_CHECKING:
    from graft.data.prepare import PreparedData
    from graft.data.template import ChatTemplate
    from graft.recipe.sections import VerifySection

FORWARD_TOKENS = 2048
"""Padded tokens of one forward pass."""
LOGIT_POSITIONS = 256
"""Positions whose logits stand in memory at once."""


class Form(NamedTuple):
    """One way of computing an adapter: a slot on the base, or a merged model (`slot` None)."""

    name: str
    """What reports call it: a digest, `svd+int8`, `merged`."""
    model: MultiAdapterModel
    slot: str | None


@dataclass
class _Tally:
    num_tokens: int = 0
    num_agreed: int = 0
    kl_sum: float = 0.0
    kl_max: float = 0.0
    difference: float = 0.0
    broken: list[str] = field(default_factory=list)

    def add(self, ours_PV: torch.Tensor, theirs_PV: torch.Tensor) -> None:
        """Compares logits: the reference's, and the form's."""
        self.num_tokens += len(ours_PV)
        for name, logits in (("reference", ours_PV), ("form", theirs_PV)):
            if not logits.isfinite().all() and name not in self.broken:
                self.broken.append(name)
        if self.broken:
            return
        self.num_agreed += int((ours_PV.argmax(-1) == theirs_PV.argmax(-1)).sum())
        ours, theirs = ours_PV.log_softmax(-1), theirs_PV.log_softmax(-1)
        kl_P = (ours.exp() * (ours - theirs)).sum(-1).clamp(min=0)
        self.kl_sum += float(kl_P.sum())
        self.kl_max = max(self.kl_max, float(kl_P.max()))
        self.difference = max(self.difference, float((ours_PV - theirs_PV).abs().max()))


def verify_parity(
    reference: Form,
    form: Form,
    prompts: Sequence[Sequence[int]],
    *,
    template: ChatTemplate,
    thresholds: VerifySection,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    progress: Progress = QUIET,
) -> ParityReport:
    """Compares a form with its reference; the caller decides with `require_parity`.

    Args:
        reference: What was trained and measured.
        form: What is to take its place.
        prompts: Token ids of held-out prompts; the first `thresholds.rows` are used.
        template: Of the base: the tokenizer, and the tokens that end a turn.
        thresholds: The recipe's `verify` section.
        max_new_tokens: Longest answer of the reference.
        batch_size: Answers decoded together.
        progress: Told of every prompt.

    Returns:
        The figures, and the reasons for a refusal.
    """
    used = [list(prompt) for prompt in prompts[: thresholds.rows] if len(prompt)]
    tally = _Tally()
    if used:
        rows = _answered(reference, used, template, max_new_tokens, batch_size, progress, tally)
        if not tally.broken:
            _compare(reference, form, rows, tally, progress)
    return _report(reference, form, tally, len(used), thresholds)


def require_parity(report: ParityReport) -> None:
    """Lets a form through, or not.

    Raises:
        GateRefusedError: The report names a reason.
    """
    if not report.passed:
        raise GateRefusedError(
            f"the form {report.form!r} stands too far from {report.reference[:12]!r}: "
            f"{'; '.join(report.reasons)}. Compress less (a larger r, fewer steps of the compress "
            "list), or change the verify section if this much is acceptable"
        )


def _answered(
    reference: Form,
    prompts: list[list[int]],
    template: ChatTemplate,
    max_new_tokens: int,
    batch_size: int,
    progress: Progress,
    tally: _Tally,
) -> list[TokenRow]:
    """Returns prompt and greedy answer of the reference; the answer's positions are supervised."""
    longest = max(map(len, prompts)) + max_new_tokens
    results = generate(
        reference.model,
        template.tokenizer,
        [
            GenerationRequest(
                prompt,
                slot=reference.slot,
                max_new_tokens=max_new_tokens,
                stop_ids=template.stop_ids,
            )
            for prompt in prompts
        ],
        max_batch=batch_size,
        max_length=longest,
        progress=progress,
    )
    if any(result.finish_reason == "error" for result in results):
        tally.broken.append("reference")
    rows = []
    for at, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        # The closing token is predicted, never read: a causal model does not see it.
        ids = [*prompt, *result.token_ids, min(template.stop_ids, default=0)]
        is_supervised = [token >= len(prompt) for token in range(len(ids))]
        rows.append(TokenRow(ids, is_supervised, f"prompt {at}"))
    return rows


@torch.inference_mode()
def _compare(
    reference: Form, form: Form, rows: list[TokenRow], tally: _Tally, progress: Progress
) -> None:
    routed = [RoutedRow(None, row, at) for at, row in enumerate(rows)]
    with progress.task("parity", len(rows), "prompt") as task:
        for batch in micro_batches(routed, FORWARD_TOKENS, reference.model.device):
            ours_PH, theirs_PH = _hidden(reference, batch), _hidden(form, batch)
            pieces = zip(
                ours_PH.split(LOGIT_POSITIONS), theirs_PH.split(LOGIT_POSITIONS), strict=True
            )
            for ours, theirs in pieces:
                tally.add(
                    _wide(reference.model.logits(ours)),
                    _wide(form.model.logits(theirs)).to(reference.model.device),
                )
            task.advance(len(batch.rows))


def _hidden(form: Form, batch: MicroBatch) -> torch.Tensor:
    """The hidden states that predict each supervised token."""
    device = form.model.device
    mask = batch.attention_mask
    hidden = form.model.hidden(
        batch.input_ids.to(device),
        routing=Routing.single(form.slot, len(batch.rows)),
        attention_mask=None if mask is None else mask.to(device),
    )
    return hidden[batch.supervised_lines.to(device), batch.predicting_tokens.to(device)]


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _report(
    reference: Form, form: Form, tally: _Tally, num_prompts: int, thresholds: VerifySection
) -> ParityReport:
    reasons: list[str] = []
    agreement = mean_kl = None
    if not num_prompts or (not tally.num_tokens and not tally.broken):
        reasons.append("there is nothing to compare: no held-out prompt gave a position")
    elif tally.broken:
        reasons.append(f"the logits of the {' and the '.join(tally.broken)} are not finite")
    else:
        agreement = tally.num_agreed / tally.num_tokens
        mean_kl = tally.kl_sum / tally.num_tokens
        if not agreement >= thresholds.min_token_agreement:
            reasons.append(
                f"greedy token agreement {agreement:.4f} is below "
                f"verify.min_token_agreement {thresholds.min_token_agreement}"
            )
        if not (math.isfinite(mean_kl) and mean_kl <= thresholds.max_kl):
            reasons.append(f"mean KL {mean_kl:.2e} nats is above verify.max_kl {thresholds.max_kl}")
    is_number = agreement is not None
    return ParityReport(
        form=form.name,
        reference=reference.name,
        token_agreement=agreement,
        mean_kl=mean_kl if mean_kl is not None and math.isfinite(mean_kl) else None,
        max_kl=tally.kl_max if is_number and math.isfinite(tally.kl_max) else None,
        max_logit_difference=tally.difference if is_number else None,
        num_tokens=tally.num_tokens,
        num_prompts=num_prompts,
        min_token_agreement=thresholds.min_token_agreement,
        mean_kl_limit=thresholds.max_kl,
        reasons=tuple(reasons),
    )


def parity_prompts(prepared: PreparedData) -> list[list[int]]:
    """Returns what the forms are asked: held-out prompts, else the unsupervised starts of rows."""
    if prepared.prompts:
        return [prompt.prompt_ids for prompt in prepared.prompts]
    starts = []
    for row in prepared.eval or prepared.train:
        first = row.is_supervised.index(True) if True in row.is_supervised else 0
        starts.append(row.input_ids[: max(first, 1)])
    return starts
