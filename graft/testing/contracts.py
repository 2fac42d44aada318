"""What every variant owes, as pytest classes: subclass one, name your class, run pytest.

    from graft.testing.contracts import MethodContract

    class TestMyMethod(MethodContract):
        @pytest.fixture
        def variant_class(self):
            return MyMethod

The suites use the tiny model; each takes a few seconds on a CPU.
"""

from __future__ import annotations

import inspect
import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from pydantic import ValidationError
from ray import cloudpickle

from graft.core.errors import DataError
from graft.core.model import Variant
from graft.core.spaces import Choice, Float, Int, Space
from graft.data.records import Example, Message
from graft.methods.layerwise import LayerMethod
from graft.methods.whole import WholeMethod
from graft.metrics.base import Metric, RowOutcome
from graft.testing.tiny import tiny_model, tiny_rows, tiny_tokenizer

if TYPE_CHECKING:
    import torch

    from graft.compressors.base import Adapter, Compressor
    from graft.data.records import TokenRow
    from graft.data.template import ChatTemplate
    from graft.engine.multi.model import MultiAdapterModel
    from graft.engine.train import SlotState, Trainer
    from graft.methods.base import Method
    from graft.objectives.base import Objective, TokenOutputs


class VariantContract:
    """What holds for every family: settings that travel, words, a place."""

    family: ClassVar[str] = ""
    """Ending of the class name, `Method`."""
    must_cite: ClassVar[bool] = True
    """The class or its module has a `Reference`; the do-nothing `none` needs none."""

    @pytest.fixture
    def variant_class(self) -> type[Variant]:
        """The class under test; to be overridden."""
        raise AssertionError("override the fixture variant_class")

    @pytest.fixture
    def variant(self, variant_class: type[Variant]) -> Variant:
        """The class with its defaults, and the first example of a field that has none."""
        fields = variant_class.model_fields
        given = {key: f.examples[0] for key, f in fields.items() if f.is_required() and f.examples}
        return variant_class.model_validate(given)

    def test_settings_survive_json_and_pickle(self, variant: Variant) -> None:
        assert type(variant).model_validate(json.loads(variant.model_dump_json())) == variant
        assert pickle.loads(pickle.dumps(variant)) == variant
        assert cloudpickle.loads(cloudpickle.dumps(variant)) == variant

    def test_an_unknown_key_is_refused(self, variant: Variant) -> None:
        with pytest.raises(ValidationError, match="no_such_key"):
            type(variant).model_validate({**variant.model_dump(), "no_such_key": 1})

    def test_settings_are_frozen(self, variant: Variant) -> None:
        with pytest.raises(ValidationError, match="frozen"):
            variant.type = "other"  # type: ignore[misc]

    def test_its_type_is_its_file_and_its_class(self, variant: Variant) -> None:
        cls = type(variant)
        assert cls.__module__.rpartition(".")[2] == variant.type
        words = "".join(part.capitalize() for part in variant.type.split("_"))
        assert cls.__name__.lower() == f"{words}{self.family}".lower()

    def test_it_says_what_it_is_and_where_it_comes_from(self, variant: Variant) -> None:
        cls = type(variant)
        module_doc = inspect.getmodule(cls).__doc__ or ""
        assert cls.__doc__
        assert module_doc
        is_cited = "Reference:" in cls.__doc__ + module_doc
        assert is_cited or not self.must_cite or variant.type == "none"

    def test_every_setting_has_a_word_of_help(self, variant: Variant) -> None:
        fields = type(variant).model_fields
        assert not [name for name in fields if name != "type" and not fields[name].description]


class MethodContract(VariantContract):
    """Frozen base, trainable adapter, rows that do not mix, files that others read."""

    family = "Method"

    @pytest.fixture
    def routed(self) -> MultiAdapterModel:
        """A fresh tiny model with slots."""
        from graft.engine.multi.model import MultiAdapterModel

        return MultiAdapterModel(tiny_model())

    def test_search_space_is_inside_the_field_bounds(self, variant: Method) -> None:
        from graft.recipe.sections import TrainSection

        for path, space in variant.search_space().items():
            section, _, field = path.rpartition(".")
            owner: type[Any] = TrainSection if section == "train" else type(variant)
            assert field in owner.model_fields, path
            for value in _ends(space):
                owner.model_validate({field: value})

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


