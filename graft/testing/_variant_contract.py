"""What every variant owes, whatever its family."""

from __future__ import annotations

import inspect
import json
import pickle
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError
from ray import cloudpickle

from graft.core.model import Variant
from graft.core.spaces import Choice, Float, Int, Space


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


def require_bounds(variant: Any) -> None:
    """Both ends of every searched range are settings that the variant takes."""
    from graft.recipe.sections import TrainSection

    for path, space in variant.search_space().items():
        section, _, field = path.rpartition(".")
        owner: type[Any] = TrainSection if section == "train" else type(variant)
        assert field in owner.model_fields, path
        others = variant.model_dump(mode="json") if owner is type(variant) else {}
        for value in _ends(space):
            owner.model_validate({**others, field: value})


def _ends(space: Space) -> list[Any]:
    if isinstance(space, Choice):
        return list(space.values)
    assert isinstance(space, Float | Int)
    return [space.low, space.high]
