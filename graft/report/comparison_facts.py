"""What a comparison of methods found: plain records, which are `comparison.json` too."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from graft.artifacts.record import MetricValue
from graft.core.model import Listed, StrictModel


class LossPoint(StrictModel):
    """Held-out loss at one moment of a training."""

    steps: int
    seconds: float
    """Of training until then; loading and evaluation excluded."""
    loss: float
    """Nats a supervised token, on the first `search.eval_rows` held-out rows."""


class BaseFacts(StrictModel):
    """The bare base, before any training."""

    num_parameters: int
    """In its files, whatever they are quantized to."""
    metrics: dict[str, MetricValue]
    """On all held-out rows."""
    general: MetricValue | None = None
    """Perplexity on the general text."""


class PointFacts(StrictModel):
    """One searched point."""

    params: dict[str, Any] = Field(default_factory=dict)
    state: Literal["complete", "failed"] = "complete"
    reason: str | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    """At its end, on the first `search.eval_rows` held-out rows."""
    steps: int
    seconds: float
    """Of training."""


class SeedFacts(StrictModel):
    """One training of a method's best settings, in a process of its own."""

    seed: int
    steps: int
    seconds: float
    """Of training."""
    tokens_per_s: float
    """Tokens without padding over all steps but the first, which warms up."""
    train_loss: float
    """Of the last step."""
    curve: Listed[LossPoint]
    """From before the first step to the last."""
    loaded_bytes: int
    """Memory of the process with the base loaded, before the method joins it."""
    peak_bytes: int
    """Highest memory of the process during its training steps, evaluations left out."""
    memory: Literal["process", "device"]
    """`process`: resident memory, all libraries included; `device`: what torch allocated there."""
    num_trainable: int
    """Numbers that take gradients in a step."""
    file_bytes: int
    """Tensor files of what would be published."""
    metrics: dict[str, MetricValue]
    """On all held-out rows, intervals over rows."""
    general: MetricValue | None = None
    """Perplexity on the general text after training."""


class MethodFacts(StrictModel):
    """One row: a method, or why there is nothing to show."""

    name: str
    method: str
    """Its registered type."""
    quantization: str = "none"
    state: Literal["done", "refused", "failed"]
    reason: str | None = None
    """Why it cannot run, or how it broke."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """The best searched point."""
    mergeable: bool = False
    servable: Listed[str] = ()
    """Engines that serve it unmerged."""
    points: Listed[PointFacts] = ()
    seeds: Listed[SeedFacts] = ()
    num_trainable: int | None = None
    trainable_share: float | None = None
    """Of the base's parameters."""
    peak_bytes: int | None = None
    """The highest over seeds."""
    tokens_per_s: float | None = None
    """Mean over seeds."""
    seconds_to_loss: float | None = None
    """Training seconds to the comparison's `common_loss`, mean over seeds; None: never there."""
    file_bytes: int | None = None
    metrics: dict[str, MetricValue] = Field(default_factory=dict)
    """Mean over seeds, from the lowest to the highest end of the seeds' own intervals."""
    general: MetricValue | None = None
    """Perplexity on general text after training, the same way."""
    general_before: float | None = None
    """Of the bare base that it trains on."""
    forgetting: float | None = None
    """Growth of that perplexity: 0.02 is 2 % worse, below 0 is better."""


class Comparison(StrictModel):
    """All methods under the same budget, data and machine."""

    name: str
    created_at: str
    """ISO 8601, UTC."""
    base: str
    """Where the base model comes from."""
    bases: dict[str, BaseFacts]
    """By quantization: the bare bases that rows start from."""
    budget: int
    """Searched points a method."""
    search_steps: int
    steps: int
    """Of each final training."""
    batch_size: int
    num_seeds: int
    searched: str
    """Metric that the points were ranked by."""
    quality: str
    """Metric of the plots and the front: the first that needs answers, else the perplexity."""
    quality_mode: Literal["min", "max"]
    common_loss: float | None = None
    """Held-out loss that all methods reached which came below every start: the worst of their
    best."""
    methods: Listed[MethodFacts]
    front: Listed[str] = ()
    """Methods that none beats in quality, memory and size at once."""
    recipe: str
    """YAML."""
    machine: str
    seconds: float
    """Of training, all points and seeds together."""
    folder: str
    """Holds every unit's record, `comparison.json` and `comparison.html`."""
    tool_versions: dict[str, str] = Field(default_factory=dict)
