"""A family of variants: found by package discovery, looked up by `type`, never listed by hand."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar, get_args

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from graft.core.errors import ConfigError
from graft.core.model import Variant

V = TypeVar("V", bound=Variant)


def nearest(name: str, known: list[str]) -> str:
    """Returns `" Did you mean 'x'?"`, or an empty string where nothing is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def _place(cls: type[Variant]) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


class Registry(Generic[V]):
    """All variants of one family.

    Every module of `package` whose name does not start with `_` is imported on first use, then the
    entry
    points of the group `graft.<family>`; each registers its class with the `register` decorator.
    """

    def __init__(self, family: str, package: str) -> None:
        self.family = family
        self._package = package
        self._classes: dict[str, type[V]] = {}
        self._is_discovered = False

    def register(self, cls: type[V]) -> type[V]:
        """Adds a variant class under the value of its `type` literal.

        Raises:
            ConfigError: Another class already claimed that `type`.
        """
        (name,) = get_args(cls.model_fields["type"].annotation)
        known = self._classes.get(name)
        if known is not None and _place(known) != _place(cls):
            raise ConfigError(
                f"two {self.family} classes claim type {name!r}: "
                f"{known.__module__}.{known.__qualname__} "
                f"and {cls.__module__}.{cls.__qualname__}; rename one"
            )
        self._classes[name] = cls
        return cls

    def _discover(self) -> None:
        if self._is_discovered:
            return
        self._is_discovered = True
        try:
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__):
                if not module.name.startswith("_"):
                    importlib.import_module(f"{self._package}.{module.name}")
            for entry in entry_points(group=f"graft.{self.family}"):
                entry.load()
        except BaseException:
            self._is_discovered = False  # a broken plug-in stays an error, not an absent name
            raise

    def names(self) -> list[str]:
        """All known `type` names, sorted."""
        self._discover()
        return sorted(self._classes)

    def get(self, name: str) -> type[V]:
        """Returns the class of that `type`.

        Raises:
            ConfigError: No such variant; the message names the nearest one and all known ones.
        """
        self._discover()
        if name not in self._classes:
            raise ConfigError(
                f"unknown {self.family} type {name!r}.{nearest(name, self.names())} "
                f"Known: {', '.join(self.names())}"
            )
        return self._classes[name]

    @property
    def _one(self) -> str:
        return f"{'an' if self.family[0] in 'aeiou' else 'a'} {self.family}"

    def build(self, raw: Any) -> V:
        """Builds a variant from a mapping with `type`, or from the bare name for all defaults."""
        if isinstance(raw, str):
            raw = {"type": raw}
        if not isinstance(raw, dict):
            raise ConfigError(f"{self._one} is a mapping with a `type` key, not {raw!r}")
        if "type" not in raw:
            raise ConfigError(
                f"{self._one} section needs a `type`. Known: {', '.join(self.names())}"
            )
        return self.get(str(raw["type"])).model_validate(raw)

    def field(self) -> tuple[Any, ...]:
        """Annotations that make a pydantic field of the family base accept any registered variant.

        Use as `method: Annotated[Method, *METHODS.field()]`.
        """
        return (
            BeforeValidator(lambda v: v if isinstance(v, Variant) else self.build(v)),
            PlainSerializer(lambda v: v.model_dump(mode="json")),
            WithJsonSchema({"x-family": self.family}),
        )
