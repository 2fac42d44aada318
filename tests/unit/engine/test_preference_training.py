"""Preferences in the training loop: packed, resumed, on workers, with a reference that is free."""

from __future__ import annotations

import math
import random
import threading
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from graft.core.errors import ConfigError
from graft.data.records import TokenRow
from graft.engine.backends.torch import TorchBackend
from graft.engine.multi import AdapterTensors, MultiAdapterModel
from graft.engine.recompute import recompute_layers
from graft.engine.reference import References
from graft.engine.train import Trainer
from graft.methods.base import METHODS
from graft.recipe.sections import Recipe
from graft.testing import tiny_model
from tests.unit.engine.conftest import exact_model, make_recipe, make_rows

STEPS = 10
TEXTS = make_rows(12, lengths=(5, 30))


def make_pairs(num_pairs: int = 12, seed: int = 0) -> list[TokenRow]:
    """Random prompts with two answers each."""
    generator = random.Random(seed)
    rows = []
    for index in range(num_pairs):
        lengths = [generator.randint(2, 12) for _ in range(3)]
        branch = [number for number, count in enumerate(lengths) for _ in range(count)]
        ids = [generator.randrange(4, 384) for _ in branch]
        rows.append(TokenRow(ids, [k > 0 for k in branch], f"pairs:{index}", branch))
    return rows


def make_answers() -> list[TokenRow]:
    """Each pair as a wanted and an unwanted answer."""
    return [
        row.take([at for at, k in enumerate(row.branch or ()) if k in (0, number)])._replace(
            branch=[min(k, 1) for k in row.branch or () if k in (0, number)],
            label=float(number == 1),
        )
        for row in make_pairs()
        for number in (1, 2)
    ]


def trial(objective: dict[str, Any], seed: int = 1, lr: float = 1e-3, **train: Any) -> Recipe:
    return make_recipe(
        method={"type": "lora", "r": 4, "lora_alpha": 8.0, "lora_dropout": 0.1},
        objective=objective,
        train={"steps": STEPS, "batch_size": 4, "lr": lr, "seed": seed, **train},
    )


RECIPES: dict[str, tuple[Recipe, list[TokenRow]]] = {
    "dpo": (trial({"type": "dpo", "beta": 0.5}), make_pairs()),
    "ipo": (trial({"type": "dpo", "loss_type": "ipo"}, seed=2, lr=3e-3), make_pairs()),
    "sft": (trial({"type": "sft"}, seed=3), TEXTS),
    "orpo": (trial({"type": "orpo"}, seed=4), make_pairs()),
    "kto": (trial({"type": "kto"}, seed=5), make_answers()),
}


def run(*names: str, **settings: Any) -> Trainer:
    trainer = Trainer(MultiAdapterModel(exact_model()))
    for name in names:
        recipe, rows = RECIPES[name]
        train = recipe.train.model_copy(update=settings)
        trainer.join(name, recipe.model_copy(update={"train": train}), rows)
    while trainer.step():
        pass
    return trainer


def largest_difference(one: AdapterTensors, other: AdapterTensors) -> float:
    return max(
        float((one[site][key] - other[site][key]).abs().max()) for site in one for key in one[site]
    )


def stirred_start(seed: int = 9) -> AdapterTensors:
    """An adapter that does something, to start from."""
    fresh = MultiAdapterModel(exact_model()).fresh_tensors(RECIPES["dpo"][0].method)
    generator = torch.Generator().manual_seed(seed)
    return {
        site: {k: v + 0.05 * torch.randn(v.shape, generator=generator) for k, v in of.items()}
        for site, of in fresh.items()
    }


def test_slots_of_several_objectives_in_one_pack_end_as_alone() -> None:
    packed = run(*RECIPES)
    for name, (recipe, rows) in RECIPES.items():
        alone = run(name).state(name).tensors
        assert largest_difference(packed.state(name).tensors, alone) <= 1e-10
        start = Trainer(MultiAdapterModel(exact_model()))
        start.join(name, recipe, rows)
        assert largest_difference(alone, start.state(name).tensors) > 1e-3


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_micro_batches_do_not_change_the_result(name: str) -> None:
    whole, small = (run(name, micro_batch_tokens=tokens).state(name) for tokens in (2048, 40))
    assert largest_difference(whole.tensors, small.tensors) <= 1e-10


