"""PEFT as the oracle of every method that it has: files, logits, and a plain training loop.

A test of a method says what it wants in a line each:

    same_logits_as_peft(method, tmp_path)         # our folder, read by PEFT
    same_logits_here(LoraConfig(...), tmp_path)   # PEFT's folder, read by us
    round_trip(method, tmp_path)                  # ours, read and written again by PEFT, read by us
    follow_peft(method, steps=20)                 # trained here and by a plain loop: equal weights
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_config,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from transformers import PreTrainedModel

from graft.compressors.base import Adapter
from graft.compressors.folder import load_adapter, save_adapter
from graft.data.records import TokenRow
from graft.engine.batches import RoutedRow, collate
from graft.engine.multi import AdapterTensors, MultiAdapterModel, Routing
from graft.engine.order import batch_rows
from graft.engine.schedule import learning_rate
from graft.engine.train import Trainer
from graft.methods.base import Method
from graft.recipe.sections import Recipe
from graft.testing import tiny_model
from tests.unit.engine.conftest import exact_model, make_recipe, make_rows

IDS = torch.arange(24).view(2, 12) + 20
ROWS = make_rows(24, lengths=(5, 40))

Optimizers = Callable[[PeftModel, float], torch.optim.Optimizer]


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Logits of one adapter, computed in fp32 in two ways."""
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def our_logits(adapter: Adapter, base: PreTrainedModel | None = None) -> torch.Tensor:
    """Logits of `IDS` with the adapter as a slot; the base is a tiny fp32 model by default."""
    model = MultiAdapterModel(base or tiny_model())
    model.add_slot("own", adapter.method, tensors=adapter.tensors)
    with torch.no_grad():
        routing = Routing.single("own", len(IDS))
        return model.logits(model.hidden(IDS, routing=routing))


def their_logits(model: torch.nn.Module) -> torch.Tensor:
    """Logits of `IDS` from a PEFT model, nothing dropped."""
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits[:, -IDS.shape[1] :]


def stirred(
    method: Method,
    *,
    seed: int = 0,
    noise: float = 0.05,
    moments: Mapping[str, torch.Tensor] | None = None,
) -> Adapter:
    """An adapter of the tiny model that does something: initial tensors with noise on top."""
    generator = torch.Generator().manual_seed(seed)
    fresh = MultiAdapterModel(tiny_model()).fresh_tensors(method, seed=seed, moments=moments)
    tensors = {
        site: {
            key: value
            if key in method.frozen or not value.is_floating_point()
            else value + noise * torch.randn(value.shape, generator=generator)
            for key, value in of_site.items()
        }
        for site, of_site in fresh.items()
    }
    return Adapter(method, tensors)


def same_logits_as_peft(method: Method | Adapter, folder: Path) -> None:
    """A folder that we write answers under PEFT as it does here."""
    adapter = method if isinstance(method, Adapter) else stirred(method)
    save_adapter(folder / "ours", adapter, "tiny")
    theirs = PeftModel.from_pretrained(tiny_model(), str(folder / "ours"))
    expected = their_logits(theirs)
    assert not torch.equal(expected, their_logits(tiny_model())), "the adapter does nothing"
    assert_close(our_logits(adapter), expected)


def same_logits_here(
    config: PeftConfig, folder: Path, stir: Callable[[PeftModel], None] | None = None
) -> Adapter:
    """A folder that PEFT writes answers here as it does there; returns what was read.

    Args:
        config: Of the adapter that PEFT makes.
        folder: A scratch folder.
        stir: Makes the adapter do something; None adds noise to all that it trains.
    """
    torch.manual_seed(0)
    theirs = get_peft_model(tiny_model(), config)
    (stir or _add_noise)(theirs)
    expected = their_logits(theirs)
    assert not torch.equal(expected, their_logits(tiny_model())), "the adapter does nothing"
    theirs.save_pretrained(str(folder / "theirs"), save_embedding_layers=False)
    adapter = load_adapter(folder / "theirs")
    assert_close(our_logits(adapter), expected)
    return adapter


def round_trip(method: Method | Adapter, folder: Path) -> None:
    """Our folder, read and written again by PEFT, is read here to the same numbers."""
    adapter = method if isinstance(method, Adapter) else stirred(method)
    save_adapter(folder / "there", adapter, "tiny")
    theirs = PeftModel.from_pretrained(tiny_model(), str(folder / "there"))
    theirs.save_pretrained(str(folder / "back"), save_embedding_layers=False)
    back = load_adapter(folder / "back")
    assert type(back.method) is type(adapter.method)
    assert_close(our_logits(back), our_logits(adapter))


