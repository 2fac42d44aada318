"""Loading a reward model that is a whole model: a sequence classifier with one output."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from graft.core.errors import ModelError
from graft.models._quiet import no_foreign_bars
from graft.models.load import pick_device, torch_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from graft.models.section import ModelSection


def require_one_output(folder: Path) -> None:
    """Refuses a folder that is no sequence classifier of one number; nothing is loaded.

    Raises:
        ModelError: Another kind of model, or several outputs.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for one cause
        raise ModelError(
            f"reward model {folder}: config.json cannot be read ({type(error).__name__}: {error})"
        ) from error
    kinds = config.architectures or ["none"]
    if not kinds[0].endswith("ForSequenceClassification"):
        raise ModelError(
            f"reward model {folder}: its architecture is {kinds[0]}, and what gives a score is a "
            "...ForSequenceClassification; train one with objective: reward"
        )
    if config.num_labels != 1:
        raise ModelError(
            f"reward model {folder}: its head has {config.num_labels} outputs, and a reward is one "
            "number; give a classifier of num_labels 1"
        )


def load_reward_model(folder: Path, section: ModelSection) -> PreTrainedModel:
    """Loads such a folder in eval mode, where and as precise as the base is.

    Code that comes with it is never run; weights come from safetensors only.

    Raises:
        ModelError: It is no reward model, or its weights do not fit or have no head.
    """
    from transformers import AutoModelForSequenceClassification

    require_one_output(folder)
    try:
        with no_foreign_bars():
            model, told = AutoModelForSequenceClassification.from_pretrained(
                folder,
                dtype=torch_dtype(section),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # transformers raises many kinds for one cause
        raise ModelError(
            f"reward model {folder} cannot be loaded ({type(error).__name__}: {error})"
        ) from error
    if missing := sorted(told["missing_keys"]):
        raise ModelError(
            f"reward model {folder} has no {missing[0]} in its files; it would score at random"
        )
    model.to(pick_device(section))
    model.requires_grad_(False)
    loaded: PreTrainedModel = model.eval()
    return loaded
