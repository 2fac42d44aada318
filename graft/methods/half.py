"""Half fine-tuning (HFT): each round trains a new half of the base and freezes the other half.

It forgets less than full fine-tuning. In every decoder layer a round trains 2 of the 4 attention
matrices, 1 of the 2 norms, and of the 3 feed-forward matrices 2 or 1, alternating over the layers,
so that half of them train in sum. Embeddings, output head and final norm always train, as in the
paper. Layers that have other counts (fused projections, experts) are halved the same way.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from graft.core.seeds import derive_seed
from graft.core.spaces import Choice, Space
from graft.methods._own_weights import OwnWeightsMethod
from graft.methods.base import METHODS, Surroundings

_IN_LAYER = re.compile(r"^(?P<layer>.*?\.\d+)\.(?P<inside>.+)$")
_NORM = re.compile(r"(^|_)(ln|norm|layernorm|rmsnorm)(_|\d|$)|norm\d*$", re.IGNORECASE)


@METHODS.register
class HalfMethod(OwnWeightsMethod):
    """Half fine-tuning.

    Frozen weights stay bit for bit in a round, with their moments: neither gradient, weight decay
    nor momentum touches them.

    Reference:
        HFT: Half Fine-Tuning for Large Language Models, arXiv 2404.18466 (selection by category).
    """

    type: Literal["half"] = "half"
    round_steps: int = Field(50, ge=1)
    """Steps of a round; the next one picks anew."""

    @classmethod
    def search_space(cls) -> dict[str, Space]:
        """Lengths of a round that fit short searches, and the learning rate."""
        return {"method.round_steps": Choice(values=(5, 10, 25)), **super().search_space()}

    def refusals(self, around: Surroundings) -> list[str]:
        """Also DeepSpeed's processes: they would step frozen weights by momentum and decay."""
        found = super().refusals(around)
        if around.workers > 1 or (around.needs_deepspeed and not around.zero_stage):
            found.append(
                f"method {self.type} trains in one process with plain torch, not with "
                f"scale.workers {around.workers} under DeepSpeed; set scale: {{workers: 1, "
                "backend: torch}, or use method full, which shards under every ZeRO stage"
            )
        return found

    def trained_at(self, names: Sequence[str], step: int, seed: int) -> frozenset[str]:
        """The round's half: of each layer and category, half of the matrices with their biases."""
        rng = random.Random(derive_seed("half", seed, step // self.round_steps))
        offset = rng.randrange(2)
        trained = []
        for of_layer in _by_layer(names).values():
            offset += 1
            for members in of_layer.values():
                modules = sorted({_module(name) for name in members})
                # An odd count is rounded up in every second layer and down in the others.
                chosen = set(rng.sample(modules, (len(modules) + offset % 2) // 2))
                trained += [name for name in members if _module(name) in chosen]
        return frozenset(trained) | {name for name in names if not _IN_LAYER.match(name)}


def _module(name: str) -> str:
    """A weight and its bias belong together; parameters of experts stand for themselves."""
    return name.removesuffix(".weight").removesuffix(".bias")


def _by_layer(names: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Groups the parameters of decoder layers: layer → category → names, all in order."""
    layers: dict[str, dict[str, list[str]]] = {}
    for name in names:
        match = _IN_LAYER.match(name)
        if match is None:
            continue
        parent, _, last = _module(match["inside"]).rpartition(".")
        category = "norm" if _NORM.search(last) else parent
        layers.setdefault(match["layer"], {}).setdefault(category, []).append(name)
    return layers
