"""What every variant owes, as pytest classes: subclass one, name your class, run pytest.

    from graft.testing.contracts import MethodContract

    class TestMyMethod(MethodContract):
        @pytest.fixture
        def variant_class(self):
            return MyMethod

The suites use the tiny model; each takes a few seconds on a CPU.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from graft.core.errors import DataError
from graft.methods.layerwise import LayerMethod
from graft.methods.whole import WholeMethod
from graft.metrics.base import Metric, RowOutcome
from graft.testing._decoding import mixed_answers
from graft.testing._objective_contract import ObjectiveContract
from graft.testing._variant_contract import VariantContract, require_bounds
from graft.testing.tiny import tiny_model

if TYPE_CHECKING:
    import torch

    from graft.compressors.base import Adapter, Compressor
    from graft.engine.multi.model import MultiAdapterModel
    from graft.engine.train import SlotState, Trainer
    from graft.methods.base import Method

__all__ = [
    "CompressorContract",
    "MethodContract",
    "MetricContract",
    "ObjectiveContract",
    "VariantContract",
]


class MethodContract(VariantContract):
    """Frozen base, trainable adapter, rows that do not mix, files that others read."""

    family = "Method"

    @pytest.fixture
    def routed(self) -> MultiAdapterModel:
        """A fresh tiny model with slots."""
        from graft.engine.multi.model import MultiAdapterModel

        return MultiAdapterModel(tiny_model())

    def test_search_space_is_inside_the_field_bounds(self, variant: Method) -> None:
        require_bounds(variant)

    def test_its_default_learning_rate_is_one_that_it_is_searched_with(
        self, variant: Method
    ) -> None:
        from graft.recipe.holes import contains

        searched = variant.search_space().get("train.lr")
        if searched is None:
            pytest.skip("the method searches no learning rate")
        assert contains(searched, variant.default_lr)

    def test_the_same_seed_gives_the_same_tensors(
        self, variant: Method, routed: MultiAdapterModel
    ) -> None:
        first, second = (routed.fresh_tensors(variant, seed=7) for _ in range(2))
        assert _is_same(first, second, 0.0)

    def test_a_fresh_adapter_changes_nothing(
        self, variant: Method, routed: MultiAdapterModel
    ) -> None:
        import torch

        if not variant.is_identity_at_start:
            pytest.skip("the method does not claim it")
        base = _logits(routed, [None])
        routed.add_slot("fresh", variant)
        assert torch.equal(_logits(routed, ["fresh"]), base)

    def test_only_the_adapter_takes_gradients(
        self, variant: Method, routed: MultiAdapterModel
    ) -> None:
        routed.add_slot("own", variant, tensors=_stirred(variant, routed), trainable=True)
        _logits(routed, ["own"]).square().sum().backward()
        own = routed.parameters("own")
        ours = {id(parameter) for parameter in own.values()}
        assert any(p.grad is not None and bool(p.grad.any()) for p in own.values())
        assert not [
            n for n, p in routed.base.named_parameters() if id(p) not in ours and p.grad is not None
        ]

    def test_rows_of_other_slots_do_not_matter(
        self, variant: Method, routed: MultiAdapterModel
    ) -> None:
        import torch

        if isinstance(variant, WholeMethod):
            pytest.skip("the method has the base for itself")
        routed.add_slot("a", variant, tensors=_stirred(variant, routed, seed=1))
        routed.add_slot("b", variant, tensors=_stirred(variant, routed, seed=2))
        alone = [_logits(routed, [name]) for name in (None, "a", "b")]
        together = _logits(routed, [None, "a", "b"])
        assert not torch.equal(alone[1], alone[2])
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)

    def test_decoded_beside_others_it_answers_as_alone(
        self, variant: Method, routed: MultiAdapterModel
    ) -> None:
        from graft.methods.base import METHODS

        if "native" not in variant.servable:
            pytest.skip("the native engine does not serve it")
        lora = METHODS.build({"type": "lora"})
        for seed, (name, method) in enumerate({"a": variant, "b": variant, "lora": lora}.items()):
            tensors = _stirred(method, routed, seed=seed, noise=0.6)
            routed.add_slot(name, method, tensors=tensors)
        answers = mixed_answers(routed, ["a", None, "b", "lora"])
        assert len(set(answers)) == len(answers), "answers of other slots are the same"

    def test_saved_and_loaded_it_answers_the_same(
        self, variant: Method, routed: MultiAdapterModel, tmp_path: Path
    ) -> None:
        import torch

        from graft.compressors.base import Adapter
        from graft.compressors.folder import load_adapter, save_adapter

        tensors = _stirred(variant, routed)
        save_adapter(tmp_path / "adapter", Adapter(variant, tensors), "tiny")
        loaded = load_adapter(tmp_path / "adapter")
        routed.add_slot("before", variant, tensors=tensors)
        expected = _logits(routed, ["before"])
        routed.remove_slot("before")
        routed.add_slot("after", loaded.method, tensors=loaded.tensors)
        assert torch.equal(_logits(routed, ["after"]), expected)

    def test_peft_reads_its_files_and_answers_the_same(
        self, variant: Method, routed: MultiAdapterModel, tmp_path: Path
    ) -> None:
        import torch
        from peft import PeftModel

        from graft.compressors.base import Adapter
        from graft.compressors.folder import save_adapter

        if not variant.is_read_by_peft:
            pytest.skip("PEFT has no such method")
        tensors = _stirred(variant, routed)
        save_adapter(tmp_path / "adapter", Adapter(variant, tensors), "tiny")
        routed.add_slot("ours", variant, tensors=tensors)
        theirs = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "adapter"))
        expected = theirs(input_ids=_prompt()).logits
        own = expected[:, -_prompt().shape[1] :]  # PEFT gives the logits of virtual tokens too
        torch.testing.assert_close(_logits(routed, ["ours"]), own, rtol=1e-4, atol=1e-4)

    def test_merged_into_the_base_it_answers_the_same(
        self, variant: Method, routed: MultiAdapterModel
    ) -> None:
        import torch

        from graft.compressors.base import Adapter
        from graft.engine.merge import merge_into_base

        if not variant.merges:
            pytest.skip("the method cannot be merged")
        tensors = _stirred(variant, routed)
        merged = merge_into_base(tiny_model(), Adapter(variant, tensors))
        routed.add_slot("apart", variant, tensors=tensors)
        expected = merged(input_ids=_prompt()).logits
        torch.testing.assert_close(_logits(routed, ["apart"]), expected, rtol=1e-4, atol=1e-4)

    def test_trained_beside_another_it_ends_as_alone(self, variant: Method) -> None:
        if not variant.packable:
            pytest.skip("the method trains alone")
        together = _trained(_trainer(variant, "a", "b"))
        for name in ("a", "b"):
            alone = _trained(_trainer(variant, name)).state(name)
            assert _is_same(together.state(name).tensors, alone.tensors, 1e-6)

    def test_continued_from_a_checkpoint_it_ends_the_same(
        self, variant: Method, tmp_path: Path
    ) -> None:
        from graft.engine.checkpoint import load_checkpoint, save_checkpoint

        if not variant.packable:
            pytest.skip("the method trains alone")
        first = _trainer(variant, "a")
        first.step()
        first.step()
        state, _ = load_checkpoint(save_checkpoint(tmp_path, first.state("a"), {}))
        second = _trained(_trainer(variant, "a", state=state)).state("a")
        whole = _trained(_trainer(variant, "a")).state("a")
        assert whole.step == second.step
        assert _is_same(whole.tensors, second.tensors, 1e-6)
        assert _is_same({"": whole.memory}, {"": second.memory}, 1e-6)


class CompressorContract(VariantContract):
    """A valid adapter comes out, the given one stays, a second pass changes nothing."""

    family = "Compressor"

    @pytest.fixture
    def adapter(self) -> Adapter:
        """A LoRA of rank 8 on the tiny model; override for compressors of other methods."""
        from graft.compressors.base import Adapter
        from graft.engine.multi.model import MultiAdapterModel
        from graft.methods.base import METHODS

        method = METHODS.build({"type": "lora", "r": 8})
        return Adapter(method, _stirred(method, MultiAdapterModel(tiny_model())))

    def test_the_given_adapter_stays_as_it_was(self, variant: Compressor, adapter: Adapter) -> None:
        before = _copied(adapter.tensors)
        variant.compress(adapter)
        assert _is_same(adapter.tensors, before, 0.0)

    def test_a_second_pass_changes_nothing(self, variant: Compressor, adapter: Adapter) -> None:
        once = variant.compress(adapter)
        twice = variant.compress(once)
        assert twice.method == once.method
        assert _is_same(_updates(once), _updates(twice), 1e-6)

    def test_what_is_written_is_what_is_read_and_no_larger(
        self, variant: Compressor, adapter: Adapter, tmp_path: Path
    ) -> None:
        from graft.compressors.folder import load_adapter, save_adapter

        small = variant.compress(adapter)
        save_adapter(tmp_path / "given", adapter, "tiny")
        save_adapter(tmp_path / "small", small, "tiny")
        loaded = load_adapter(tmp_path / "small")
        assert _is_same(loaded.tensors, small.tensors, 0.0)
        assert _is_same(_updates(loaded), _updates(small), 0.0)
        assert _tensor_bytes(tmp_path / "small") <= _tensor_bytes(tmp_path / "given")

    def test_the_result_fits_the_base(self, variant: Compressor, adapter: Adapter) -> None:
        from graft.engine.multi.model import MultiAdapterModel

        small = variant.compress(adapter)
        routed = MultiAdapterModel(tiny_model())
        routed.add_slot("small", small.method, tensors=small.tensors)
        assert bool(_logits(routed, ["small"]).isfinite().all())


class MetricContract(VariantContract):
    """One finite number over all rows, one a row, right answers better than wrong ones."""

    family = "Metric"
    must_cite = False

    def test_it_scores_every_row_whatever_their_order(self, variant: Metric) -> None:
        rows = [*_outcomes(is_good=True), *_outcomes(is_good=False)]
        value, scores = variant.score(rows)
        backwards, _ = variant.score(rows[::-1])
        assert math.isfinite(value)
        assert len(scores) == len(rows)
        assert value == pytest.approx(backwards)

    def test_right_answers_score_better_than_wrong_ones(self, variant: Metric) -> None:
        good, _ = variant.score(_outcomes(is_good=True))
        bad, _ = variant.score(_outcomes(is_good=False))
        assert good > bad if variant.mode == "max" else good < bad

    def test_no_rows_is_refused_in_words(self, variant: Metric) -> None:
        with pytest.raises(DataError, match=r"\w+ \w+"):
            variant.score([])


def _prompt() -> torch.Tensor:
    import torch

    return torch.arange(5, 29)[None] % 300


def _logits(routed: MultiAdapterModel, slots: list[str | None]) -> torch.Tensor:
    from graft.engine.multi.routing import Routing

    input_ids = _prompt().expand(len(slots), -1)
    routing = Routing(slots=tuple(slots), num_rows=(1,) * len(slots))
    return routed.logits(routed.hidden(input_ids, routing=routing))


def _stirred(
    method: Method, routed: MultiAdapterModel, seed: int = 0, noise: float = 0.02
) -> dict[str, dict[str, torch.Tensor]]:
    """Initial tensors with noise on top, so that the adapter does something."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return {
        site: {
            key: value
            if key in method.frozen or not value.is_floating_point()
            else value + noise * torch.randn(value.shape, generator=generator)
            for key, value in of_site.items()
        }
        for site, of_site in routed.fresh_tensors(method).items()
    }


