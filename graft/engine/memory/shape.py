"""What a base model's `config.json` tells of its memory: nothing is loaded, no weight is read.

transformers builds the model without storage, so shapes are exact for every architecture that it
knows, mixtures of experts included.
"""

from __future__ import annotations

import copy
import json
import math
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from graft.core.errors import ModelError
from graft.core.files import sha256_json
from graft.engine.multi import MultiAdapterModel
from graft.engine.multi.prompts import base_shape
from graft.methods.virtual import BaseShape
from graft.models import ReadyModel, torch_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from graft.models.section import ModelSection, QuantizationSection

_NF4_BLOCK, _ABSMAX_BLOCK = 64, 256


class WeightBytes(NamedTuple):
    """What the frozen base occupies."""

    weights: int
    constants: int
    """Of quantization: the largest value of each block or row, and what those are divided by."""


class ModelShape:
    """Sizes of a base model.

    Args:
        config: Of the base.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config

    @classmethod
    def of(cls, source: ReadyModel | Path | PreTrainedConfig) -> ModelShape:
        """Reads a ready model, a folder with a `config.json`, that file, or a configuration.

        Raises:
            ModelError: It cannot be read, or transformers does not know the architecture.
        """
        if isinstance(source, ReadyModel):
            source = source.path
        return cls(_read(source) if isinstance(source, Path) else source)

    @cached_property
    def key(self) -> str:
        """Names the shape: equal configurations, equal keys."""
        return sha256_json(json.loads(self.config.to_json_string(use_diff=False)))

    @cached_property
    def _bare(self) -> PreTrainedModel:
        with torch.device("meta"):
            return self.build("eager", torch.float32)  # which every architecture has

    def build(
        self, attention: str, dtype: torch.dtype, num_layers: int | None = None
    ) -> PreTrainedModel:
        """Makes the model with weights that nobody set, wherever tensors are being made.

        Args:
            attention: As `model.attention`.
            dtype: Of its weights.
            num_layers: Decoder layers; None is all.

        Raises:
            ModelError: transformers does not know the architecture.
        """
        from transformers import AutoModelForCausalLM
        from transformers.initialization import no_init_weights

        config = copy.deepcopy(self.config)
        if num_layers is not None:
            text = config.get_text_config()
            text.num_hidden_layers = num_layers
            if getattr(text, "layer_types", None):
                text.layer_types = text.layer_types[:num_layers]
        try:
            with no_init_weights():
                model: PreTrainedModel = AutoModelForCausalLM.from_config(
                    config,
                    dtype=dtype,
                    attn_implementation=attention,
                    experts_implementation=None,  # transformers' own choice, as when loading
                )
            model.tie_weights()
        except Exception as error:  # transformers raises many kinds for one cause
            raise ModelError(
                f"no causal language model can be made of this config.json (model_type "
                f"{getattr(config, 'model_type', None)!r}): {type(error).__name__}: {error}"
            ) from error
        return model

    @cached_property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name → shape; a tied weight stands once."""
        return {name: tuple(p.shape) for name, p in self._bare.named_parameters()}

    @cached_property
    def num_parameters(self) -> int:
        """Weights of the base, tied ones once."""
        return sum(math.prod(shape) for shape in self.parameters.values())

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Linear layers below the head, module path → (in_features, out_features).

        Experts and routers of a mixture-of-experts base follow, as methods see them.
        """
        return MultiAdapterModel(self._bare).linears

    @cached_property
    def _packable(self) -> frozenset[str]:
        return frozenset(name for name, size in self.linears.items() if type(size) is tuple)

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return int(self.config.get_text_config().num_hidden_layers)

    @property
    def vocab_size(self) -> int:
        """Outputs of the head."""
        return self.base_shape.vocab_size

    @cached_property
    def base_shape(self) -> BaseShape:
        """What virtual tokens and a cache of keys and values depend on."""
        return base_shape(self._bare)

    @cached_property
    def layers_are_alike(self) -> bool:
        """All decoder layers have the same weights and the same kind of attention."""
        kinds = set(getattr(self.config.get_text_config(), "layer_types", None) or [""])
        layers: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, shape in self.parameters.items():
            index, inside = split_layer(name)
            if index is not None:
                layers.setdefault(index, {})[inside] = shape
        found = list(layers.values())
        is_alike = all(layer == found[0] for layer in found)
        return len(kinds) == 1 and len(found) == self.num_layers and is_alike

    def weight_bytes(self, section: ModelSection) -> WeightBytes:
        """Returns what the base occupies as the recipe's `model` section stores it."""
        if section.quantization.type == "none":
            return WeightBytes(self.unpacked_bytes(section), 0)
        packed = [packed_bytes(section.quantization, shape) for shape in self._packed_shapes()]
        return WeightBytes(
            self.unpacked_bytes(section) + sum(of.weights for of in packed),
            sum(of.constants for of in packed),
        )

    def unpacked_bytes(self, section: ModelSection) -> int:
        """Returns what those weights and buffers occupy that are not quantized."""
        count = self.num_parameters
        if section.quantization.type != "none":
            count -= sum(math.prod(shape) for shape in self._packed_shapes())
        buffers = sum(int(buffer.nbytes) for buffer in self._bare.buffers())
        return count * int(torch_dtype(section).itemsize) + buffers

    def _packed_shapes(self) -> list[tuple[int, ...]]:
        return [
            shape
            for name, shape in self.parameters.items()
            if name.removesuffix(".weight") in self._packable
        ]

    @cached_property
    def file_bytes(self) -> int:
        """Weights as they lie in their files."""
        dtype = self.config.dtype or torch.float32
        return self.num_parameters * int(dtype.itemsize)


def packed_bytes(quantization: QuantizationSection, shape: tuple[int, ...]) -> WeightBytes:
    """Returns what a quantized weight occupies.

    NF4 has 4 bits a weight and 32 bits a block of 64; double quantization keeps those constants in
    8 bits with 32 bits a block of 256 of them: 4.127 bits a weight in all.

    Args:
        quantization: int8 or nf4.
        shape: `[out_features, in_features]`.

    Reference:
        QLoRA: Efficient Finetuning of Quantized LLMs, arXiv 2305.14314; LLM.int8(), arXiv
        2208.07339, with one constant an output row.
    """
    count = math.prod(shape)
    if quantization.type == "int8":
        return WeightBytes(count, 4 * shape[0])
    blocks = math.ceil(count / _NF4_BLOCK)
    absmax = (
        blocks + 4 * math.ceil(blocks / _ABSMAX_BLOCK) + 4 if quantization.double else 4 * blocks
    )
    return WeightBytes(math.ceil(count / 2), absmax)


def split_layer(name: str) -> tuple[str | None, str]:
    """Divides a path at the decoder layer's number: its layer, and what is inside.

    >>> split_layer("model.layers.3.mlp.up_proj.weight")
    ('model.layers.3', 'mlp.up_proj.weight')
    """
    parts = name.split(".")
    at = next((at for at, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return None, name
    return ".".join(parts[: at + 1]), ".".join(parts[at + 1 :])


def _read(path: Path) -> Any:
    from transformers import AutoConfig

    folder = path.parent if path.is_file() else path
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for one cause
        raise ModelError(
            f"{folder / 'config.json'} cannot be read ({type(error).__name__}: {error}); give a "
            "folder with the config.json of a causal language model"
        ) from error
