"""What PEFT takes up of an adapter folder, found out by PEFT itself on the shape of the base alone.

PEFT rewrites the targets of LoRA on many mixture-of-experts bases, and leaves out tensors for which
its rewriting has no place; whoever loads them gets another model, and a warning at most.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from graft.core.errors import AdapterError

if TYPE_CHECKING:
    from pathlib import Path

    from graft.engine.memory.shape import ModelShape


def require_taken_by_peft(folder: Path, shape: ModelShape) -> None:
    """Has PEFT load a LoRA folder onto a base without weights.

    Args:
        folder: In PEFT's format.
        shape: Of its base.

    Raises:
        AdapterError: PEFT refuses the folder, or leaves tensors out, or misses some.
    """
    import peft

    with torch.device("meta"):
        base = shape.build("eager", torch.float32)
    path = str(folder)
    try:
        with warnings.catch_warnings(action="ignore"):  # what is lost is told below
            model = peft.PeftModel(
                base, peft.PeftConfig.from_pretrained(path), "default", low_cpu_mem_usage=True
            )
            found = model.load_adapter(path, "default", torch_device="cpu", low_cpu_mem_usage=True)
    except Exception as error:  # PEFT raises many kinds for one cause
        raise AdapterError(
            f"PEFT {peft.__version__} does not load this adapter onto its base "
            f"({type(error).__name__}: {error}); use --format merged"
        ) from error
    lost = [*found.unexpected_keys, *found.missing_keys]
    if lost:
        raise AdapterError(
            f"PEFT {peft.__version__} would leave {len(lost)} tensors of this adapter out (the "
            f"first: {lost[0]}), so that others got another model; use --format merged"
        )
