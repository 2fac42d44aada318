"""What layers below all slots put out is kept: training and reading are those without it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from graft.data.records import TokenRow
from graft.engine.evaluate import pair_margins, row_losses
from graft.engine.multi import MultiAdapterModel
from graft.engine.multi.lower_layers import LowerLayers
from graft.engine.recompute import recompute_layers
from graft.engine.train import Trainer
from graft.testing import tiny_model
from tests.unit.engine.conftest import keep_exact, make_recipe, make_rows

LAYERS, UPPER = 5, [3, 4]
ROWS = make_rows(12, lengths=(9, 40))
HELD_OUT = make_rows(7, lengths=(5, 30), seed=1)
PACK: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "r": 4, "lora_dropout": 0.2, "layers_to_transform": UPPER},
    "dora": {"type": "dora", "r": 2, "layers_to_transform": [4]},
    "adalora": {"type": "adalora", "init_r": 4, "target_r": 2, "layers_to_transform": UPPER},
    "mixture": {"type": "mixture", "r": 2, "target_modules": ["layers.4.mlp.up_proj"]},
    "ia3": {"type": "ia3", "target_modules": ["layers.3.self_attn.v_proj"]},
}
LOW = {"type": "lora", "r": 2, "layers_to_transform": [1, 4]}


def make_pairs(num_pairs: int = 8) -> list[TokenRow]:
    """Random prompts with two answers each."""
    generator = random.Random(0)
    rows = []
    for index in range(num_pairs):
        lengths = [generator.randint(2, 12) for _ in range(3)]
        branch = [number for number, count in enumerate(lengths) for _ in range(count)]
        ids = [generator.randrange(4, 384) for _ in branch]
        rows.append(TokenRow(ids, [k > 0 for k in branch], f"pairs:{index}", branch))
    return rows


def exact_base() -> PreTrainedModel:
    base = tiny_model(dtype=torch.float64, num_layers=LAYERS)
    keep_exact(base)
    return base


class Lines:
    """Counts the lines that pass each decoder layer's attention."""

    def __init__(self, model: MultiAdapterModel) -> None:
        self.counts = [0] * LAYERS
        for at, layer in enumerate(model.base.get_decoder().layers):
            layer.self_attn.register_forward_hook(lambda *told, at=at: self._passed(at, told[-1]))

    def _passed(self, at: int, out: tuple[torch.Tensor, ...]) -> None:
        self.counts[at] += len(out[0])

    @contextmanager
    def counted(self) -> Iterator[list[int]]:
        """Those of what runs inside."""
        before, found = list(self.counts), []
        yield found
        found += [now - then for now, then in zip(self.counts, before, strict=True)]


def join(trainer: Trainer, name: str, method: dict[str, Any], **train: Any) -> None:
    settings = {"steps": 40, "batch_size": 6, "lr": 2e-3, "seed": 3, **train}
    trainer.join(name, make_recipe(method=method, train=settings), ROWS)


def trained(
    model: MultiAdapterModel, pack: dict[str, dict[str, Any]], *, keeps: bool, steps: int = 5
) -> tuple[Trainer, list[float]]:
    """A pack after some steps, each of half of the rows."""
    trainer = Trainer(model, keeps_lower_states=keeps)
    for number, (name, method) in enumerate(pack.items()):
        join(trainer, name, method, seed=3 + number % 2)
    losses = [report.loss for _ in range(steps) for report in trainer.step().values()]
    return trainer, losses


def assert_equal(one: Trainer, other: Trainer, *, atol: float = 1e-10) -> None:
    assert one.slots == other.slots
    for name in one.slots:
        for key, value in one.backend.parameters(name).items():
            found = other.backend.parameters(name)[key]
            torch.testing.assert_close(found, value, rtol=0, atol=atol)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("lanes", [1, 2])
def test_a_pack_trains_to_the_weights_that_it_has_without(
    threads: Any, lanes: int, recompute: bool
) -> None:
    threads(lanes)
    found = []
    for keeps in (False, True):
        model = MultiAdapterModel(exact_base())
        if recompute:
            recompute_layers(model)
        trainer, losses = trained(model, PACK, keeps=keeps)
        assert model.lower.start == (UPPER[0] if keeps else 0)
        assert (model.lower.num_bytes > 0) == keeps
        losses += [sum(row) for name in PACK for row in row_losses(model, name, HELD_OUT)]
        found.append((trainer, losses))
    (plain, expected), (kept, losses) = found
    assert losses == pytest.approx(expected, abs=1e-10)
    assert_equal(plain, kept)


