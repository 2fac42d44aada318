"""Adapter folders in PEFT's format, written whole and read as hostile input.

`adapter_config.json` and `adapter_model.safetensors` are PEFT's own. An adapter whose compressor
has a number format of its own is stored as `adapter_model.<type>.safetensors` beside
`graft_storage.json`; `graft export` writes it in plain PEFT form for other libraries.

A method that trains the base's own weights is kept as a whole model: `model.safetensors` under
transformers' names, and its settings in `graft_model.json`, because transformers takes a folder
with an `adapter_config.json` for an adapter.

The head of a reward model stands where PEFT keeps that of a sequence classifier: `task_type` is
`SEQ_CLS` and `modules_to_save` is `[score]`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from graft.artifacts.tensors import load_json, read_header, require_finite
from graft.compressors._head import add_head, take_head
from graft.compressors.base import COMPRESSORS, Adapter, Compressor
from graft.core.errors import AdapterError, CompressionError, ConfigError
from graft.core.files import folder_atomic, write_json
from graft.core.registry import nearest
from graft.methods.base import HEAD, METHODS, Method, split_head

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
MODEL_CONFIG = "graft_model.json"
MODEL_TENSORS = "model.safetensors"
STORAGE = "graft_storage.json"
_METADATA = {"format": "pt"}
_SAFETENSORS_TYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
MAX_CONFIG_BYTES = 2**20

_REWARD_MODEL = (
    "A reward model: one number for each answer, from the state of its last token. Load it with "
    "`num_labels=1`.\n\n"
)

_DESCRIPTIVE = frozenset(
    {
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "peft_version",
        "target_modules",
    }
)
"""Fields that describe; none of them is followed, fetched or imported."""
_HARMLESS_INITIALISATIONS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Others (PiSSA, OLoRA, CorDA, LoftQ, ...) change the base's own weights."""


def save_adapter(folder: Path, adapter: Adapter, base_source: str) -> None:
    """Writes an adapter folder; it appears whole or not at all.

    Args:
        folder: Where; must not exist.
        adapter: What.
        base_source: What PEFT shall load as the base: a hub id or a folder.

    Raises:
        AdapterError: The folder exists or cannot be written, or a tensor holds NaN or infinity.
    """
    from safetensors.torch import save_file

    config, state = _as_peft(adapter, base_source)
    for name, value in state.items():
        if not value.isfinite().all():
            raise AdapterError(f"{name} holds NaN or infinity; an adapter like that is not saved")
    encoded = {
        name: value.detach().cpu().contiguous() for name, value in _encoded(adapter, state).items()
    }
    try:
        with folder_atomic(folder) as temporary:
            is_model = adapter.method.artifact_kind == "full"
            write_json(temporary / (MODEL_CONFIG if is_model else CONFIG), _plain(config))
            tensor_file = temporary / _tensor_name(adapter.storage, is_model)
            save_file(encoded, tensor_file, metadata=_METADATA)
            if adapter.storage is not None:
                write_json(temporary / STORAGE, adapter.storage.model_dump(mode="json"))
            card = _card(adapter, base_source)
            (temporary / "README.md").write_text(card, encoding="utf-8")
    except FileExistsError as error:
        raise AdapterError(f"{folder} already exists; choose another folder") from error
    except OSError as error:
        raise AdapterError(f"cannot write {folder}: {error.strerror or error}") from error


