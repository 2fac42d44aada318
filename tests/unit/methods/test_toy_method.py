"""A method is one new file: contract tests, schema, command line and documents find it alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

TOY = '''\
"""Shift, a toy: one vector is added to each layer's output.

Shapes: S slots, N rows, T tokens, O out_features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from graft.core.errors import AdapterError
from graft.core.spaces import Float, Space
from graft.methods.base import METHODS, Method, Site
from graft.methods.layerwise import FrozenLayer, LayerMethod
from graft.methods.targets import select_sites

if TYPE_CHECKING:
    import torch

    from graft.methods.base import AdapterTensors
    from graft.methods.routing import GroupRouting


@METHODS.register
class ShiftMethod(LayerMethod):
    """A trained bias.

    Reference:
        BitFit, arXiv 2106.10199, with a bias for every layer.
    """

    type: Literal["shift"] = "shift"
    target_modules: str = "all-linear"
    """Layers to adapt: `all-linear`, or an ending of module paths."""

    default_lr: ClassVar[float] = 1e-2
    packable: ClassVar[bool] = True
    servable: ClassVar[frozenset[str]] = frozenset({"native"})
    quantized_base: ClassVar[frozenset[str]] = frozenset({"nf4"})
    is_read_by_peft: ClassVar[bool] = False

    @classmethod
    def search_space(cls) -> dict[str, Space]:
        """The learning rate alone."""
        return {"train.lr": Float(low=1e-3, high=1e-1, log=True)}

    def sites(self, linears: dict[str, tuple[int, int]]) -> tuple[Site, ...]:
        """Picks the target layers."""
        return select_sites(linears, self.target_modules)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """One vector, `[out_features]`."""
        return {"shift": (site.out_features,)}

    def init(
        self, site: Site, generator: torch.Generator, layer: FrozenLayer
    ) -> dict[str, torch.Tensor]:
        """Zeros."""
        import torch

        return {"shift": torch.zeros(site.out_features)}

    @classmethod
    def stack(
        cls,
        slots: list[dict[str, torch.Tensor]],
        methods: tuple[Method, ...],
        dtype: torch.dtype,
        layer: FrozenLayer,
    ) -> dict[str, torch.Tensor]:
        """All vectors, `[slots, out_features]`."""
        import torch

        return {"shift_SO": torch.stack([tensors["shift"] for tensors in slots]).to(dtype)}

    @classmethod
    def delta(
        cls,
        x_NTI: torch.Tensor,
        base_NTO: torch.Tensor,
        stacked: dict[str, torch.Tensor],
        routing: GroupRouting,
    ) -> torch.Tensor:
        """Each row's own vector at every token."""
        shift_NO = stacked["shift_SO"][routing.slot_of_row(x_NTI.device)]
        return shift_NO[:, None, :].expand_as(base_NTO)

    def to_peft(
        self, tensors: AdapterTensors, base: str
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """A form of its own: PEFT has no such method."""
        config = {"peft_type": "SHIFT", "base_model_name_or_path": base, **self.model_dump()}
        config.pop("type")
        return config, {site: of_site["shift"] for site, of_site in tensors.items()}

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], state: dict[str, torch.Tensor]
    ) -> tuple[Method, AdapterTensors]:
        """Reads the same back."""
        if not state:
            raise AdapterError("adapter_model.safetensors: no tensor for SHIFT")
        method = cls(target_modules=config["target_modules"])
        return method, {site: {"shift": tensor} for site, tensor in state.items()}
'''


def python(*arguments: str, path: Path, cwd: Path) -> str:
    """Runs this Python with a folder before all installed packages; returns what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(path), "COLUMNS": "160"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def graft(*arguments: str, path: Path, cwd: Path) -> str:
    """Runs the command line."""
    return python("-m", "graft.cli", *arguments, path=path, cwd=cwd)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package, its contract tests and its documents, and one new file in it."""
    folder = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("graft", "docs", "tests/contracts"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "tests/__init__.py", "tests/conftest.py"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "graft" / "methods" / "shift.py").write_text(TOY, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def recipe_file(checkout: Path) -> Path:
    path = checkout / "recipe.yaml"
    path.write_text(
        "model: {source: tiny}\n"
        "data: {train: rows.jsonl, eval: held_out.jsonl}\n"
        "method: {choice: [{type: lora}, {type: shift}]}\n"
        "search: {space: auto}\n"
    )
    return path


def test_its_contract_tests_are_found_and_pass(checkout: Path) -> None:
    told = python(
        *("-m", "pytest", "-q", "-k", "shift", "tests/contracts/test_methods.py"),
        "tests/contracts/test_method_combinations.py",
        path=checkout,
        cwd=checkout,
    )
    passed = re.search(r"(\d+) passed", told)
    assert passed
    assert int(passed[1]) >= 24
    assert "failed" not in told


def test_schema_and_command_line_know_it(checkout: Path, recipe_file: Path) -> None:
    schema = json.loads(graft("schema", path=checkout, cwd=checkout))
    assert "target_modules" in schema["$defs"]["method-shift"]["properties"]
    assert "shift" in schema["$defs"]["method"]["anyOf"][0]["enum"]
    plan = graft("plan", str(recipe_file), path=checkout, cwd=checkout)
    assert "method[shift]/train.lr" in plan
    assert re.search(r"method = shift +shift +packed", plan)
    assert re.search(r"shift +yes +no +native +none, nf4 +0 +yes", plan)


def test_the_documents_take_it_up_when_they_are_made_anew(checkout: Path) -> None:
    python("docs/methods_reference.py", path=checkout, cwd=checkout)
    page = (checkout / "docs" / "methods.md").read_text(encoding="utf-8")
    assert "| `shift` | yes | no | native | none, nf4 | 0 | yes |" in page
    assert "one vector is added to each layer's output" in page


def test_a_package_of_somebody_else_adds_one_by_an_entry_point(tmp_path: Path) -> None:
    (tmp_path / "graft_shift").mkdir()
    (tmp_path / "graft_shift" / "__init__.py").write_text("")
    (tmp_path / "graft_shift" / "shift.py").write_text(TOY, encoding="utf-8")
    installed = tmp_path / "graft_shift-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: graft-shift\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(
        "[graft.method]\nshift = graft_shift.shift:ShiftMethod\n"
    )
    schema = json.loads(graft("schema", path=tmp_path, cwd=tmp_path))
    assert "method-shift" in schema["$defs"]