def test_a_trial_of_a_pack_trains_as_alone() -> None:
    packed, _ = trained(MultiAdapterModel(exact_base()), PACK, keeps=True)
    for name in PACK:
        seed = 3 + list(PACK).index(name) % 2
        alone = Trainer(MultiAdapterModel(exact_base()))
        join(alone, name, PACK[name], seed=seed)
        for _ in range(5):
            alone.step()
        for key, value in alone.backend.parameters(name).items():
            found = packed.backend.parameters(name)[key]
            torch.testing.assert_close(found, value, rtol=0, atol=1e-10)


def test_lower_layers_see_each_row_once_whatever_the_epochs_and_trials() -> None:
    model = MultiAdapterModel(exact_base())
    lines = Lines(model)
    tried = 2  # the first row goes through all layers, and again in two parts
    with lines.counted() as first_epoch:
        trainer, _ = trained(model, {"a": PACK["lora"], "b": PACK["lora"]}, keeps=True, steps=2)
    assert first_epoch == [len(ROWS) + tried] * 3 + [2 * len(ROWS) + tried] * 2
    with lines.counted() as later:
        trainer.step()
        trainer.leave("a")
        trainer.step()
        trainer.leave("b")
        join(trainer, "c", PACK["dora"] | {"layers_to_transform": UPPER}, seed=8)
        trainer.step()
    assert later == [0, 0, 0, 24, 24]
    with lines.counted() as read:
        row_losses(model, "c", HELD_OUT)
    assert read == [len(HELD_OUT)] * 5
    with lines.counted() as read_again:
        row_losses(model, "c", HELD_OUT)
        row_losses(model, None, HELD_OUT)
    assert read_again == [0, 0, 0, 14, 14]


def test_the_cache_is_made_anew_when_a_trial_with_a_lower_layer_comes_and_when_it_goes() -> None:
    found = []
    for keeps in (False, True):
        model = MultiAdapterModel(exact_base())
        trainer, _ = trained(model, {"upper": PACK["lora"]}, keeps=keeps, steps=3)
        starts = []
        for name, method in (
            ("low", LOW),
            ("all", {"type": "lora", "r": 2}),
            ("virtual", {"type": "prefix", "num_virtual_tokens": 3}),
        ):
            starts.append(model.lower.start)
            join(trainer, name, method)
            assert model.lower.start == 0, "nobody starts in the middle before slots are looked at"
            trainer.step()
            starts.append(model.lower.start)
            trainer.step()
            trainer.leave(name)
            trainer.step()
        assert starts == ([3, 1, 3, 0, 3, 0] if keeps else [0] * 6)
        found.append(trainer)
    assert_equal(*found)


def test_pairs_are_kept_with_their_branches() -> None:
    pairs, found = make_pairs(), []
    for keeps in (False, True):
        model = MultiAdapterModel(exact_base())
        lines = Lines(model)
        trainer = Trainer(model, keeps_lower_states=keeps)
        recipe = make_recipe(
            method=PACK["lora"],
            objective={"type": "dpo", "beta": 0.5},
            train={"steps": 9, "batch_size": 4, "lr": 2e-3},
        )
        trainer.join("own", recipe, pairs)
        losses = [trainer.step()["own"].loss for _ in range(4)]
        with lines.counted() as last:
            trainer.step()
        assert (last[0] == 0) == keeps
        as_text = pairs[0]._replace(branch=None)
        losses += [*pair_margins(model, "own", pairs), row_losses(model, "own", [as_text])[0][0]]
        found.append((trainer, losses))
    (plain, expected), (kept, losses) = found
    assert losses == pytest.approx(expected, abs=1e-10)
    assert_equal(plain, kept)


