"""What full and half fine-tuning share: the base's own weights are what is trained and kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from graft.core.errors import AdapterError, ConfigError
from graft.core.spaces import Float, Space
from graft.methods.base import Method, by_site
from graft.methods.whole import Attachment, WholeMethod

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from graft.methods.base import AdapterTensors


class OwnWeightsMethod(WholeMethod):
    """A method that trains weights of the base in place; its artifact is a whole model."""

    default_lr: ClassVar[float] = 2e-5
    mergeable: ClassVar[bool] = True
    is_read_by_peft: ClassVar[bool] = False
    artifact_kind: ClassVar[Literal["adapter", "full"]] = "full"

    @classmethod
    def search_space(cls) -> dict[str, Space]:
        """The learning rate, about a tenth of LoRA's (arXiv 2405.09673)."""
        return {"train.lr": Float(low=5e-6, high=5e-4, log=True)}

    def attach(self, base: PreTrainedModel, seed: int) -> Attachment:
        """Every parameter of the base is the slot's own; a tied one stands once.

        Raises:
            ConfigError: The base is quantized, or keeps weights that are no parameters.
        """
        parameters = dict(base.named_parameters())
        names = {name for name, _ in base.named_parameters(remove_duplicate=False)}
        odd = [name for name, p in parameters.items() if not p.is_floating_point()]
        odd += sorted(set(base.state_dict()) - names)
        if odd:
            raise ConfigError(
                f"method {self.type} trains every weight of the base, and {odd[0]} is quantized or "
                "no parameter; load the base with model.quantization: {type: none}, or use lora"
            )
        for parameter in parameters.values():
            parameter.requires_grad_(True)

        def freeze() -> None:
            base.requires_grad_(False)

        return Attachment(parameters, undo=freeze, merge=freeze)

    def to_peft(
        self, tensors: AdapterTensors, base: str
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The settings, and the weights under the names that transformers gives them."""
        config = {
            "peft_type": self.type.upper(),
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            **self.model_dump(mode="json", exclude={"type"}),
        }
        return config, {f"{s}.{k}": value for s, of in tensors.items() for k, value in of.items()}

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], state: dict[str, torch.Tensor]
    ) -> tuple[Method, AdapterTensors]:
        """Reads the same back.

        Raises:
            AdapterError: There is no weight, or one outside a module.
        """
        method = cls.model_validate(
            {key: config[key] for key in cls.model_fields if key != "type" and key in config}
        )
        if odd := [name for name in state if "." not in name]:
            raise AdapterError(f"model.safetensors: {odd[0]!r} is no weight of a module")
        if not state:
            raise AdapterError("model.safetensors holds no weight")
        return method, by_site(state)
