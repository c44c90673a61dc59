"""Settings that check themselves: pydantic dataclasses whose errors say what a person needs to know.

A range stands in the field's type (`PositiveInt`, `Annotated[float, Interval(ge=0, lt=1)]`); what several fields must
have in common stands in `__post_init__`. Nothing is coerced: True is no number and "3" no count. An unknown or misspelt
field is an error, too, so a dataclass read from JSON is as strict as one made in Python.

`pydantic.ValidationError` names its own classes and links to its manual. `messages` turns it into the texts of this
code: the setting by its dotted name, its value, and what it must be.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import field, fields, is_dataclass
from typing import Annotated, Any, TypeVar, dataclass_transform, get_args, get_origin, get_type_hints

import pydantic.dataclasses
from annotated_types import Interval
from pydantic import ConfigDict, ValidationError

from meteor_model.checks import nearest
from pipelines.io.names import NAME_RULE

T = TypeVar("T")

Share = Annotated[float, Interval(ge=0, le=1)]
"""A share of a whole, all of it included."""
ShareBelowOne = Annotated[float, Interval(ge=0, lt=1)]
"""A share of a whole that leaves something."""

CONFIG = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
_SHOWN = 200  # characters of a refused value
_KINDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_pattern_mismatch": NAME_RULE,  # the one pattern that settings have
    "finite_number": "a finite number",
    "dict_type": "a mapping",
    "tuple_type": "a list",
    "dataclass_type": "a mapping of settings",
}


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def settings_class(section: str = "", error: type[ValueError] = ValueError) -> Callable[[type[T]], type[T]]:
    """Make a class a frozen dataclass that checks its fields.

    Args:
        section: dotted name of the settings that an object of the class is filed under, for its errors.
        error: what is raised in place of `pydantic.ValidationError`.
    """

    def decorate(cls: type[T]) -> type[T]:
        made: Any = pydantic.dataclasses.dataclass(frozen=True, config=CONFIG)(cls)
        validate = made.__init__

        @functools.wraps(validate)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            try:
                validate(self, *args, **kwargs)
            except ValidationError as failed:
                raise error("; ".join(messages(failed, made, section))) from None

        made.__init__ = init
        return made

    return decorate


def messages(failed: ValidationError, cls: type, section: str = "") -> list[str]:
    """What is wrong, one text for each fault: the field by its dotted name, its value, and what it must be.

    Args:
        failed: of a `cls`.
        cls: the dataclass that was to be made.
        section: dotted name that goes before the fields'.
    """
    return [_message(fault, cls, section) for fault in failed.errors(include_url=False)]


def bounds(hint: Any) -> str:
    """What the numbers of a type must be ("at least 1"), from its annotations; nothing where they are free."""
    hint, optional = _required(hint)
    whole = get_args(hint)[:1] == (int,)
    text = _interval(hint.__metadata__, whole) if get_origin(hint) is Annotated else ""
    return f"{text}, or None" if text and optional else text


def _message(fault: Any, cls: type, section: str) -> str:
    kind, where, value = fault["type"], tuple(fault["loc"]), fault["input"]
    name = ".".join(str(part) for part in (section, *where) if part != "") or cls.__name__
    if kind == "value_error":  # of a __post_init__, which names the settings itself
        return str(fault["ctx"]["error"])
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        known = [item.name for item in _fields(_at(cls, where[:-1]))]
        return f"{name} is unknown; known: {', '.join(known)}{nearest(str(where[-1]), known)}"
    if kind == "json_invalid":
        return f"it is not JSON ({fault['ctx']['error']})"
    if kind in ("missing", "missing_argument"):
        return f"{name} is missing; give its value"
    return f"{name} is {_shown(value)}; it must be {_wanted(fault, cls, where)}"


def _wanted(fault: Any, cls: type, where: Sequence[str | int]) -> str:
    kind, hint = fault["type"], _at(cls, where)
    if kind == "literal_error":
        return str(fault["ctx"]["expected"])
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        return bounds(hint) or fault["msg"]
    return _KINDS.get(kind, fault["msg"].removeprefix("Input should be "))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"


def _at(hint: Any, where: Sequence[str | int]) -> Any:
    """The type of the field at a place, its annotations included."""
    for step in where:
        hint = _required(hint)[0]
        bare = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        if is_dataclass(bare):
            hint = get_type_hints(bare, include_extras=True).get(str(step), Any)
        else:
            inner = [part for part in get_args(bare) if part is not Ellipsis]
            hint = inner[-1] if inner else Any  # values of a mapping, items of a list
    return hint


def _fields(hint: Any) -> Iterable[Any]:
    bare = _required(hint)[0]
    return fields(bare) if is_dataclass(bare) else ()


def _required(hint: Any) -> tuple[Any, bool]:
    """A type without its None, and whether it had one."""
    parts = get_args(hint)
    if type(None) not in parts:
        return hint, False
    return next(part for part in parts if part is not type(None)), True


def _interval(metadata: Iterable[Any], whole: bool) -> str:
    """The range of Ge, Gt, Le, Lt and Interval in words; bounds of whole numbers belong to it."""
    found: dict[str, Any] = {}
    for item in metadata:
        for name in ("ge", "gt", "le", "lt"):
            if (bound := getattr(item, name, None)) is not None:
                found[name] = bound
    if whole and "gt" in found:
        found["ge"] = found.pop("gt") + 1
    if whole and "lt" in found:
        found["le"] = found.pop("lt") - 1
    low, high = found.get("ge", found.get("gt")), found.get("le", found.get("lt"))
    if low is not None and high is not None:
        return f"in {'[' if 'ge' in found else '('}{low}, {high}{']' if 'le' in found else ')'}"
    if low is not None:
        return f"{'at least' if 'ge' in found else 'above'} {low}"
    return f"{'at most' if 'le' in found else 'below'} {high}" if high is not None else ""


__all__ = ["CONFIG", "Share", "ShareBelowOne", "bounds", "messages", "settings_class"]
