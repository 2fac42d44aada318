"""How long a search takes and what it costs: floating-point operations over what devices do.

A token costs two operations a weight forward and two backward; two more where the weights
themselves are trained; attention as much again as tokens stand before it. Answers are sampled a
token at a time: each pass reads the base once for all that grow together, and multiplies for each.
Devices reach a share of their data sheet's speed, and nobody knows how long answers will be, which
is why hours are a range.

Reference:
    Scaling Laws for Neural Language Models, arXiv 2001.08361, section 2.1, for operations a token;
    PaLM, arXiv 2204.02311, appendix B, for utilization.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from graft.core.model import StrictModel
from graft.methods._own_weights import OwnWeightsMethod
from graft.objectives.sampling import SamplingObjective

if TYPE_CHECKING:
    import torch

    from graft.engine.memory.shape import ModelShape
    from graft.recipe.search import SearchSection
    from graft.recipe.sections import Recipe

_GPU_UTILIZATION = (0.15, 0.6)
"""Published runs of adapters reach 0.34 to 0.6; short padded rows stay below."""
_CPU_UTILIZATION = (0.2, 0.8)
"""Of products measured here."""
_PARAMETER_OFFLOAD = 0.3
"""Of the lower end, where every pass sends the base over PCIe."""
_PROBE_SIZE = 1024
_PROBE_BYTES = 2**27
"""Of weights that are read once: more than caches hold."""
_SHORT_ANSWER = 0.25
"""Of `max_new_tokens`, at the lower end; at the upper one answers take them all."""
_LAYER_S = (1e-4, 5e-4)
"""Of a layer in a sampling pass, beside its arithmetic: kernels are started one by one."""


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
    bytes_per_s: float
    """Of weights that are read, at best."""
    low: float
    """Share of both that is reached at least."""
    high: float
    words: str


def gpu_speed(name: str, flops: float, bytes_per_s: float) -> Speed:
    """Returns the speed of a GPU by its data sheet."""
    low, high = _GPU_UTILIZATION
    words = f"{low:.0%} to {high:.0%} of {name}'s {flops / 1e12:.0f} TFLOP/s"
    return Speed(flops, bytes_per_s, low, high, words)


def cpu_speed(dtype: torch.dtype) -> Speed:
    """Measures products of matrices, and with a vector, here; it takes less than a second."""
    import torch

    matrix = torch.ones(_PROBE_SIZE, _PROBE_SIZE, dtype=dtype)
    weights = torch.ones(_PROBE_BYTES // dtype.itemsize // _PROBE_SIZE, _PROBE_SIZE, dtype=dtype)
    flops = 2 * _PROBE_SIZE**3 / _fastest(lambda: matrix @ matrix)
    bytes_per_s = _PROBE_BYTES / _fastest(lambda: weights @ matrix[0])
    low, high = _CPU_UTILIZATION
    words = f"{low:.0%} to {high:.0%} of the {flops / 1e9:.0f} GFLOP/s measured here; rough"
    return Speed(flops, bytes_per_s, low, high, words)


def _fastest(do: Callable[[], object]) -> float:
    """Seconds of the fastest of a few times."""
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        do()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


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
        row_tokens: Tokens of a training row, of each kind; where answers are sampled, of a prompt.
        devices: In use at once.
        price: Dollars an hour of one device.
    """
    kinds = list(zip(recipes, row_tokens, strict=True))
    tokens = _mean([r.train.steps * r.train.batch_size * learned_tokens(r, of) for r, of in kinds])
    seconds = [trial_seconds(recipe, shape, speed, of) for recipe, of in kinds]
    shortest, longest = (_mean(end) / devices / 3600 for end in zip(*seconds, strict=True))
    search = recipes[0].search
    least, most = least_share(search), 1.0
    if search.max_tokens is not None:
        most = min(most, search.max_tokens / (search.trials * tokens))
    bound = math.inf if search.max_hours is None else search.max_hours
    low = min(bound, search.trials * min(least, most) * shortest)
    high = min(bound, search.trials * most * longest)
    ends = ", ended by search.max_tokens" if most < 1.0 else ""
    ends = ", ended by search.max_hours" if high == bound else ends
    early = "" if search.scheduler.type == "none" else ", trials stopped early or not"
    again = search.finalists * search.finalist_seeds  # to the end, beside every budget
    low, high = low + again * shortest, high + again * longest
    return PlannedTime(
        low_hours=low,
        high_hours=high,
        devices=devices,
        low_dollars=None if price is None else low * devices * price,
        high_dollars=None if price is None else high * devices * price,
        basis=f"{speed.words}{early}{ends}; {_rows_words(kinds)}; start-up and checkpoints are "
        "left out",
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _rows_words(kinds: Sequence[tuple[Recipe, float]]) -> str:
    """What the rows of a search are taken to be."""
    tokens = _mean([tokens for _, tokens in kinds])
    longest = [
        recipe.objective.max_new_tokens
        for recipe, _ in kinds
        if isinstance(recipe.objective, SamplingObjective)
    ]
    if not longest:
        return f"rows of {tokens:.0f} tokens"
    return (
        f"rows of {tokens:.0f} tokens, sampled answers of {_SHORT_ANSWER * min(longest):.0f} to "
        f"{max(longest)}"
    )


def learned_tokens(recipe: Recipe, row_tokens: float, answer_share: float = 1.0) -> float:
    """Returns the tokens of a row as it is learned from, sampled answers included.

    Args:
        recipe: Complete.
        row_tokens: Of the row as the data has it; of a prompt where answers are sampled.
        answer_share: Of `max_new_tokens`, that answers take.
    """
    objective = recipe.objective
    if not isinstance(objective, SamplingObjective):
        return row_tokens
    return row_tokens + objective.group_size * answer_share * objective.max_new_tokens


class _End(NamedTuple):
    """What holds at one end of the range."""

    share: float
    """Of the device's speed."""
    answer_share: float
    """Of `max_new_tokens`."""
    layer_s: float


def trial_seconds(
    recipe: Recipe, shape: ModelShape, speed: Speed, row_tokens: float
) -> tuple[float, float]:
    """Returns the least and the most that a trial to its end keeps one device busy.

    Args:
        recipe: Of the trial.
        shape: Of the base.
        speed: Of the device.
        row_tokens: As in `learned_tokens`.
    """
    offloads = recipe.scale.offload.parameters != "none"
    slowest = speed.low * (_PARAMETER_OFFLOAD if offloads else 1.0)
    least, most = (
        trial_flops(recipe, shape, learned_tokens(recipe, row_tokens, end.answer_share))
        / (speed.flops * end.share)
        + _sampling_seconds(recipe, shape, speed, row_tokens, end)
        for end in (_End(speed.high, _SHORT_ANSWER, _LAYER_S[0]), _End(slowest, 1.0, _LAYER_S[1]))
    )
    return least, most


def _sampling_seconds(
    recipe: Recipe, shape: ModelShape, speed: Speed, prompt_tokens: float, end: _End
) -> float:
    """What a trial's answers take, where it learns from its own; else nothing."""
    from graft.engine.answers import CACHE_TOKENS, MAX_BATCH

    objective, settings = recipe.objective, recipe.train
    if not isinstance(objective, SamplingObjective):
        return 0.0
    answers = settings.batch_size * objective.group_size
    room = CACHE_TOKENS // math.ceil(prompt_tokens + objective.max_new_tokens)
    together = min(answers, MAX_BATCH, max(1, room))
    new_tokens = end.answer_share * objective.max_new_tokens
    token_s = _forward_flops(shape, prompt_tokens + new_tokens) / speed.flops
    reading_s = sum(shape.weight_bytes(recipe.model)) / speed.bytes_per_s
    pass_s = max(reading_s, together * token_s) / end.share + shape.num_layers * end.layer_s
    prompts_s = answers * prompt_tokens * token_s / end.share
    rollouts = math.ceil(settings.steps / objective.num_iterations)
    return rollouts * (prompts_s + answers / together * new_tokens * pass_s)


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
