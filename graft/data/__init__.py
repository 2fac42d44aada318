"""Data: read, checked, rendered with the model's own chat template, and proved."""

from graft.data.formats import load_examples
from graft.data.mixture import DataPart, prepare_parts
from graft.data.prepare import DataProof, PreparedData, SplitProof, prepare_data
from graft.data.records import EvalPrompt, Example, Message, TokenRow
from graft.data.template import ChatTemplate

__all__ = [
    "ChatTemplate",
    "DataPart",
    "DataProof",
    "EvalPrompt",
    "Example",
    "Message",
    "PreparedData",
    "SplitProof",
    "TokenRow",
    "load_examples",
    "prepare_data",
    "prepare_parts",
]
