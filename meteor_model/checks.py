"""Checks of single settings.

A wrong setting is an error that names it, and not a number that was cut or a TypeError from somewhere else.
"""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

T = TypeVar("T")


def whole_number(where: str, value: Any, least: int | None = None) -> int:
    """`value` as an int. ValueError that names `where`, for a fraction, a truth value, a text or less than `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise ValueError(f"{where} must be a whole number, got {value!r}")
    if least is not None and number < least:
        raise ValueError(f"{where} must be at least {least}, got {number}")
    return number


def finite_number(where: str, value: Any) -> float:
    """`value` as a float. ValueError that names `where`, for NaN, infinity or what is no number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or isinstance(value, bool | str):
        raise ValueError(f"{where} must be finite and a number, got {value!r}")
    return number


def switch(where: str, value: Any) -> bool:
    """`value`, which must be True or False: a text such as "false" would count as true."""
    if not isinstance(value, bool):
        raise ValueError(f"{where} must be true or false, got {value!r}")
    return value


def nearest(name: str, known: Iterable[str]) -> str:
    """What an error adds where a name is misspelt: "; did you mean 'x'?", or nothing where no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def refuse_unknown(where: str, data: Any, known: Any) -> None:
    """ValueError where `data` is no mapping or has keys that are not `known`."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} must be a mapping of settings, got {data!r}")
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise ValueError(f"{where} has unknown keys {unknown}; known: {sorted(known)}")


def from_mapping(cls: type[T], where: str, data: Any) -> T:
    """A dataclass from config.json. ValueError that names unknown and missing keys."""
    if isinstance(data, cls):
        return data
    items = fields(cls)  # type: ignore[arg-type]
    refuse_unknown(where, data, [item.name for item in items])
    required = [item.name for item in items if item.default is MISSING and item.default_factory is MISSING]
    missing = [name for name in required if name not in data]
    if missing:
        raise ValueError(f"{where} lacks the keys {missing}, got {sorted(data)}")
    return cls(**data)
