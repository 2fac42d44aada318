"""Heads in the training loop: packed, resumed, divided, and what they are taken from and to."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.core.errors import AdapterError
from graft.data.records import TokenRow
from graft.engine.backends.torch import TorchBackend
from graft.engine.batches import RoutedRow, collate
from graft.engine.checkpoint import load_checkpoint, save_checkpoint
from graft.engine.logprobs import read_positions, slot_outputs
from graft.engine.multi import MultiAdapterModel, Routing
from graft.engine.scoring import read_rows
from graft.engine.train import SlotState, Trainer
from graft.methods.base import HEAD
from graft.methods.lora import LoraMethod
from graft.objectives._scored import scored_row
from tests.unit.engine.conftest import exact_model
from tests.unit.engine.test_preference_training import (
    OneOfTwo,
    largest_difference,
    make_pairs,
    trial,
)

METHOD = LoraMethod(r=4)
REWARD = {"type": "reward", "center_rewards_coefficient": 0.01}
ROWS = [scored_row(row) for row in make_pairs()]
CPU = torch.device("cpu")


def test_a_head_reads_the_state_that_predicts_each_token_and_another_slot_has_none() -> None:
    model = MultiAdapterModel(exact_model())
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(1, 64, generator=generator)
    tensors = model.fresh_tensors(METHOD)
    model.add_slot("a", METHOD, tensors={**tensors, HEAD: {"weight": weight}})
    model.add_slot("b", METHOD)
    row = TokenRow([5, 6, 7, 8, 9], [False, False, True, False, True], "r:1")
    batch = collate([RoutedRow("a", row, 0), RoutedRow("b", row, 0)], CPU)
    found = slot_outputs(model, batch, read_positions(model, batch), {})
    hidden = model.hidden(torch.tensor([row.input_ids]), routing=Routing(("a",), (1,)))
    expected = hidden[0, [1, 3]] @ weight[0].double()
    torch.testing.assert_close(found["a"].values_P, expected, rtol=0, atol=1e-12)
    assert found["b"].values_P is None
    read = read_rows(model, "a", [row], backend=TorchBackend(), max_tokens=100).values
    assert read is not None
    assert read[0].tolist() == pytest.approx(expected.tolist(), abs=1e-12)


def test_entropy_and_temperature_are_those_of_the_divided_logits() -> None:
    model = MultiAdapterModel(exact_model())
    row = TokenRow([5, 6, 7, 8], [False, True, True, True], "r:1")
    batch = collate([RoutedRow("warm", row, 0)], CPU)
    model.add_slot("warm", METHOD)
    found = read_positions(model, batch, temperatures={"warm": 0.5}, with_entropy=True)
    logits = model.base(input_ids=torch.tensor([row.input_ids])).logits[0, :-1] / 0.5
    expected = torch.distributions.Categorical(logits=logits)
    targets = torch.tensor(row.input_ids[1:])
    torch.testing.assert_close(found.logprobs_P, expected.log_prob(targets), rtol=0, atol=1e-10)
    torch.testing.assert_close(found.entropy_P, expected.entropy(), rtol=0, atol=1e-10)


def trained(**settings: Any) -> SlotState:
    trainer = Trainer(MultiAdapterModel(exact_model()))
    trainer.join("a", trial(REWARD, **settings), ROWS)
    while trainer.step():
        pass
    return trainer.state("a")


def test_reward_models_in_a_pack_beside_another_objective_end_as_alone() -> None:
    packed = Trainer(MultiAdapterModel(exact_model()))
    recipes = {
        "reward": trial(REWARD, seed=1),
        "margin": trial({"type": "reward", "margin": 0.5}, seed=2),
        "dpo": trial({"type": "dpo"}, seed=3),
    }
    rows = {"reward": ROWS, "margin": ROWS, "dpo": make_pairs()}
    for name, recipe in recipes.items():
        packed.join(name, recipe, rows[name])
    while packed.step():
        pass
    for name, recipe in recipes.items():
        alone = Trainer(MultiAdapterModel(exact_model()))
        alone.join(name, recipe, rows[name])
        while alone.step():
            pass
        found, expected = packed.state(name).tensors, alone.state(name).tensors
        assert largest_difference(found, expected) <= 1e-10
        assert (HEAD in found) == (name != "dpo")
    assert float(packed.state("reward").tensors[HEAD]["weight"].abs().max()) > 1e-3


def test_the_loss_starts_at_even_odds_and_the_margin_grows() -> None:
    trainer = Trainer(MultiAdapterModel(exact_model()))
    trainer.join("a", trial({"type": "reward"}, lr=3e-3, batch_size=12), ROWS)
    reports = []
    while steps := trainer.step():
        reports.append(steps["a"])
    assert reports[0].loss == pytest.approx(math.log(2), abs=1e-12)
    assert reports[-1].loss < reports[0].loss
    assert reports[-1].figures["reward_margin"] > 0.01
    assert reports[-1].figures["reward_accuracy"] > 0.5


def test_micro_batches_do_not_change_a_reward_model() -> None:
    whole, small = (trained(micro_batch_tokens=n) for n in (2048, 40))
    assert largest_difference(whole.tensors, small.tensors) <= 1e-10


def test_resumed_from_a_checkpoint_a_reward_model_ends_the_same(tmp_path: Path) -> None:
    recipe = trial(REWARD)
    first, second = (Trainer(MultiAdapterModel(exact_model())) for _ in range(2))
    first.join("a", recipe, ROWS)
    for _ in range(4):
        first.step()
    state, _ = load_checkpoint(save_checkpoint(tmp_path, first.state("a"), {}))
    assert "score.weight" in state.optimizer
    second.join("a", recipe, ROWS, state=state)
    for trainer in (first, second):
        while trainer.step():
            pass
    assert largest_difference(first.state("a").tensors, second.state("a").tensors) <= 1e-10


def test_two_workers_train_a_reward_model_as_one() -> None:
    recipe = trial(REWARD, steps=4, batch_size=3, micro_batch_tokens=60)
    barrier, board = threading.Barrier(2), dict[int, Any]()
    workers = [
        Trainer(MultiAdapterModel(exact_model()), OneOfTwo(rank, barrier, board))
        for rank in range(2)
    ]

    def work(trainer: Trainer) -> None:
        trainer.join("a", recipe, ROWS)
        while trainer.step():
            pass

    threads = [threading.Thread(target=work, args=(trainer,)) for trainer in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = Trainer(MultiAdapterModel(exact_model()))
    work(alone)
    for worker in workers:
        found = worker.state("a").tensors
        assert largest_difference(found, alone.state("a").tensors) <= 1e-10


def test_a_head_is_taken_over_where_the_objective_has_one_and_left_behind_elsewhere() -> None:
    start = trained().tensors
    trainer = Trainer(MultiAdapterModel(exact_model()))
    trainer.join("reward", trial(REWARD), ROWS, tensors=start)
    assert largest_difference(trainer.state("reward").tensors, start) == 0
    trainer.join("dpo", trial({"type": "dpo"}), make_pairs(), tensors=start)
    assert HEAD not in trainer.state("dpo").tensors
    trainer.leave("reward")
    assert "reward" not in trainer.model.heads
    assert not [name for name, _ in trainer.model.base.named_modules() if "heads" in name]


def test_a_head_with_two_outputs_is_refused() -> None:
    model = MultiAdapterModel(exact_model())
    tensors = {**model.fresh_tensors(METHOD), HEAD: {"weight": torch.zeros(2, 64)}}
    with pytest.raises(AdapterError, match=r"head of adapter 'a' .* has .*\(2, 64\)"):
        model.add_slot("a", METHOD, tensors=tensors)
    assert not model.slots
