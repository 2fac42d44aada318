"""From a decoder's last hidden states to logits, as each architecture does it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graft.core.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_SAME = 0.02
"""Relative; the same products in another order differ by far less, a forgotten scale by more."""


def head_logits(base: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Applies the output head to `[..., hidden]`, and the scale and soft cap that some bases have.

    Returns:
        `[..., vocabulary]`.
    """
    import torch

    logits: torch.Tensor = base.get_output_embeddings()(hidden)
    config = base.config.get_text_config()
    scale = _scale(config)
    if scale != 1.0:
        logits = logits * scale
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _scale(config: Any) -> float:
    """What logits are multiplied by; Granite and MiniCPM3 divide, HyperCLOVA X does not."""
    scaling = getattr(config, "logits_scaling", None) or 1.0
    scale = scaling if config.model_type == "hyperclovax" else 1.0 / scaling
    for name in ("logit_scale", "lm_head_multiplier"):
        scale *= getattr(config, name, None) or 1.0
    return float(scale)


def require_known_head(base: PreTrainedModel) -> None:
    """Refuses a base whose own logits are others: an architecture does more than is known here.

    Raises:
        ModelError: It says what differs.
    """
    import torch

    ids = torch.arange(4, device=base.device)[None]  # one of them may be padding, which is zero
    with torch.no_grad():
        own = base(input_ids=ids).logits.float()
        here = head_logits(base, base.get_decoder()(input_ids=ids).last_hidden_state).float()
    is_broken = not torch.isfinite(own).all()  # of weights, which is another check's to tell
    is_alike = own.shape == here.shape
    if not is_alike or (not is_broken and (own - here).abs().max() > _SAME * own.abs().max()):
        raise ModelError(
            f"{type(base).__name__} makes its logits in a way that is not known here, so training "
            "and answers would be wrong; choose a base of another architecture"
        )
