"""AdaLoRA: LoRA in the form of a singular value decomposition whose ranks go where they matter.

Every layer starts with `init_r` ranks; while training, the least important of all layers are cut
until `target_r` a layer are left on average. To be tried where a small file matters and runs are
long enough to find out which layers need rank: some hundred steps.

Shapes: S slots, N rows, T tokens, I in_features, O out_features, R rank (the largest of the slots).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from graft.core.errors import AdapterError
from graft.core.model import Listed
from graft.core.spaces import Choice, Float, Space
from graft.methods.base import METHODS, Method, Site, Surroundings
from graft.methods.layerwise import FrozenLayer, LayerMethod
from graft.methods.targets import (
    explicit_targets,
    peft_layers,
    require_rank_fits,
    select_sites,
)

if TYPE_CHECKING:
    import torch

    from graft.methods.base import AdapterTensors
    from graft.methods.routing import GroupRouting

_TENSORS = ("lora_A", "lora_B", "lora_E")


@METHODS.register
class AdaloraMethod(LayerMethod):
    """Adaptive low-rank adaptation, `(alpha / init_r) B diag(E) A x` with cut singular values.

    Reference:
        AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, arXiv 2303.10512.
    """

    type: Literal["adalora"] = "adalora"
    init_r: int = Field(12, ge=1)
    """Rank of every layer at the start."""
    target_r: int = Field(8, ge=1)
    """Mean rank of the layers at the end."""
    lora_alpha: float = Field(32.0, gt=0)
    """The update is scaled by lora_alpha / init_r, however many ranks are left."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping an input feature of the update while training."""
    target_modules: Literal["all-linear"] | Listed[str] = "all-linear"
    """Layers to adapt: `all-linear`, or endings of module paths."""
    layers_to_transform: Listed[Annotated[int, Field(ge=0)]] | None = Field(None, min_length=1)
    """Only in these decoder layers, by number from 0; None is all."""
    tinit: int | None = Field(None, ge=0)
    """Steps before ranks are cut; None means 4 % of `train.steps`."""
    tfinal: int | None = Field(None, ge=0)
    """Steps at the end in which the ranks stay; None means 10 % of `train.steps`."""
    deltaT: int = Field(1, ge=1)
    """Ranks are cut at steps divisible by it."""
    beta1: float = Field(0.85, gt=0, lt=1)
    """Smoothing of the sensitivity."""
    beta2: float = Field(0.85, gt=0, lt=1)
    """Smoothing of its uncertainty."""
    orth_reg_weight: float = Field(0.5, ge=0)
    """Weight of the penalty that keeps A and B orthogonal."""

    packable: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True
    servable: ClassVar[frozenset[str]] = frozenset({"native"})
    quantized_base: ClassVar[frozenset[str]] = frozenset({"int8", "nf4"})
    # Importance asks for whole gradients after the step, which sharding stages do not keep.
    zero_stages: ClassVar[frozenset[int]] = frozenset({0})
    regularizes: ClassVar[bool] = True
    acts_after_step: ClassVar[bool] = True
    peft_only_fields: ClassVar[frozenset[str]] = frozenset({"rank_pattern", "total_step", "r"})

    @model_validator(mode="after")
    def ranks_shrink(self) -> AdaloraMethod:
        """Refuses a target above the start."""
        if self.target_r > self.init_r:
            raise ValueError(
                f"target_r {self.target_r} is above init_r {self.init_r}; ranks are only cut, "
                f"set init_r to {self.target_r} or more (the paper: half as much again)"
            )
        return self

    @classmethod
    def search_space(cls) -> dict[str, Space]:
        """Ranks around the paper's; rates and penalties as it tuned them."""
        return {
            "method.init_r": Choice(values=(12, 24, 48)),
            "method.target_r": Choice(values=(4, 8, 12)),
            "method.orth_reg_weight": Choice(values=(0.1, 0.3, 0.5)),
            "train.lr": Float(low=2e-4, high=5e-3, log=True),
        }

    def refusals(self, around: Surroundings) -> list[str]:
        """Refuses a run with no step left between `tinit` and `tfinal`."""
        found = super().refusals(around)
        start, end = self.cutting_steps(around.steps)
        if start >= end:
            tfinal = around.steps - end
            found.append(
                f"method adalora cuts ranks after step {start} (tinit) and until step {end} "
                f"(train.steps {around.steps} - tfinal {tfinal}), which leaves no step for it; set "
                f"train.steps above {start + tfinal}, or tinit + tfinal below {around.steps}"
            )
        return found

    def cutting_steps(self, num_steps: int) -> tuple[int, int]:
        """Returns the last step before ranks are cut and the step of the last cut."""
        tinit = num_steps * 4 // 100 if self.tinit is None else self.tinit
        tfinal = num_steps // 10 if self.tfinal is None else self.tfinal
        return tinit, num_steps - tfinal

    @property
    def scale(self) -> float:
        """The factor before `B diag(E) A x`; the small number is PEFT's."""
        return self.lora_alpha / (self.init_r + 1e-5)

    def sites(self, linears: dict[str, tuple[int, int]]) -> tuple[Site, ...]:
        """Picks the target layers.

        Raises:
            ConfigError: A target matches nothing, or `init_r` exceeds a layer's smaller side.
        """
        sites = select_sites(linears, self.target_modules, layers=self.layers_to_transform)
        require_rank_fits(sites, self.init_r, field="init_r")
        return sites

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """A `[init_r, in_features]`, B `[out_features, init_r]`, E `[init_r, 1]`."""
        shapes = ((self.init_r, site.in_features), (site.out_features, self.init_r))
        return dict(zip(_TENSORS, (*shapes, (self.init_r, 1)), strict=True))

    def init(
        self, site: Site, generator: torch.Generator, layer: FrozenLayer
    ) -> dict[str, torch.Tensor]:
        """A and B normal with deviation 0.02, E zero: the update starts at nothing, as in PEFT."""
        import torch

        tensors = {name: torch.zeros(shape) for name, shape in self.shapes(site).items()}
        for name in ("lora_A", "lora_B"):
            tensors[name].normal_(std=0.02, generator=generator)
        return tensors

    @classmethod
    def stack(
        cls,
        slots: list[dict[str, torch.Tensor]],
        methods: tuple[Method, ...],
        dtype: torch.dtype,
        layer: FrozenLayer,
    ) -> dict[str, torch.Tensor]:
        """As LoRA's, with E and the scale folded into A."""
        from torch.nn.utils.rnn import pad_sequence

        from graft.methods._low_rank import stacked_factors

        scaled = [
            tensors["lora_A"] * (tensors["lora_E"] * method.scale)
            for tensors, method in zip(slots, methods, strict=True)
            if isinstance(method, AdaloraMethod)
        ]
        a_SRI = pad_sequence(scaled, batch_first=True)
        b_SRO = pad_sequence([tensors["lora_B"].T for tensors in slots], batch_first=True)
        return stacked_factors(a_SRI, b_SRO, dtype)

    @classmethod
    def delta(
        cls,
        x_NTI: torch.Tensor,
        base_NTO: torch.Tensor,
        stacked: dict[str, torch.Tensor],
        routing: GroupRouting,
    ) -> torch.Tensor:
        """Two batched products, after dropout."""
        from graft.methods._low_rank import drop_input, low_rank_product

        rates = [m.lora_dropout for m in routing.methods if isinstance(m, AdaloraMethod)]
        x_NTI = drop_input(x_NTI, rates, routing)
        return low_rank_product(x_NTI, stacked["a_SIR"], stacked["b_SRO"], routing)

    def merge_delta(self, tensors: dict[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
        """`(alpha / init_r) B diag(E) A`."""
        scaled = tensors["lora_A"].to(weight) * (tensors["lora_E"].to(weight) * self.scale)
        return tensors["lora_B"].to(weight) @ scaled

    def regularization(self, tensors: AdapterTensors) -> torch.Tensor | None:
        """Mean over all A and B of how far they are from orthogonal, `‖A Aᵀ - 1‖`."""
        import torch

        by_width: dict[int, list[torch.Tensor]] = {}
        for of_site in tensors.values():
            for factor_RF in (of_site["lora_A"], of_site["lora_B"].T):
                by_width.setdefault(factor_RF.shape[1], []).append(factor_RF)
        norms = []
        for factors in by_width.values():
            factors_PRF = torch.stack(factors)
            gram_PRR = factors_PRF @ factors_PRF.transpose(1, 2)
            one_RR = torch.eye(self.init_r, dtype=gram_PRR.dtype, device=gram_PRR.device)
            norms.append(torch.linalg.matrix_norm(gram_PRR - one_RR))
        return self.orth_reg_weight * torch.cat(norms).mean()

    def after_step(
        self,
        tensors: AdapterTensors,
        gradients: AdapterTensors,
        state: dict[str, torch.Tensor],
        step: int,
        num_steps: int,
    ) -> None:
        """Updates the importance of each rank and cuts the least important ones."""
        from graft.methods import _rank_budget as ranks

        start, end = self.cutting_steps(num_steps)
        sites = list(tensors)
        if ranks.is_settled(state):
            ranks.cut(tensors, ranks.settled(sites, state))
            return
        if step < end or not state:
            ranks.remember_importance(tensors, gradients, state, beta1=self.beta1, beta2=self.beta2)
        if step < end and (step <= start or step % self.deltaT):
            return
        budget = ranks.budget_at(
            step,
            initial=self.init_r * len(sites),
            target=self.target_r * len(sites),
            start=start,
            end=end,
        )
        kept = ranks.most_important(sites, state, budget)
        ranks.cut(tensors, kept)
        if step >= end:
            ranks.settle(state, kept)

    def to_peft(
        self, tensors: AdapterTensors, base: str
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """PEFT's `AdaLoraConfig` and tensor names; ranks that were cut are left out."""
        from peft import AdaLoraConfig

        from graft.methods._rank_pattern import without_cut_ranks
        from graft.methods._state import joined_state

        targets = explicit_targets(self.target_modules, tensors)
        pattern, tensors = without_cut_ranks(tensors)
        tinit, tfinal = self.tinit or 0, self.tfinal or 0
        settings = self.model_dump(mode="json", exclude={"type", "target_modules"})
        config = AdaLoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=base,
            inference_mode=True,
            target_modules=targets,
            **{**settings, "tinit": tinit, "tfinal": tfinal},
            # PEFT refuses to load without a schedule, which only training reads.
            total_step=tinit + tfinal + 1,
            rank_pattern=pattern,
            bias="none",
        ).to_dict()
        return {**config, "target_modules": targets}, joined_state(tensors)

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], state: dict[str, torch.Tensor]
    ) -> tuple[Method, AdapterTensors]:
        """Reads PEFT's AdaLoRA; ranks that were cut come back as zeros.

        Raises:
            AdapterError: Unknown tensor names, or a `rank_pattern` unlike the tensors.
        """
        from graft.methods._rank_pattern import with_cut_ranks
        from graft.methods._state import split_state

        # Older files also hold PEFT's divisor, which is init_r and never changes.
        divisors = {key: state[key] for key in state if key.endswith(".ranknum")}
        tensors = split_state(
            {key: value for key, value in state.items() if key not in divisors}, _TENSORS, "AdaLoRA"
        )
        targets = config.get("target_modules")
        given = {key: config[key] for key in cls.model_fields if key in config and key != "type"}
        given["layers_to_transform"] = peft_layers(config.get("layers_to_transform"))
        if not isinstance(targets, list):
            given["target_modules"] = list(tensors)
        method = cls.model_validate(given)
        for key, divisor in divisors.items():
            if bool((divisor != method.init_r).any()):
                raise AdapterError(
                    f"adapter_model.safetensors: {key} is not init_r {method.init_r}, by which "
                    "the update is divided; re-export the adapter with PEFT 0.21 or later"
                )
        if config.get("rank_pattern"):
            tensors = with_cut_ranks(tensors, config["rank_pattern"], method.init_r)
        return method, tensors
