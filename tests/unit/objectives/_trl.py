"""TRL's trainers on the same rows and the same weights: what our losses are compared with."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict

from graft.data.records import TokenRow
from graft.engine.accumulate import SlotStep, SlotSums, accumulate
from graft.engine.backends.torch import TorchBackend
from graft.engine.batches import RoutedRow
from graft.engine.multi import AdapterTensors, MultiAdapterModel
from graft.engine.scoring import outputs_of, score_rows
from graft.methods.lora import LoraMethod
from graft.objectives.base import REFERENCE, Objective
from graft.testing import tiny_model, tiny_tokenizer

METHOD = LoraMethod(r=4, lora_alpha=8.0)
TEXTS = {
    "prompt": ["hi"] * 4,
    "chosen": ["yes"] * 4,
    "rejected": ["no"] * 4,
}
"""What a trainer insists on being made with; the batches compared are our own rows."""


def stirred_tensors() -> AdapterTensors:
    """An adapter that does something."""
    fresh = MultiAdapterModel(tiny_model()).fresh_tensors(METHOD, seed=3)
    generator = torch.Generator().manual_seed(4)
    return {
        site: {
            key: value + 0.05 * torch.randn(value.shape, generator=generator)
            for key, value in of_site.items()
        }
        for site, of_site in fresh.items()
    }


def peft_policy() -> PeftModel:
    """The tiny model with the same adapter, on PEFT."""
    config, state = METHOD.to_peft(stirred_tensors(), "tiny")
    names = ("r", "lora_alpha", "target_modules")
    policy = get_peft_model(tiny_model(), LoraConfig(**{name: config[name] for name in names}))
    set_peft_model_state_dict(policy, state)
    return policy


def make_trainer(trainer: Any, config: Any, folder: Path, **settings: Any) -> Any:
    """A TRL trainer of that policy, against the bare base where it has a reference."""
    reference = settings.pop("reference", {"ref_model": tiny_model()})
    texts = settings.pop("texts", TEXTS)
    args = config(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to=[],
        gradient_checkpointing=False,
        per_device_train_batch_size=4,
        **settings,
    )
    return trainer(
        model=peft_policy(),
        args=args,
        train_dataset=datasets.Dataset.from_dict(texts),
        processing_class=tiny_tokenizer(),
        **reference,
    )


def their_gradients(policy: PeftModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients by our own names, `site.tensor`."""
    policy.zero_grad()
    loss.backward()
    found = {}
    for key, value in policy.named_parameters():
        if value.requires_grad:
            path = key.removeprefix("base_model.model.").removesuffix(".default.weight")
            assert value.grad is not None
            found[path] = value.grad
    return found


def our_step(
    objective: Objective,
    rows: list[TokenRow],
    *,
    max_tokens: int = 100,
    tensors: AdapterTensors | None = None,
) -> tuple[SlotSums, dict[str, torch.Tensor]]:
    """Loss, figures and gradients of one step on these rows, as the training loop makes them."""
    model = MultiAdapterModel(tiny_model())
    model.add_slot("own", METHOD, tensors=tensors or stirred_tensors(), trainable=True)
    backend = TorchBackend()

    temperature = getattr(objective, "temperature", 1.0)

    def scores(slot: str | None, of: list[TokenRow]) -> list[Any]:
        return score_rows(
            model, slot, of, backend=backend, max_tokens=max_tokens, temperature=temperature
        )

    statistics: dict[str, float] = {}
    if probes := objective.probe_rows(rows):
        of_probes = outputs_of(probes, scores("own", probes), {REFERENCE: scores(None, probes)})
        statistics = objective.statistics(of_probes)
    if "reference" in objective.needs:
        found = zip(rows, scores(None, rows), strict=True)
        rows = [row._replace(extra={**(row.extra or {}), REFERENCE: k}) for row, k in found]
    routed = [RoutedRow("own", row, at) for at, row in enumerate(rows)]
    step = SlotStep(objective, routed, 0, 0, max_tokens, statistics, temperature)
    sums = accumulate(model, backend, {"own": step}, lambda: None)["own"]
    parameters = model.parameters("own").items()
    return sums, {key: p.grad for key, p in parameters if p.grad is not None}


def make_pairs(num_pairs: int, seed: int = 0, even: bool = False) -> list[TokenRow]:
    """Random prompts with two answers each, of uneven lengths."""
    generator = random.Random(seed)
    rows = []
    for index in range(num_pairs):
        lengths = [5, 4, 4] if even else [generator.randint(3, 9) for _ in range(3)]
        branch = [number for number, count in enumerate(lengths) for _ in range(count)]
        ids = [generator.randrange(4, 384) for _ in branch]
        rows.append(TokenRow(ids, [k > 0 for k in branch], f"pairs:{index}", branch))
    return rows


def parts(row: TokenRow) -> list[list[int]]:
    """Prompt and answers of a row."""
    numbers = range(row.num_branches + 1)
    branch = row.branch or []
    return [[t for t, k in zip(row.input_ids, branch, strict=True) if k == n] for n in numbers]


def assert_same(
    ours: tuple[SlotSums, dict[str, torch.Tensor]],
    loss: torch.Tensor,
    gradients: dict[str, torch.Tensor],
    tolerance: float = 1e-5,
) -> None:
    """Loss and every gradient are equal, and there is something to compare."""
    sums, own = ours
    assert abs(sums.loss - float(loss)) <= tolerance
    assert own.keys() == gradients.keys()
    assert max(float(g.abs().max()) for g in gradients.values()) > 1e-3
    for key, gradient in gradients.items():
        torch.testing.assert_close(own[key], gradient, rtol=0, atol=tolerance)
