"""YAML as a plain tree of Python values that remembers where each value was written."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from graft.core.errors import ConfigError
from graft.core.passwords import mask_passwords
from graft.core.registry import nearest

FieldPath = tuple[str | int, ...]

MAX_BYTES = 256 * 1024
MAX_NODES = 20_000
MAX_DEPTH = 40

_TAG = "tag:yaml.org,2002:"
_DATA_SUFFIXES = {".jsonl", ".csv", ".parquet"}


@dataclass
class Tree:
    """Plain dicts, lists and scalars, and the place each one was written: `recipe.yaml:7`."""

    source: str
    root: Any
    origins: dict[FieldPath, str] = field(default_factory=dict)

    def origin(self, path: FieldPath) -> str:
        """Returns where `path`, or the nearest section around it, was written."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return self.source

    def get(self, path: FieldPath) -> Any:
        """Returns the value at `path`.

        Raises:
            KeyError: There is none.
        """
        node = self.root
        for part in path:
            try:
                node = node[part]
            except (TypeError, IndexError, KeyError) as error:
                raise KeyError(path) from error
        return node


def dotted(path: FieldPath) -> str:
    """Formats a path as people write it: `compress.0.r`."""
    return ".".join(str(part) for part in path)


def read_tree(path: Path) -> Tree:
    """Reads a YAML file.

    Raises:
        ConfigError: It is absent, unreadable, too large, not UTF-8, empty or not one mapping; or it
            has duplicate keys, tags, directives, merge keys or endless aliases.
    """
    text = _read_text(path)
    node = _compose(text, str(path))
    if node is None:
        raise ConfigError(f"{path} is empty; `graft init` writes a recipe to start from")
    tree = Tree(str(path), None)
    tree.root = _Builder(str(path), tree.origins).build(node, ())
    if not isinstance(tree.root, dict):
        raise ConfigError(
            f"{path}: a recipe is a mapping of sections (`model:`, `data:`, ...), "
            f"not {describe(tree.root)}"
        )
    return tree


def read_value(text: str, label: str) -> Any:
    """Reads one value as YAML would, for `--set`.

    Raises:
        ConfigError: As `read_tree`; `label` stands for the file.
    """
    node = _compose(text, label)
    return None if node is None else _Builder(label, {}).build(node, ())


