"""One frozen base, many adapters: slots are added and removed, batch rows are routed to them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graft.core.errors import AdapterError, ModelError
from graft.engine.multi.attention import as_mask, attention_kernel, branch_mask, takes_any_mask
from graft.engine.multi.heads import SlotHeads
from graft.engine.multi.holder import SlotHolder
from graft.engine.multi.layer import ActiveRouting
from graft.engine.multi.layers import LayerSlots
from graft.engine.multi.lower_layers import LowerLayers
from graft.engine.multi.prefix import PrefixCache
from graft.engine.multi.prompts import PromptSlots
from graft.engine.multi.routing import Routing
from graft.engine.multi.whole import WholeSlots
from graft.methods.base import Method, by_site, split_head
from graft.methods.layerwise import LayerMethod
from graft.methods.routing import Observed
from graft.methods.virtual import VirtualMethod
from graft.methods.whole import WholeMethod
from graft.models.head import head_logits

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

AdapterTensors = dict[str, dict[str, torch.Tensor]]
"""Site name → tensor name → tensor."""


@dataclass(frozen=True)
class Slot:
    """One adapter on the base."""

    name: str
    method: Method


class MultiAdapterModel:
    """A loaded causal language model whose linear layers can carry any number of adapters.

    Takes over the given model: it is frozen, and adapted layers are wrapped in place.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self.base = base
        base.requires_grad_(False)
        base.eval()
        head = base.get_output_embeddings()
        if head is None:
            raise ModelError(f"{type(base).__name__} has no output head; a causal model is needed")
        self._active = ActiveRouting()
        self.layers = LayerSlots(base, head, self._active)
        self.lower = LowerLayers(base, self._adapted)
        self.prompts = PromptSlots(base, self._active)
        self.whole = WholeSlots(base, self.unwrap)
        self.heads = SlotHeads(base)
        self.slots: dict[str, Slot] = {}

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return torch.device(self.base.device)

    @property
    def dtype(self) -> torch.dtype:
        """What the base computes in."""
        return self.whole.computes_in

    @cached_property
    def shares_prompts(self) -> bool:
        """Branches of a row may stand behind one copy of their prompt; else rows are expanded."""
        return takes_any_mask(self.base)

    @property
    def is_owned(self) -> bool:
        """A method that owns the base is on it."""
        return any(isinstance(slot.method, WholeMethod) for slot in self.slots.values())

    @property
    def is_partitioned(self) -> bool:
        """ZeRO-3 has divided the base between workers."""
        return hasattr(next(self.base.parameters()), "ds_id")  # which divides all or none

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Every linear layer below the head: module path → (in_features, out_features)."""
        return self.layers.linears

    def add_slot(
        self,
        name: str,
        method: Method,
        *,
        tensors: AdapterTensors | None = None,
        seed: int = 0,
        trainable: bool = False,
        moments: Mapping[str, torch.Tensor] | None = None,
        has_head: bool = False,
    ) -> Slot:
        """Puts an adapter on the base.

        Args:
            name: Unique among the slots.
            method: Its settings.
            tensors: Its weights; None draws initial ones from `seed`. A head among them is put on.
            seed: Of the initial weights.
            trainable: Keep fp32 (fp64 on an fp64 base) parameters that take gradients.
            moments: Of layer inputs, for initial weights that look at them.
            has_head: It has a head, which gives 0 at first where `tensors` have none.

        Raises:
            AdapterError: The name is taken, the tensors do not fit the base, or a method that owns
                the base would have company.
            ConfigError: The method's targets do not fit the base.
        """
        if name in self.slots:
            raise AdapterError(f"a slot named {name!r} is already on the base; remove it first")
        self.require_room(name, method)
        holder = self._holder(method)
        if tensors is None:
            tensors, head = self.fresh_tensors(method, seed=seed, moments=moments), None
        else:
            tensors, head = split_head(tensors)
            holder.require_fit(name, method, tensors)
        if head is None and has_head:
            head = self.heads.fresh()
        if head is not None:
            self.heads.require_fit(name, head)
        placed = {site: self._placed(of_site) for site, of_site in tensors.items()}
        holder.add(name, method, placed, trainable=trainable)
        if head is not None:
            self.heads.add(name, self._placed(head), trainable=trainable)
        self.slots[name] = Slot(name, method)
        self.lower.slots_changed()
        return self.slots[name]

    def fresh_tensors(
        self,
        method: Method,
        *,
        seed: int = 0,
        moments: Mapping[str, torch.Tensor] | None = None,
    ) -> AdapterTensors:
        """Draws the initial weights of an adapter; the same seed, the same weights.

        Raises:
            ConfigError: The method's settings do not fit the base.
            AdapterError: The method owns the base, and slots are on it.
        """
        if isinstance(method, WholeMethod):
            self.require_room("a new slot", method)
        return self._holder(method).fresh(method, seed, moments)

    def _placed(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        dtype = torch.promote_types(self.dtype, torch.float32)
        return {
            key: value.detach().to(
                device=self.device, dtype=dtype if value.is_floating_point() else None, copy=True
            )
            for key, value in tensors.items()
        }

    def _holder(self, method: Method) -> SlotHolder:
        if isinstance(method, LayerMethod):
            return self.layers
        if isinstance(method, VirtualMethod):
            return self.prompts
        if isinstance(method, WholeMethod):
            return self.whole
        raise AdapterError(f"method {method.type!r} has no place on a base")

    def require_room(self, name: str, method: Method) -> None:
        """Refuses company for a method that owns the base.

        Raises:
            AdapterError: The slot cannot stand beside those on the base.
        """
        for slot in self.slots.values():
            for owner in (slot.method, method):
                if isinstance(owner, WholeMethod):
                    raise AdapterError(
                        f"{name!r} cannot join {slot.name!r} on the base: method {owner.type} owns "
                        f"the base and takes no slot beside it; remove {slot.name!r} first, or use "
                        "another copy of the base"
                    )

    def _holder_of(self, name: str) -> SlotHolder:
        return self._holder(self.slots[name].method)

    def remove_slot(self, name: str) -> None:
        """Takes an adapter off the base.

        Raises:
            AdapterError: There is no such slot.
        """
        if name not in self.slots:
            raise AdapterError(f"no slot named {name!r}; slots: {', '.join(self.slots) or 'none'}")
        self.heads.remove(name)
        self._holder_of(name).remove(name)
        del self.slots[name]
        self.lower.slots_changed()
        self._active.slots = []

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """One slot's parameters, `site.tensor` → parameter; those that train take gradients."""
        return self._holder_of(name).parameters(name) | self.heads.parameters(name)

    def tensors(self, name: str) -> AdapterTensors:
        """A copy of one slot's weights, on the CPU."""
        copied = {k: p.detach().cpu().clone() for k, p in self.parameters(name).items()}
        return by_site(copied)

    def weights_changed(self) -> None:
        """To be called after parameters were written in place; what came of them is dropped."""
        self.layers.weights_changed()
        self.prompts.weights_changed()

    @contextmanager
    def observed(self) -> Iterator[Observed]:
        """Lets methods leave figures about themselves (an expert's load) while it lasts."""
        self._active.observed = {}
        try:
            yield self._active.observed
        finally:
            self._active.observed = None

    def unwrap(self) -> None:
        """Takes all wrappers off the base; there are no slots on it."""
        self.lower.forget()
        self.layers.unwrap()

    def _adapted(self) -> Collection[str] | None:
        """Paths of the layers that slots adapt; None where a slot does more than that."""
        methods = [slot.method for slot in self.slots.values()]
        return self.layers.adapted if all(isinstance(m, LayerMethod) for m in methods) else None

    def routing_as_now(self) -> AbstractContextManager[None]:
        """Returns a context in which layers see the rows of the latest forward pass until now."""
        return self._active.as_now()

    def hidden(
        self,
        input_ids: torch.Tensor,
        *,
        routing: Routing,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        branches: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Runs the decoder.

        Args:
            input_ids: `[rows, tokens]`, int64, rows in the routing's order.
            routing: The slot of each row.
            attention_mask: Which tokens are no padding, `[rows, tokens]`; or, with a cache, which
                keys each token sees, `[rows, 1, tokens, keys]`, bool.
            position_ids: `[rows, tokens]`, with a cache or with branches; else rows count from 0.
                Virtual tokens come before them: with a cache they are counted in already.
            branches: Branch of each token, `[rows, tokens]`; those of one see the row's branch 0
                and themselves. Only where `shares_prompts`.
            cache: Keys and values to read and extend; virtual tokens are in it already.

        Returns:
            Final hidden states, `[rows, tokens, hidden]`.
        """
        prefix = self.prompts.prefix(routing) if cache is None else None
        self._route(routing, input_ids.shape[0])
        self._active.real = None
        if self._active.observed is not None and attention_mask is not None:
            # A mask of four axes is the generator's own, which asks for no figures.
            self._active.real = attention_mask if attention_mask.ndim == 2 else None
        if branches is not None:
            attention_mask = branch_mask(branches, attention_mask)
        if prefix is not None:
            num_new = input_ids.shape[1]
            cache = PrefixCache(prefix)
            position_ids = prefix.positions(num_new, position_ids)
            attention_mask = prefix.visible(num_new, attention_mask)
        if attention_mask is not None and attention_mask.ndim == 4:
            attention_mask = as_mask(attention_mask, self.base)
        extra: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
        with self.whole.precision(), attention_kernel(input_ids.shape[1], input_ids.device):
            output = self.base.get_decoder()(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=cache is not None,
                **extra,
            )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Makes logits of final hidden states, `[..., hidden]`."""
        with self.whole.precision():
            return head_logits(self.base, hidden)

    def _route(self, routing: Routing, num_rows: int) -> None:
        if sum(routing.num_rows) != num_rows:
            raise ValueError(
                f"routing names {sum(routing.num_rows)} rows, the batch has {num_rows}"
            )
        self._active.slots = []
        self._active.streams = {}
        self._active.num_rows = num_rows
        start = 0
        for index, (name, rows) in enumerate(zip(routing.slots, routing.num_rows, strict=True)):
            if name is None:
                self._require_bare_base()
            else:
                if name not in self.slots:
                    raise AdapterError(f"no slot named {name!r} on the base")
                self._active.slots.append((self.slots[name], start, rows))
                stream = routing.streams[index] if routing.streams else None
                if stream is not None:
                    self._active.streams[name] = stream
            start += rows

    def _require_bare_base(self) -> None:
        for slot in self.slots.values():
            if isinstance(slot.method, WholeMethod):
                raise AdapterError(
                    f"the bare base is not there while {slot.name!r} is on it: method "
                    f"{slot.method.type} changes it in place; remove the slot first"
                )
