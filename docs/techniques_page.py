"""Writes `techniques.md` from measured figures: `python docs/techniques_page.py [RECORD]`.

RECORD is what `python -m benchmarks.techniques --json RECORD` wrote; it is copied to `docs/`, so
that the published figures are the measured ones. Without it the copy is read again.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).parent
RECORD, PAGE = (DOCS / f"techniques.{kind}" for kind in ("json", "md"))


class Row(NamedTuple):
    """What a row is called, and what is published about it."""

    name: str
    published: str


ALONE = {
    "full": Row("full fine-tuning", "16 bytes a weight, activations beside them (1910.02054)"),
    "lora": Row("LoRA", "a third of the memory, 25 % faster (GPT-3 175B, 2106.09685)"),
    "dora": Row(
        "DoRA", "about LoRA's with its detached norm (2402.09353); a quarter slower (PEFT)"
    ),
    "qlora": Row("QLoRA", "65B on one GPU of 48 GB (2305.14314); 40 % below LoRA (torchtune)"),
    "qdora": Row("QDoRA", "no figure published"),
    "adapters": Row("bottleneck adapters", "3.6 % of the weights trained (1902.00751)"),
    "prompt": Row("prompt tuning", "below 0.01 % of the weights trained (2104.08691)"),
    "prefix": Row("prefix tuning", "0.1 % of the weights trained (2101.00190)"),
    "ptuning": Row("P-tuning", "0.1 to 3 % of the weights trained (2110.07602)"),
    "checkpointing": Row(
        "full + checkpointing", "activations of √layers, a third more time (1604.06174)"
    ),
    "lora_checkpointing": Row("LoRA + checkpointing", "the same of its activations"),
}
DIVIDED = {
    "zero0": Row("full, nothing divided", "16 bytes a weight on every worker"),
    "zero1": Row("ZeRO-1", "to a quarter of the states, no more communication (1910.02054)"),
    "zero2": Row("ZeRO-2", "to an eighth of the states, no more communication"),
    "zero3": Row("ZeRO-3", "states divided by the workers, half as much communication more"),
    "zero2_offload": Row("ZeRO-2 + CPU offload", "13B on one GPU of 32 GB (2101.06840)"),
    "zero3_offload": Row("ZeRO-3 + CPU offload", "40B on one GPU of 32 GB (DeepSpeed)"),
}

HEAD = """# What each technique saves and costs

Written by `python docs/techniques_page.py` from `techniques.json`, which
`python -m benchmarks.techniques` measured."""

HOW = """Memory is the highest of a process above what it held before the model was loaded, speed
counts tokens without padding; both are medians over the rounds. Every technique runs in processes
of its own, on the same rows. Published figures are of other models, mostly much larger ones, on
GPUs: there weights and optimizer states weigh more beside activations, so the same technique saves
more, and communication between workers costs otherwise. Numbers in brackets are arXiv ids."""

OFFLOAD = """Here device and host are one memory, so offload to the CPU moves nothing out of it:
its rows show what the copies and the optimizer on the CPU cost."""

AGAIN = """## Again

```sh
python -m benchmarks.techniques --json techniques.json
python docs/techniques_page.py techniques.json
```"""


def page(record: dict[str, Any]) -> str:
    """The whole page."""
    settings, machine = record["settings"], record["machine"]
    about = (
        f"Base: `{Path(settings['model']).name}`, {settings['dtype']}; {settings['batch_size']} "
        f"rows a step, at most {settings['micro_batch_tokens']} tokens a forward pass. Machine: "
        f"{machine['cores']} cores ({machine['cpu']})."
    )
    figures = record["figures"]
    parts = [
        HEAD,
        about,
        "## In one process",
        table(ALONE, figures, "full"),
        f"## On {settings['workers']} workers",
        table(DIVIDED, figures, "zero0"),
        OFFLOAD,
        "## How it was measured",
        HOW,
        AGAIN,
    ]
    return "\n\n".join(parts) + "\n"


def table(rows: dict[str, Row], figures: dict[str, float], against: str) -> str:
    """The rows that were measured, as Markdown; ratios are against one of them."""
    heads = ["technique", "GB a worker", "memory", "GB in all", "tokens/s", "speed", "published"]
    lines = [heads, ["---", *["---:"] * 5, "---"]]
    for key, row in rows.items():
        if f"{key}_worker_gb" in figures:
            lines.append(_cells(key, row, figures, is_reference=key == against))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(key: str, row: Row, figures: dict[str, float], *, is_reference: bool) -> list[str]:
    def ratio(name: str) -> str:
        return "1.00" if is_reference else f"{figures[f'{key}_{name}_vs_full']:.2f}"

    return [
        row.name,
        f"{figures[f'{key}_worker_gb']:.2f}",
        ratio("memory"),
        f"{figures[f'{key}_host_gb']:.2f}",
        f"{figures[f'{key}_tokens_per_s']:.0f}",
        ratio("speed"),
        row.published,
    ]


def main() -> None:
    """Copies a record here if one is named, and writes the document."""
    if len(sys.argv) > 1:
        shutil.copyfile(sys.argv[1], RECORD)
    PAGE.write_text(page(json.loads(RECORD.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
