"""Full fine-tuning: against a plain loop, in half precision, alone on the base, as a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from graft.artifacts import Store
from graft.compressors.base import Adapter
from graft.compressors.folder import load_adapter
from graft.core.errors import AdapterError, ConfigError
from graft.engine.merge import merge_into_base
from graft.engine.multi import MultiAdapterModel, Routing
from graft.engine.publish import publish_adapter
from graft.engine.train import Trainer, by_site
from graft.methods.full import FullMethod
from graft.methods.lora import LoraMethod
from graft.models import load_model, resolve_model
from graft.models.section import ModelSection
from graft.testing import tiny_model
from tests.unit.engine.conftest import exact_model, make_recipe
from tests.unit.methods._peft import (
    IDS,
    ROWS,
    largest_difference,
    our_logits,
    stirred,
    their_logits,
    train_here,
    train_with_peft,
)

TRAIN = {"steps": 20, "batch_size": 4, "lr": 1e-3, "seed": 1}


def state_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_its_training_follows_a_plain_loop_over_the_model() -> None:
    recipe = make_recipe(method=FullMethod(), train=TRAIN)
    start, end = train_here(recipe)
    plain = exact_model().requires_grad_(True)
    train_with_peft(plain, recipe)  # type: ignore[arg-type]  # any model with a head will do
    ours = {f"{s}.{k}": value for s, of in end.items() for k, value in of.items()}
    theirs = state_of(plain)
    assert ours.keys() == theirs.keys() == state_of(exact_model()).keys()
    assert "lm_head.weight" not in ours, "a tied embedding trains once"
    assert largest_difference(ours, state_of(exact_model())) > 1e-3
    assert largest_difference(ours, theirs) <= 1e-5
    assert (
        largest_difference(
            {f"{s}.{k}": value for s, of in start.items() for k, value in of.items()},
            state_of(exact_model()),
        )
        == 0
    )


def test_a_half_precision_base_trains_fp32_weights_under_autocast() -> None:
    model = MultiAdapterModel(tiny_model(dtype=torch.bfloat16))
    before = state_of(model.base)
    trainer = Trainer(model)
    recipe = make_recipe(method=FullMethod(), train={**TRAIN, "steps": 3, "lr": 1e-6})
    trainer.join("full", recipe, ROWS)
    assert {p.dtype for p in model.base.parameters()} == {torch.float32}
    assert model.dtype == torch.bfloat16
    logits = model.logits(model.hidden(IDS, routing=Routing.single("full", len(IDS))))
    assert logits.dtype == torch.bfloat16, "products run in the base's precision"
    while trainer.step():
        pass
    after = trainer.state("full").tensors["model.norm"]["weight"]
    assert not torch.equal(after, before["model.norm.weight"].float())
    assert torch.equal(after.bfloat16(), before["model.norm.weight"]), "too small for bf16 alone"
    trainer.leave("full")
    assert all(torch.equal(value, before[name]) for name, value in state_of(model.base).items())


def test_a_base_from_files_is_given_back_from_them(model_folder: Path, tmp_path: Path) -> None:
    section = ModelSection(source=str(model_folder), dtype="bf16")
    model = MultiAdapterModel(load_model(resolve_model(section, tmp_path), section))
    before = state_of(model.base)
    trainer = Trainer(model)
    trainer.join("full", make_recipe(method=FullMethod(), train={**TRAIN, "steps": 1}), ROWS)
    trainer.step()
    trainer.leave("full")
    after = state_of(model.base)
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert {value.dtype for value in after.values()} == {torch.bfloat16}


def test_weights_that_a_base_keeps_in_fp32_come_back_in_it(
    model_folder: Path, tmp_path: Path
) -> None:
    section = ModelSection(source=str(model_folder), dtype="bf16")
    model = MultiAdapterModel(load_model(resolve_model(section, tmp_path), section))
    kept = model.base.get_parameter("model.norm.weight")
    kept.data = kept.data.float()
    trainer = Trainer(model)
    trainer.join("full", make_recipe(method=FullMethod(), train={**TRAIN, "steps": 1}), ROWS)
    trainer.step()
    trainer.leave("full")
    assert kept.dtype == torch.float32
    assert model.base.get_parameter("lm_head.weight").dtype == torch.bfloat16


def test_it_shares_the_base_with_nobody() -> None:
    model = MultiAdapterModel(tiny_model())
    bare = model.hidden(IDS, routing=Routing.single(None, len(IDS)))
    model.add_slot("lora", LoraMethod(r=4))
    for add in (model.fresh_tensors, lambda method: model.add_slot("full", method)):
        with pytest.raises(AdapterError, match="takes no slot beside it; remove 'lora' first"):
            add(FullMethod())
    model.remove_slot("lora")
    model.add_slot("full", FullMethod())
    with pytest.raises(AdapterError, match="method full owns the base"):
        model.add_slot("lora", LoraMethod(r=4))
    with pytest.raises(AdapterError, match="bare base is not there while 'full' is on it"):
        model.hidden(IDS, routing=Routing.single(None, len(IDS)))
    model.remove_slot("full")
    model.add_slot("lora", LoraMethod(r=4))
    assert torch.equal(model.hidden(IDS, routing=Routing.single("lora", len(IDS))), bare)


def test_weights_of_another_base_are_refused_by_name() -> None:
    tensors = MultiAdapterModel(tiny_model(num_layers=1)).fresh_tensors(FullMethod())
    with pytest.raises(AdapterError, match=r"does not fit the base: model\.layers\.1\..* is None"):
        MultiAdapterModel(tiny_model()).add_slot("full", FullMethod(), tensors=tensors)


def test_a_weight_that_is_no_parameter_is_refused() -> None:
    base = tiny_model()
    base.register_buffer("counter", torch.zeros(1))
    with pytest.raises(ConfigError, match="counter is quantized or no parameter"):
        MultiAdapterModel(base).fresh_tensors(FullMethod())


def test_what_is_published_is_a_model_that_transformers_loads(
    model_folder: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(
        model={"source": str(model_folder), "dtype": "bf16"}, method={"type": "full"}
    )
    ready = resolve_model(recipe.model, tmp_path)
    adapter = stirred(FullMethod())
    stored = publish_adapter(
        Store(tmp_path), adapter, recipe=recipe, ready=ready, data_digest=None, metrics={}
    )
    assert stored.record.kind == "full"
    assert stored.record.serving.engines == ()
    loaded = AutoModelForCausalLM.from_pretrained(stored.path, local_files_only=True)
    assert loaded.dtype == torch.bfloat16
    again = load_adapter(stored.path)
    base = load_model(ready, recipe.model)
    expected = their_logits(loaded)
    assert torch.equal(our_logits(Adapter(again.method, again.tensors), base), expected)
    assert torch.equal(their_logits(merge_into_base(base, again)), expected)
    tokenizer = AutoTokenizer.from_pretrained(stored.path, local_files_only=True)
    assert tokenizer.chat_template


def test_all_weights_are_the_models_own() -> None:
    model = MultiAdapterModel(tiny_model())
    model.add_slot("full", FullMethod(), trainable=True)
    own = model.parameters("full")
    assert own.keys() == dict(model.base.named_parameters()).keys()
    assert set(by_site(own)) >= {"model.embed_tokens", "model.norm"}
