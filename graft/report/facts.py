"""What a report shows: plain records, which are `report.json` too. Pipelines fill them in."""

from __future__ import annotations

from typing import Any, Literal

from graft.artifacts.record import MetricValue, ParityReport
from graft.core.model import Listed, StrictModel
from graft.report.finals_facts import Finals


class CurvePoint(StrictModel):
    """One report of a trial."""

    steps: int
    value: float
    """Of the metric whose curve it is."""


class TrialFacts(StrictModel):
    """One trial of the search."""

    number: int
    state: Literal["waiting", "running", "paused", "complete", "stopped", "failed", "infeasible"]
    params: dict[str, Any]
    metrics: dict[str, float] = {}
    """The last report."""
    steps: int = 0
    seconds: float = 0.0
    """Training time."""
    executor: str | None = None
    reason: str | None = None
    """Why it failed, could not be or is paused."""
    adapter_bytes: int | None = None
    """Of the published tensor file where the search is for it; else of the trained weights as they
    were kept, fp32."""
    searched: Listed[CurvePoint] = ()
    """The first searched metric by step."""
    train_loss: Listed[CurvePoint] = ()


class ObjectiveFacts(StrictModel):
    """A searched metric."""

    metric: str
    mode: Literal["min", "max"]
    unit: str = ""
    """`bytes`, `ms`; empty where the name says enough."""


class SplitFacts(StrictModel):
    """One part of the data."""

    name: str
    source: str
    num_rows: int
    num_tokens: int
    num_supervised_tokens: int
    longest_row_tokens: int
    num_truncated: int
    num_duplicates: int


class FormFacts(StrictModel):
    """One published form of the study's adapter."""

    digest: str
    form: str
    """`trained`, or what made it: `svd+int8`, `merged`, a successor."""
    parent: str | None = None
    """Digest of the form that it was compressed from."""
    num_bytes: int
    created_at: str
    metrics: dict[str, MetricValue] = {}
    parity: Listed[ParityReport] = ()
    aliases: Listed[str] = ()
    """Names that point at it now: `smart-home@champion`."""


class DriftPoint(StrictModel):
    """One point of the drift timeline."""

    time_s: float
    """Unix seconds."""
    num_prompts: int
    """Served prompts seen by then."""
    kind: Literal["test", "state", "note"]
    state: str
    """Of the renewal loop, after this point."""
    label: str
    statistic: float | None = None
    threshold: float | None = None
    p_value: float | None = None
    is_drift: bool = False
    is_alarm: bool = False
    detector: str | None = None
    evidence: dict[str, Any] | None = None


class Importance(StrictModel):
    """How much of the trials' order one parameter explains."""

    param: str
    share: float
    """Share of the variance of the ranks explained by the parameter's values, corrected for their
    number (epsilon squared), 0 to 1."""
    p_value: float
    """Of that share under shuffled results."""
    num_trials: int


class StudyReport(StrictModel):
    """Everything that one report shows."""

    name: str
    created_at: str
    """ISO 8601, UTC."""
    base: str
    """Where the base model comes from."""
    objectives: Listed[ObjectiveFacts]
    trials: Listed[TrialFacts]
    front: Listed[int] = ()
    """Trials that no other one beats in every searched metric; with one, in adapter bytes too."""
    winner: int | None = None
    winner_metrics: dict[str, MetricValue] = {}
    """Over all held-out rows."""
    base_metrics: dict[str, MetricValue] = {}
    """The bare base on the same rows, where it was measured."""
    finals: Finals | None = None
    """The best trials on fresh seeds, as far as they have come."""
    importances: Listed[Importance] = ()
    recipe: str
    """The study's recipe, YAML."""
    chosen_recipe: str | None = None
    """The winner's, complete, YAML."""
    data: Listed[SplitFacts] = ()
    forms: Listed[FormFacts] = ()
    drift: Listed[DriftPoint] = ()
    tool_versions: dict[str, str] = {}
