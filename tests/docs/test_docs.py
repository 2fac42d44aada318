"""What the documents say is so: recipes load, commands and files exist, pages are fresh."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from graft.recipe import load_recipe

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "clusters" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
]


def name_of(path: Path) -> str:
    """For test ids."""
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    """Fenced blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def test_the_recipe_in_the_readme_is_a_recipe(tmp_path: Path) -> None:
    (block,) = blocks(ROOT / "README.md", "yaml")
    (tmp_path / "recipe.yaml").write_text(block, encoding="utf-8")
    space = load_recipe(tmp_path / "recipe.yaml")
    assert set(space.holes) == {"method/r", "train/lr"}


@pytest.mark.parametrize("block", blocks(ROOT / "docs" / "data.md", "yaml"))
def test_the_recipes_of_the_data_page_are_recipes(block: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(block, encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.yaml").is_complete


def test_the_recipe_reference_is_what_the_code_says() -> None:
    spec = importlib.util.spec_from_file_location(
        "recipe_reference", ROOT / "docs" / "recipe_reference.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert written == module.page(), "run: python docs/recipe_reference.py"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_verb_that_a_page_names_exists(path: Path) -> None:
    from typer.main import get_command

    from graft.cli.main import build_app

    known = set(get_command(build_app()).commands)  # type: ignore[attr-defined]
    commands = [line for text in blocks(path, "(?:bash|sh)") for line in text.splitlines()]
    used = {found for line in commands for found in re.findall(r"(?:^|\s)graft ([a-z-]+)\b", line)}
    assert used - {"graft"} <= known


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_file_that_a_page_names_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text):
        assert (path.parent / link).exists(), link
    for block in blocks(path, "(?:bash|sh)"):
        for file in re.findall(
            r"\b((?:examples|jobs|clusters|serve)/[\w/.-]+\.(?:py|yaml))", block
        ):
            assert (ROOT / file).is_file(), file


def test_the_makefile_targets_of_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in PAGES:
        commands = "\n".join(blocks(path, "(?:bash|sh)"))
        assert set(re.findall(r"^make ([a-z-]+)", commands, re.MULTILINE)) <= targets
