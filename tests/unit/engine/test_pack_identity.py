"""A slot of any packable method, beside any neighbours, ends with the weights that it has alone.

What may differ inside a pack differs here all at once: settings of the method, dropout, rates and
schedules, batch sizes, accumulation, lengths of rows, seeds and numbers of steps. Slots stand still
by turns, as trials do at their reports, and one is replaced in mid-run.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch

from graft.core.errors import GraftError
from graft.core.spaces import Choice
from graft.data.records import Example, Message, TokenRow
from graft.data.template import ChatTemplate
from graft.engine.multi import MultiAdapterModel
from graft.engine.train import SlotState, Trainer
from graft.methods.base import METHODS
from graft.objectives.base import OBJECTIVES
from graft.recipe.sections import Recipe
from graft.testing import tiny_rows, tiny_tokenizer
from tests.unit.engine.conftest import exact_model, make_recipe, make_rows
from tests.unit.engine.test_packed_equals_alone import largest_difference

STEPS = 30
LEAVES_AFTER = 9
PACKABLE = [name for name in METHODS.names() if METHODS.get(name).packable]
OFFLINE = [name for name in OBJECTIVES.names() if "rollouts" not in OBJECTIVES.get(name).needs]
TEMPLATE = ChatTemplate(tiny_tokenizer())

SHORT = make_rows(12, lengths=(4, 8), seed=1)
LONG = make_rows(8, lengths=(24, 40), seed=2)
UNEVEN = make_rows(16, lengths=(4, 32), seed=3)


class Job(NamedTuple):
    """What a slot trains."""

    recipe: Recipe
    rows: Sequence[TokenRow]


TRAIN: dict[str, dict[str, Any]] = {
    "stays": {"batch_size": 4, "lr": 1e-3, "seed": 1, "micro_batch_tokens": 20},
    "leaves": {
        "batch_size": 2,
        "lr": 5e-3,
        "seed": 2,
        "schedule": "constant",
        "warmup_fraction": 0.2,
        "weight_decay": 0.1,
    },
    "ends": {
        "steps": 18,
        "batch_size": 3,
        "lr": 2e-3,
        "seed": 3,
        "schedule": "cosine",
        "betas": (0.8, 0.95),
        "max_grad_norm": 0.3,
    },
    "follows": {"steps": 14, "batch_size": 3, "lr": 3e-3, "seed": 4, "warmup_fraction": 0.0},
}
ROWS = {"stays": SHORT, "leaves": LONG, "ends": UNEVEN, "follows": UNEVEN}


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    """Rows are few: a second thread would wait longer than it works."""
    threads(1)


def settings_of(method: str, which: int) -> dict[str, Any]:
    """Settings of a method: one of those that its own search space offers, with dropout."""
    kind = METHODS.get(method)
    offered = {
        path.removeprefix("method."): space.values[which]
        for path, space in kind.search_space().items()
        if path.startswith("method.") and isinstance(space, Choice)
    }
    dropout = {key: 0.1 * (which + 1) for key in kind.model_fields if key.endswith("dropout")}
    return {"type": method, **offered, **dropout}


def job(slot: str, method: dict[str, Any], **train: Any) -> Job:
    settings = {"steps": STEPS, **TRAIN[slot], **train}
    return Job(make_recipe(method=method, train=settings), ROWS[slot])


def trainer() -> Trainer:
    return Trainer(MultiAdapterModel(exact_model()), template=TEMPLATE)


def together(
    jobs: Mapping[str, Job], *, leaves: str | None = None, follows: str | None = None
) -> dict[str, SlotState]:
    """Trains a pack to its end; in each round another slot stands still.

    Args:
        jobs: By slot.
        leaves: Leaves after some rounds.
        follows: Joins in its place.
    """
    pack = trainer()
    ended: dict[str, SlotState] = {}
    for name, one in jobs.items():
        if name != follows:
            pack.join(name, *one)
    for number in itertools.count():
        if number == LEAVES_AFTER and leaves is not None and follows is not None:
            ended[leaves] = pack.state(leaves)
            pack.leave(leaves)
            pack.join(follows, *jobs[follows])
        names = list(pack.slots)
        del names[number % len(names)]
        if not pack.step(names) and not pack.step():
            return ended | {name: pack.state(name) for name in pack.slots}
    raise AssertionError("a loop without an end has ended")


def require_same_alone(found: Mapping[str, SlotState], jobs: Mapping[str, Job]) -> None:
    """Trains each alone for as many steps; nothing counts that has hardly moved."""
    assert found.keys() == jobs.keys()
    for name, state in found.items():
        alone = trainer()
        alone.join(name, *jobs[name])
        start = alone.state(name)
        for _ in range(state.step):
            alone.step()
        expected = alone.state(name)
        assert state.step == expected.step > LEAVES_AFTER // 2
        assert largest_difference(expected.tensors, start.tensors) > 1e-3, name
        assert largest_difference(state.tensors, expected.tensors) <= 1e-10, name


@pytest.mark.parametrize("method", PACKABLE)
def test_slots_of_one_method_end_as_alone(method: str) -> None:
    which = {"stays": 0, "leaves": 1, "ends": 1, "follows": 0}
    jobs = {name: job(name, settings_of(method, at)) for name, at in which.items()}
    require_same_alone(together(jobs, leaves="leaves", follows="follows"), jobs)


def five_from(first: int) -> dict[str, Job]:
    """Five methods, the slot that leaves and the one that follows it, in many micro-batches."""
    methods = list(itertools.islice(itertools.cycle(PACKABLE), first, first + 6))
    slots = ("leaves", "stays", "ends", "stays", "ends", "follows")
    return {
        method: job(slot, settings_of(method, at % 2), seed=at, micro_batch_tokens=48)
        for at, (method, slot) in enumerate(zip(methods, slots, strict=True))
    }


@pytest.mark.parametrize(
    "first",
    [
        at if at % 5 == 0 else pytest.param(at, marks=pytest.mark.slow)
        for at in range(len(PACKABLE))
    ],
)
def test_a_pack_of_five_methods_ends_as_each_alone(first: int) -> None:
    packed = five_from(first)
    leaves, *_, follows = packed
    whole = {
        name: Job(
            one.recipe.model_copy(
                update={"train": one.recipe.train.model_copy(update={"micro_batch_tokens": 2048})}
            ),
            one.rows,
        )
        for name, one in packed.items()
    }
    require_same_alone(together(packed, leaves=leaves, follows=follows), whole)


def rows_for(objective: str) -> list[TokenRow]:
    """Rows of the tiny task for an objective, of lengths that differ."""
    built = OBJECTIVES.build(objective)
    rows = []
    for number, row in enumerate(tiny_rows(12)):
        user, assistant = (Message(**message) for message in row["messages"])
        kinds: dict[str, dict[str, Any]] = {
            "messages": {"messages": (user, assistant)},
            "preference": {"prompt": (user,), "chosen": assistant.content, "rejected": "no " * 9},
            "text": {"text": f"{user.content} " * (number + 1)},
        }
        (kind,) = sorted(built.columns & kinds.keys())[:1]
        rows += built.rows(Example(source=f"rows:{number}", **kinds[kind]), TEMPLATE)
    return built.pack(rows, 96)


def objective_jobs(objectives: Sequence[str]) -> dict[str, Job]:
    """A slot for each objective, each with another method."""
    methods = itertools.cycle(PACKABLE)
    return {
        objective: Job(
            make_recipe(
                method=settings_of(next(methods), at % 2),
                objective={"type": objective},
                train={"steps": STEPS, "batch_size": 2 + at % 3, "lr": 1e-3, "seed": at},
            ),
            rows_for(objective),
        )
        for at, objective in enumerate(objectives)
    }


def test_a_pack_of_every_objective_ends_as_each_alone() -> None:
    jobs = objective_jobs(OFFLINE)
    require_same_alone(together(jobs), jobs)


LARGE_RATES = (0.3, 0.05)


@pytest.mark.parametrize("method", PACKABLE)
def test_at_large_rates_each_step_is_the_step_alone(method: str) -> None:
    jobs = {
        slot: job(slot, settings_of(method, at), lr=lr, steps=6)
        for at, (slot, lr) in enumerate(zip(("stays", "ends"), LARGE_RATES, strict=True))
    }
    pack, alone = trainer(), trainer()
    for name, one in jobs.items():
        pack.join(name, *one)
    for _ in range(6):
        before = {name: pack.state(name) for name in jobs}
        pack.step()
        for name, one in jobs.items():
            alone.join(name, *one, state=before[name])
            alone.step()
            found, expected = pack.state(name), alone.state(name)
            alone.leave(name)
            assert largest_difference(found.tensors, expected.tensors) <= 1e-10
            assert largest_difference(found.optimizer, expected.optimizer) <= 1e-10
            assert found.memory.keys() == expected.memory.keys()
            for key, value in found.memory.items():
                torch.testing.assert_close(value, expected.memory[key], rtol=0, atol=1e-10)


def weights_beside(method: str, *, breaks: bool) -> dict[str, SlotState]:
    """Trains two methods beside a neighbour that turns, or does not, to NaN in mid-run."""
    other = PACKABLE[(PACKABLE.index(method) + 1) % len(PACKABLE)]
    pack = trainer()
    pack.join("stays", *job("stays", settings_of(method, 0)))
    pack.join("breaks", *job("ends", settings_of(method, 1)))
    pack.join("other", *job("follows", settings_of(other, 1)))
    for number in range(4):
        if breaks and number == 1:
            with torch.no_grad():
                for parameter in pack.model.parameters("breaks").values():
                    parameter.fill_(torch.nan)
        reports = pack.step()
        assert reports["breaks"].is_finite is not (breaks and number > 0)
        assert reports["stays"].is_finite
        assert reports["other"].is_finite
    return {name: pack.state(name) for name in ("stays", "other")}


def require_same_bits(found: Mapping[str, SlotState], expected: Mapping[str, SlotState]) -> None:
    for name, state in found.items():
        for site, of_site in state.tensors.items():
            for key, value in of_site.items():
                assert torch.equal(value, expected[name].tensors[site][key]), (name, site, key)


@pytest.mark.parametrize("method", PACKABLE)
def test_a_neighbour_that_turns_to_nan_changes_no_bit(method: str) -> None:
    require_same_bits(weights_beside(method, breaks=True), weights_beside(method, breaks=False))


WRONG: dict[str, dict[str, Any]] = {
    "no such layer": {"method": {"type": "lora", "target_modules": ["nowhere"]}},
    "rank above the layer": {"method": {"type": "lora", "r": 999}},
    "owns the base": {"method": {"type": "full"}},
    "optimizer of a GPU": {"train": {"optimizer": "paged_adamw_8bit"}},
    "no template's text": {
        "method": {"type": "prompt", "init_tokens": "text", "init_text": "be brief"}
    },
}


def test_neighbours_that_are_refused_change_no_bit() -> None:
    pack, undisturbed = trainer(), trainer()
    for one in (pack, undisturbed):
        one.join("stays", *job("stays", settings_of("lora", 0)))
    for sections in WRONG.values():
        pack.step()
        undisturbed.step()
        with pytest.raises(GraftError):
            pack.join("wrong", make_recipe(**sections), SHORT)
        assert pack.slots == tuple(pack.model.slots) == ("stays",)
    pack.step()
    undisturbed.step()
    require_same_bits({"stays": pack.state("stays")}, {"stays": undisturbed.state("stays")})
