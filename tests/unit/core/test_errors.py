from __future__ import annotations

import pickle

import pytest

from graft.core import errors
from graft.core.errors import GraftError


def all_errors() -> list[type[GraftError]]:
    found, queue = [], [GraftError]
    while queue:
        cls = queue.pop()
        found.append(cls)
        queue += cls.__subclasses__()
    return [cls for cls in found if cls.__module__ == errors.__name__]


@pytest.mark.parametrize("cls", all_errors(), ids=lambda cls: cls.__name__)
def test_every_error_survives_pickling_with_its_message(cls: type[GraftError]) -> None:
    error = pickle.loads(pickle.dumps(cls("row 7: 'x' is not a role; use user")))
    assert type(error) is cls
    assert str(error) == "row 7: 'x' is not a role; use user"


def test_exit_codes_are_the_documented_ones() -> None:
    codes = {cls.__name__: cls.exit_code for cls in all_errors()}
    assert set(codes.values()) <= {1, 2, 3, 130}
    assert codes["ConfigError"] == codes["DataError"] == codes["AdapterError"] == 2
    assert codes["GateRefusedError"] == 3
    assert codes["StoppedError"] == 130
    assert codes["TrainingError"] == codes["ServingError"] == 1


def test_the_tree_in_the_docstring_names_every_error() -> None:
    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert all(name in (errors.__doc__ or "") for name in defined)
