"""Methods that PEFT does not know: its two files, under a `peft_type` of our own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from graft.methods._state import joined_state, split_state
from graft.methods.base import Method
from graft.methods.layerwise import LayerMethod

if TYPE_CHECKING:
    import torch

    from graft.methods.base import AdapterTensors


class OwnFilesMethod(LayerMethod):
    """A method on layers with files of its own: its settings, and `site.tensor` → tensor."""

    is_read_by_peft: ClassVar[bool] = False
    tensor_names: ClassVar[tuple[str, ...]]
    """Tensors of each site."""

    def to_peft(
        self, tensors: AdapterTensors, base: str
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The settings under their own names, beside a `peft_type` that PEFT does not have."""
        config = {
            "peft_type": self.type.upper(),
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "inference_mode": True,
            **self.model_dump(mode="json", exclude={"type"}),
        }
        return config, joined_state(tensors)

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], state: dict[str, torch.Tensor]
    ) -> tuple[Method, AdapterTensors]:
        """Reads them back; shapes are compared when they are put on a base.

        Raises:
            AdapterError: A tensor is unknown or missing.
        """
        method = cls.model_validate(
            {key: config[key] for key in cls.model_fields if key != "type" and key in config}
        )
        return method, split_state(state, cls.tensor_names, method.type)
