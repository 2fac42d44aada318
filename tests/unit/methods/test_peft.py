"""Methods through PEFT's own code: files, merging, training, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PeftType
from pydantic import ValidationError

from graft.compressors.folder import load_adapter
from graft.core.errors import AdapterError, ConfigError
from graft.engine.merge import merge_into_base
from graft.engine.multi import MultiAdapterModel
from graft.engine.recompute import recompute_layers
from graft.engine.train import Trainer
from graft.methods._peft_config import ABSENT, MERGED, UNMERGED, plain
from graft.methods.base import METHODS
from graft.methods.peft import PeftMethod
from graft.testing import tiny_model
from tests.unit.engine.conftest import exact_model, make_recipe
from tests.unit.methods._peft import (
    ROWS,
    follow_peft,
    largest_difference,
    our_logits,
    same_logits_as_peft,
    same_logits_here,
    stirred,
    their_logits,
)

# PEFT warns of kernels that it does without and of layers that it takes as they are.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SETTINGS: dict[str, dict[str, Any]] = {
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "OFT": {"oft_block_size": 4},
    "OSF": {"target_modules": ["q_proj", "v_proj"]},
    "ROAD": {"group_size": 32},
    "SHIRA": {"r": 4},
    "TINYLORA": {"target_modules": ["q_proj", "v_proj"]},
    "VBLORA": {"num_vectors": 8, "vector_length": 16},
    "WAVEFT": {"n_frequency": 64},
}


def method_of(peft_type: str) -> PeftMethod:
    return PeftMethod(peft_type=peft_type, config=SETTINGS.get(peft_type, {}))


def test_every_type_of_peft_runs_here_or_says_why_not() -> None:
    own = [METHODS.get(name) for name in METHODS.names() if name != "peft"]
    for peft_type in (known.value for known in PeftType):
        is_own = any(method.reads_peft({"peft_type": peft_type}) for method in own)
        places = [peft_type in MERGED, peft_type in UNMERGED, peft_type in ABSENT, is_own]
        assert places.count(True) == 1, peft_type


@pytest.mark.parametrize("peft_type", sorted(MERGED | UNMERGED))
def test_peft_reads_its_folder_and_its_merged_model_says_the_same(
    peft_type: str, tmp_path: Path
) -> None:
    adapter = stirred(method_of(peft_type))
    same_logits_as_peft(adapter, tmp_path)
    if adapter.method.merges:
        merged = their_logits(merge_into_base(tiny_model(), adapter))
        torch.testing.assert_close(merged, our_logits(adapter), atol=1e-4, rtol=1e-4)
    else:
        with pytest.raises(AdapterError, match="cannot be merged"):
            merge_into_base(tiny_model(), adapter)


@pytest.mark.parametrize("peft_type", sorted(MERGED | UNMERGED))
def test_a_folder_of_peft_is_read_to_the_same_logits(peft_type: str, tmp_path: Path) -> None:
    read = same_logits_here(method_of(peft_type)._peft_config(), tmp_path)
    assert isinstance(read.method, PeftMethod)
    assert read.method.peft_type == peft_type
    config = read.method._peft_config()
    for key, value in SETTINGS.get(peft_type, {}).items():
        assert plain(getattr(config, key)) == value


@pytest.mark.parametrize("peft_type", sorted(MERGED | UNMERGED))
def test_its_training_follows_a_plain_loop_around_peft(peft_type: str) -> None:
    # PSOFT's start needs a decomposition that PEFT has for fp32 and less.
    base = tiny_model if peft_type == "PSOFT" else exact_model
    follow_peft(method_of(peft_type), steps=20, base=base)


@pytest.mark.parametrize("peft_type", sorted(MERGED | UNMERGED))
def test_it_trains_and_leaves_the_base_bit_for_bit(peft_type: str) -> None:
    model = MultiAdapterModel(tiny_model())
    before = {key: value.clone() for key, value in model.base.state_dict().items()}
    trainer = Trainer(model)
    recipe = make_recipe(method=method_of(peft_type), train={"steps": 2, "batch_size": 4})
    trainer.join("own", recipe, ROWS)
    start = trainer.state("own").tensors
    while trainer.step():
        pass
    end = trainer.state("own").tensors
    assert any(not torch.equal(start[s][k], end[s][k]) for s in start for k in start[s])
    trainer.leave("own")
    after = model.base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not any(parameter.requires_grad for parameter in model.base.parameters())


def test_a_half_precision_base_trains_fp32_weights_and_merges_in_its_own(tmp_path: Path) -> None:
    model = MultiAdapterModel(tiny_model(dtype=torch.bfloat16))
    trainer = Trainer(model)
    for peft_type in ("VERA", "LN_TUNING"):
        recipe = make_recipe(method=method_of(peft_type), train={"steps": 2, "batch_size": 4})
        trainer.join("own", recipe, ROWS)
        assert {p.dtype for p in model.parameters("own").values()} == {torch.float32}
        assert all(report["own"].is_finite for report in (trainer.step(), trainer.step()))
        adapter = stirred(method_of(peft_type))
        trainer.leave("own")
        merged = merge_into_base(tiny_model(dtype=torch.bfloat16), adapter)
        assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "LORA"}, "method of its own here: method: {type: lora}"),
        ({"peft_type": "VERRA"}, "Did you mean 'VERA'"),
        ({"peft_type": "XLORA"}, "does not run here"),
        ({"config": {"d_inital": 0.1}}, "config.d_inital is unknown. Did you mean 'd_initial'"),
        ({"config": {"r": "8"}}, "config.r is '8', PEFT takes"),
        ({"config": {"vera_dropout": 0.1}}, "config.vera_dropout is 0.1.*set it to 0"),
        ({"config": {"bias": "all"}}, "config.bias is 'all'.*leave it out"),
        ({"config": {"task_type": "SEQ_CLS"}}, "config.task_type is set by GRAFT"),
        ({"peft_type": "OFT", "config": {"r": 4, "oft_block_size": 4}}, "PEFT refuses it for OFT"),
    ],
)
def test_wrong_settings_are_refused_in_words(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        PeftMethod.model_validate(settings)


def test_it_trains_under_gradient_checkpointing_to_the_same_weights() -> None:
    recipe = make_recipe(method=method_of("OFT"), train={"steps": 2, "batch_size": 4})
    ends = []
    for recomputes in (False, True):
        model = MultiAdapterModel(tiny_model())
        if recomputes:
            recompute_layers(model)
        trainer = Trainer(model)
        trainer.join("own", recipe, ROWS)
        while trainer.step():
            pass
        _, state = recipe.method.to_peft(trainer.state("own").tensors, "tiny")
        ends.append(state)
    assert largest_difference(*ends) <= 1e-6


def test_a_target_that_matches_nothing_is_refused_with_the_near_names() -> None:
    method = PeftMethod(config={"target_modules": ["q_proj", "v_projj"]})
    with pytest.raises(ConfigError, match=r"'v_projj' matches no module.*Did you mean 'v_proj'"):
        MultiAdapterModel(tiny_model()).fresh_tensors(method)


def test_a_setting_that_does_not_fit_the_base_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match=r"PEFT cannot put C3A on LlamaForCausalLM.*block size"):
        MultiAdapterModel(tiny_model()).fresh_tensors(PeftMethod(peft_type="C3A"))


@pytest.mark.parametrize(
    "settings",
    [
        {"exclude_modules": "([a-z0-9_.]+)*!"},
        {"layers_pattern": "(h+)+"},
        {"alpha_pattern": {"(q+)+_proj": 4}},
    ],
)
def test_no_other_pattern_of_a_stranger_is_run_either(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    from peft import LoHaConfig, get_peft_model

    theirs = get_peft_model(tiny_model(), LoHaConfig(target_modules=["q_proj"]))
    assert isinstance(theirs, PeftModel)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    path = tmp_path / "theirs" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    with pytest.raises(AdapterError, match="pattern, which is not run on a stranger's word"):
        load_adapter(tmp_path / "theirs")


def test_a_pattern_in_a_strangers_folder_is_not_run(tmp_path: Path) -> None:
    from peft import VeraConfig, get_peft_model

    theirs = get_peft_model(tiny_model(), VeraConfig(target_modules=".*(q|v)_proj"))
    assert isinstance(theirs, PeftModel)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    with pytest.raises(AdapterError, match="pattern, which is not run on a stranger's word"):
        load_adapter(tmp_path / "theirs")
