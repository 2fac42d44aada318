"""From a file or a hub dataset to raw rows, each with the place that error messages name."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

from graft.core.errors import DataError
from graft.core.registry import nearest

HUB_PREFIX = "hub:"

RawRow = tuple[str, dict[str, Any]]
"""Place (`train.jsonl:7`) and content."""


def read_rows(source: str, *, limit: int | None = None) -> list[RawRow]:
    """Reads the rows of a `.jsonl`, `.json`, `.csv` or `.parquet` file, or of `hub:<id>[:<split>]`.

    Raises:
        DataError: The source is missing, of an unknown kind, empty, or a row of it is malformed.
    """
    rows = list(islice(_open(source), limit))
    if not rows:
        raise DataError(f"{source} holds no rows; give a data set with at least one")
    return rows


def _open(source: str) -> Iterator[RawRow]:
    if source.startswith(HUB_PREFIX):
        return _read_hub(source.removeprefix(HUB_PREFIX))
    path = Path(source).expanduser()
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix.lower() in _READERS)
        hint = f"; it holds {', '.join(inside[:5])}" if inside else ""
        raise DataError(f"{source!r} is a folder, not a data file{hint}")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{source!r} is of no known kind; give a file that ends in {', '.join(_READERS)}, or "
            "hub:<dataset id>[:<split>]"
        )
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"data file {source!r} does not exist.{nearest(path.name, siblings)}")
    return reader(path)


def _read_jsonl(path: Path) -> Iterator[RawRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path.name}:{number}"
            text = _decode(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, place)
            if text.strip():
                yield place, _as_row(_parse_json(text.rstrip(), place), place)


def _read_json(path: Path) -> Iterator[RawRow]:
    value = _parse_json(
        _decode(path.read_bytes().removeprefix(b"\xef\xbb\xbf"), path.name), path.name
    )
    if not isinstance(value, list):
        raise DataError(
            f"{path.name} holds a JSON {type(value).__name__}; a list of rows is expected (one "
            "object a "
            "line is called .jsonl)"
        )
    for number, row in enumerate(value, start=1):
        place = f"{path.name}[{number}]"
        yield place, _as_row(row, place)


def _read_csv(path: Path) -> Iterator[RawRow]:
    text = _decode(path.read_bytes().removeprefix(b"\xef\xbb\xbf"), path.name)
    lines = StringIO(text, newline="")  # `splitlines` would cut a field at U+2028, too
    reader = csv.reader(lines, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        for values in reader:
            if not values:
                continue  # an empty line
            place = f"{path.name}:{reader.line_num}"
            if len(values) != len(header):
                raise DataError(
                    f"{place}: {len(values)} fields, and the header names {len(header)} columns "
                    f"({', '.join(header)}); quote fields that hold commas or line breaks"
                )
            yield place, dict(zip(header, values, strict=True))
    except csv.Error as error:
        place = f"{path.name}:{reader.line_num}"
        if "field limit" in str(error):
            raise DataError(
                f"{place}: a field of a CSV file has at most {csv.field_size_limit():,} "
                "characters; shorten it, or save the rows as .jsonl"
            ) from error
        raise DataError(f"{place}: malformed CSV: {error}") from error


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path.name} is no readable Parquet file: {error}") from error
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"{path.name}[{number}]", row


def _read_hub(name: str) -> Iterator[RawRow]:
    from datasets import load_dataset

    dataset_id, _, split = name.partition(":")
    try:
        dataset = load_dataset(dataset_id, split=split or "train")
    except Exception as error:  # the library raises many kinds for one cause
        raise DataError(
            f"dataset {HUB_PREFIX}{name} cannot be loaded ({type(error).__name__}: {error}); "
            "check the id "
            "and the split, or download it and name the file"
        ) from error
    for number, row in enumerate(dataset, start=1):
        yield f"{dataset_id}[{number}]", dict(row)


_READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: byte {error.start} is no UTF-8 ({error.reason}); save the file as UTF-8"
        ) from error


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = (
            f"line {error.lineno}, column {error.colno}"
            if error.lineno > 1
            else f"column {error.colno}"
        )
        raise DataError(f"{place}: malformed JSON at {at}: {error.msg}") from error
    except RecursionError as error:
        raise DataError(f"{place}: JSON nested too deeply; a row is an object of texts") from error
    except ValueError as error:  # the one thing left: Python reads no endless number
        raise DataError(
            f"{place}: a number has more digits than can be read; write it as text, in quotes"
        ) from error


def _as_row(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{place}: a row is a JSON object, not {type(value).__name__}")
    return value
