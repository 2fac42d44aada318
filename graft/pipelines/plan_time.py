"""How long a search takes and what it costs: floating-point operations over what devices do.

A token costs two operations a weight forward and two backward; two more where the weights
themselves are trained; attention as much again as tokens stand before it. Devices reach a share of
their data sheet's speed, which is why hours are a range.

Reference:
    Scaling Laws for Neural Language Models, arXiv 2001.08361, section 2.1, for operations a token;
    PaLM, arXiv 2204.02311, appendix B, for utilization.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from graft.core.model import StrictModel
from graft.methods._own_weights import OwnWeightsMethod

if TYPE_CHECKING:
    import torch

    from graft.engine.memory.shape import ModelShape
    from graft.recipe.search import SearchSection
    from graft.recipe.sections import Recipe

_GPU_UTILIZATION = (0.15, 0.6)
"""Published runs of adapters reach 0.34 to 0.6; short padded rows stay below."""
_CPU_UTILIZATION = (0.2, 0.8)
"""Of a product of large matrices, measured here."""
_PARAMETER_OFFLOAD = 0.3
"""Of the lower end, where every pass sends the base over PCIe."""
_PROBE_SIZE = 1024


class PlannedTime(StrictModel):
    """What a search takes, as a range."""

    low_hours: float
    high_hours: float
    devices: int
    """Devices in use at once."""
    low_dollars: float | None = None
    high_dollars: float | None = None
    basis: str
    """What the range stands on, in words."""


class Speed(NamedTuple):
    """What one device does."""

    flops: float
    """Operations a second at best."""
    low: float
    """Share of them that training reaches at least."""
    high: float
    words: str


def gpu_speed(name: str, flops: float) -> Speed:
    """Returns the speed of a GPU by its data sheet."""
    low, high = _GPU_UTILIZATION
    words = f"{low:.0%} to {high:.0%} of {name}'s {flops / 1e12:.0f} TFLOP/s"
    return Speed(flops, low, high, words)


def cpu_speed(dtype: torch.dtype) -> Speed:
    """Measures a matrix product here; it takes less than a second."""
    import torch

    matrix = torch.ones(_PROBE_SIZE, _PROBE_SIZE, dtype=dtype)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - started)
    flops = 2 * _PROBE_SIZE**3 / min(seconds)
    low, high = _CPU_UTILIZATION
    words = f"{low:.0%} to {high:.0%} of the {flops / 1e9:.0f} GFLOP/s measured here; rough"
    return Speed(flops, low, high, words)


def plan_time(
    recipes: Sequence[Recipe],
    shape: ModelShape,
    speed: Speed,
    *,
    row_tokens: Sequence[float],
    devices: int,
    price: float | None,
) -> PlannedTime:
    """Estimates a search whose trials are spread evenly over some kinds.

    Args:
        recipes: One of each kind.
        shape: Of the base.
        speed: Of one device.
        row_tokens: Tokens of a training row, of each kind.
        devices: In use at once.
        price: Dollars an hour of one device.
    """
    kinds = list(zip(recipes, row_tokens, strict=True))
    mean = _mean([trial_flops(recipe, shape, tokens) for recipe, tokens in kinds])
    tokens = _mean([r.train.steps * r.train.batch_size * of_row for r, of_row in kinds])
    search = recipes[0].search
    least, most = least_share(search), 1.0
    if search.max_tokens is not None:
        most = min(most, search.max_tokens / (search.trials * tokens))
    offloads = any(recipe.scale.offload.parameters != "none" for recipe in recipes)
    slowest = speed.low * (_PARAMETER_OFFLOAD if offloads else 1.0)
    seconds = mean / speed.flops / devices
    bound = math.inf if search.max_hours is None else search.max_hours
    shortest = min(bound, search.trials * min(least, most) * seconds / speed.high / 3600)
    longest = min(bound, search.trials * most * seconds / slowest / 3600)
    again = search.finalists * search.finalist_seeds * seconds  # to the end, beside every budget
    low, high = shortest + again / speed.high / 3600, longest + again / slowest / 3600
    early = "" if search.scheduler.type == "none" else ", trials stopped early or not"
    samples = any("rollouts" in recipe.objective.needs for recipe in recipes)
    sampling = "the sampling of answers (often most of it), " if samples else ""
    ends = ", ended by search.max_tokens" if most < 1.0 else ""
    ends = ", ended by search.max_hours" if longest == bound else ends
    return PlannedTime(
        low_hours=low,
        high_hours=high,
        devices=devices,
        low_dollars=None if price is None else low * devices * price,
        high_dollars=None if price is None else high * devices * price,
        basis=f"{speed.words}{early}{ends}; rows of {_mean(row_tokens):.0f} tokens; "
        f"{sampling}start-up and checkpoints left out",
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def trial_flops(recipe: Recipe, shape: ModelShape, row_tokens: float) -> float:
    """Counts the operations of a trial that trains to its end, its measurements included."""
    forward = _forward_flops(shape, row_tokens)
    passes = 2.0 + isinstance(recipe.method, OwnWeightsMethod) + recipe.scale.gradient_checkpointing
    passes += recipe.needs_reference
    rows = recipe.train.steps * recipe.train.batch_size
    reports = math.ceil(recipe.train.steps / recipe.train.report_every)
    measured = reports * recipe.search.eval_rows if recipe.data.eval is not None else 0
    return row_tokens * forward * (passes * rows + measured)


def least_share(search: SearchSection) -> float:
    """Share of all steps that are trained if halving never promotes more than its share."""
    if search.scheduler.type == "none":
        return 1.0
    share, reached, trained = 1.0, 0.25, 0.25  # the first decision comes after a quarter
    while reached < 1.0:
        share /= search.scheduler.reduction_factor
        next_rung = min(1.0, reached * search.scheduler.reduction_factor)
        trained += share * (next_rung - reached)
        reached = next_rung
    return trained


def _forward_flops(shape: ModelShape, row_tokens: float) -> float:
    """Operations a token: every weight that it meets, and the tokens before it."""
    base = shape.base_shape
    config = shape.config.get_text_config()
    weights = num_active(shape) + base.vocab_size * base.hidden_size
    attended: float = config.num_attention_heads * base.head_dim * row_tokens / 2
    return 2.0 * weights + 4.0 * base.num_layers * attended


def num_active(shape: ModelShape) -> float:
    """Counts the weights of linear layers that one token meets: of experts, those it is sent to."""
    config = shape.config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    share = chosen / experts if experts and chosen else 1.0
    count = 0.0
    for name, size in shape.parameters.items():
        is_expert = ".experts." in name
        if is_expert and len(size) >= 2:
            count += share * math.prod(size)
        elif name.removesuffix(".weight") in shape.linears:
            count += math.prod(size)
    return count