def tensor_file_bytes(adapter: Adapter) -> int:
    """Returns the size of the file that `save_adapter` would write for the tensors."""
    state = _encoded(adapter, _as_peft(adapter, "")[1])
    header: dict[str, Any] = {"__metadata__": _METADATA}
    end = 0
    for name, value in sorted(state.items(), key=lambda item: (-item[1].itemsize, item[0])):
        start, end = end, end + value.nbytes
        dtype = _SAFETENSORS_TYPES[str(value.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + end  # the header's length, the header in eights, the data


def _as_peft(adapter: Adapter, base_source: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    tensors, head = split_head(adapter.tensors)
    config, state = adapter.method.to_peft(tensors, base_source)
    return add_head(adapter.method, config, state, head)


def _encoded(adapter: Adapter, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return adapter.storage.encode(state) if adapter.storage else state


def load_adapter(folder: Path) -> Adapter:
    """Reads an adapter folder. No code in it is run, no name in it is followed.

    Raises:
        AdapterError: Missing, damaged or foreign files; unknown, unsafe or contradictory settings.
    """
    is_model = (folder / MODEL_CONFIG).is_file()
    path = folder / (MODEL_CONFIG if is_model else CONFIG)
    config = _read_config(path)
    storage = _read_storage(folder)
    state = _read_tensors(folder / _tensor_name(storage, is_model), storage)
    method = _method_class(path, config)
    if (method.artifact_kind == "full") != is_model:
        raise AdapterError(
            f"{path}: peft_type {config['peft_type']} stands in the wrong file; a whole model says "
            f"it in {MODEL_CONFIG}, an adapter in {CONFIG}"
        )
    config, state, head = take_head(config, state)
    _require_plain(path, method, config)
    try:
        settings, tensors = method.from_peft(config, state)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise AdapterError(
            f"{path}: {field}: {first['msg']} (given {config.get(field)!r})"
        ) from error
    return Adapter(settings, tensors if head is None else {**tensors, HEAD: head}, storage)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: sorted(value) if isinstance(value, set) else value for key, value in config.items()
    }


def _tensor_name(storage: Compressor | None, is_model: bool) -> str:
    if storage is not None:
        return f"adapter_model.{storage.type}.safetensors"
    return MODEL_TENSORS if is_model else TENSORS


def _read_object(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise AdapterError(
                f"{path} is larger than {MAX_CONFIG_BYTES} bytes; that is no adapter"
            )
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise AdapterError(
            f"{path} is missing; give the folder of an adapter in PEFT's format"
        ) from error
    except OSError as error:
        raise AdapterError(f"cannot read {path}: {error.strerror or error}") from error
    value = load_json(content, where=str(path))
    if not isinstance(value, dict):
        raise AdapterError(f"{path} holds {type(value).__name__}, expected a JSON object")
    return value


def _read_config(path: Path) -> dict[str, Any]:
    config = _read_object(path)
    if not isinstance(config.get("peft_type"), str):
        raise AdapterError(f"{path}: peft_type is missing; is this a PEFT adapter?")
    return config


def _read_storage(folder: Path) -> Compressor | None:
    if not (folder / STORAGE).exists():
        return None
    try:
        return COMPRESSORS.build(_read_object(folder / STORAGE))
    except (ConfigError, ValidationError) as error:
        raise AdapterError(f"{folder / STORAGE}: {error}") from error


def _read_tensors(path: Path, storage: Compressor | None) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    pickle = path.parent / "adapter_model.bin"
    if pickle.exists():
        raise AdapterError(
            f"{pickle} is a pickle, which can run code when it is read: it is refused; convert the "
            f"adapter to {TENSORS} where you trust it, and remove the pickle"
        )
    if not path.is_file():
        raise AdapterError(f"{path} is missing; give the folder of an adapter in PEFT's format")
    require_finite(path, read_header(path))
    state = load_file(path)
    if storage is None:
        return state
    try:
        return storage.decode(state)
    except CompressionError as error:
        raise AdapterError(f"{path}: {error}") from error


def _method_class(path: Path, config: dict[str, Any]) -> type[Method]:
    methods = [METHODS.get(name) for name in METHODS.names()]
    for method in methods:
        if method.reads_peft(config):
            return method
    given, known = config["peft_type"], [name.upper() for name in METHODS.names()]
    raise AdapterError(
        f"{path}: no method reads peft_type {_shown(given)}."
        f"{nearest(given.upper(), known)} Known: {', '.join(known)}"
    )


def _require_plain(path: Path, method: type[Method], config: dict[str, Any]) -> None:
    """Refuses set fields that the method does not read: they may change what the adapter does."""
    if method.knows_every_peft_field:
        return
    defaults = _peft_defaults(config["peft_type"])
    for key, value in config.items():
        is_read = key in method.model_fields or key in method.peft_only_fields
        if key == "init_lora_weights":  # not a matter of the method: it is about the base
            is_read = value in _HARMLESS_INITIALISATIONS
        if key in _DESCRIPTIVE or is_read or not value:
            continue
        if key == "auto_mapping" and _is_from_transformers(value):
            continue
        if key not in defaults or value != defaults[key]:
            raise AdapterError(
                f"{path}: {key}={_shown(value)} is not understood for {config['peft_type']} and "
                "could change what the adapter does; re-export the adapter without it"
            )


def _is_from_transformers(value: Any) -> bool:
    library = value.get("parent_library") if isinstance(value, dict) else None
    return isinstance(library, str) and library.partition(".")[0] == "transformers"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _peft_defaults(peft_type: str) -> dict[str, Any]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    config = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if config is None:
        return {}
    found: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        if item.default is not dataclasses.MISSING:
            found[item.name] = item.default
        elif item.default_factory is not dataclasses.MISSING:
            found[item.name] = item.default_factory()
    return found


def _card(adapter: Adapter, base_source: str) -> str:
    settings = "\n".join(
        f"- `{key}`: {value}" for key, value in adapter.method.model_dump(mode="json").items()
    )
    form = (
        "plain PEFT" if adapter.storage is None else f"{adapter.storage.type} (export it for PEFT)"
    )
    is_model = adapter.method.artifact_kind == "full"
    if is_model:
        form = "a whole model for transformers"
    is_reward_model = HEAD in adapter.tensors
    return (
        "---\n"
        f"library_name: {'transformers' if is_model else 'peft'}\n"
        f"base_model: {json.dumps(base_source)}\n"
        f"base_model_relation: {'finetune' if is_model else 'adapter'}\n"
        f"pipeline_tag: {'text-classification' if is_reward_model else 'text-generation'}\n"
        f"tags: [{adapter.method.type}, graft]\n"
        "---\n\n"
        f"# {'A tuned model' if is_model else 'An adapter'} of {base_source}\n\n"
        f"{_REWARD_MODEL if is_reward_model else ''}"
        f"{settings}\n- stored as: {form}\n"
    )
