"""The model that an objective compares with: what the slot was before it trained.

It is the frozen base with the slot switched off, so it costs no memory. Where a slot starts from
given weights, a second, frozen slot holds those. Only a method that owns the base needs a copy of
it. Rows are scored once: what came out is kept by their content, for all slots of one reference.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import torch

from graft.core.errors import ConfigError
from graft.data.records import TokenRow
from graft.engine.backends.base import Backend
from graft.engine.lower_states import row_key
from graft.engine.memory.free import room_on
from graft.engine.multi import AdapterTensors, MultiAdapterModel
from graft.engine.recompute import plain_layers
from graft.engine.scoring import Scores, score_rows
from graft.methods.base import Method
from graft.methods.whole import WholeMethod


@dataclass
class _Reference:
    model: MultiAdapterModel
    slot: str | None
    known: dict[bytes, Scores] = field(default_factory=dict)
    users: set[str] = field(default_factory=set)


class References:
    """Knows the reference of each slot in training that needs one.

    Args:
        model: Holds the slots.
        backend: Of the training.
        free: Tells the memory that a copy of the base may take.
    """

    def __init__(
        self,
        model: MultiAdapterModel,
        backend: Backend,
        free: Callable[[torch.device], int] = lambda device: room_on(device).free_bytes,
    ) -> None:
        self._model = model
        self._backend = backend
        self._free = free
        self._by_key: dict[str, _Reference] = {}
        self._keys: dict[str, str] = {}

    def join(self, name: str, method: Method, start: AdapterTensors | None) -> None:
        """Sees to a slot's reference; called before the slot itself is on the base.

        Args:
            name: The slot's.
            method: The slot's.
            start: Weights that it starts from; None is the bare base.

        Raises:
            ConfigError: The reference would be a copy of the base, and there is no room for it.
            AdapterError: The weights do not fit.
        """
        key = "base" if start is None else f"reference-{_digest(method, start)}"
        if isinstance(method, WholeMethod):
            key = f"{key} of {name}"
        if key not in self._by_key:
            self._by_key[key] = self._made(key, name, method, start)
        self._by_key[key].users.add(name)
        self._keys[name] = key

    def leave(self, name: str) -> None:
        """Lets go of a slot's reference; scores of the bare base are kept for later slots."""
        key = self._keys.pop(name, None)
        if key is None:
            return
        reference = self._by_key[key]
        reference.users.discard(name)
        if reference.users or (reference.slot is None and reference.model is self._model):
            return
        if reference.slot is not None and reference.model is self._model:
            self._model.remove_slot(reference.slot)
        del self._by_key[key]

    def scores(
        self,
        name: str,
        rows: Sequence[TokenRow],
        *,
        max_tokens: int,
        keeps: bool = True,
        temperature: float = 1.0,
    ) -> list[Scores]:
        """Returns log-probabilities of each row's targets under a slot's reference.

        Every worker calls it with the same rows.

        Args:
            name: The slot's.
            rows: Any.
            max_tokens: Padded tokens of one forward pass.
            keeps: The rows will come again.
            temperature: Of the distributions; scores of other ones than the model's are not kept.
        """
        reference = self._by_key[self._keys[name]]
        if temperature != 1:
            return score_rows(
                reference.model,
                reference.slot,
                rows,
                backend=self._backend,
                max_tokens=max_tokens,
                temperature=temperature,
            )
        keys = [_key(row) for row in rows]
        new = {k: row for k, row in zip(keys, rows, strict=True) if k not in reference.known}
        found = score_rows(
            reference.model,
            reference.slot,
            list(new.values()),
            backend=self._backend,
            max_tokens=max_tokens,
        )
        scored = dict(zip(new, found, strict=True))
        if keeps:
            reference.known.update(scored)
        return [scored[key] if key in scored else reference.known[key] for key in keys]

    def _made(
        self, key: str, name: str, method: Method, start: AdapterTensors | None
    ) -> _Reference:
        if isinstance(method, WholeMethod):
            self._model.require_room(name, method)
            model = self._copied(method)
        else:
            model = self._model
        if start is None:
            return _Reference(model, None)
        model.add_slot(key, method, tensors=start)
        return _Reference(model, key)

    def _copied(self, method: Method) -> MultiAdapterModel:
        base = self._model.base
        tensors = {id(t): t for t in (*base.parameters(), *base.buffers())}.values()
        needed = sum(tensor.nbytes for tensor in tensors)
        free = self._free(self._model.device)
        if needed > free:
            raise ConfigError(
                f"the objective compares with the model as it was, and method {method.type} trains "
                f"the base itself: the frozen copy needs {needed / 1e6:.1f} MB and "
                f"{free / 1e6:.1f} MB are free; use a method that leaves the base alone (lora), "
                "an objective without a reference (orpo), or a smaller base"
            )
        self._model.unwrap()
        with plain_layers(base):  # the copy is read without gradients
            return MultiAdapterModel(copy.deepcopy(base))


def _key(row: TokenRow) -> bytes:
    """Names what a row's scores depend on."""
    return row_key(row) + blake2b(bytes(row.is_supervised), digest_size=16).digest()


def _digest(method: Method, tensors: AdapterTensors) -> str:
    digest = blake2b(method.model_dump_json().encode(), digest_size=8)
    for site, of_site in sorted(tensors.items()):
        for key, value in sorted(of_site.items()):
            digest.update(f"{site}.{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(
                value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
            )
    return digest.hexdigest()
