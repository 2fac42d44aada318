"""What `graft run` promotes, and what it leaves as it is."""

from __future__ import annotations

from pathlib import Path

from graft.artifacts import Store
from graft.compressors.folder import load_adapter, save_adapter
from graft.pipelines.run import publish_forms
from tests.unit.pipelines.conftest import PublishedHome


def test_a_run_that_is_repeated_undoes_no_promotion_and_no_rollback(
    published: PublishedHome, tmp_path: Path
) -> None:
    store, first = Store(published.home), str(published.stored.digest)
    save_adapter(tmp_path / "other", load_adapter(published.stored.path), "tiny")
    renamed = published.stored.record.model_copy(update={"name": "other"})
    second = store.publish(tmp_path / "other", renamed)

    def run(digest: str) -> tuple[int, str]:
        name, _ = publish_forms("served", digest, None, home=published.home)
        return name

    assert run(first) == (1, first)
    store.promote("served", store.register("served", second))  # a successor
    assert run(first) == (2, second)
    store.rollback("served")
    assert run(second) == (1, first)
    assert store.aliases("served")["champion"] == 1
