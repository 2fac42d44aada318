"""The one slot of a method that owns the base, and giving the base back as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from graft.core.errors import AdapterError
from graft.methods.base import by_site
from graft.methods.whole import Attachment, WholeMethod

_HALF_PRECISIONS = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Occupation:
    attachment: Attachment
    computes_in: torch.dtype
    """What the base was loaded in."""
    is_mixed: bool
    """Some weights stand in a wider type than the base computes in."""
    changed: dict[str, torch.Tensor | None]
    """The base's own weights that were replaced; None is to be read from the model's files."""
    dtypes: dict[str, torch.dtype]
    """Of those weights: a base may keep some in fp32 whatever it computes in."""


class WholeSlots:
    """Lends the base to one method at a time.

    A method that trains the base's own weights gets them in fp32. While it trains no copy of the
    old ones is held where the model's files have them; in evaluation they stand beside.

    Args:
        base: The base.
        unwrap: Takes the wrappers of other kinds of slots off its layers; there are no such slots.
    """

    def __init__(self, base: PreTrainedModel, unwrap: Callable[[], None]) -> None:
        self._base = base
        self._unwrap = unwrap
        self._slots: dict[str, _Occupation] = {}

    @property
    def computes_in(self) -> torch.dtype:
        """What the base computes in, whatever its weights stand in."""
        for occupation in self._slots.values():
            return occupation.computes_in
        dtype: torch.dtype = self._base.dtype
        return dtype

    def precision(self) -> AbstractContextManager[object]:
        """What a forward pass is to run under."""
        for occupation in self._slots.values():
            if occupation.is_mixed:
                return torch.autocast(self._base.device.type, dtype=occupation.computes_in)
        return nullcontext()

    def fresh(
        self, method: WholeMethod, seed: int, moments: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, dict[str, torch.Tensor]]:
        """Copies what the method would start from; the base stays as it is."""
        attachment = self._attach(method, seed)
        copied = {key: p.detach().clone() for key, p in attachment.parameters.items()}
        attachment.undo()
        return by_site(copied)

    def require_fit(
        self, name: str, method: WholeMethod, tensors: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> None:
        """Refuses tensors of other names or shapes than the method puts on this base.

        Raises:
            AdapterError: They do not fit.
        """
        attachment = self._attach(method, seed=0)
        wanted = {key: tuple(p.shape) for key, p in attachment.parameters.items()}
        attachment.undo()
        require_shapes(name, wanted, tensors)

    def add(
        self,
        name: str,
        method: WholeMethod,
        tensors: Mapping[str, dict[str, torch.Tensor]],
        *,
        trainable: bool,
    ) -> None:
        """Takes the base over for a slot; what is only evaluated is rounded as the base is."""
        computes_in = self._base.dtype
        own = {id(parameter) for parameter in self._base.parameters()}
        attachment = self._attach(method, seed=0)
        changed: dict[str, torch.Tensor | None] = {}
        in_files = self._names_in_files() if trainable else frozenset()
        for key, parameter in attachment.parameters.items():
            if id(parameter) in own:
                changed[key] = None if key in in_files else parameter.data
        dtypes = {key: attachment.parameters[key].dtype for key in changed}
        place(attachment, tensors, widens=trainable, own=own)
        for parameter in attachment.parameters.values():
            parameter.requires_grad_(trainable and parameter.requires_grad)
        is_mixed = computes_in in _HALF_PRECISIONS and any(
            p.is_floating_point() and p.dtype != computes_in for p in attachment.parameters.values()
        )
        self._slots[name] = _Occupation(attachment, computes_in, is_mixed, changed, dtypes)

    def remove(self, name: str) -> None:
        """Takes the slot off; the base is what it was before, bit for bit."""
        occupation = self._slots.pop(name)
        occupation.attachment.undo()
        absent = [key for key, kept in occupation.changed.items() if kept is None]
        from_files = self._read(absent) if absent else {}
        for key, kept in occupation.changed.items():
            parameter = occupation.attachment.parameters[key]
            original = from_files[key] if kept is None else kept
            parameter.grad = None
            parameter.data = original.to(parameter.device, occupation.dtypes[key])

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The slot's parameters, `site.tensor` → parameter."""
        return dict(self._slots[name].attachment.parameters)

    def weights_changed(self) -> None:
        """Nothing is computed from weights ahead of a forward pass."""

    def _attach(self, method: WholeMethod, seed: int) -> Attachment:
        self._unwrap()
        return method.attach(self._base, seed)

    def _files(self) -> list[Path]:
        folder = Path(self._base.config._name_or_path or "/nonexistent")
        return sorted(folder.glob("*.safetensors"))

    def _names_in_files(self) -> frozenset[str]:
        from safetensors import safe_open

        names: set[str] = set()
        for file in self._files():
            with safe_open(file, framework="pt") as opened:
                names.update(opened.keys())
        return frozenset(names)

    def _read(self, keys: list[str]) -> dict[str, torch.Tensor]:
        from safetensors import safe_open

        found: dict[str, torch.Tensor] = {}
        for file in self._files():
            with safe_open(file, framework="pt") as opened:
                found |= {key: opened.get_tensor(key) for key in set(opened.keys()) & set(keys)}
        return found


def place(
    attachment: Attachment,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    *,
    widens: bool,
    own: set[int],
) -> None:
    """Puts a slot's tensors where a method asks for them.

    Args:
        attachment: Of the method.
        tensors: By site and name; those of the base's own weights become the weights themselves.
        widens: The base's own weights take the tensors' type; else they keep theirs.
        own: Ids of the base's own parameters.
    """
    for key, parameter in attachment.parameters.items():
        site, _, name = key.rpartition(".")
        value = tensors[site][name]
        if id(parameter) in own:
            parameter.data = value if widens else value.to(parameter.device, parameter.dtype)
        elif parameter.requires_grad:
            parameter.data = value.to(parameter.device)
        else:  # shares its memory with a buffer of the method's modules
            parameter.data.copy_(value)


def require_shapes(
    name: str,
    wanted: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
) -> None:
    """Compares tensors with what a method puts on a base.

    Raises:
        AdapterError: A name or a shape differs; the first one is named.
    """
    given = {f"{s}.{k}": tuple(value.shape) for s, of in tensors.items() for k, value in of.items()}
    odd = sorted(key for key in given.keys() | wanted.keys() if given.get(key) != wanted.get(key))
    if odd:
        raise AdapterError(
            f"adapter {name!r} does not fit the base: {odd[0]} should be {wanted.get(odd[0])}, is "
            f"{given.get(odd[0])}; was it made for another base?"
        )
