"""Compress, verify and export on a published adapter of the tiny model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from graft.artifacts import Store
from graft.compressors.folder import load_adapter, save_adapter
from graft.core.errors import AdapterError, ConfigError, GateRefusedError
from graft.engine.publish import publish_adapter, require_base
from graft.pipelines.compress import compress
from graft.pipelines.export import export
from graft.pipelines.forms import recipe_for
from graft.pipelines.verify import verify
from tests.unit.compressors.conftest import make_adapter
from tests.unit.pipelines.conftest import PublishedHome


def with_compress(published: PublishedHome, *steps: dict[str, object]):  # type: ignore[no-untyped-def]
    return type(published.recipe).model_validate(
        {**published.recipe.model_dump(mode="json"), "compress": list(steps)}
    )


def test_a_compressed_adapter_is_published_with_its_parent_parity_and_metrics(
    published: PublishedHome,
) -> None:
    recipe = with_compress(published, {"type": "svd", "r": 6}, {"type": "int8"})
    result = compress("tiny", recipe, home=published.home, run=published.run)
    stored = Store(published.home).verify(result.digest)
    assert stored.record.parents[0].digest == published.stored.digest
    assert stored.record.parents[0].relation == "compressed"
    assert stored.record.storage == "int8"
    assert stored.record.serving.r == 6
    assert stored.record.parity == (result.parity,)
    assert result.parity.passed
    assert result.metrics["eval/loss"].rows == 24
    assert result.parent_metrics["eval/loss"].value == 5.0
    assert (result.r_before, result.r_after) == (8, 6)
    assert result.num_bytes == sum(p.stat().st_size for p in stored.path.iterdir())
    assert published.run.model.slots == {}


def test_a_form_that_says_something_else_is_refused_and_not_published(
    published: PublishedHome,
) -> None:
    before = Store(published.home).digests()
    recipe = with_compress(published, {"type": "svd", "r": 1})
    with pytest.raises(GateRefusedError, match="'svd' stands too far"):
        compress("tiny", recipe, home=published.home, run=published.run)
    assert Store(published.home).digests() == before
    assert published.run.model.slots == {}


def test_the_same_compression_twice_is_one_artifact(published: PublishedHome) -> None:
    first = compress("tiny", home=published.home, run=published.run)
    assert compress("tiny", home=published.home, run=published.run) == first
    assert len(Store(published.home).digests()) == 2


def test_a_recipe_without_compressors_is_refused(published: PublishedHome) -> None:
    with pytest.raises(ConfigError, match="lists no compressor"):
        compress("tiny", with_compress(published), home=published.home, run=published.run)


def test_an_adapter_of_another_base_is_refused(published: PublishedHome, tmp_path: Path) -> None:
    other = published.run.ready.model_copy(update={"digest": "c" * 64, "source": "other"})
    stored = publish_adapter(
        Store(published.home),
        make_adapter(),
        recipe=published.recipe,
        ready=other,
        data_digest=None,
        metrics={},
    )
    with pytest.raises(AdapterError, match="was made for the base other"):
        compress(str(stored.digest), home=published.home, run=published.run)
    with pytest.raises(AdapterError, match="was made for the base other"):
        verify(str(stored.digest), home=published.home)
    target = tmp_path / "merged"
    with pytest.raises(AdapterError, match="was made for the base other"):
        export(str(stored.digest), target, home=published.home, format="merged")
    assert not target.exists()


def test_an_adapter_that_makes_up_for_quantization_is_refused_on_another_base(
    published: PublishedHome,
) -> None:
    content = published.recipe.model_dump(mode="json")
    content["method"] |= {"init_lora_weights": "loftq"}
    content["model"] |= {"quantization": {"type": "nf4"}}
    trained = type(published.recipe).model_validate(content)
    stored = publish_adapter(
        Store(published.home),
        make_adapter(),
        recipe=trained,
        ready=published.run.ready,
        data_digest=None,
        metrics={},
    )
    with pytest.raises(
        AdapterError, match=r"what nf4 took .* set model\.quantization\.type to nf4"
    ):
        verify(str(stored.digest), recipe=published.recipe, home=published.home)
    require_base(stored, published.run.ready, trained.model)


def test_verify_compares_with_the_parent_and_with_the_merged_form(
    published: PublishedHome,
) -> None:
    small = compress("tiny", home=published.home, run=published.run)
    result = verify(small.digest, home=published.home)
    assert [report.form for report in result.parity] == [small.digest, "merged"]
    assert result.refusal is None
    strange = publish_adapter(
        Store(published.home),
        make_adapter(seed=9),
        recipe=published.recipe,
        ready=published.run.ready,
        data_digest=None,
        metrics={},
    )
    refused = verify(small.digest, home=published.home, against=str(strange.digest))
    assert "token agreement" in str(refused.refusal)


def test_verify_names_the_damaged_file(published: PublishedHome) -> None:
    path = published.stored.path / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors has changed"):
        verify("tiny", home=published.home)


def test_an_exported_int8_adapter_is_plain_peft_with_the_served_numbers(
    published: PublishedHome, tmp_path: Path
) -> None:
    from peft import PeftModel

    from graft.testing import tiny_model

    small = compress("tiny", home=published.home, run=published.run)
    result = export(small.digest, tmp_path / "out", home=published.home)
    served = load_adapter(Store(published.home).open(small.digest).path)
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(tiny_model(), tmp_path / "out").eval()(ids).logits
        folder = tmp_path / "merged"
        export(small.digest, folder, home=published.home, format="merged")
        merged = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    torch.testing.assert_close(theirs, merged, atol=2e-5, rtol=1e-5)
    again = load_adapter(tmp_path / "out")
    assert again.storage is None
    for site, of_site in served.tensors.items():
        assert all(torch.equal(again.tensors[site][k], v) for k, v in of_site.items())
    assert result.num_bytes > 0
    assert result.is_read_by_peft


def test_an_export_that_cannot_be_written_says_so_and_leaves_nothing(
    published: PublishedHome, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot write"):
        export("tiny", tmp_path / "file" / "out", home=published.home)
    (tmp_path / "there").mkdir()
    with pytest.raises(AdapterError, match="already exists"):
        export("tiny", tmp_path / "there", home=published.home)
    assert sorted(os.listdir(tmp_path)) == ["file", "home", "there"]


def test_a_plain_folder_needs_a_recipe_and_then_works(
    published: PublishedHome, tmp_path: Path
) -> None:
    folder = tmp_path / "plain"
    save_adapter(folder, make_adapter(), "tiny")
    with pytest.raises(ConfigError, match="carries no recipe"):
        recipe_for(str(folder), None, [], home=published.home)
    result = compress(str(folder), published.recipe, home=published.home, run=published.run)
    assert result.parent is None


def test_the_adapters_recipe_takes_overrides(published: PublishedHome) -> None:
    found = recipe_for("tiny", None, ["verify.rows=3"], home=published.home)
    assert found.verify.rows == 3
    assert found == published.recipe.model_copy(update={"verify": found.verify})
    assert json.loads(found.model_dump_json())["name"] == "tiny"