class ObjectiveContract(VariantContract):
    """Rows with something to learn; a loss that is finite, differentiable and a sum over rows."""

    family = "Objective"

    @pytest.fixture
    def example(self, variant: Objective) -> Example:
        """One example of the first kind that the objective learns from."""
        user, assistant = (Message(**message) for message in tiny_rows(1)[0]["messages"])
        kinds: dict[str, dict[str, Any]] = {
            "messages": {"messages": (user, assistant)},
            "preference": {"prompt": (user,), "chosen": assistant.content, "rejected": "no"},
            "unpaired": {"prompt": (user,), "answer": assistant.content, "is_wanted": True},
            "text": {"text": assistant.content},
        }
        return Example(source="contract:1", **kinds[min(variant.columns)])

    @pytest.fixture
    def template(self) -> ChatTemplate:
        """Of the tiny model."""
        from graft.data.template import ChatTemplate

        return ChatTemplate(tiny_tokenizer())

    def test_its_rows_have_targets_and_weight(
        self, variant: Objective, example: Example, template: ChatTemplate
    ) -> None:
        rows = variant.rows(example, template)
        assert rows
        for row in rows:
            assert len(row.input_ids) == len(row.is_supervised)
            assert any(row.is_supervised)
            assert row.source == example.source
            assert variant.row_weight(row) > 0

    def test_its_loss_is_a_sum_over_rows(
        self, variant: Objective, example: Example, template: ChatTemplate
    ) -> None:
        import torch

        rows = [row for at in range(2) for row in variant.rows(example, template)]
        together, logprobs = _outputs(variant, rows)
        losses = variant.loss(together)
        assert losses.shape == (len(rows),)
        assert bool(losses.isfinite().all())
        apart = [_outputs(variant, rows, only=at)[0] for at in range(len(rows))]
        torch.testing.assert_close(losses, torch.cat([variant.loss(one) for one in apart]))
        losses.sum().backward()
        assert logprobs.grad is not None
        assert bool(logprobs.grad.isfinite().all() and logprobs.grad.any())

    def test_its_figures_are_a_number_a_row(
        self, variant: Objective, example: Example, template: ChatTemplate
    ) -> None:
        rows = variant.rows(example, template)
        outputs, _ = _outputs(variant, rows)
        for name, of_rows in variant.figures(outputs).items():
            assert name.isidentifier()
            assert of_rows.shape == (len(rows),)


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


def _outputs(
    objective: Objective, rows: list[TokenRow], only: int | None = None
) -> tuple[TokenOutputs, torch.Tensor]:
    """Made-up outputs of some rows, or of one of them, and the log-probabilities in them."""
    import torch

    from graft.engine.scoring import outputs_of
    from graft.objectives.base import REFERENCE

    generator = torch.Generator().manual_seed(0)
    drawn = [
        [-torch.rand(len(row.targets), generator=generator).double() for row in rows]
        for _ in range(2)
    ]
    at = slice(None) if only is None else slice(only, only + 1)
    logprobs, reference = ([scores.tolist() for scores in of_rows[at]] for of_rows in drawn)
    extra = {REFERENCE: reference} if "reference" in objective.needs else {}
    outputs = outputs_of(rows[at], logprobs, extra)
    statistics = objective.statistics(outputs) if objective.probe_rows(rows) else {}
    leaf = outputs.logprobs_P.requires_grad_()
    return replace(outputs, statistics=dict.fromkeys(statistics, 0.1)), leaf


def _ends(space: Space) -> list[Any]:
    if isinstance(space, Choice):
        return list(space.values)
    assert isinstance(space, Float | Int)
    return [space.low, space.high]


def _prompt() -> torch.Tensor:
    import torch

    return torch.arange(5, 29)[None] % 300


def _logits(routed: MultiAdapterModel, slots: list[str | None]) -> torch.Tensor:
    from graft.engine.multi.routing import Routing

    input_ids = _prompt().expand(len(slots), -1)
    routing = Routing(slots=tuple(slots), num_rows=(1,) * len(slots))
    return routed.logits(routed.hidden(input_ids, routing=routing))


def _stirred(
    method: Method, routed: MultiAdapterModel, seed: int = 0
) -> dict[str, dict[str, torch.Tensor]]:
    """Initial tensors with noise on top, so that the adapter does something."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return {
        site: {
            key: value
            if key in method.frozen or not value.is_floating_point()
            else value + 0.02 * torch.randn(value.shape, generator=generator)
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
        )
        for number in range(6)
    ]