@pytest.mark.parametrize("name", ["dpo", "orpo", "kto"])
@pytest.mark.parametrize("is_given_a_start", [False, True])
def test_a_resumed_run_ends_as_an_undisturbed_one(name: str, is_given_a_start: bool) -> None:
    recipe, rows = RECIPES[name]
    start = stirred_start() if is_given_a_start else None
    whole, first, second = (Trainer(MultiAdapterModel(exact_model())) for _ in range(3))
    whole.join("a", recipe, rows, tensors=start)
    while whole.step():
        pass
    first.join("a", recipe, rows, tensors=start)
    for _ in range(4):
        first.step()
    second.join("b", recipe, rows, tensors=start, state=first.state("a"))
    while second.step():
        pass
    found, expected = second.state("b").tensors, whole.state("a").tensors
    assert largest_difference(found, expected) <= 1e-10


def test_the_reference_is_what_the_slot_started_from_and_leaves_with_it() -> None:
    recipe, rows = RECIPES["dpo"]
    method = recipe.method.model_copy(update={"lora_dropout": 0.0})
    recipe = recipe.model_copy(update={"method": method})
    trainer = Trainer(MultiAdapterModel(exact_model()))
    trainer.join("a", recipe, rows, tensors=stirred_start())
    trainer.join("b", recipe, rows, tensors=stirred_start())
    trainer.join("c", recipe, rows)
    assert len(trainer.model.slots) == 4  # two share one reference, the third has the base itself
    first, second = trainer.step(), trainer.step()
    for name in "abc":
        assert first[name].loss == pytest.approx(math.log(2), abs=1e-12)
        assert first[name].figures["reward_margin"] == pytest.approx(0, abs=1e-12)
        assert second[name].loss != pytest.approx(math.log(2), abs=1e-4)
    other = recipe.method.model_copy(update={"lora_alpha": 3.0})
    trainer.join("d", recipe.model_copy(update={"method": other}), rows, tensors=stirred_start())
    assert trainer.step()["d"].loss == pytest.approx(math.log(2), abs=1e-12)
    trainer.leave("d")
    trainer.leave("a")
    assert len(trainer.model.slots) == 3
    trainer.leave("b")
    assert list(trainer.model.slots) == ["c"]


def test_a_row_is_scored_once_under_a_reference_whatever_the_epoch_and_slot(threads: Any) -> None:
    threads(1)  # a pass for all rows, not one a lane
    rows = make_pairs(4)
    model = MultiAdapterModel(exact_model())
    passes: list[int] = []
    model.base.get_decoder().register_forward_hook(lambda *_: passes.append(1))
    trainer = Trainer(model)
    recipe = trial({"type": "dpo"})
    trainer.join("a", recipe, rows)
    counts = []
    for step in range(3):
        if step == 2:
            trainer.join("b", recipe, rows)
        passes.clear()
        trainer.step()
        counts.append(len(passes))
    assert counts == [2, 1, 1]


def test_a_method_that_owns_the_base_has_a_copy_of_it_as_reference() -> None:
    recipe = make_recipe(
        method={"type": "full"},
        objective={"type": "dpo"},
        train={"steps": 3, "batch_size": 4, "lr": 1e-3},
    )
    model = MultiAdapterModel(exact_model())
    trainer = Trainer(model)
    trainer.join("a", recipe, make_pairs(4))
    reports = [trainer.step()["a"] for _ in range(3)]
    assert reports[0].loss == pytest.approx(math.log(2), abs=1e-12)
    assert reports[0].figures["reward_margin"] == pytest.approx(0, abs=1e-12)
    assert reports[2].figures["reward_margin"] > 0.01
    assert reports[2].loss < reports[0].loss


def test_a_base_whose_layers_recompute_is_copied_too() -> None:
    recipe = make_recipe(
        method={"type": "full"},
        objective={"type": "dpo"},
        train={"steps": 3, "batch_size": 4, "lr": 1e-3},
    )
    losses = []
    for recomputes in (False, True):
        model = MultiAdapterModel(exact_model())
        if recomputes:
            recompute_layers(model)
        trainer = Trainer(model)
        trainer.join("a", recipe, make_pairs(4))
        losses.append([trainer.step()["a"].loss for _ in range(3)])
        layers = model.base.get_decoder().layers
        assert all(("forward" in vars(layer)) == recomputes for layer in layers)
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)


