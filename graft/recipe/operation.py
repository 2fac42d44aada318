"""The recipe's sections of what comes after training: serving, watching, renewing, tracking."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from graft.core.model import Listed, StrictModel
from graft.detectors.base import DETECTORS, Detector

AnyDetector = Annotated[Detector, *DETECTORS.field()]


class TenantSection(StrictModel):
    """One tenant of the served API."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    key_env: str = Field(pattern=r"^[A-Z_][A-Z0-9_]*$")
    """Name of the environment variable that holds the tenant's API key."""
    models: Listed[str] = ()
    """Adapter names that the tenant may call; `base` is the bare base model."""


class ServeSection(StrictModel):
    """The OpenAI-compatible endpoint."""

    engine: Literal["native"] = "native"
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    replicas: int = Field(1, ge=1)
    max_batch: int = Field(16, ge=1)
    """Requests decoded together."""
    max_queue: int = Field(64, ge=0)
    """Requests waiting beside those; more are told to try again (429)."""
    max_length: int = Field(1024, ge=16)
    """Prompt and answer together, in tokens."""
    tenants: Listed[TenantSection] = ()

    @model_validator(mode="after")
    def tenants_are_distinct(self) -> ServeSection:
        """Refuses two tenants of one name or one key."""
        for field in ("name", "key_env"):
            values = [getattr(tenant, field) for tenant in self.tenants]
            if len(set(values)) != len(values):
                raise ValueError(f"two tenants share a `{field}`; each needs its own")
        return self


class WatchSection(StrictModel):
    """Which drift is looked for in the served prompts."""

    detectors: Listed[AnyDetector] = Field(({"type": "mmd"},), validate_default=True)
    expected_run_length: int = Field(2000, ge=10)
    """Mean number of prompts between false alarms when nothing drifts."""
    reference_rows: int = Field(400, ge=20)
    """Training prompts that make the reference."""
    seed: int = 0


class GateSection(StrictModel):
    """When a successor may replace the champion."""

    metric: str = "eval/loss"
    margin: float = Field(0.01, ge=0)
    """On the frozen held-out set the successor may be worse by at most this."""
    min_gain: float = Field(0.0, ge=0)
    """On the new rows it must be better by at least this."""


class LoopSection(StrictModel):
    """What happens after an alarm."""

    feedback: str | None = None
    """Labelled rows of the new traffic; a successor learns from them and a replay of old rows."""
    feedback_eval: str | None = None
    """Held-out rows of the new traffic, for the gate."""
    replay_fraction: float = Field(0.5, ge=0, lt=1)
    """Share of old rows in the successor's training data."""
    budget_trials: int = Field(8, ge=1)
    steps: int | None = Field(None, ge=1)
    """Steps a trial; None means `train.steps`."""
    gate: GateSection = GateSection()
    canary: Listed[float] = (0.05, 0.25, 0.5)
    cooldown_s: float = Field(600.0, ge=0)
    """No second re-search starts sooner after the last one."""


class TrackSection(StrictModel):
    """Experiment tracking beside the run's own event files."""

    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases: a run a trial, in the study's group; `wandb sync` sends what is offline."""
    project: str = "graft"
    """Of W&B."""
