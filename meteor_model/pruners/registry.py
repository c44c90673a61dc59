"""Registries of named criteria: one decorator enters a function, a configuration names it, with its numbers.

A criterion is a function whose first argument is what its stage offers (a `Boundary`, a `Pool`, a `LayerView`); its
numbers are keyword-only arguments with defaults, which `options` of the stage's settings may set. A name or an option
that does not exist is refused when the configuration is made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from meteor_model.checks import finite_number, nearest, refuse_unknown

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Criterion(Generic[F]):
    """One entry of a registry.

    Attributes:
        name: what configurations call it.
        run: the function.
        facts: what its stage has to know before it calls it (`Registry.facts` lists them with their defaults).
    """

    name: str
    run: F
    facts: Mapping[str, Any]

    @property
    def defaults(self) -> dict[str, float]:
        """Its numbers and their defaults."""
        parameters = inspect.signature(self.run).parameters.values()
        return {item.name: item.default for item in parameters if item.kind is inspect.Parameter.KEYWORD_ONLY}

    @property
    def about(self) -> str:
        """The first line of its docstring."""
        return (inspect.getdoc(self.run) or "").partition("\n")[0]

    def checked(self, where: str, options: Mapping[str, Any]) -> dict[str, float]:
        """`options` as numbers. ValueError that names `where`, for one that it does not have or that is no number."""
        refuse_unknown(f"{where} of criterion {self.name!r}", options, self.defaults)
        return {name: finite_number(f"{where}.{name}", value) for name, value in options.items()}


class Registry(Generic[F]):
    """Criteria of one stage by name.

    Args:
        setting: the setting that names one, for errors.
        facts: what an entry may say about itself, and the defaults.
    """

    def __init__(self, setting: str, **facts: Any) -> None:
        self.setting, self.facts = setting, facts
        self._entries: dict[str, Criterion[F]] = {}

    def register(self, name: str, **facts: Any) -> Callable[[F], F]:
        """Decorator: enter a function under this name.

        Raises:
            ValueError: for a name that is taken, or a fact that this registry does not know.
        """
        if name in self._entries:
            raise ValueError(f"{self.setting} {name!r} is registered already, by {self._entries[name].run.__module__}")
        refuse_unknown(f"{self.setting} {name!r}", facts, self.facts)

        def enter(run: F) -> F:
            self._entries[name] = Criterion(name, run, {**self.facts, **facts})
            return run

        return enter

    def __getitem__(self, name: str) -> Criterion[F]:
        """The entry. ValueError for an unknown name, with the known ones and what to do for one's own."""
        if name not in self._entries:
            known = ", ".join(self._entries)
            raise ValueError(
                f"{self.setting} {name!r} is unknown; known: {known}{nearest(str(name), self._entries)} (one of your "
                "own: import the module that registers it first)"
            )
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        """The names, in the order in which they were entered."""
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries
