"""Writes the generated parts of `methods.md` from the classes: `python docs/methods_reference.py`.

What stands outside the markers is written by hand and kept.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from graft.methods.base import METHODS, Method
from graft.methods.support import COLUMNS, method_support

PAGE = Path(__file__).with_name("methods.md")


def compatibility() -> str:
    """What each method can be combined with."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    rows += [(f"`{name}`", *cells) for name, *cells in (row.cells() for row in method_support())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def descriptions() -> str:
    """What each method says of itself, and where it comes from."""
    return "\n\n".join(description(METHODS.get(name)) for name in METHODS.names())


def description(method: type[Method]) -> str:
    """The first two paragraphs of its module, its reference, and its learning rate."""
    name = method.model_fields["type"].default
    source = (inspect.getdoc(method) or "").partition("Reference:")[2]
    module = inspect.getdoc(inspect.getmodule(method)) or ""
    words = [text for text in paragraphs(module)[:2] if not text.startswith("Shapes:")]
    linked = re.sub(
        r"arXiv (\d{4}\.\d{5})",
        r"[arXiv \1](https://arxiv.org/abs/\1)",
        " ".join(source.split()),
    )
    rate = f"`train.lr`, where a recipe leaves it out: {method.default_lr:g}."
    return "\n\n".join([f"### `{name}`", " ".join(words), linked, rate])


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a docstring, each on one line."""
    return [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]


def page(written: str) -> str:
    """The whole page: the given one with its generated parts made anew.

    Raises:
        ValueError: A pair of markers is missing.
    """
    for part in (compatibility, descriptions):
        start, end = f"<!-- {part.__name__}: generated -->", f"<!-- {part.__name__}: end -->"
        if start not in written or end not in written:
            raise ValueError(f"{PAGE.name} lacks the markers {start} and {end}; put them back")
        before, _, rest = written.partition(start)
        after = rest.partition(end)[2]
        written = f"{before}{start}\n\n{part()}\n\n{end}{after}"
    return written


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
