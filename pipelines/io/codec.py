"""Stored values: a dataclass as JSON and back, strictly.

What is written is plain `json.dumps` of the fields, in their order: floats keep every bit, NaN and infinities are
written as Python writes them, and equal values give equal bytes for ever. What is read must be exactly such a document:
a field that is missing, unknown or of another type is an error that names the file and the field. Fields with a default
may be missing, so a dataclass may grow and still read what was written before.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from pipelines.io.validation import messages

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")


def encode(value: DataclassInstance, indent: int | None = None) -> str:
    """A dataclass as JSON."""
    return json.dumps(asdict(value), indent=indent)


def decode(cls: type[T], text: str | bytes, where: str, error: type[ValueError] = ValueError) -> T:
    """The value that `encode` wrote.

    Args:
        cls: a dataclass, of which the value is.
        text: the JSON.
        where: the file or the tag that it was read from, for the error.
        error: what is raised.

    Raises:
        ValueError: of the class `error`, naming `where` and every field that is not as it must be.
    """
    try:
        return _adapter(cls).validate_json(text, strict=True, extra="forbid")
    except ValidationError as failed:
        what = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", cls.__name__).lower()
        raise error(f"{where} holds no {what}: {'; '.join(messages(failed, cls))}") from None


def from_plain(cls: type[T], plain: Any, where: str, error: type[ValueError] = ValueError) -> T:
    """The same from a JSON document that is parsed already, or a part of one."""
    return decode(cls, json.dumps(plain), where, error)


_ADAPTERS: dict[type, TypeAdapter[Any]] = {}


def _adapter(cls: type[T]) -> TypeAdapter[T]:
    if cls not in _ADAPTERS:  # making one takes longer than reading a value
        _ADAPTERS[cls] = TypeAdapter(cls)
    return _ADAPTERS[cls]
