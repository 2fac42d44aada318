"""A training step, or a generated answer, of the real code on tensors without storage.

The base is made from its configuration, slots are put on it, one micro-batch goes forward and
backward, and a ledger notes what would be alive. Decoder layers that are alike are not all run:
memory at the two ends of the stack is linear in their number, so two short stacks give any.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graft.data.records import TokenRow
from graft.engine.batches import MicroBatch, RoutedRow
from graft.engine.generate import PREFILL_TOKENS
from graft.engine.kv_cache import KVCache
from graft.engine.logprobs import read_positions
from graft.engine.memory.ledger import Ledger
from graft.engine.memory.shape import split_layer
from graft.engine.memory.stand_ins import DeviceType, kernels_of, pack_layers, scratch_of_kernels
from graft.engine.multi import AdapterTensors, MultiAdapterModel, Routing
from graft.engine.multi.layer import ActiveRouting
from graft.engine.multi.prompts import FrozenModel
from graft.engine.recompute import recompute_layers
from graft.methods.layerwise import LayerMethod
from graft.methods.routing import DropoutStream
from graft.methods.virtual import SITE, VirtualMethod
from graft.models import torch_dtype

if TYPE_CHECKING:
    from graft.engine.memory.shape import ModelShape
    from graft.engine.memory.workload import Answers, Workload
    from graft.methods.base import Method
    from graft.models.section import ModelSection

_SHORT_STACKS = (2, 3)
_LAST, _BETWEEN, _FIRST = ("backward, last layer", "backward, between", "backward, first layer")

Parts = Counter[str]
"""Part → bytes."""


class Setting(NamedTuple):
    """What a dry run depends on beside the base's shape; it can be hashed."""

    section: ModelSection
    method: Method
    device: DeviceType
    checkpoints: bool = False
    has_head: bool = False
    needs_entropy: bool = False
    slots: int = 1
    """In one micro-batch."""


def step_peaks(shape: ModelShape, setting: Setting, work: Workload) -> list[Parts]:
    """Runs one micro-batch forward and backward.

    Args:
        shape: Of the base.
        setting: Of the run.
        work: The micro-batch.

    Returns:
        What is alive beside weights, adapter and optimizer at the moments of which one is the peak:
        parts `activations`, `logits`, `temporaries`, `gradients` and scratch of kernels.
    """
    return _of_all_layers(shape, setting, lambda stack: _step(shape, setting, work, stack))


def reading_peaks(shape: ModelShape, setting: Setting, work: Workload) -> list[Parts]:
    """Runs one micro-batch forward without gradients, as evaluation does."""

    def run(num_layers: int | None) -> dict[str, Parts]:
        with _fake(setting.device) as ledger:
            model = _model(shape, setting, num_layers)
            with ledger, torch.no_grad():
                read_positions(model, _micro_batch(work, ["slot0"]))
            return ledger.peaks

    return _of_all_layers(shape, setting, run)


def answer_peaks(shape: ModelShape, setting: Setting, answers: Answers) -> list[Parts]:
    """Reads prompts into a cache of keys and values, then decodes all rows at their longest."""
    return _of_all_layers(
        shape, setting, lambda num_layers: _answer(shape, setting, answers, num_layers)
    )


