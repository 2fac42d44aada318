"""The section `search`: what a search is for, who fills the holes, and when trials are stopped."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from graft.core.model import Listed, StrictModel
from graft.recipe.costs import PREFIX, require_cost
from graft.recipe.storage import require_database_url


class AshaScheduler(StrictModel):
    """Asynchronous successive halving (arXiv 1810.05934): the best 1/factor of a rung go on."""

    type: Literal["asha"] = "asha"
    reduction_factor: int = Field(2, ge=2)
    grace_steps: int | None = Field(None, ge=1)
    """Steps before the first decision; None means a quarter of `train.steps`."""
    grace_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    """Tokens before the first decision, `auto` a quarter of the longest trial's: rungs then count
    tokens in place of steps, so that trials of other batch sizes and lengths compare."""

    @model_validator(mode="after")
    def rungs_count_one_thing(self) -> AshaScheduler:
        """Refuses rungs in steps and in tokens at once."""
        if self.grace_steps is not None and self.grace_tokens is not None:
            raise ValueError(
                f"grace_steps {self.grace_steps} counts rungs in steps and grace_tokens "
                f"{self.grace_tokens} in tokens; give one of them"
            )
        return self

    @property
    def unit(self) -> Literal["steps", "tokens"]:
        """What rungs count."""
        return "steps" if self.grace_tokens is None else "tokens"


class NoScheduler(StrictModel):
    """Every trial runs to its end."""

    type: Literal["none"] = "none"


class SearchObjective(StrictModel):
    """A metric to search for; the first one of a search chooses the winner."""

    metric: str
    """`eval/...` of held-out rows, `train/...`, or a cost: `cost/adapter_bytes`,
    `cost/peak_memory_bytes`, `cost/latency_ms` (see docs/search.md)."""
    mode: Literal["min", "max"]

    @model_validator(mode="after")
    def cost_is_minimised(self) -> SearchObjective:
        """Refuses an unknown cost, and the dearest."""
        if self.metric.startswith(PREFIX):
            require_cost(self.metric, self.mode)
        return self


class SearchSection(StrictModel):
    """How `graft tune` fills the holes."""

    trials: int = Field(16, ge=1)
    """Of the whole study, however often the command is run; as the two below."""
    max_hours: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Of searching. Once they are over no trial is begun, and those that run end at their next
    report; a larger number goes on with them."""
    max_tokens: int | None = Field(None, ge=1)
    """Trained on by all trials together; what follows is the same."""
    objectives: Listed[SearchObjective] = (SearchObjective(metric="eval/loss", mode="min"),)
    scheduler: Annotated[AshaScheduler | NoScheduler, Field(discriminator="type")] = AshaScheduler()
    sampler: Literal["auto", "tpe", "gp", "nsga2", "random", "grid", "qmc"] = "auto"
    """How holes are filled; `auto` is tpe, or grid where the whole space is within the budget."""
    executor: Literal["auto", "packed", "dedicated"] = "auto"
    """`packed`: slots on one base; `dedicated`: a Ray Train run a trial; `auto`: by trial."""
    pack_slots: int = Field(8, ge=1)
    """Trials that train together on one base."""
    space: Literal["recipe", "auto"] = "recipe"
    """`auto` adds the vetted ranges of each method and objective to the recipe's holes."""
    points: Listed[dict[str, Any]] = ()
    """Settings to try first, as `{path: value}`."""
    points_from: Listed[str] = ()
    """Earlier studies in this home, of any task: their best points are tried first."""
    warm_start: Listed[str] = ()
    """Earlier studies in this home, of the same task: the sampler learns from their trials."""
    storage: str | None = None
    """PostgreSQL database that keeps the study, `postgresql://USER@HOST:PORT/DATABASE`; None is a
    journal file in the study's folder."""
    storage_password_env: str | None = Field(None, pattern=r"^[A-Z_][A-Z0-9_]*$")
    """Name of the environment variable that holds the database's password; None leaves it to
    `PGPASSWORD` or `~/.pgpass`."""
    eval_rows: int = Field(64, ge=1)
    """Held-out rows a report during the search; the winner is evaluated on all."""
    finalists: int = Field(0, ge=0)
    """Best complete trials that are trained again, on fresh seeds and to the end, before a winner
    is named: the one with the best mean of the first metric. They come on top of `trials`; 0 names
    the best trial as it was searched."""
    finalist_seeds: int = Field(3, ge=2)
    """Trainings of each finalist, on seeds that the search has not seen; two leave the interval of
    their mean wide."""
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def finalists_are_trials(self) -> SearchSection:
        """Refuses more finalists than trials."""
        if self.finalists > self.trials:
            raise ValueError(
                f"finalists {self.finalists} of {self.trials} trials; ask for {self.trials} at "
                "most, or raise `trials`"
            )
        return self

    @field_validator("storage")
    @classmethod
    def storage_is_a_database(cls, storage: str | None) -> str | None:
        """Refuses other databases, and a password in the URL."""
        return storage if storage is None else require_database_url(storage)

    @model_validator(mode="after")
    def password_is_of_a_database(self) -> SearchSection:
        """Refuses a password for nothing."""
        if self.storage_password_env is not None and self.storage is None:
            raise ValueError("storage_password_env is the password of `storage`, which is not set")
        return self

    @model_validator(mode="after")
    def sampler_learns(self) -> SearchSection:
        """Refuses history for a sampler that does not look at results."""
        if self.warm_start and self.sampler in ("random", "grid", "qmc"):
            raise ValueError(
                f"sampler {self.sampler} learns nothing from warm_start; use auto or tpe, or "
                "points_from, which tries the best points of those studies first"
            )
        return self

    @field_validator("objectives")
    @classmethod
    def objectives_are_distinct(
        cls, objectives: tuple[SearchObjective, ...]
    ) -> tuple[SearchObjective, ...]:
        """Refuses none, and one metric twice."""
        names = [objective.metric for objective in objectives]
        if not names:
            raise ValueError("names no metric; name one, as {metric: eval/loss, mode: min}")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"names {twice[0]!r} twice; keep one")
        return objectives

    @model_validator(mode="after")
    def sampler_suits_objectives(self) -> SearchSection:
        """Refuses a sampler of several objectives for one."""
        if self.sampler == "nsga2" and len(self.objectives) == 1:
            raise ValueError(
                "sampler nsga2 selects by several objectives, and search.objectives names one; "
                "name a second (as cost/adapter_bytes), or use tpe"
            )
        return self
