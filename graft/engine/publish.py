"""From an adapter in memory to a published artifact with its record: the one way there is."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from graft.artifacts import (
    AdapterRecord,
    MetricValue,
    Parent,
    ParityReport,
    ServingConstraints,
    Store,
    StoredAdapter,
)
from graft.compressors.base import Adapter
from graft.compressors.folder import save_adapter
from graft.core.errors import AdapterError
from graft.methods.base import HEAD, split_head

if TYPE_CHECKING:
    from graft.engine.multi import AdapterTensors
    from graft.models import ReadyModel
    from graft.models.section import ModelSection
    from graft.recipe.sections import Recipe


def publish_adapter(
    store: Store,
    adapter: Adapter,
    *,
    recipe: Recipe,
    ready: ReadyModel,
    data_digest: str | None,
    metrics: Mapping[str, MetricValue],
    parents: Sequence[Parent] = (),
    parity: Sequence[ParityReport] = (),
) -> StoredAdapter:
    """Saves an adapter, describes it and publishes it; registering a name is another step.

    Args:
        store: Of the home.
        adapter: What is published.
        recipe: Resolved; kept in the record, so that later verbs need the adapter alone.
        ready: The base that it belongs to.
        data_digest: `proof.digest` of the data it was trained on.
        metrics: As `EvalReport.metrics`.
        parents: What it was made from.
        parity: What the parity gate said of it.

    Raises:
        AdapterError: A tensor or a metric is not finite, or a parity report refused.
    """
    refused = [report.form for report in parity if not report.passed]
    if refused:
        raise AdapterError(f"the parity gate refused {refused[0]!r}; it is not published")
    with tempfile.TemporaryDirectory(prefix="graft-publish-") as scratch:
        folder = Path(scratch) / "adapter"
        if adapter.method.artifact_kind == "full":
            adapter = as_served(adapter, recipe)
        save_adapter(folder, adapter, ready.source)
        if adapter.method.artifact_kind == "full":
            _complete_model(folder, recipe, ready, is_reward_model=HEAD in adapter.tensors)
        num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        record = AdapterRecord(
            name=recipe.name,
            base_source=ready.source,
            base_digest=ready.digest,
            template_digest=ready.template_digest,
            data_digest=data_digest,
            recipe=recipe.model_dump(mode="json"),
            method=adapter.method.type,
            kind=adapter.method.artifact_kind,
            purpose="scores" if HEAD in adapter.tensors else "answers",
            storage=adapter.storage.type if adapter.storage is not None else "none",
            metrics=dict(metrics),
            parity=tuple(parity),
            serving=ServingConstraints(
                engines=tuple(sorted(adapter.method.servable)),
                r=getattr(adapter.method, "r", None),
                num_bytes=num_bytes,
            ),
            parents=tuple(parents),
        )
        return store.open(store.publish(folder, record))


def finished_tensors(recipe: Recipe, tensors: AdapterTensors) -> AdapterTensors:
    """Returns what of trained weights is the adapter: the head of a reward model, no other."""
    return tensors if recipe.objective.scores_answers else split_head(tensors)[0]


def as_served(adapter: Adapter, recipe: Recipe) -> Adapter:
    """Rounds the weights of a whole model as `model.dtype` says: so it was evaluated."""
    from graft.models import torch_dtype

    dtype = torch_dtype(recipe.model)
    tensors = {
        site: {key: value.to(dtype) for key, value in of_site.items()}
        for site, of_site in adapter.tensors.items()
    }
    return adapter._replace(tensors=tensors)


def _complete_model(
    folder: Path, recipe: Recipe, ready: ReadyModel, *, is_reward_model: bool
) -> None:
    """Adds what transformers needs beside the weights: configuration and tokenizer of the base."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig

    from graft.data.template import ChatTemplate
    from graft.models import load_tokenizer, torch_dtype

    tokenizer = load_tokenizer(ready)
    config = AutoConfig.from_pretrained(ready.path, local_files_only=True, trust_remote_code=False)
    config.dtype = torch_dtype(recipe.model)
    if is_reward_model:
        config.num_labels = 1
        config.architectures = [MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)].__name__]
        ends = ChatTemplate(tokenizer).stop_ids
        if config.get_text_config().pad_token_id in ends:
            # transformers reads the score at the last token that is no padding: at the end of turn.
            others = sorted(set(tokenizer.all_special_ids) - ends)
            pad = others[0] if others else None
            config.get_text_config().pad_token_id = pad
            tokenizer.pad_token = None if pad is None else tokenizer.convert_ids_to_tokens(pad)
    config.save_pretrained(folder)
    generation = ready.path / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, folder / generation.name)
    tokenizer.save_pretrained(folder)


def require_answers(stored: StoredAdapter, purpose: str) -> None:
    """Refuses a reward model where an adapter is to answer.

    Args:
        stored: The adapter.
        purpose: What is wanted with it; the start of the message.

    Raises:
        AdapterError: It gives scores.
    """
    if stored.record.purpose == "scores":
        name = stored.digest[:12] if stored.digest else str(stored.path)
        raise AdapterError(
            f"{purpose}: adapter {name} is a reward model (objective "
            f"{stored.record.recipe.get('objective', {}).get('type', 'reward')}): it scores "
            "answers and gives none; use it as a reward of another training, metric: {type: "
            f"reward_model, source: {name}}}"
        )


def require_base(stored: StoredAdapter, ready: ReadyModel, section: ModelSection) -> None:
    """Refuses an adapter of another base, whatever its shapes.

    Args:
        stored: The adapter.
        ready: The base.
        section: How the base is loaded.

    Raises:
        AdapterError: The digests of the bases or of their chat templates differ; or the adapter
            makes up for what quantization took, and the base is not quantized so.
    """
    record = stored.record
    name = stored.digest[:12] if stored.digest else str(stored.path)
    if record.base_digest is not None and record.base_digest != ready.digest:
        raise AdapterError(
            f"adapter {name} was made for the base {record.base_source} "
            f"({record.base_digest[:12]}), this one is {ready.source} ({ready.digest[:12]}); "
            "use the base that it was trained on"
        )
    if record.template_digest is not None and record.template_digest != ready.template_digest:
        raise AdapterError(
            f"adapter {name} was trained with another chat template or vocabulary than that of "
            f"{ready.source}; use the tokenizer that it was trained with"
        )
    trained = record.recipe
    if trained.get("method", {}).get("init_lora_weights") == "loftq":
        before, now = trained["model"]["quantization"]["type"], section.quantization.type
        if before != now:
            raise AdapterError(
                f"adapter {name} makes up for what {before} took from its base (init_lora_weights "
                f"loftq) and is wrong on one that is loaded otherwise; set model.quantization.type "
                f"to {before}, it is {now}"
            )
