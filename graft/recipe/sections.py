"""The recipe's sections that no lower layer owns, and the recipe itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from graft.artifacts.names import require_name
from graft.compressors.base import COMPRESSORS, Compressor
from graft.core.model import Listed, StrictModel
from graft.core.sizes import parse_bytes
from graft.data.mixture import DataPart
from graft.methods.base import METHODS, Method, Surroundings
from graft.metrics.base import METRICS, Metric
from graft.models.section import ModelSection, QuantizationSection
from graft.objectives.base import Objective
from graft.recipe.mixture import AnyData, AnyObjective, DataMixture
from graft.recipe.operation import LoopSection, ServeSection, TrackSection, WatchSection
from graft.recipe.search import SearchSection
from graft.recipe.searched import cost_obstacle, require_known_metrics

AnyMethod = Annotated[Method, *METHODS.field()]
AnyCompressor = Annotated[Compressor, *COMPRESSORS.field()]
AnyMetric = Annotated[Metric, *METRICS.field()]


class TrainSection(StrictModel):
    """One training run: how long, how fast."""

    steps: int = Field(200, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(8, ge=1)
    """Rows a step, over all workers and micro-batches; it need not divide evenly."""
    lr: float = Field(2e-4, gt=0)
    """Left out of a recipe it is the method's own default (`docs/methods.md`), 2e-4 for LoRA."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Shape of the learning rate after warm-up; `linear` and `cosine` end at 0."""
    warmup_fraction: float = Field(0.03, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """`8bit`: moments in 8 bits; `paged`: moments leave the GPU when its memory runs short. All but
    the first are bitsandbytes', on a GPU, with `scale.zero_stage` 0."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients of the whole adapter are scaled down to this norm."""
    micro_batch_tokens: int = Field(2048, ge=1)
    """Padded tokens of one forward pass; gradients add up over as many passes as a step's rows
    take. Bounds memory, changes no result."""
    seed: int = Field(0, ge=0)
    """Initial weights, data order and dropout."""
    report_every: int = Field(10, ge=1)
    """Steps between reports (loss, tokens/s) and checkpoints."""
    stop_at_loss: float | None = Field(None, gt=0)
    """Ends the run at the first report whose mean loss is not above it; None trains all steps."""
    init_from: str | None = None
    """Digest or folder of an adapter of the same method and shapes to start from."""

    def ends_with(self, report: Mapping[str, float]) -> bool:
        """Tells whether a run is complete with this report, be it before the last step."""
        loss = report.get("train/loss", math.inf)
        has_learned = self.stop_at_loss is not None and loss <= self.stop_at_loss
        return has_learned or report["steps"] >= self.steps


class OffloadSection(StrictModel):
    """Where ZeRO keeps what does not fit."""

    optimizer: Literal["none", "cpu", "nvme"] = "none"
    parameters: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str | None = None

    @model_validator(mode="after")
    def nvme_has_a_path(self) -> OffloadSection:
        """Refuses NVMe offload without a folder."""
        if "nvme" in (self.optimizer, self.parameters) and not self.nvme_path:
            raise ValueError("offload to nvme needs `nvme_path`, a folder on the fast disk")
        return self


_Count = Annotated[int, Field(ge=1)]


class ScaleSection(StrictModel):
    """Workers and how memory is divided between them."""

    workers: _Count | Annotated[tuple[_Count, _Count], Field(strict=False)] = 1
    """Processes of a run; `[min, max]` is as many of these as the cluster has room for, more or
    fewer while it trains."""
    backend: Literal["auto", "torch", "deepspeed"] = "auto"
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: OffloadSection = OffloadSection()
    gradient_checkpointing: bool = False
    threads: int | None = Field(None, ge=1)
    """CPU threads a process; None divides the machine's cores between its processes."""
    device_memory: str | None = None
    """Most that a device may be given, as `40GB` or `24GiB`; None is what it has. What is predicted
    to need more is refused before anything loads, and never proposed by a search."""

    @field_validator("device_memory")
    @classmethod
    def device_memory_is_a_size(cls, device_memory: str | None) -> str | None:
        """Refuses what is no size."""
        if device_memory is not None:
            parse_bytes(device_memory)
        return device_memory

    @field_validator("workers")
    @classmethod
    def workers_are_in_order(cls, workers: int | tuple[int, int]) -> int | tuple[int, int]:
        """Refuses `[4, 2]`."""
        if isinstance(workers, tuple) and workers[0] > workers[1]:
            raise ValueError(
                f"{list(workers)} is [min, max] the wrong way round; write "
                f"[{workers[1]}, {workers[0]}]"
            )
        return workers

    @property
    def min_workers(self) -> int:
        """The fewest workers that a run starts with."""
        return self.workers[0] if isinstance(self.workers, tuple) else self.workers

    @property
    def max_workers(self) -> int:
        """The most workers that a run has."""
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers

    @model_validator(mode="after")
    def backend_can_shard(self) -> ScaleSection:
        """Refuses workers or ZeRO without DeepSpeed, and offload of what is not sharded."""
        if self.zero_stage and self.backend == "torch":
            raise ValueError(
                f"zero_stage {self.zero_stage} needs `backend: deepspeed` (or auto), not torch"
            )
        if self.max_workers > 1 and self.backend == "torch":
            raise ValueError(
                f"workers {self.max_workers} needs `backend: deepspeed` (or auto): torch is one "
                "process"
            )
        if self.offload.optimizer != "none" and self.zero_stage == 0:
            raise ValueError("offload.optimizer needs `zero_stage` 1, 2 or 3")
        if self.offload.parameters != "none" and self.zero_stage != 3:
            raise ValueError("offload.parameters needs `zero_stage: 3`")
        if self.offload.optimizer == "nvme" and self.zero_stage != 3:
            raise ValueError("offload.optimizer nvme needs `zero_stage: 3`; cpu works with 1 and 2")
        return self

    @property
    def needs_deepspeed(self) -> bool:
        """Tells whether a run takes DeepSpeed's processes rather than this one."""
        return self.backend == "deepspeed" or self.max_workers > 1 or self.zero_stage > 0


class CompareVariant(StrictModel):
    """A method with some of its settings given, compared beside the registered types."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    """Its row; the name of a registered type takes that type's place."""
    method: AnyMethod
    """What is given here stays; what is not is searched as the method's own space says."""
    quantization: QuantizationSection | None = None
    """How its base is stored; None is as in `model`."""


class CompareSection(StrictModel):
    """How `graft compare` searches and measures; `search.trials` points a method."""

    search_steps: int = Field(20, ge=1)
    """Steps of a searched point; the best one is then trained for `train.steps`."""
    seeds: int = Field(2, ge=2)
    """Trainings of each method's best, on seeds that the search has not seen."""
    general: str | None = None
    """Held-out general text (rows with `text`): its perplexity before and after is forgetting."""
    general_limit: int | None = Field(None, ge=1)
    """Use only the first so many of its rows."""
    variants: Listed[CompareVariant] = ()

    @field_validator("variants")
    @classmethod
    def variants_are_distinct(
        cls, variants: tuple[CompareVariant, ...]
    ) -> tuple[CompareVariant, ...]:
        """Refuses two variants of one name."""
        names = [variant.name for variant in variants]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two variants are called {twice[0]!r}; each row needs its own name")
        return variants


class EvalSection(StrictModel):
    """What is measured on held-out rows."""

    metrics: Listed[AnyMetric] = Field(("loss", "perplexity"), validate_default=True)
    max_new_tokens: int = Field(64, ge=1)
    batch_size: int = Field(16, ge=1)
    confidence: float = Field(0.95, gt=0, lt=1)
    """Of the bootstrap intervals."""

    @field_validator("metrics")
    @classmethod
    def metrics_are_distinct(cls, metrics: tuple[Metric, ...]) -> tuple[Metric, ...]:
        """Refuses two metrics that would be reported under one name."""
        names = [metric.type for metric in metrics]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"two metrics are of type {twice[0]!r}, both `eval/{twice[0]}`; keep one"
            )
        return metrics


