"""Every method that the native engine serves, decoded beside all the others."""

from __future__ import annotations

from graft.engine.multi import MultiAdapterModel
from graft.methods.base import METHODS
from graft.testing import tiny_model
from graft.testing._decoding import mixed_answers
from tests.unit.methods._peft import stirred


def test_all_methods_that_the_native_engine_serves_answer_in_one_batch_as_alone() -> None:
    names = [name for name in METHODS.names() if "native" in METHODS.get(name).servable]
    assert set(names) >= set(METHODS.names()) - {"full", "half", "peft"}
    model = MultiAdapterModel(tiny_model())
    for seed, name in enumerate(names):
        adapter = stirred(METHODS.build({"type": name}), seed=seed, noise=0.6)
        model.add_slot(name, adapter.method, tensors=adapter.tensors)
    answers = mixed_answers(model, [None, *names])
    assert len(set(answers)) == len(answers), "answers of other methods are the same"