def test_what_is_kept_stays_within_its_share_of_the_memory_that_is_free() -> None:
    model = MultiAdapterModel(exact_base())
    lines = Lines(model)
    sizes = sorted(8 * 64 * len(row.input_ids) for row in ROWS)
    room = {"bytes": sum(sizes) // 2}

    def free() -> int:
        return 4 * room["bytes"] - model.lower.num_bytes

    model.lower = LowerLayers(model.base, lambda: model.layers.adapted, free)
    kept, losses = trained(model, {"lora": PACK["lora"]}, keeps=True, steps=4)
    assert room["bytes"] - sizes[-1] < model.lower.num_bytes <= room["bytes"]
    with lines.counted() as epoch:
        for _ in range(2):
            losses.append(kept.step()["lora"].loss)
    assert 0 < epoch[0] < epoch[4] == len(ROWS), "rows that found no room take whole passes"
    room["bytes"] //= 2
    losses.append(kept.step()["lora"].loss)
    assert 0 < model.lower.num_bytes <= room["bytes"], "what others need is given back"
    room["bytes"] = 0
    losses.append(kept.step()["lora"].loss)
    assert model.lower.num_bytes == 0
    plain, expected = trained(
        MultiAdapterModel(exact_base()), {"lora": PACK["lora"]}, keeps=False, steps=8
    )
    assert losses == pytest.approx(expected, abs=1e-10)
    assert_equal(plain, kept)


def test_a_base_without_lower_layers_stays_as_it_is() -> None:
    model = MultiAdapterModel(exact_base())
    layers = model.base.get_decoder().layers
    trained(model, {"lora": {"type": "lora", "r": 2}}, keeps=True, steps=1)
    assert not any("forward" in vars(layer) for layer in layers)
    trainer, _ = trained(MultiAdapterModel(exact_base()), {"own": PACK["lora"]}, keeps=True)
    layers = trainer.model.base.get_decoder().layers
    assert all("forward" in vars(layer) for layer in layers)
    trainer.leave("own")
    join(trainer, "whole", {"type": "full"}, lr=1e-4)
    assert not any("forward" in vars(layer) for layer in layers), "who owns the base gets it bare"
    assert trainer.step()["whole"].is_finite
    assert trainer.model.lower.num_bytes == 0


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("gemma3_text", {"head_dim": 16, "sliding_window": 8}),
        ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}),
        ("gpt_neox", {}),
    ],
)
def test_other_chains_of_layers_are_entered_in_the_middle_too(
    architecture: str, settings: dict[str, Any]
) -> None:
    found = []
    for keeps in (False, True):
        model = MultiAdapterModel(make_base(architecture, settings))
        found.append(trained(model, {"lora": PACK["lora"]}, keeps=keeps))
        assert model.lower.is_chain == (True if keeps else None)
        assert (model.lower.num_bytes > 0) == keeps
    (plain, expected), (kept, losses) = found
    assert losses == pytest.approx(expected, abs=1e-4)
    expected, losses = (
        [total for total, _ in row_losses(trainer.model, "lora", HELD_OUT)]
        for trainer in (plain, kept)
    )
    assert losses == pytest.approx(expected, rel=1e-3), "Adam makes more of what fp32 rounds"


@pytest.mark.parametrize("architecture", ["gemma4_text", "falcon"])
def test_layers_that_hand_on_more_than_states_are_no_chain(architecture: str) -> None:
    """Keys and values that later layers share, and tuples."""
    found = []
    for keeps in (False, True):
        model = MultiAdapterModel(make_base(architecture, {}))
        found.append(trained(model, {"lora": PACK["lora"]}, keeps=keeps, steps=2))
        assert model.lower.is_chain == (False if keeps else None)
        assert model.lower.num_bytes == 0
    assert found[0][1] == found[1][1]


def make_base(architecture: str, settings: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(architecture, vocab_size=384, **sizes, **heads, **settings)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def test_a_base_whose_upper_layers_look_at_lower_ones_is_never_entered_in_the_middle(
    threads: Any,
) -> None:
    threads(1)
    found = []
    for keeps in (False, True):
        base, seen = exact_base(), []
        layers = base.get_decoder().layers
        layers[1].register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        layers[4].register_forward_hook(lambda _, __, out, seen=seen: out + 0.5 * seen.pop())
        model = MultiAdapterModel(base)
        found.append(trained(model, {"lora": PACK["lora"]}, keeps=keeps, steps=3))
        assert model.lower.is_chain == (False if keeps else None)
        assert model.lower.num_bytes == 0
        assert not any("forward" in vars(layer) for layer in layers)
    (plain, expected), (refused, losses) = found
    assert losses == expected
    assert_equal(plain, refused, atol=0)


def test_embeddings_that_follow_the_longest_row_of_a_pass_keep_nothing() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = MultiAdapterModel(make_base("llama", {"rope_parameters": rope}))
    trained(model, {"lora": PACK["lora"]}, keeps=True, steps=1)
    assert model.lower.start == 0
