"""When a search stops a trial before its end."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from graft.core.model import StrictModel


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
