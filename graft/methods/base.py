"""What a tuning method is: its settings, what it can do, and its files.

A method is one of three kinds, by what it attaches to: `LayerMethod` (`graft.methods.layerwise`)
changes what linear layers put out, `VirtualMethod` (`graft.methods.virtual`) gives every row
virtual tokens to attend to, `WholeMethod` (`graft.methods.whole`) owns the base and trains it in
place.
A method class is a schema too, so this module imports no torch at run time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar

from graft.core.model import Variant
from graft.core.registry import Registry
from graft.core.spaces import Space

if TYPE_CHECKING:
    import torch

    AdapterTensors = dict[str, dict[str, torch.Tensor]]

T = TypeVar("T")

HEAD = "score"
"""Site of a slot's linear head, beside the sites of its method; its one tensor is `weight`."""


def by_site(named: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """Regroups `site.tensor` → value as site → tensor → value."""
    found: dict[str, dict[str, T]] = {}
    for key, value in named.items():
        site, _, tensor = key.rpartition(".")
        found.setdefault(site, {})[tensor] = value
    return found


def split_head(
    tensors: Mapping[str, dict[str, T]],
) -> tuple[dict[str, dict[str, T]], dict[str, T] | None]:
    """Divides an adapter's tensors into what is the method's own and the head, if there is one."""
    own = {site: of_site for site, of_site in tensors.items() if site != HEAD}
    return own, tensors.get(HEAD)


class Site(NamedTuple):
    """One layer of the base that a method adapts."""

    name: str
    """Module path inside the base model, `model.layers.0.self_attn.q_proj`."""
    in_features: int
    out_features: int


class FusedSize(tuple[int, int]):
    """(in_features, out_features) of a layer that is no module: an expert's weight, or a router's.

    Methods adapt it only where a target names it: `experts.down_proj` (those of all experts),
    `experts.3.down_proj`, `mlp.gate`.
    """


class Surroundings(NamedTuple):
    """What a method is asked to train under: the parts of a recipe that can forbid it."""

    quantization: str = "none"
    zero_stage: int = 0
    workers: int = 1
    steps: int = 1
    gradient_checkpointing: bool = False
    needs_deepspeed: bool = False
    """It is stepped by DeepSpeed, in processes of its own."""


class Method(Variant):
    """Base of all tuning methods.

    Tensors of a whole adapter are a `dict[str, dict[str, Tensor]]`: site name → tensor name →
    tensor.
    """

    packable: ClassVar[bool] = False
    """Several slots of this method may train together in one forward pass."""
    mergeable: ClassVar[bool] = False
    """The adapter can be put into the base weights exactly."""
    servable: ClassVar[frozenset[str]] = frozenset()
    """Engines that serve it unmerged: `native`, `vllm`."""
    quantized_base: ClassVar[frozenset[str]] = frozenset()
    """Quantization types of the base that it trains on, beside `none`."""
    zero_stages: ClassVar[frozenset[int]] = frozenset({0})
    """ZeRO stages that it trains under."""
    checkpoints_activations: ClassVar[bool] = True
    """It trains under `scale.gradient_checkpointing`."""
    frozen: ClassVar[frozenset[str]] = frozenset()
    """Names of its tensors that take no gradient."""
    is_identity_at_start: ClassVar[bool] = True
    """A fresh adapter changes no output."""
    is_read_by_peft: ClassVar[bool] = True
    """PEFT loads its files; else they hold a form of our own."""
    default_lr: ClassVar[float] = 2e-4
    """`train.lr` where a recipe leaves it out."""
    artifact_kind: ClassVar[Literal["adapter", "full"]] = "adapter"
    """It is published as an adapter of the base, or as a whole model (`full`)."""
    peft_only_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields of PEFT's config that are no settings of its own but that `from_peft` reads."""
    knows_every_peft_field: ClassVar[bool] = False
    """`from_peft` checks all fields of PEFT's config by itself."""

    @property
    def merges(self) -> bool:
        """An adapter with these settings can be put into the base; by default all can or none."""
        return self.mergeable

    @classmethod
    def search_space(cls) -> dict[str, Space]:
        """What `search: {space: auto}` varies: field path (`method.r`, `train.lr`) → range."""
        return {}

    def refusals(self, around: Surroundings) -> list[str]:
        """Says why it cannot train there, each reason with the nearest combination that works.

        Asked before anything is loaded.
        """
        found = []
        if around.quantization not in self.quantized_base | {"none"}:
            known = ", ".join(sorted(self.quantized_base | {"none"}))
            found.append(
                f"method {self.type} does not train on a base with model.quantization "
                f"{around.quantization}; it does with {known}"
            )
        if around.zero_stage not in self.zero_stages:
            known = ", ".join(map(str, sorted(self.zero_stages)))
            found.append(
                f"method {self.type} does not train under scale.zero_stage {around.zero_stage}; "
                f"it does under {known}"
            )
        if around.gradient_checkpointing and not self.checkpoints_activations:
            found.append(
                f"method {self.type} does not train under scale.gradient_checkpointing; "
                "set it to false, a smaller train.micro_batch_tokens saves memory too"
            )
        return found

    def lr_scale(self, tensor: str) -> float:
        """Returns the factor on `train.lr` of one of its tensors, by tensor name."""
        return 1.0

    def starting_tensors(self, given: Method, tensors: AdapterTensors) -> AdapterTensors:
        """Returns what to start training from, made of a loaded adapter's; by default the same."""
        return tensors

    @classmethod
    def reads_peft(cls, config: dict[str, Any]) -> bool:
        """Says whether `from_peft` is for an `adapter_config.json`; by default `type` decides."""
        return bool(str(config.get("peft_type")).lower() == cls.model_fields["type"].default)

    @abstractmethod
    def to_peft(
        self, tensors: AdapterTensors, base: str
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Returns PEFT's `adapter_config.json` content and state dict.

        A method that PEFT does not know writes the same two files under its own `peft_type`, the
        `type` in capitals.
        """

    @classmethod
    @abstractmethod
    def from_peft(
        cls, config: dict[str, Any], state: dict[str, torch.Tensor]
    ) -> tuple[Method, AdapterTensors]:
        """Reads the same back; the config is hostile input, unsafe fields are refused."""


METHODS: Registry[Method] = Registry("method", "graft.methods")