def _trainer(method: Method, *slots: str, state: SlotState | None = None) -> Trainer:
    """Slots of four steps each on the tiny model in fp64, of other rows and seeds each."""
    import torch

    from graft.data.records import TokenRow
    from graft.engine.multi.model import MultiAdapterModel
    from graft.engine.train import Trainer
    from graft.recipe.sections import Recipe

    trainer = Trainer(MultiAdapterModel(tiny_model(dtype=torch.float64)))
    for name in slots:
        seed = ord(name)
        recipe = Recipe.model_validate(
            {
                "model": {"source": "tiny"},
                "data": {"train": "none.jsonl"},
                "method": method,
                "train": {"steps": 4, "batch_size": 3, "lr": 1e-3, "seed": seed},
            }
        )
        rows = [
            TokenRow(list(range(seed, seed + length)), [True] * length, f"contract:{length}")
            for length in range(5, 29, 3)
        ]
        trainer.join(name, recipe, rows, state=state)
    return trainer


def _trained(trainer: Trainer) -> Trainer:
    while trainer.step():
        pass
    return trainer


Tensors = dict[str, dict[str, Any]]


def _copied(tensors: Tensors) -> Tensors:
    return {site: {key: value.clone() for key, value in t.items()} for site, t in tensors.items()}


def _is_same(left: Tensors, right: Tensors, tolerance: float) -> bool:
    return left.keys() == right.keys() and all(
        left[site].keys() == right[site].keys()
        and all(
            left[site][key].shape == right[site][key].shape
            and bool(
                (left[site][key].double() - right[site][key].double()).abs().max() <= tolerance
            )
            for key in left[site]
        )
        for site in left
    )


def _updates(adapter: Adapter) -> Tensors:
    """What the adapter does: factors may differ where their product is the same."""
    method, base = adapter.method, tiny_model()
    if not (method.mergeable and isinstance(method, LayerMethod)):
        return adapter.tensors
    return {
        site: {"update": method.merge_delta(tensors, base.get_submodule(site).weight)}
        for site, tensors in adapter.tensors.items()
    }


def _tensor_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _outcomes(*, is_good: bool) -> list[RowOutcome]:
    return [
        RowOutcome(
            reference=f'{{"lamp": {number}}}',
            answer=f'{{"lamp": {number}}}' if is_good else "I am sorry, I cannot say",
            loss_sum=(0.1 if is_good else 9.0) * (number + 1),
            num_tokens=4 + number,
            preference_margin=(0.1 if is_good else -0.1) * (number + 1),
            model_scores={"judge": (0.1 if is_good else -0.1) * (number + 1)},
        )
        for number in range(6)
    ]
