"""`verify`: is a stored adapter what was published, and do its forms still say the same?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from graft.artifacts import ParityReport, Store, StoredAdapter
from graft.core.model import StrictModel
from graft.core.progress import QUIET, Progress

if TYPE_CHECKING:
    from graft.recipe.sections import Recipe


class VerifyResult(StrictModel):
    """What was checked. Damage is an error, a form too far away a refusal in `parity`."""

    digest: str | None
    """None for a plain folder."""
    path: str
    parity: tuple[ParityReport, ...]

    @property
    def refusal(self) -> str | None:
        """Why a form may not take the other's place; None where all may."""
        reasons = [
            f"{report.form} against {report.reference[:12]}: {'; '.join(report.reasons)}"
            for report in self.parity
            if not report.passed
        ]
        return " | ".join(reasons) or None


def verify(
    reference: str,
    *,
    home: Path,
    against: str | None = None,
    recipe: Recipe | None = None,
    progress: Progress = QUIET,
) -> VerifyResult:
    """Checks every byte of an adapter, then its forms: beside its parent, and merged.

    A reward model has no other form; its bytes are checked alone.

    Args:
        reference: A name, a digest, or an adapter folder.
        home: Where adapters and models are.
        against: What the adapter is compared with; None means the adapter it was compressed from.
        recipe: Its `verify` section has the thresholds; None is the adapter's own recipe.
        progress: Told of every stage.

    Raises:
        AdapterError: A file differs from what was published, or the adapter is of another base.
    """
    from graft.compressors.folder import load_adapter
    from graft.engine.merge import merge_into_base
    from graft.engine.multi import MultiAdapterModel
    from graft.engine.parity import Form
    from graft.engine.publish import require_answers, require_base
    from graft.engine.run import load_run
    from graft.models import load_model
    from graft.pipelines.forms import (
        compare_forms,
        compare_with_adapter,
        form_name,
        recipe_of,
        seated,
    )

    store = Store(home)
    stored = _checked(store, reference)
    other = _checked(store, against) if against else _parent(store, stored)
    if stored.record.purpose == "scores" and other is None:
        return VerifyResult(digest=stored.digest, path=str(stored.path), parity=())
    require_answers(stored, "verify --against")
    recipe = recipe or recipe_of(stored)
    run = load_run(recipe, home)
    adapter = load_adapter(stored.path)
    require_base(stored, run.ready, run.recipe.model)
    reports = []
    if other is not None:
        require_base(other, run.ready, run.recipe.model)
        with seated(run, load_adapter(other.path), adapter) as (theirs, ours):
            before = Form(form_name(other), run.model, theirs)
            form = Form(form_name(stored), run.model, ours)
            reports.append(compare_forms(run, before, form, recipe, progress))
    if adapter.method.merges and recipe.model.quantization.type == "none":
        merged = MultiAdapterModel(merge_into_base(load_model(run.ready, recipe.model), adapter))
        name = form_name(stored)
        reports.append(compare_with_adapter(run, adapter, name, merged, recipe, progress))
    return VerifyResult(digest=stored.digest, path=str(stored.path), parity=tuple(reports))


def _checked(store: Store, reference: str) -> StoredAdapter:
    stored = store.resolve(reference, allow_folder=True)
    is_ours = stored.digest is not None and stored.digest in store.digests()
    return store.verify(stored.digest) if is_ours and stored.digest else stored


def _parent(store: Store, stored: StoredAdapter) -> StoredAdapter | None:
    for parent in stored.record.parents:
        if parent.relation == "compressed" and parent.digest in store.digests():
            return store.verify(parent.digest)
    return None
