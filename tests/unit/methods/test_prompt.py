"""Prompt tuning against PEFT, and against a base that reads the same text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PromptTuningConfig
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from graft.compressors.base import Adapter
from graft.compressors.folder import load_adapter, save_adapter, tensor_file_bytes
from graft.core.errors import AdapterError, ModelError
from graft.engine.multi import MultiAdapterModel, Routing
from graft.engine.train import Trainer
from graft.methods.prompt import PromptMethod
from graft.testing import save_tiny_model, tiny_model, tiny_tokenizer
from tests.unit.engine.conftest import make_recipe
from tests.unit.methods._peft import (
    IDS,
    ROWS,
    assert_close,
    follow_peft,
    our_logits,
    peft_twin,
    round_trip,
    same_logits_as_peft,
    same_logits_here,
    stirred,
    their_logits,
)

METHOD = PromptMethod(num_virtual_tokens=7)


def test_folders_answer_alike_here_and_under_peft(tmp_path: Path) -> None:
    same_logits_as_peft(METHOD, tmp_path)
    round_trip(METHOD, tmp_path)
    read = same_logits_here(
        PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=5, prompt_tuning_init="SAMPLE_VOCAB"
        ),
        tmp_path,
    )
    assert read.method == PromptMethod(num_virtual_tokens=5)


def test_training_follows_peft() -> None:
    follow_peft(METHOD, lr=0.03)


def test_a_prompt_of_a_text_is_that_text_in_front_of_each_row(tmp_path: Path) -> None:
    text = "put lamp to"
    ids = tiny_tokenizer().encode(text)
    base = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "base"))
    method = PromptMethod(num_virtual_tokens=len(ids), init_tokens="text", init_text=text)
    model = MultiAdapterModel(base)
    model.add_slot("own", method)
    with torch.no_grad():
        ours = model.logits(model.hidden(IDS, routing=Routing.single("own", len(IDS))))
        read = torch.cat([torch.tensor([ids] * len(IDS)), IDS], dim=1)
        expected = tiny_model()(input_ids=read).logits[:, len(ids) :]
    assert_close(ours, expected)


def test_the_file_of_a_prompt_of_a_text_is_sized_without_its_base(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "base"))
    method = PromptMethod(num_virtual_tokens=4, init_tokens="text", init_text="put lamp to")
    adapter = Adapter(method, MultiAdapterModel(base).fresh_tensors(method))
    save_adapter(tmp_path / "adapter", adapter, "tiny")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    assert tensor_file_bytes(adapter) == file.stat().st_size


def test_a_short_text_is_repeated_and_a_long_one_cut(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "base"))
    model = MultiAdapterModel(base)
    ids = tiny_tokenizer().encode("lamp fan")
    table = base.get_input_embeddings().weight
    for count in (1, 2 * len(ids) + 1):
        method = PromptMethod(num_virtual_tokens=count, init_tokens="text", init_text="lamp fan")
        tensors = model.fresh_tensors(method)["prompt"]
        assert torch.equal(tensors["embedding"], table[(ids * 3)[:count]])


def test_sampled_virtual_tokens_are_tokens_of_the_base() -> None:
    model = MultiAdapterModel(tiny_model())
    table = model.base.get_input_embeddings().weight
    drawn = model.fresh_tensors(METHOD, seed=3)["prompt"]["embedding"]
    assert all(bool((table == row).all(dim=1).any()) for row in drawn)
    assert not torch.equal(drawn, model.fresh_tensors(METHOD, seed=4)["prompt"]["embedding"])


def test_a_text_needs_the_tokenizer_of_the_base() -> None:
    method = PromptMethod(init_tokens="text", init_text="put lamp to")
    with pytest.raises(ModelError, match="init_tokens: text needs the tokenizer"):
        MultiAdapterModel(tiny_model()).fresh_tensors(method)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_on_a_quantized_base_it_answers_as_under_peft_and_learns(
    quantization: str, quantized: Callable[[str], MultiAdapterModel]
) -> None:
    adapter = stirred(METHOD)
    theirs = peft_twin(METHOD, adapter.tensors, quantized(quantization).base)
    assert_close(our_logits(adapter, quantized(quantization).base), their_logits(theirs))
    trainer = Trainer(quantized(quantization))
    recipe = make_recipe(method=METHOD, train={"steps": 6, "batch_size": len(ROWS), "lr": 0.03})
    trainer.join("own", recipe, ROWS)
    losses = [trainer.step()["own"].loss for _ in range(6)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("settings", [{"init_tokens": "text"}, {"init_text": "put"}])
def test_text_and_its_choice_belong_together(settings: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="init_text belong together"):
        PromptMethod.model_validate(settings)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_virtual_tokens": 6}, r"num_virtual_tokens=6 but prompt_embeddings has shape \(7, 6"),
        ({"num_transformer_submodules": 2}, "encoder-decoder"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_a_folder_that_says_otherwise_is_refused(
    change: dict[str, object], words: str, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    save_adapter(folder, stirred(METHOD), "tiny")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(AdapterError, match=words):
        load_adapter(folder)


def test_a_folder_with_more_tensors_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    save_adapter(folder, stirred(METHOD), "tiny")
    file = folder / "adapter_model.safetensors"
    save_file({**load_file(file), "lora_A": torch.ones(2)}, file)
    with pytest.raises(AdapterError, match="lora_A"):
        load_adapter(folder)


def test_an_adapter_of_another_base_is_refused() -> None:
    adapter = stirred(METHOD)
    model = MultiAdapterModel(tiny_model(hidden_size=32))
    with pytest.raises(AdapterError, match=r"prompt.embedding should be \(7, 32\), is \(7, 64\)"):
        model.add_slot("own", adapter.method, tensors=adapter.tensors)