def describe(value: Any) -> str:
    """Names a value and its type in words: `the text '8.5'`, `a list`."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, str):
        masked = mask_passwords(value)
        shown = masked if len(masked) <= 60 else masked[:57] + "..."
        return f"the text {shown!r}"
    return repr(value)


def _read_text(path: Path) -> str:
    if path.is_dir():
        inside = sorted(p.name for p in path.glob("*.yaml"))
        hint = f"; it holds {', '.join(inside[:5])}" if inside else ""
        raise ConfigError(f"{path} is a folder, not a recipe file{hint}")
    if path.suffix.lower() in _DATA_SUFFIXES and path.is_file():
        raise ConfigError(f"{path} is a data file; give a recipe (.yaml) that names it in `data`")
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(
                f"{path} has {size} bytes; a recipe is at most {MAX_BYTES}: is it a data file?"
            )
        data = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"no recipe at {path}.{_near_files(path)}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line}: not UTF-8 text (byte {error.start}); save the file as UTF-8"
        ) from error


def _near_files(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" The folder {folder} does not exist."
    files = sorted(p.name for p in folder.iterdir() if p.suffix in {".yaml", ".yml"})
    return nearest(path.name, files) or (
        f" In that folder: {', '.join(files[:8])}" if files else ""
    )


def _compose(text: str, source: str) -> Node | None:
    if re.search(r"^%", text, re.MULTILINE):
        raise ConfigError(f"{source}: YAML directives (lines that begin with %) are not accepted")
    try:
        return YAML(typ="safe", pure=True).compose(text)  # type: ignore[no-any-return]
    except MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        context = f" ({error.context})" if error.context else ""
        raise ConfigError(f"{place}: not YAML: {_explain(str(error.problem))}{context}") from error
    except YAMLError as error:
        raise ConfigError(f"{source}: not YAML: {str(error).splitlines()[0]}") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: nested too deeply for a recipe") from error


def _explain(problem: str) -> str:
    if r"\t" in problem:
        return "a tab where only spaces may stand"
    if "another document" in problem:
        return "a second document (`---`); a recipe is one document"
    if "mapping values are not allowed" in problem:
        return "a `:` where a value was expected; put the value in quotes or check the indentation"
    return problem


class _Builder:
    """Turns composed nodes into plain values; refuses what a recipe has no use for."""

    def __init__(self, source: str, origins: dict[FieldPath, str]) -> None:
        self._source = source
        self._origins = origins
        self._open: set[int] = set()
        self._num_nodes = 0

    def build(self, node: Node, path: FieldPath) -> Any:
        """Builds one node and everything under it."""
        self._num_nodes += 1
        if self._num_nodes > MAX_NODES or len(path) > MAX_DEPTH:
            raise ConfigError(
                f"{self._place(node)}: the recipe is too large once its aliases expand"
            )
        if id(node) in self._open:
            raise ConfigError(f"{self._place(node)}: the anchor {node.anchor!r} contains itself")
        self._origins.setdefault(path, self._place(node))
        self._open.add(id(node))
        try:
            if isinstance(node, MappingNode):
                return dict(self._entries(node, path))
            if isinstance(node, SequenceNode):
                return self._list(node, path)
            return self._scalar(node)
        finally:
            self._open.discard(id(node))

    def _place(self, node: Node) -> str:
        return f"{self._source}:{node.start_mark.line + 1}"

    def _entries(self, node: MappingNode, path: FieldPath) -> Iterator[tuple[str, Any]]:
        self._check_tag(node, {"map"})
        seen: dict[str, str] = {}
        for key_node, value_node in node.value:
            place = self._place(key_node)
            if key_node.tag == f"{_TAG}merge":
                raise ConfigError(
                    f"{place}: merge keys (`<<`) are not accepted; write the keys out"
                )
            if not isinstance(key_node, ScalarNode) or key_node.tag != f"{_TAG}str":
                raise ConfigError(f"{place}: a key must be a plain name, not {key_node.value!r}")
            key = str(key_node.value)
            if key in seen:
                raise ConfigError(
                    f"{place}: {dotted((*path, key))} is given twice, first at {seen[key]}; "
                    "keep one"
                )
            seen[key] = place
            self._origins[(*path, key)] = place
            yield key, self.build(value_node, (*path, key))

    def _list(self, node: SequenceNode, path: FieldPath) -> list[Any]:
        self._check_tag(node, {"seq"})
        return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]

    def _scalar(self, node: Node) -> Any:
        kind = self._check_tag(node, {"null", "bool", "int", "float", "str", "timestamp", "value"})
        text = str(node.value)
        if kind == "null":
            return None
        if kind == "bool" and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind == "bool":
            raise ConfigError(f"{self._place(node)}: {text!r} is no bool; write true or false")
        if kind not in {"int", "float"}:
            return text
        try:
            return _integer(text) if kind == "int" else _real(text)
        except ValueError as error:
            raise ConfigError(
                f"{self._place(node)}: {text[:40]!r} is not a finite number"
            ) from error

    def _check_tag(self, node: Node, allowed: set[str]) -> str:
        kind = str(node.tag).removeprefix(_TAG)
        if kind not in allowed:
            raise ConfigError(
                f"{self._place(node)}: the tag {str(node.tag)!r} is not accepted; "
                "a recipe holds plain values only"
            )
        return kind


def _integer(text: str) -> int:
    digits = text.replace("_", "").lower()
    unsigned = digits.lstrip("+-")
    base = {"0o": 8, "0x": 16, "0b": 2}.get(unsigned[:2], 10)
    return int(digits, base)


def _real(text: str) -> float:
    value = float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
    if not math.isfinite(value):
        raise ValueError(text)
    return value
