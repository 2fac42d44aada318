"""`doctor`: what trains here and why not the rest, from the methods' own words and from trying."""

from __future__ import annotations

from pathlib import Path

import pytest

from graft.methods.base import METHODS, Surroundings
from graft.pipelines.environment import inspect_environment
from graft.pipelines.support import inspect_support


@pytest.fixture(autouse=True)
def no_ops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is compiled yet."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    return tmp_path / "extensions"


def test_each_method_says_itself_why_a_setting_is_not_for_it() -> None:
    found = {method.method: method for method in inspect_support().methods}
    assert set(found) == set(METHODS.names())
    refused = METHODS.build("full").refusals(Surroundings(quantization="nf4", steps=200))
    assert found["full"].reasons["model.quantization nf4"] == "; ".join(refused)
    assert "model.quantization nf4" in found["lora"].trains_with
    for stage in (1, 2, 3):
        for name, method in found.items():
            declared = stage in METHODS.get(name).zero_stages
            assert (f"scale.zero_stage {stage}" in method.trains_with) == declared


def test_offload_without_a_compiler_is_out_of_reach_and_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")
    settings = {setting.setting: setting.reason for setting in inspect_support().settings}
    assert "install g++" in settings["scale.offload cpu"]
    assert settings["scale.zero_stage 3"] == ""
    lora = next(m for m in inspect_support().methods if m.method == "lora")
    assert lora.reasons["scale.offload cpu"] == settings["scale.offload cpu"]


def test_a_stale_lock_is_found_and_cleared_only_when_ops_are_to_be_built(
    no_ops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graft.engine.backends.ops import ops_folder

    lock = ops_folder() / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("PATH", "")  # nothing can be built: only the lock is dealt with
    looked = [f for f in inspect_environment(tmp_path).findings if f.subject == "build lock"]
    assert [finding.status for finding in looked] == ["note"]
    assert "graft doctor --build-ops removes it" in looked[0].fix
    assert lock.exists()
    cleared = inspect_environment(tmp_path, build=True)
    assert not lock.exists()
    assert cleared.refusal is None
    assert any(f.found.endswith("; removed") for f in cleared.findings)
