"""What is known of a published adapter: where it comes from, how good it is, what may serve it."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from pydantic import Field

from graft.core.model import Listed, StrictModel

SCHEMA_VERSION = 1


class MetricValue(StrictModel):
    """One metric on held-out rows, with its interval. NaN and infinity are refused."""

    value: float = Field(allow_inf_nan=False)
    low: float | None = Field(None, allow_inf_nan=False)
    """Lower end of the interval; None where none was computed."""
    high: float | None = Field(None, allow_inf_nan=False)
    rows: int = Field(ge=0)
    """Held-out rows it was measured on."""


class ParityReport(StrictModel):
    """How far one form of an adapter stands from another, and whether the gate let it through."""

    form: str
    """The form that was judged: `svd+int8`, `merged`, `export`, ..."""
    reference: str
    """What it was compared with: a digest, or a form's name."""
    token_agreement: float | None
    """Share of the reference's greedy tokens that the form repeats; None: not a number."""
    mean_kl: float | None
    """Mean KL divergence of next-token distributions, nats; None where it was not a number."""
    max_kl: float | None
    """Largest divergence at one token, nats."""
    max_logit_difference: float | None
    num_tokens: int
    """Positions compared."""
    num_prompts: int
    min_token_agreement: float
    """Threshold."""
    mean_kl_limit: float
    """Threshold, nats."""
    reasons: Listed[str] = ()
    """Why it was refused; empty means passed."""

    @property
    def passed(self) -> bool:
        """True where every threshold was kept."""
        return not self.reasons


class Parent(StrictModel):
    """An artifact that this one was made from."""

    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    relation: Literal["trained", "compressed", "merged", "successor"]


class ServingConstraints(StrictModel):
    """What may serve the adapter unmerged, and what it takes."""

    engines: Listed[str] = ()
    r: int | None = None
    """Largest LoRA rank; None for methods without one."""
    num_bytes: int = Field(0, ge=0)
    """Bytes of the tensor file on disk."""


class AdapterRecord(StrictModel):
    """The card of an adapter, stored beside its tensors and covered by its digest."""

    schema_version: Literal[1] = 1
    name: str
    """The recipe's name; the name it is served under is registered in the store."""
    base_source: str
    base_digest: str | None
    """Digest of the base's files; None only for a folder that did not come from a store."""
    template_digest: str | None = None
    data_digest: str | None = None
    recipe: dict[str, Any] = Field(default_factory=dict)
    """The resolved recipe."""
    method: str
    """Type of the tuning method."""
    kind: Literal["adapter", "full"] = "adapter"
    """`full` is a whole model: its base is where it came from, not what it needs."""
    purpose: Literal["answers", "scores"] = "answers"
    """`scores` is a reward model: it gives answers a number and is not for talking with."""
    storage: str = "none"
    """How the tensors are stored: `none` is plain PEFT; others need `export` elsewhere."""
    metrics: dict[str, MetricValue] = Field(default_factory=dict)
    parity: Listed[ParityReport] = ()
    serving: ServingConstraints = ServingConstraints()
    parents: Listed[Parent] = ()
    created_at: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    """ISO 8601, UTC."""
    tool_versions: dict[str, str] = Field(default_factory=lambda: tool_versions())


def tool_versions() -> dict[str, str]:
    """Returns the versions of the libraries that decide an adapter's numbers."""
    found: dict[str, str] = {}
    for package in ("graft", "torch", "transformers", "peft", "ray", "deepspeed", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
