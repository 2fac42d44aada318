"""Methods that change what linear layers put out: plain tensor functions around frozen layers.

The engine owns the forward pass. It asks a method for its sites once, makes one set of tensors a
site and slot with `init`, and inside each adapted layer calls `delta` for all rows of the method's
slots at once.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Protocol

from graft.methods.base import Method, Site

if TYPE_CHECKING:
    import torch

    from graft.methods.base import AdapterTensors
    from graft.methods.routing import GroupRouting


class FrozenLayer(Protocol):
    """What a method may ask of the frozen layer that it adapts."""

    def weight(self) -> torch.Tensor:
        """The weight that the layer computes with, `[out_features, in_features]`.

        Dequantized where the base is quantized, at least fp32; not to be written to.
        """

    def squared_row_norms(self) -> torch.Tensor:
        """Squared length of each row of `weight()`, `[out_features]`; it is computed once."""

    def bias(self) -> torch.Tensor | None:
        """The bias, `[out_features]`."""

    def original_weight(self) -> torch.Tensor:
        """The weight before quantization, read from the model's files, at least fp32."""

    def input_moment(self) -> torch.Tensor:
        """Covariance of the inputs over training rows, `[in_features, in_features]`.

        There where the method `looks_at_inputs`; at least fp32.
        """


class LayerMethod(Method):
    """A method with tensors of its own at each linear layer that it adapts.

    Tensors of one slot at one site are a `dict[str, Tensor]`.
    """

    scales_input: ClassVar[bool] = False
    """`scale_input` does something: the layer's input is changed before the frozen product."""
    regularizes: ClassVar[bool] = False
    """`regularization` adds to the loss."""
    acts_after_step: ClassVar[bool] = False
    """`after_step` does something."""

    @property
    def looks_at_inputs(self) -> bool:
        """`init` asks for `layer.input_moment()`, so training rows are read first."""
        return False

    def expert_refusal(self) -> str | None:
        """Says why it does not adapt single experts and routers; None where it does."""
        return f"method {self.type} does not adapt it, method lora does: leave that target out"

    @abstractmethod
    def sites(self, linears: dict[str, tuple[int, int]]) -> tuple[Site, ...]:
        """Picks its layers. Called once a slot, in the process that holds the model.

        Args:
            linears: Every linear layer of the base, module path → (in_features, out_features).

        Raises:
            ConfigError: A target matches nothing; the near names are in the message.
        """

    @abstractmethod
    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each of its tensors at a site; no weight is needed to know it."""

    @abstractmethod
    def init(
        self, site: Site, generator: torch.Generator, layer: FrozenLayer
    ) -> dict[str, torch.Tensor]:
        """Makes the fp32 tensors of one site; the same generator state, the same tensors."""

    @classmethod
    @abstractmethod
    def stack(
        cls,
        slots: list[dict[str, torch.Tensor]],
        methods: tuple[Method, ...],
        dtype: torch.dtype,
        layer: FrozenLayer,
    ) -> dict[str, torch.Tensor]:
        """Puts the tensors of several slots at one site together, ready for `delta`.

        Called every forward pass while training (gradients flow through it), once and cached while
        serving.

        Args:
            slots: Each slot's tensors at this site.
            methods: Each slot's settings, same order.
            dtype: The dtype that the base computes in.
            layer: The frozen layer.
        """

    @classmethod
    def scale_input(
        cls, x_NTI: torch.Tensor, stacked: dict[str, torch.Tensor], routing: GroupRouting
    ) -> torch.Tensor:
        """Returns the input that the frozen layer shall see, for the rows of this method's slots.

        Called only where the method `scales_input`.
        """
        return x_NTI

    @classmethod
    @abstractmethod
    def delta(
        cls,
        x_NTI: torch.Tensor,
        base_NTO: torch.Tensor,
        stacked: dict[str, torch.Tensor],
        routing: GroupRouting,
    ) -> torch.Tensor | None:
        """Returns what to add to the base layer's output, `[rows, tokens, out_features]`.

        Args:
            x_NTI: The layer's input for the rows of this method's slots, ordered by slot; after
                `scale_input`.
            base_NTO: The frozen layer's output for the same rows; not to be written to.
            stacked: What `stack` made.
            routing: Which rows belong to which slot; dropout streams while training.

        Returns:
            The delta, or None where there is nothing to add.
        """

    def merge_delta(self, tensors: dict[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
        """Returns the update of the base weight, `[out_features, in_features]`, if `mergeable`.

        Args:
            tensors: Of one site.
            weight: The base weight, at least fp32; not to be written to.
        """
        raise TypeError(f"method {self.type!r} cannot be merged into the base weights")

    def merge_bias_delta(
        self, tensors: dict[str, torch.Tensor], bias: torch.Tensor
    ) -> torch.Tensor | None:
        """Returns the update of the layer's bias, `[out_features]`; None leaves it as it is.

        Called where the method is `mergeable` and the layer has a bias.

        Args:
            tensors: Of one site.
            bias: The layer's bias, at least fp32; not to be written to.
        """
        return None

    def regularization(self, tensors: AdapterTensors) -> torch.Tensor | None:
        """Returns a scalar to add to a step's loss, once a step, or None.

        Called only where the method `regularizes`.
        """
        return None

    def after_step(
        self,
        tensors: AdapterTensors,
        gradients: AdapterTensors,
        state: dict[str, torch.Tensor],
        step: int,
        num_steps: int,
    ) -> None:
        """Changes its tensors in place after the optimizer did.

        Called only where the method `acts_after_step`.

        Args:
            tensors: Of the slot, to be written to.
            gradients: Of this step, after clipping.
            state: What the method wants to remember, by its own names; a part of each checkpoint.
            step: Steps done, this one included.
            num_steps: `train.steps`.
        """
