"""What a trial costs, as far as a search asks: counted from its weights, predicted, or timed."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

from graft.compressors.base import Adapter
from graft.compressors.folder import tensor_file_bytes
from graft.core.errors import TrainingError
from graft.core.files import write_json
from graft.engine.publish import as_served, finished_tensors
from graft.recipe.costs import (
    ADAPTER_BYTES,
    LATENCY_MS,
    LATENCY_PROMPTS,
    LATENCY_TOKENS,
    PEAK_MEMORY_BYTES,
)

if TYPE_CHECKING:
    from graft.engine.memory.cap import MemoryCap
    from graft.engine.multi import AdapterTensors
    from graft.engine.run import LoadedRun
    from graft.engine.run_folder import Report
    from graft.recipe.sections import Recipe

_FILE = "costs.json"
"""In a trial's folder: what was predicted of it before it began."""


def predict_costs(folder: Path, recipe: Recipe, memory: MemoryCap) -> None:
    """Keeps what is predicted of a trial in its folder, from where its reports take it.

    The device, and the threads of a CPU, are the same for all trials of a search, wherever they
    run: so predictions compare. What other trials have taught is left out for the same reason.
    """
    if PEAK_MEMORY_BYTES in _searched(recipe):
        found = memory.predict(recipe).device_bytes
        write_json(folder / _FILE, {PEAK_MEMORY_BYTES: float(found)})


def costs_of(
    run: LoadedRun, slot: str, tensors: AdapterTensors, report: Report, folder: Path
) -> Report:
    """Returns the searched costs of a slot that stands at a report.

    Under several workers all of them call it.

    Args:
        run: Holds the slot.
        slot: In training.
        tensors: Its weights, whole.
        report: Made by now; with the last one the slot is timed too.
        folder: The trial's.

    Raises:
        TrainingError: The weights give logits that are not finite.
    """
    searched, found = _searched(run.recipe), dict[str, float]()
    if ADAPTER_BYTES in searched:
        found[ADAPTER_BYTES] = float(adapter_bytes(run.recipe, tensors))
    if PEAK_MEMORY_BYTES in searched and (folder / _FILE).exists():
        found |= json.loads((folder / _FILE).read_text())
    if LATENCY_MS in searched and run.recipe.train.ends_with(report):
        found[LATENCY_MS] = answer_latency_ms(run, slot)
    return found


def adapter_bytes(recipe: Recipe, tensors: AdapterTensors) -> int:
    """Returns the size of the tensor file that these weights would be published as."""
    adapter = Adapter(recipe.method, finished_tensors(recipe, tensors))
    if adapter.method.artifact_kind == "full":
        adapter = as_served(adapter, recipe)
    return tensor_file_bytes(adapter)


def answer_latency_ms(run: LoadedRun, slot: str) -> float:
    """Times answers of a slot, one at a time, on the engine as it serves; returns the median.

    Each has `LATENCY_TOKENS` new tokens, whatever the slot would say, so that a short answer is no
    fast one. What else runs on the machine is in the time.

    Raises:
        TrainingError: The weights give logits that are not finite.
    """
    from graft.engine.generate import GenerationRequest, Generator

    prompts = [prompt.prompt_ids for prompt in run.prepared.prompts[:LATENCY_PROMPTS]]
    longest = max(map(len, prompts)) + LATENCY_TOKENS + 1
    generator = Generator(run.model, run.template.tokenizer, max_batch=1, max_length=longest)
    run.model.weights_changed()
    seconds = []
    for prompt_ids in (prompts[0], *prompts):
        request = GenerationRequest(prompt_ids, slot, max_new_tokens=LATENCY_TOKENS)
        started = time.perf_counter()
        (answer,) = generator.run([request])
        seconds.append(time.perf_counter() - started)
        if answer.finish_reason == "error":
            raise TrainingError(
                f"{LATENCY_MS} cannot be timed: the trained weights give logits that are not finite"
            )
    return 1000 * statistics.median(seconds[1:])  # the first one warms up


def _searched(recipe: Recipe) -> set[str]:
    return {objective.metric for objective in recipe.search.objectives}