def _answer(
    shape: ModelShape, setting: Setting, answers: Answers, num_layers: int | None
) -> dict[str, Parts]:
    with _fake(setting.device) as ledger:
        model = _model(shape, setting, num_layers)
        cache = _CountedCache(ledger, answers)
        width, longest = answers.prompt_tokens, answers.max_tokens
        read = max(1, min(answers.rows, PREFILL_TOKENS // width))
        with ledger, torch.no_grad():
            ledger.enter("prompts")
            routing = Routing.single("slot0", read)
            prefix = model.prompts.prefix(routing)
            mask = torch.ones(width, width, dtype=torch.bool).expand(read, 1, width, width)
            cache.begin([*range(read)], None, model.device, prefix)
            hidden = model.hidden(
                torch.zeros(read, width, dtype=torch.long),
                routing=routing,
                attention_mask=mask if prefix is None else prefix.visible(width),
                position_ids=torch.zeros(read, width, dtype=torch.long),
                cache=cache,
            )
            model.logits(hidden[:, -1])
            del hidden, mask
            ledger.enter("answers")
            last = longest - 1 + model.prompts.num_virtual_tokens("slot0")
            cache.begin([*range(answers.rows)], [last] * answers.rows, model.device)
            hidden = model.hidden(
                torch.zeros(answers.rows, 1, dtype=torch.long),
                routing=Routing.single("slot0", answers.rows),
                attention_mask=torch.ones(answers.rows, 1, 1, last + 1, dtype=torch.bool),
                position_ids=torch.zeros(answers.rows, 1, dtype=torch.long),
                cache=cache,
            )
            ledger.part = "logits"
            model.logits(hidden[:, 0]).float()
        return ledger.peaks


class _CountedCache(KVCache):
    """A cache whose pools are counted for themselves."""

    def __init__(self, ledger: Ledger, answers: Answers) -> None:
        super().__init__(max_batch=answers.rows, max_length=answers.max_tokens)
        self._ledger = ledger

    def _room(self, *args: Any) -> list[torch.Tensor]:
        with self._ledger.counting("kv cache"):
            return super()._room(*args)


def _of_all_layers(
    shape: ModelShape, setting: Setting, run: Callable[[int | None], dict[str, Parts]]
) -> list[Parts]:
    """Runs two short stacks and draws the line, or runs the whole one where layers differ."""
    low, high = _SHORT_STACKS
    is_regular = shape.layers_are_alike and _treats_layers_alike(shape, setting.method)
    if shape.num_layers <= high or not is_regular:
        return list(run(None).values())
    few, more = run(low), run(high)
    found = []
    # Between its ends a stack is never higher than at the higher one, for it is linear there.
    for window in few.keys() & more.keys() - {_BETWEEN}:
        a, b = few[window], more[window]
        steps = (shape.num_layers - high) / (high - low)
        found.append(
            Counter({part: round(b[part] + (b[part] - a[part]) * steps) for part in a | b})
        )
    return found


def _treats_layers_alike(shape: ModelShape, method: Method) -> bool:
    """Says whether a method has the same tensors at each decoder layer, however many there are."""
    if not isinstance(method, LayerMethod):
        return True
    if getattr(method, "layers_to_transform", None) is not None:  # names that short stacks lack
        return False
    layers: dict[str, list[tuple[str, tuple[int, int]]]] = {}
    for site in method.sites(shape.linears):
        index, inside = split_layer(site.name)
        of_layer = layers.setdefault(index or "", [])
        of_layer.append((inside, (site.in_features, site.out_features)))
    found = list(layers.values())
    return len(found) == shape.num_layers and all(layer == found[0] for layer in found)


def _step(
    shape: ModelShape, setting: Setting, work: Workload, num_layers: int | None
) -> dict[str, Parts]:
    with _fake(setting.device) as ledger:
        model = _model(shape, setting, num_layers)
        names = [f"slot{at}" for at in range(setting.slots)]
        _mark_gradients(model, names, ledger, stand_already=work.num_micro_batches > 1)
        _mark_windows(model, ledger)
        batch = _micro_batch(work, names)
        with ledger, ledger.counting("activations", "forward"):
            positions = read_positions(model, batch, _stream, with_entropy=setting.needs_entropy)
            loss = positions.logprobs_P.sum()
            if setting.has_head:
                values = model.heads.values(names[0], positions.hidden_PH)
                loss = loss + values.sum()
            ledger.part = "temporaries"
            loss.backward()
        return ledger.peaks


@contextmanager
def _fake(device: DeviceType) -> Iterator[Ledger]:
    """Tensors made inside have no storage; kernels are those of the device."""
    with FakeTensorMode(allow_non_fake_inputs=True), kernels_of(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Ledger(scratch_of_kernels(device))


def _model(shape: ModelShape, setting: Setting, num_layers: int | None) -> MultiAdapterModel:
    """The base with its slots, all of them trained; tensors have no storage."""
    section = setting.section
    base = shape.build(section.attention, torch_dtype(section), num_layers)
    if section.quantization.type != "none":
        pack_layers(base, section.quantization)
    model = MultiAdapterModel(base)
    if setting.checkpoints:
        recompute_layers(model)
    for at in range(setting.slots):
        tensors = adapter_tensors(model, setting.method)
        model.add_slot(
            f"slot{at}",
            setting.method,
            tensors=tensors,
            trainable=True,
            has_head=setting.has_head,
        )
    return model


def adapter_tensors(model: MultiAdapterModel, method: Method) -> AdapterTensors:
    """Makes tensors of a method's shapes on a base; nothing is drawn."""
    if isinstance(method, LayerMethod):
        return {
            site.name: {key: torch.empty(shape) for key, shape in method.shapes(site).items()}
            for site in method.sites(model.linears)
        }
    if isinstance(method, VirtualMethod):
        shapes = method.shapes(FrozenModel(model.base, ActiveRouting()).shape)
        return {SITE: {key: torch.empty(shape) for key, shape in shapes.items()}}
    return model.fresh_tensors(method)


def _mark_gradients(
    model: MultiAdapterModel, names: list[str], ledger: Ledger, *, stand_already: bool
) -> None:
    """Counts gradients for themselves; those of an earlier micro-batch stand already."""

    def mark(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        ledger.assign(parameter.grad, "gradients")

    for name in names:
        for parameter in model.parameters(name).values():
            if not parameter.requires_grad:
                continue
            if stand_already:
                parameter.grad = torch.empty_like(parameter)
                mark(parameter)
            parameter.register_post_accumulate_grad_hook(mark)


def _mark_windows(model: MultiAdapterModel, ledger: Ledger) -> None:
    """Tells the ledger where in the step it is: at which end of the stack."""
    decoder = model.base.get_decoder()

    def on_gradient(tensor: torch.Tensor, window: str) -> None:
        if tensor.requires_grad:
            tensor.register_hook(lambda _: ledger.enter(window))

    def after_decoder(_: nn.Module, __: Any, kwargs: Any, output: Any) -> None:
        # Virtual tokens run through the decoder too, as embeddings, before the rows do.
        if torch.is_grad_enabled() and kwargs.get("input_ids") is not None:
            ledger.part = "logits"
            ledger.enter("head")
            on_gradient(output.last_hidden_state, _LAST)

    def before(window: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(_: nn.Module, args: Any, kwargs: Any) -> None:
            # A recomputed layer runs once more in the backward pass, where it is no end.
            if ledger.window == "forward":
                on_gradient(args[0] if args else kwargs["hidden_states"], window)

        return note

    decoder.register_forward_hook(after_decoder, with_kwargs=True)
    layers = decoder_layers(decoder)
    if len(layers) >= _SHORT_STACKS[0]:
        # The gradient of the last layer's input is made when that layer is done.
        layers[1].register_forward_pre_hook(before(_FIRST), with_kwargs=True)
    if len(layers) > _SHORT_STACKS[0]:
        layers[-1].register_forward_pre_hook(before(_BETWEEN), with_kwargs=True)


def decoder_layers(decoder: nn.Module) -> list[nn.Module]:
    """The longest list of modules in it."""
    stacks = [module for module in decoder.modules() if isinstance(module, nn.ModuleList)]
    return list(max(stacks, key=len, default=[]))


def _stream(_: str, rows: torch.Tensor) -> DropoutStream:
    return DropoutStream(0, 0, rows)


def _micro_batch(work: Workload, slots: list[str]) -> MicroBatch:
    """Rows of the workload's size, divided between the slots."""
    rows, width, count = work.rows, work.row_tokens, work.supervised_tokens
    nothing = TokenRow([], [], "dry run")
    own = sorted(slots[at % len(slots)] for at in range(rows))
    of_tokens = torch.zeros(rows, width, dtype=torch.long)
    of_positions = torch.zeros(count, dtype=torch.long)
    return MicroBatch(
        rows=tuple(RoutedRow(slot, nothing, at) for at, slot in enumerate(own)),
        lines=tuple(range(rows)),
        input_ids=of_tokens,
        attention_mask=torch.ones_like(of_tokens) if work.is_padded else None,
        branches=torch.zeros_like(of_tokens) if work.has_branches else None,
        position_ids=torch.zeros_like(of_tokens) if work.has_branches else None,
        columns=None,
        supervised_rows=of_positions,
        supervised_lines=of_positions,
        supervised_tokens=of_positions,
        predicting_tokens=of_positions,
        supervised_branches=of_positions,
    )
