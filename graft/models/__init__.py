"""Base models: where they come from, and how they are loaded."""

from graft.models.load import load_model, pick_device, require_device, torch_dtype
from graft.models.ready import ReadyModel
from graft.models.resolve import find_config, resolve_model
from graft.models.tokenizer import load_tokenizer, load_tokenizer_in, template_digest

__all__ = [
    "ReadyModel",
    "find_config",
    "load_model",
    "load_tokenizer",
    "load_tokenizer_in",
    "pick_device",
    "require_device",
    "resolve_model",
    "template_digest",
    "torch_dtype",
]
