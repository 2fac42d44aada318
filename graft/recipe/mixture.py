"""`data: {sources: [...]}`: rows of several places, drawn by weight, each with its objective."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from graft.core.errors import ConfigError
from graft.core.model import Listed, StrictModel
from graft.data.section import DataSection
from graft.objectives.base import OBJECTIVES, Objective

AnyObjective = Annotated[Objective, *OBJECTIVES.field()]

SMALLEST_SHARE = 0.001
"""Rows are drawn in blocks of a thousand; a source has at least one of each."""


class MixedSource(DataSection):
    """One source of a mixture; beside what follows it has every key of a single `data`."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    """Its metrics are `eval/<name>/loss` and so on."""
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Share of the rows that training draws from it, relative to the other weights."""
    objective: AnyObjective | None = None
    """What is learned from its rows; None: the recipe's `objective`."""


class DataMixture(StrictModel):
    """Several sources instead of one: training draws rows of each by weight.

    Sources of one objective are learned as if their rows stood in one file. Different objectives
    are averaged each over its own rows of a step, and count by how many rows those are.
    """

    sources: Listed[MixedSource]

    @model_validator(mode="before")
    @classmethod
    def nothing_stands_beside_sources(cls, raw: Any) -> Any:
        """Refuses keys of a single source, which each source of a mixture has for itself."""
        others = [key for key in raw if key != "sources"] if isinstance(raw, dict) else []
        if others:
            raise ValueError(
                f"{', '.join(map(repr, others))} beside `sources`: a mixture has nothing else; "
                "write it inside each source"
            )
        return raw

    @field_validator("sources")
    @classmethod
    def sources_are_told_apart(cls, sources: tuple[MixedSource, ...]) -> tuple[MixedSource, ...]:
        """Refuses two sources of one name, and one too rare to be drawn."""
        if not sources:
            raise ValueError("no source is named; name at least one, or give data.train")
        names = [source.name for source in sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two sources are called {twice[0]!r}; each needs its own name")
        total = sum(source.weight for source in sources)
        for source in sources:
            if source.weight < SMALLEST_SHARE * total:
                raise ValueError(
                    f"source {source.name!r} has weight {source.weight:g} of {total:g}, below one "
                    "row of a thousand; raise it or leave the source out"
                )
        return sources

    @property
    def eval(self) -> str | None:
        """Where the held-out rows come from, in words; None where no source has any."""
        held_out = [f"{source.name}: {source.eval}" for source in self.sources if source.eval]
        return ", ".join(held_out) or None


def _kind(raw: Any) -> str:
    is_mixture = isinstance(raw, DataMixture) or (isinstance(raw, dict) and "sources" in raw)
    return "mixture" if is_mixture else "single"


AnyData = Annotated[
    Annotated[DataSection, Tag("single")] | Annotated[DataMixture, Tag("mixture")],
    Discriminator(_kind),
]


def sources_of(data: DataSection | DataMixture) -> tuple[DataSection, ...]:
    """Returns where rows come from: the one source, or those of a mixture."""
    return data.sources if isinstance(data, DataMixture) else (data,)


def mixture_facts(data: DataSection | DataMixture) -> dict[str, Any]:
    """Returns what of a mixture changes a training beside the rows; nothing of one source."""
    if not isinstance(data, DataMixture):
        return {}
    kept = {"name", "weight", "objective"}
    return {"data.sources": [s.model_dump(mode="json", include=kept) for s in data.sources]}


def require_single(data: DataSection | DataMixture, purpose: str) -> DataSection:
    """Returns the data section where it is of one source.

    Raises:
        ConfigError: It is a mixture, which this purpose has no use for.
    """
    if isinstance(data, DataMixture):
        raise ConfigError(
            f"{purpose} needs one data source, and data.sources names "
            f"{', '.join(source.name for source in data.sources)}; give data.train instead"
        )
    return data
