"""Slots of virtual tokens beside others: in training, in evaluation and in generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_config, get_peft_model, set_peft_model_state_dict
from transformers import MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

from graft.core.errors import ConfigError, ModelError
from graft.engine.checkpoint import newest_checkpoint, save_checkpoint
from graft.engine.generate import GenerationRequest, Generator
from graft.engine.multi import AdapterTensors, MultiAdapterModel, Routing
from graft.engine.train import Trainer
from graft.methods.base import METHODS, Method
from graft.recipe.sections import Recipe
from graft.testing import tiny_model, tiny_tokenizer
from tests.unit.engine.conftest import exact_model, make_recipe, make_rows
from tests.unit.engine.test_packed_equals_alone import largest_difference

STEPS = 8
ROWS = make_rows(24, lengths=(5, 40))
SETTINGS: dict[str, dict[str, Any]] = {
    "deep": {"type": "ptuning", "deep": True, "num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "lora": {"type": "lora", "r": 4, "lora_dropout": 0.1},
    "lstm": {"type": "ptuning", "encoder": "lstm", "num_virtual_tokens": 3},
    "prefix": {"type": "prefix", "num_virtual_tokens": 3},
    "prompt": {"type": "prompt", "num_virtual_tokens": 9},
}


def recipes() -> dict[str, Recipe]:
    return {
        name: make_recipe(
            method=method, train={"steps": STEPS, "batch_size": 4, "lr": 5e-3, "seed": at}
        )
        for at, (name, method) in enumerate(SETTINGS.items())
    }


def run(wanted: dict[str, Recipe]) -> dict[str, AdapterTensors]:
    trainer = Trainer(MultiAdapterModel(exact_model()))
    for name, recipe in wanted.items():
        trainer.join(name, recipe, ROWS)
    while trainer.step():
        pass
    return {name: trainer.state(name).tensors for name in wanted}


def make_model(attention: str = "sdpa", dtype: torch.dtype | None = None) -> MultiAdapterModel:
    """The tiny base with a slot of every kind, each strong enough to change answers."""
    model = MultiAdapterModel(tiny_model(attention=attention, dtype=dtype))
    for at, (name, settings) in enumerate(SETTINGS.items()):
        method = METHODS.build(settings)
        generator = torch.Generator().manual_seed(at)
        tensors = {
            site: {
                key: value + 0.15 * torch.randn(value.shape, generator=generator)
                for key, value in of_site.items()
            }
            for site, of_site in model.fresh_tensors(method, seed=at).items()
        }
        model.add_slot(name, method, tensors=tensors)
    return model


def logits(model: MultiAdapterModel, slots: list[str | None], ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        routing = Routing(tuple(slots), (1,) * len(slots))
        return model.logits(model.hidden(ids.expand(len(slots), -1), routing=routing))


def test_a_packed_slot_ends_with_the_weights_of_the_same_slot_alone() -> None:
    packed = run(recipes())
    for name, recipe in recipes().items():
        alone = run({name: recipe})[name]
        assert largest_difference(packed[name], alone) <= 1e-10
        start = MultiAdapterModel(exact_model()).fresh_tensors(
            recipe.method, seed=recipe.train.seed
        )
        assert largest_difference(packed[name], start) > 1e-3


def test_rows_of_every_kind_are_read_together_as_alone() -> None:
    model = make_model(dtype=torch.float64)
    ids = torch.arange(20)[None] + 30
    slots: list[str | None] = [None, *SETTINGS]
    together = logits(model, slots, ids)
    for at, name in enumerate(slots):
        torch.testing.assert_close(together[at : at + 1], logits(model, [name], ids))
    assert len({tuple(row) for row in together[:, -1, :4].tolist()}) == len(slots)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_behind_a_row_changes_nothing(attention: str) -> None:
    model = make_model(attention)
    ids = torch.arange(20)[None] + 30
    mask = torch.ones(1, 20, dtype=torch.long)
    mask[:, 12:] = 0
    routing = Routing.single("prompt", 1)
    with torch.no_grad():
        short = model.hidden(ids[:, :12], routing=routing)
        padded = model.hidden(ids, routing=routing, attention_mask=mask)
    torch.testing.assert_close(padded[:, :12], short, atol=1e-5, rtol=1e-5)


def test_a_slot_that_continues_from_its_checkpoint_ends_as_if_never_interrupted(
    tmp_path: Any,
) -> None:
    recipe = recipes()["lstm"]
    first = Trainer(MultiAdapterModel(exact_model()))
    first.join("a", recipe, ROWS)
    for _ in range(3):
        first.step()
    save_checkpoint(tmp_path, first.state("a"), {})
    found = newest_checkpoint(tmp_path)
    assert found is not None
    second = Trainer(MultiAdapterModel(exact_model()))
    second.join("b", recipe, ROWS, state=found[0])
    while second.step():
        pass
    assert "lstm_head_weight_ih_l0" in second.state("b").tensors["prompt"]
    whole = run({"a": recipe})["a"]
    assert largest_difference(second.state("b").tensors, whole) <= 1e-10


def test_keys_and_values_are_kept_until_weights_change_or_the_slot_leaves() -> None:
    model = make_model()
    ids = torch.arange(9)[None] + 30
    before = logits(model, ["prompt"], ids)
    with torch.no_grad():
        model.parameters("prompt")["prompt.embedding"].mul_(1.5)
    assert torch.equal(logits(model, ["prompt"], ids), before)
    model.weights_changed()
    after = logits(model, ["prompt"], ids)
    assert not torch.equal(after, before)
    method, tensors = model.slots["prompt"].method, model.tensors("prompt")
    model.remove_slot("prompt")
    model.add_slot(
        "prompt", method, tensors={"prompt": {"embedding": tensors["prompt"]["embedding"] / 1.5}}
    )
    torch.testing.assert_close(logits(model, ["prompt"], ids), before, atol=1e-5, rtol=1e-5)
    for name in SETTINGS:
        model.remove_slot(name)
    assert not [name for name, _ in model.base.named_modules() if "virtual" in name]


PROMPTS = ["put lamp to 7", "she sells sea shells by the sea shore", "x", "turn fan to 3 now"]


def requests(num_new: int = 8) -> list[GenerationRequest]:
    tokenizer = tiny_tokenizer()
    slots = [None, *SETTINGS]
    return [
        GenerationRequest(
            tokenizer.encode(PROMPTS[at % len(PROMPTS)]),
            slot=slots[at % len(slots)],
            max_new_tokens=num_new + at % 3,
        )
        for at in range(2 * len(slots))
    ]


def peft_answer(model: MultiAdapterModel, request: GenerationRequest) -> list[int]:
    """What PEFT's model says, one whole forward pass a token."""
    base: Any = tiny_model()
    if request.slot is not None:
        method: Method = model.slots[request.slot].method
        config, state = method.to_peft(model.tensors(request.slot), "tiny")
        base = get_peft_model(base, get_peft_config({**config, "base_model_name_or_path": None}))
        set_peft_model_state_dict(base, state)
        base.eval()
    ids = list(request.prompt_ids)
    with torch.no_grad():
        for _ in range(request.max_new_tokens):
            ids.append(int(base(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(request.prompt_ids) :]


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_a_mixed_batch_answers_as_peft_does() -> None:
    model = make_model()
    results = Generator(model, tiny_tokenizer(), max_batch=5).run(requests())
    for request, result in zip(requests(), results, strict=True):
        assert result.token_ids == peft_answer(model, request), request.slot


@pytest.mark.parametrize("max_batch", [1, 3, 12])
def test_who_else_is_in_the_batch_changes_no_answer(max_batch: int) -> None:
    model = make_model("eager")
    together = Generator(model, tiny_tokenizer(), max_batch=max_batch).run(requests())
    alone = [
        Generator(model, tiny_tokenizer(), max_batch=2).run([request])[0] for request in requests()
    ]
    assert together == alone


def test_virtual_tokens_are_not_counted_and_a_long_answer_outgrows_the_first_cache() -> None:
    model = make_model()
    ids = tiny_tokenizer().encode(PROMPTS[1])
    asked = [GenerationRequest(ids, slot=slot, max_new_tokens=999) for slot in ("prompt", None)]
    results = Generator(model, tiny_tokenizer(), max_length=150).run(asked)
    assert [result.finish_reason for result in results] == ["length", "length"]
    assert [len(result.token_ids) + len(ids) for result in results] == [150, 150]
    request = GenerationRequest(ids, slot="prompt", max_new_tokens=len(results[0].token_ids))
    assert results[0].token_ids == peft_answer(model, request)


def test_virtual_tokens_take_of_the_context_of_the_base() -> None:
    model = make_model()
    generator = Generator(model, tiny_tokenizer(), max_length=512)
    assert generator.max_tokens(None) == generator.max_tokens("lora") == 512
    assert generator.max_tokens("prompt") == 512 - 9
    with pytest.raises(
        ConfigError, match="has 503 tokens; prompt and answer together may have 503"
    ):
        generator.submit(GenerationRequest([5] * 503, slot="prompt"))


def test_a_cell_that_held_virtual_tokens_is_clean_for_the_next_request() -> None:
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters("prefix").values():
            parameter.fill_(torch.inf)
    model.weights_changed()
    generator = Generator(model, tiny_tokenizer(), max_batch=1)
    ids = tiny_tokenizer().encode(PROMPTS[0])
    (broken,) = generator.run([GenerationRequest(ids, slot="prefix")])
    assert broken.finish_reason == "error"
    fresh = Generator(make_model(), tiny_tokenizer(), max_batch=1)
    for slot in (None, "deep"):
        asked = [GenerationRequest(ids, slot=slot, max_new_tokens=6)]
        assert generator.run(asked) == fresh.run(asked)


def mistral() -> MistralForCausalLM:
    config = MistralConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=8,
    )
    return MistralForCausalLM(config)


def mamba() -> MambaForCausalLM:
    config = MambaConfig(vocab_size=384, hidden_size=32, state_size=4, num_hidden_layers=2)
    return MambaForCausalLM(config)


@pytest.mark.parametrize("name", ["prefix", "prompt", "ptuning"])
@pytest.mark.parametrize("base", [mistral, mamba])
def test_a_base_without_a_cache_of_every_token_is_refused(name: str, base: Any) -> None:
    model = MultiAdapterModel(base())
    with pytest.raises(ModelError, match=f"method {name}\\) need a KV cache .* or method lora"):
        model.fresh_tensors(METHODS.build(name))
