"""Most other methods of PEFT, through PEFT's own code; a type that cannot run is refused with why.

`method: {type: peft, peft_type: OFT, config: {oft_block_size: 32, target_modules: [q_proj]}}`.
PEFT puts its modules into the base, so such a method has the base for itself: its trials are
dedicated, and it is served as a merged model (`graft export --format merged`). Its folder is
PEFT's own. Methods that GRAFT has a file for pack and serve beside others: use their own type.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from graft.core.errors import AdapterError, ConfigError
from graft.core.registry import nearest
from graft.core.seeds import derive_seed
from graft.core.spaces import Float, Space
from graft.methods._peft_config import (
    ABSENT,
    MERGED,
    OURS,
    UNMERGED,
    config_class,
    plain,
    plain_defaults,
    require_known,
)
from graft.methods.base import METHODS, Method
from graft.methods.whole import Attachment, WholeMethod

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel

    from graft.methods.base import AdapterTensors

_PREFIX = "base_model.model."
_SLOT = "default"


@METHODS.register
class PeftMethod(WholeMethod):
    """A method of PEFT by its `peft_type`.

    Dropout is refused: PEFT draws it from torch's global generator, which neither a checkpoint nor
    another number of workers could repeat.

    Reference:
        PEFT, State-of-the-art Parameter-Efficient Fine-Tuning methods, the library's documentation;
        the default, VeRA: Vector-based Random Matrix Adaptation, arXiv 2310.11454.
    """

    type: Literal["peft"] = "peft"
    peft_type: str = "VERA"
    """PEFT's name of the method, as in its `PeftType`."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Fields of PEFT's config class, under PEFT's names; others keep PEFT's defaults."""

    default_lr: ClassVar[float] = 1e-3
    mergeable: ClassVar[bool] = True
    is_identity_at_start: ClassVar[bool] = False
    knows_every_peft_field: ClassVar[bool] = True

    @property
    def merges(self) -> bool:
        """Where PEFT merges it."""
        return self.peft_type in MERGED

    @field_validator("peft_type")
    @classmethod
    def peft_type_runs_here(cls, peft_type: str) -> str:
        """Refuses what GRAFT has a type of its own for, what does not run here, and typos."""
        known = sorted(MERGED | UNMERGED)
        if peft_type in known:
            return peft_type
        if peft_type in ABSENT:
            raise ValueError(
                f"{peft_type} does not run here: {ABSENT[peft_type]}; known: {', '.join(known)}"
            )
        for name in METHODS.names():
            if name != "peft" and METHODS.get(name).reads_peft({"peft_type": peft_type}):
                raise ValueError(
                    f"{peft_type} is a method of its own here: method: {{type: {name}}}"
                )
        raise ValueError(
            f"PEFT has no {peft_type!r}.{nearest(peft_type.upper(), known)} Known: "
            f"{', '.join(known)}"
        )

    @model_validator(mode="after")
    def config_is_of_its_type(self) -> PeftMethod:
        """Refuses unknown fields, wrong values, dropout, and what PEFT itself refuses."""
        if self.config:
            require_known(self.peft_type, self.config)
            self._peft_config()
        return self

    @classmethod
    def search_space(cls) -> dict[str, Space]:
        """The learning rate; what else there is depends on the type."""
        return {"train.lr": Float(low=1e-4, high=2e-2, log=True)}

    def attach(self, base: PreTrainedModel, seed: int) -> Attachment:
        """Lets PEFT inject its modules, drawn from the seed alone.

        Raises:
            ConfigError: A target matches nothing, or a setting does not fit the base's layers.
        """
        import torch

        model = self.inject(base, seed)
        parameters = _named_as_saved(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        known = {id(p) for p in parameters.values()}
        if not trained or any(id(p) not in known for p in trained):
            raise ConfigError(
                f"method.peft_type {self.peft_type}: PEFT does not save all that it would train on "
                f"{type(base).__name__}; use another method"
            )

        def undo() -> None:
            model.base_model.unload()
            base.requires_grad_(False)

        def merge() -> None:
            dtype = base.dtype
            with torch.no_grad():
                model.base_model.merge_and_unload()
            base.requires_grad_(False)
            base.to(dtype)

        return Attachment(parameters, undo=undo, merge=merge)

    def _peft_config(self) -> PeftConfig:
        """Makes PEFT's own config.

        Raises:
            ValueError: PEFT refuses it.
        """
        made_by = config_class(self.peft_type)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made: PeftConfig = made_by(task_type="CAUSAL_LM", **self.config)
        except (TypeError, ValueError) as error:
            raise ValueError(f"config: PEFT refuses it for {self.peft_type}: {error}") from error
        return made

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    def inject(self, base: PreTrainedModel, seed: int) -> PeftModel:
        """Lets PEFT put its modules on the base, which may be without storage.

        Raises:
            ConfigError: A target matches nothing, or a setting does not fit the base's layers.
        """
        import torch
        from peft import PeftModel

        config = self._peft_config()
        _require_targets(base, getattr(config, "target_modules", None))
        cuda = [base.device] if base.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=cuda), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.manual_seed(derive_seed("init", seed, "peft"))
                model = PeftModel(base, config, _SLOT)
        except (ValueError, TypeError, RuntimeError, ImportError) as error:
            raise ConfigError(
                f"method.config: PEFT cannot put {self.peft_type} on {type(base).__name__}: {error}"
            ) from error
        if base.is_activation_checkpointing:
            # PEFT's remedy for reentrant checkpointing, which is not used here.
            base.disable_input_require_grads()
        if base.dtype == torch.float64:
            model.double()  # random projections are made in fp32
        base.eval()
        return model

    @classmethod
    def reads_peft(cls, config: dict[str, Any]) -> bool:
        """All types that run here."""
        return config.get("peft_type") in MERGED | UNMERGED

    def to_peft(self, tensors: AdapterTensors, base: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """PEFT's config, and its tensors under the names that it saves."""
        made = self._peft_config()
        made.base_model_name_or_path = base
        made.inference_mode = True
        state = {
            _saved_name(f"{site}.{name}"): tensor
            for site, of_site in tensors.items()
            for name, tensor in of_site.items()
        }
        content = {key: plain(value) for key, value in made.to_dict().items()}
        return content, state

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], state: dict[str, Any]
    ) -> tuple[Method, AdapterTensors]:
        """Reads PEFT's folder; every field is checked, tensors are compared with the base later.

        Raises:
            AdapterError: A target is a pattern, or a tensor has a name of no module.
        """
        _require_no_patterns(config)
        peft_type = str(config["peft_type"])
        defaults = plain_defaults(peft_type)
        settings = {
            key: value
            for key, value in config.items()
            if key not in OURS and (key not in defaults or value != defaults[key])
        }
        tensors: AdapterTensors = {}
        for key, tensor in state.items():
            site, _, name = key.removeprefix(_PREFIX).rpartition(".")
            if not key.startswith("base_model.") or not site:
                raise AdapterError(
                    f"adapter_model.safetensors: unexpected tensor {key!r} for {peft_type}"
                )
            tensors.setdefault(site, {})[name] = tensor
        return cls.model_validate({"peft_type": peft_type, "config": settings}), tensors