def test_a_copy_without_memory_is_refused_with_what_it_costs() -> None:
    model = MultiAdapterModel(tiny_model())
    references = References(model, TorchBackend(), free=lambda _: 100_000)
    needed = sum(p.nbytes for p in model.base.parameters()) / 1e6
    with pytest.raises(ConfigError, match=rf"method full .* needs {needed:.1f} MB .* 0.1 MB are"):
        references.join("a", METHODS.build("full"), None)
    references.join("b", METHODS.build("lora"), None)  # that costs nothing


def test_a_base_with_a_sliding_window_learns_from_pairs_as_each_answer_alone() -> None:
    config = MistralConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=4,
    )
    torch.manual_seed(0)
    model = MultiAdapterModel(MistralForCausalLM(config))
    assert not model.shares_prompts
    row = make_pairs(1)[0]
    objective = {"type": "orpo", "beta": 0.3}
    recipe = make_recipe(objective=objective, train={"steps": 2, "batch_size": 1})
    with torch.no_grad():
        means = []
        for answer in (1, 2):
            ids = torch.tensor([row.take(row.branch_columns(answer)).input_ids])
            logprobs = model.base(input_ids=ids).logits[0, :-1].log_softmax(-1)
            each = logprobs.gather(1, ids[0, 1:, None])[:, 0]
            means.append(float(each[row.num_prompt_tokens - 1 :].mean()))
    odds = [mean - math.log(1 - math.exp(mean)) for mean in means]
    expected = -means[0] + 0.3 * math.log1p(math.exp(odds[1] - odds[0]))
    trainer = Trainer(model)
    trainer.join("a", recipe, [row])
    assert trainer.step()["a"].loss == pytest.approx(expected, abs=1e-5)


class OneOfTwo(TorchBackend):
    """A worker of two that are threads of this process; gradients are summed before a step."""

    world_size = 2

    def __init__(self, rank: int, barrier: threading.Barrier, board: dict[int, Any]) -> None:
        super().__init__()
        self.world_rank = rank
        self._barrier = barrier
        self._board = board

    def _exchange(self, value: Any) -> list[Any]:
        self._barrier.wait(60)
        self._board[self.world_rank] = value
        self._barrier.wait(60)
        return [self._board[rank] for rank in range(2)]

    def forward_backward_count(self, local: int) -> int:
        return max(self._exchange(local))

    def all_reduce_sum(self, value: torch.Tensor) -> torch.Tensor:
        first, second = self._exchange(value)
        total: torch.Tensor = first + second
        return total

    def step(self, lrs: Any, max_grad_norms: Any, after: Any) -> dict[str, float]:
        for parameters in self._parameters.values():
            for parameter in parameters.values():
                if parameter.requires_grad:
                    own = parameter.grad
                    found = torch.zeros_like(parameter) if own is None else own
                    parameter.grad = self.all_reduce_sum(found)
        return super().step(lrs, max_grad_norms, after)


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_two_workers_train_as_one(name: str) -> None:
    recipe, rows = RECIPES[name]
    train = recipe.train.model_copy(update={"batch_size": 3, "micro_batch_tokens": 60, "steps": 4})
    recipe = recipe.model_copy(update={"train": train})
    barrier, board = threading.Barrier(2), dict[int, Any]()
    workers = [
        Trainer(MultiAdapterModel(exact_model()), OneOfTwo(rank, barrier, board))
        for rank in range(2)
    ]
    reports: dict[int, list[Any]] = {0: [], 1: []}

    def work(rank: int) -> None:
        workers[rank].join("a", recipe, rows)
        while steps := workers[rank].step():
            reports[rank].append(steps["a"])

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = Trainer(MultiAdapterModel(exact_model()))
    alone.join("a", recipe, rows)
    for of_step in zip(*reports.values(), strict=True):
        expected = alone.step()["a"]
        for report in of_step:
            assert report.loss == pytest.approx(expected.loss, abs=1e-10)
            if report.step > 1:  # before, both answers earn 0 and rounding decides
                assert report.figures == pytest.approx(expected.figures, abs=1e-10)
    for worker in workers:
        found = worker.state("a").tensors
        assert largest_difference(found, alone.state("a").tensors) <= 1e-10