def follow_peft(
    method: Method,
    *,
    steps: int = 20,
    lr: float = 2e-3,
    tolerance: float = 1e-5,
    tensors: AdapterTensors | None = None,
    model: PeftModel | None = None,
    base: Callable[[], PreTrainedModel] = exact_model,
    **loop: Any,
) -> None:
    """Trains here and in a plain loop around PEFT, in fp64, from equal weights to equal weights.

    Args:
        method: Trained here; without dropout.
        steps: Of AdamW, clipped.
        lr: Peak learning rate.
        tolerance: Between any two weights at the end.
        tensors: To start from; None draws fresh ones.
        model: PEFT's twin at the same weights; None makes it of `method.to_peft`.
        base: Makes the model that both train on.
        loop: Passed on to `train_with_peft`.
    """
    recipe = make_recipe(
        method=method, train={"steps": steps, "batch_size": 4, "lr": lr, "seed": 1}
    )
    start, end = train_here(recipe, tensors, base=base)
    twin = model or peft_twin(method, start, base())
    train_with_peft(twin, recipe, **loop)
    _, ours = method.to_peft(end, "tiny")
    _, before = method.to_peft(start, "tiny")
    theirs = get_peft_model_state_dict(twin)
    assert ours.keys() == theirs.keys()
    assert largest_difference(ours, before) > 1e-3, "nothing was learned"
    assert largest_difference(ours, theirs) <= tolerance


def train_here(
    recipe: Recipe,
    tensors: AdapterTensors | None = None,
    rows: list[TokenRow] | None = None,
    *,
    base: Callable[[], PreTrainedModel] = exact_model,
) -> tuple[AdapterTensors, AdapterTensors]:
    """Trains a recipe to its end; returns the weights before and after."""
    trainer = Trainer(MultiAdapterModel(base()))
    trainer.join("own", recipe, rows or ROWS, tensors=tensors)
    start = trainer.state("own").tensors
    while trainer.step():
        pass
    return start, trainer.state("own").tensors


def peft_twin(
    method: Method, tensors: AdapterTensors, base: PreTrainedModel | None = None
) -> PeftModel:
    """PEFT's own model with the same adapter on it, ready to train; the exact model by default."""
    config, state = method.to_peft(tensors, "tiny")
    wanted = get_peft_config({**config, "inference_mode": False, "base_model_name_or_path": None})
    base = base or exact_model()
    is_exact = base.dtype == torch.float64
    model = get_peft_model(base, wanted, autocast_adapter_dtype=False)
    assert isinstance(model, PeftModel)
    if is_exact:
        model = model.double()
    load_state(model, state)
    return model


def load_state(model: PeftModel, state: dict[str, torch.Tensor]) -> None:
    """Puts an adapter's tensors into PEFT's model; each must have its place there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = set_peft_model_state_dict(model, state)
    # PEFT puts virtual tokens in their place itself, and still calls them unexpected.
    unexpected = set(result.unexpected_keys) - {"prompt_embeddings"}
    assert not unexpected, unexpected


def train_with_peft(
    model: PeftModel,
    recipe: Recipe,
    *,
    rows: list[TokenRow] | None = None,
    optimizer: Optimizers | None = None,
    extra_loss: Callable[[PeftModel], torch.Tensor] | None = None,
    after_step: Callable[[PeftModel, int], None] | None = None,
) -> None:
    """The oracle: PEFT's model, transformers' forward, torch's AdamW, written as anybody would.

    Args:
        model: Trained in place.
        recipe: Its training settings are followed.
        rows: To learn from.
        optimizer: Makes it of the model and the learning rate; None is AdamW of all that trains.
        extra_loss: Added to the loss of each step.
        after_step: Called after each optimizer step, before gradients are dropped; steps from 0.
    """
    rows = rows or ROWS
    train = recipe.train
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    stepper = (optimizer or _adamw)(model, train.lr)
    shares = [group["lr"] / train.lr for group in stepper.param_groups]
    for step in range(train.steps):
        taken = [rows[i] for i in batch_rows(train.seed, step, train.batch_size, len(rows))]
        loss = _loss(model, taken)
        if extra_loss is not None:
            loss = loss + extra_loss(model)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)
        for group, share in zip(stepper.param_groups, shares, strict=True):
            group["lr"] = learning_rate(train, step) * share
        stepper.step()
        if after_step is not None:
            after_step(model, step)
        stepper.zero_grad()


def _adamw(model: PeftModel, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0
    )


def _loss(model: PeftModel, taken: list[TokenRow]) -> torch.Tensor:
    batch = collate([RoutedRow(None, row, i) for i, row in enumerate(taken)], torch.device("cpu"))
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    logits = logits[:, -batch.input_ids.shape[1] :]
    labels = torch.full_like(batch.input_ids, -100)
    at = (batch.supervised_rows, batch.supervised_tokens)
    labels[at] = batch.input_ids[at]
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)
    )


def _add_noise(model: PeftModel) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of any two numbers of equal place."""
    return max(
        float((one[key].double() - other[key].double()).abs().max())
        for key in one
        if one[key].numel() or other[key].numel()
    )