_PLAIN_NAME = re.compile(r"[\w.]+")


def _require_no_patterns(config: Mapping[str, Any]) -> None:
    """Refuses what PEFT would run as regular expressions, which a stranger can make endless.

    Raises:
        AdapterError: A target, an exclusion, or a layer with a rank of its own is a pattern.
    """
    patterns: list[tuple[str, object]] = []
    for key, value in config.items():
        if key in ("target_modules", "exclude_modules") and isinstance(value, str):
            patterns += [] if value == "all-linear" else [(key, value)]
        elif key == "layers_pattern":
            names = value if isinstance(value, list) else [value] if value else []
            patterns += [(key, name) for name in names]
        elif key.endswith("_pattern") and isinstance(value, dict):
            patterns += [(key, name) for name in value]
    for key, pattern in patterns:
        is_list = key in ("target_modules", "exclude_modules")
        if is_list or not (isinstance(pattern, str) and _PLAIN_NAME.fullmatch(pattern)):
            raise AdapterError(
                f"adapter_config.json: {key}={str(pattern)[:80]!r} is a pattern, which is not run "
                "on a stranger's word; list the modules and save the adapter again"
            )


def _require_targets(base: PreTrainedModel, targets: Any) -> None:
    """Refuses a listed target that matches no module: PEFT does so only where none of them does."""
    if not isinstance(targets, list | tuple | set):
        return
    paths = [name for name, _ in base.named_modules() if name]
    leaves = sorted({path.rpartition(".")[2] for path in paths})
    for target in sorted(targets):
        if not any(path == target or path.endswith(f".{target}") for path in paths):
            raise ConfigError(
                f"method.config.target_modules: {target!r} matches no module of the base."
                f"{nearest(target, leaves)} Known: {', '.join(leaves)}"
            )


def _named_as_saved(model: PeftModel) -> dict[str, nn.Parameter]:
    """All that PEFT saves; what is not trained (random projections) shares memory with it."""
    import torch
    from peft import get_peft_model_state_dict

    live = {(p.data_ptr(), p.shape): p for p in model.parameters() if p.requires_grad}
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(
        model, adapter_name=_SLOT, save_embedding_layers=False
    )
    found: dict[str, nn.Parameter] = {}
    for key, tensor in state.items():
        kept = live.get((tensor.data_ptr(), tensor.shape))
        name = key.removeprefix(_PREFIX)
        found[name] = torch.nn.Parameter(tensor, requires_grad=False) if kept is None else kept
    return found


def _saved_name(name: str) -> str:
    return name if name.startswith("base_model.") else f"{_PREFIX}{name}"
