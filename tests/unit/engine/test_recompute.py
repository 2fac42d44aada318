from typing import Any

import pytest
import torch

from graft.data.records import TokenRow
from graft.engine.generate import GenerationRequest, Generator
from graft.engine.multi import MultiAdapterModel
from graft.engine.recompute import recompute_layers
from graft.engine.train import Trainer
from graft.recipe import Recipe
from graft.testing import tiny_model, tiny_tokenizer

ROWS = [
    TokenRow([(7 * i + j) % 384 for j in range(4 + i)], [j > 1 for j in range(4 + i)], str(i))
    for i in range(8)
]


LORA = {"type": "lora", "r": 4, "lora_dropout": 0.2}
VIRTUAL: dict[str, dict[str, Any]] = {
    "prompt": {"type": "prompt", "num_virtual_tokens": 5},
    "prefix": {"type": "prefix", "num_virtual_tokens": 5},
    "projected-prefix": {
        "type": "prefix",
        "num_virtual_tokens": 5,
        "prefix_projection": True,
        "init_tokens": "random",
    },
    "ptuning": {"type": "ptuning", "num_virtual_tokens": 5},
    "deep-ptuning": {"type": "ptuning", "num_virtual_tokens": 5, "deep": True, "encoder": "mlp"},
}


def trained(*methods: dict[str, Any], recompute: bool) -> tuple[Trainer, list[list[float]], int]:
    """A trainer after three steps, the slots' losses, and how often layer 0 ran its attention."""
    model = MultiAdapterModel(tiny_model(dtype=torch.float64))
    if recompute:
        recompute_layers(model)
    runs = []
    model.base.model.layers[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    trainer = Trainer(model)
    for number, method in enumerate(methods):
        recipe = Recipe.model_validate(
            {
                "model": {"source": "tiny", "dtype": "fp64"},
                "data": {"train": "a.jsonl", "eval": "b.jsonl"},
                "method": method,
                "train": {"steps": 3, "batch_size": 3 + number, "lr": 5e-3},
            }
        )
        trainer.join(f"slot{number}", recipe, ROWS)
    losses = [[report.loss for report in trainer.step().values()] for _ in range(3)]
    return trainer, losses, len(runs)


def assert_same(kept: Trainer, again: Trainer) -> None:
    for slot in kept.slots:
        for key, value in kept.backend.parameters(slot).items():
            found = again.backend.parameters(slot)[key]
            torch.testing.assert_close(found, value, rtol=0, atol=0)


def test_recomputed_layers_train_to_the_same_weights_with_dropout() -> None:
    kept, kept_losses, kept_runs = trained(LORA, recompute=False)
    again, again_losses, again_runs = trained(LORA, recompute=True)
    assert again_runs == 2 * kept_runs
    assert again_losses == kept_losses
    assert_same(kept, again)


@pytest.mark.parametrize("name", VIRTUAL)
def test_virtual_tokens_train_to_the_same_weights_in_recomputed_layers(name: str) -> None:
    kept, kept_losses, _ = trained(VIRTUAL[name], recompute=False)
    again, again_losses, _ = trained(VIRTUAL[name], recompute=True)
    assert again_losses == kept_losses
    assert kept_losses[-1] != kept_losses[0]
    assert_same(kept, again)


def test_a_pack_of_all_kinds_trains_to_the_same_weights_in_recomputed_layers() -> None:
    methods = [LORA, VIRTUAL["prompt"], VIRTUAL["prefix"], {"type": "dora", "r": 4}]
    kept, kept_losses, _ = trained(*methods, recompute=False)
    again, again_losses, _ = trained(*methods, recompute=True)
    assert again_losses == kept_losses
    assert_same(kept, again)


def test_generation_keeps_its_cache_after_training_with_recomputed_layers() -> None:
    answers = []
    for recompute in (False, True):
        trainer, _, _ = trained(LORA, recompute=recompute)
        trainer.model.weights_changed()
        generator = Generator(trainer.model, tiny_tokenizer(), max_batch=2, max_length=40)
        request = GenerationRequest([5, 6, 7, 8], slot="slot0", max_new_tokens=12)
        answers.append(generator.run([request])[0].text)
    assert answers[0] == answers[1]