class VerifySection(StrictModel):
    """The parity gate: how far a compressed or merged form may stand from what was trained."""

    rows: int = Field(32, ge=1)
    """Held-out prompts compared."""
    min_token_agreement: float = Field(0.98, ge=0, le=1)
    """Share of greedy tokens that must be the same."""
    max_kl: float = Field(0.02, gt=0)
    """Mean KL divergence of next-token distributions, nats."""


class Recipe(StrictModel):
    """One complete recipe: every verb reads it, no hole is left in it."""

    version: Literal[1] = 1
    name: str = Field("run", pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    """Names the study and the served adapter."""
    model: ModelSection
    data: AnyData
    """One source, or `sources` of a mixture."""
    method: AnyMethod = Field({"type": "lora"}, validate_default=True)
    objective: AnyObjective = Field({"type": "sft"}, validate_default=True)
    train: TrainSection = TrainSection()
    scale: ScaleSection = ScaleSection()
    search: SearchSection = SearchSection()
    compare: CompareSection = CompareSection()
    eval: EvalSection = Field(default_factory=EvalSection)
    compress: Listed[AnyCompressor] = ()
    verify: VerifySection = VerifySection()
    serve: ServeSection = ServeSection()
    watch: WatchSection = Field(default_factory=WatchSection)
    loop: LoopSection = LoopSection()
    track: TrackSection = TrackSection()

    @property
    def parts(self) -> tuple[DataPart[Objective], ...]:
        """What training draws rows from: the one source, or those of a mixture."""
        if not isinstance(self.data, DataMixture):
            return (DataPart(self.data, self.objective),)
        return tuple(
            DataPart(source, source.objective or self.objective, source.name, source.weight)
            for source in self.data.sources
        )

    @property
    def needs_cuda(self) -> tuple[str, ...]:
        """Why it trains on a GPU only, each reason with what trains elsewhere; else empty."""
        found = []
        if self.model.dtype == "fp16":
            found.append(
                "model.dtype fp16 trains on a GPU only: its small gradients need loss scaling, and "
                "a CPU computes it slower than fp32; use bf16 or fp32"
            )
        if self.train.optimizer != "adamw":
            found.append(
                f"train.optimizer {self.train.optimizer} trains on a GPU only: bitsandbytes steps "
                "with CUDA kernels; use adamw, with scale.offload.optimizer cpu where memory is "
                "short"
            )
        return tuple(found)

    @property
    def needs_reference(self) -> bool:
        """Tells whether training compares with the model as it was."""
        return any("reference" in part.objective.needs for part in self.parts)

    @model_validator(mode="before")
    @classmethod
    def left_out_lr_is_the_methods_own(cls, given: Any) -> Any:
        """Fills in `train.lr`: what suits one method is a hundred times too much for another."""
        if not isinstance(given, dict):
            return given
        method, train = given.get("method", {}), given.get("train", {})
        is_raw = isinstance(method, dict)
        kind = method.get("type", "lora") if is_raw else getattr(method, "type", method)
        if not isinstance(train, dict) or "lr" in train or kind not in METHODS.names():
            return given
        return {**given, "train": {**train, "lr": METHODS.get(kind).default_lr}}

    @field_validator("name")
    @classmethod
    def name_is_free(cls, name: str) -> str:
        """Refuses a name that no adapter may have: `base`, `latest`, `v3`."""
        return require_name(name)

    @model_validator(mode="after")
    def method_fits_its_surroundings(self) -> Recipe:
        """Refuses a method where it cannot train; asked before anything is loaded."""
        refused = self.method.refusals(
            Surroundings(
                quantization=self.model.quantization.type,
                zero_stage=self.scale.zero_stage,
                workers=self.scale.max_workers,
                steps=self.train.steps,
                gradient_checkpointing=self.scale.gradient_checkpointing,
                needs_deepspeed=self.scale.needs_deepspeed,
            )
        )
        if refused:
            raise ValueError("; ".join(refused))
        return self

    @model_validator(mode="after")
    def device_can_train(self) -> Recipe:
        """Refuses on a CPU what trains on a GPU only; `auto` is known where the base is loaded."""
        if self.model.device == "cpu" and self.needs_cuda:
            raise ValueError("; ".join(self.needs_cuda))
        return self

    @model_validator(mode="after")
    def optimizer_fits_zero(self) -> Recipe:
        """Refuses moments in blocks or pages where ZeRO divides them between workers."""
        if self.train.optimizer != "adamw" and self.scale.zero_stage:
            raise ValueError(
                f"train.optimizer {self.train.optimizer} needs scale.zero_stage 0: ZeRO cuts "
                "moments where their blocks do not end; use adamw, whose moments it divides"
            )
        return self

    @model_validator(mode="after")
    def quantization_fits_offload(self) -> Recipe:
        """Refuses to swap packed weights to a disk."""
        quantization = self.model.quantization.type
        if quantization != "none" and self.scale.offload.parameters == "nvme":
            raise ValueError(
                f"scale.offload.parameters nvme cannot swap {quantization} weights: DeepSpeed's "
                "buffers hold one kind of number, and packed weights would come back wrong; use "
                "offload.parameters cpu, or model.quantization none"
            )
        return self

    @model_validator(mode="after")
    def every_worker_has_rows(self) -> Recipe:
        """Refuses a step of fewer rows than workers."""
        if self.train.batch_size < self.scale.max_workers:
            raise ValueError(
                f"train.batch_size {self.train.batch_size} is below scale.workers "
                f"{self.scale.max_workers}; each worker needs a row a step"
            )
        return self

    @model_validator(mode="after")
    def objective_has_enough_rows(self) -> Recipe:
        """Refuses a step of fewer rows than the objective learns from together."""
        for objective in {part.objective for part in self.parts}:
            smallest = objective.smallest_batch
            if self.train.batch_size < smallest:
                raise ValueError(
                    f"train.batch_size {self.train.batch_size} is too small for objective "
                    f"{objective.type}, which takes at least {smallest} rows a step"
                )
        return self

    @model_validator(mode="after")
    def sources_can_be_mixed(self) -> Recipe:
        """Refuses objectives that cannot be learned from a few rows of a step among others."""
        if not isinstance(self.data, DataMixture):
            return self
        objectives = {part.objective for part in self.parts}
        for part in self.parts:
            words = f"source {part.name!r}: objective {part.objective.type}"
            if beyond := part.objective.needs - {"reference"}:
                raise ValueError(
                    f"{words} needs {' and '.join(sorted(beyond))}, which rows of a mixture do not "
                    "have; train it on one source alone, with data.train"
                )
            if part.objective.smallest_batch > 1 and len(objectives) > 1:
                raise ValueError(
                    f"{words} learns from {part.objective.smallest_batch} rows of a step together, "
                    "and beside other objectives a step may have fewer; give all sources this one"
                )
        return self

    @model_validator(mode="after")
    def reward_models_answer_nothing(self) -> Recipe:
        """Refuses metrics of answers where what is trained only scores them."""
        if not self.objective.scores_answers:
            return self
        searched = [o.metric.rpartition("/")[2] for o in self.search.objectives]
        for name in (*searched, *(metric.type for metric in self.eval.metrics)):
            if name in METRICS.names() and METRICS.get(name).needs == "generation":
                raise ValueError(
                    f"objective {self.objective.type} trains a reward model, which gives no "
                    f"answers, and metric {name!r} scores answers; choose loss or "
                    "preference_accuracy"
                )
        return self

    @model_validator(mode="after")
    def costs_can_be_measured(self) -> Recipe:
        """Refuses costs without quality, and latency where nothing can be timed."""
        if obstacle := cost_obstacle(self):
            raise ValueError(obstacle)
        return self

    @model_validator(mode="after")
    def metrics_are_known(self) -> Recipe:
        """Refuses a search or a gate on a held-out metric that nobody computes."""
        require_known_metrics(self)
        return self
