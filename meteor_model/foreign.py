"""What comes from outside, at the border: how much of it is shown, and how its JSON is read.

Decoders of foreign bytes raise anything, so a list of exceptions is always too short. Every reader parses inside
`foreign`, which turns whatever is raised there into the one error of the format; texts from outside are bounded.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SHOWN = 200
"""Characters of a value from outside in an error."""
SHOWN_DETAIL = 600
"""Characters of a whole error about something from outside."""
MAX_JSON_VALUES = 2**17
"""Values and keys of a JSON document from outside. Each takes some 100 bytes, however few it had in the document."""

_STRUCTURE = re.compile(r"[\[{,:]")
_TEXT = re.compile(r'"(?:[^"\\]++|\\.)*+"', re.DOTALL)


class JsonError(ValueError):
    """A document that is not JSON, or more than is read of one; the text is bounded."""


def shown(text: str, most: int = SHOWN) -> str:
    """A text from outside as one printable line of at most `most` characters.

    Control characters, line ends and lone surrogates are escaped; where it is cut its length is said.
    """
    line = _escaped(text[:most])
    if len(text) <= most and len(line) <= most:
        return line
    note = f"... ({len(text)} characters)"
    return line[: max(0, most - len(note))] + note


def quoted(value: object, most: int = SHOWN) -> str:
    """The `repr` of a value from outside, bounded as `shown`; its type where it has none."""
    if isinstance(value, str) and len(value) > most:
        return f"'{shown(value, most)}'"
    try:
        return shown(repr(value), most)
    except (ValueError, RecursionError):  # an endless integer, a nest of thousands
        return f"a {type(value).__name__}"


def described(error: BaseException, most: int = SHOWN) -> str:
    """Name and text of an exception that foreign bytes caused, bounded as `shown`."""
    return shown(f"{type(error).__name__}: {error}", most)


@contextmanager
def foreign(error: Callable[[str], Exception], keep: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Whatever is raised in the block, which parses bytes from outside, becomes one error.

    MemoryError passes: it is this machine's.

    Args:
        error: makes it of what was raised, in bounded words.
        keep: errors that are raised as they are: those of the format itself.
    """
    try:
        yield
    except MemoryError:
        raise
    except keep:
        raise
    except Exception as found:
        raise error(described(found)) from found


def parse_json(data: bytes | str, max_values: int | None = MAX_JSON_VALUES) -> Any:
    """Parse a JSON document from outside, strictly.

    Args:
        data: the document; bytes are UTF-8, with or without a byte order mark.
        max_values: most values and keys that it may hold; None for a document of any size.

    Raises:
        JsonError: what is not JSON; NaN, infinities and numbers that overflow to them; integers of thousands of
            digits; a key twice in an object; nesting that is too deep; more than `max_values`.
    """
    with foreign(JsonError, keep=(JsonError,)):
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        if max_values is not None:
            _refuse_many_values(text, max_values)
        return json.loads(
            text, object_pairs_hook=_unique_keys, parse_float=_finite_float, parse_constant=_refuse_constant
        )


def _refuse_many_values(text: str, max_values: int) -> None:
    if len(text) <= max_values or sum(map(text.count, "[{,:")) <= max_values:
        return
    values = len(_STRUCTURE.findall(_TEXT.sub("", text)))
    if values > max_values:
        raise JsonError(f"{values} values, the limit is {max_values}")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise JsonError(f"the key {quoted(twice)} is there twice in one object")
    return made


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise JsonError(f"the number {shown(text)} is too large")
    return number


def _refuse_constant(name: str) -> float:
    raise JsonError(f"{name} is no number of JSON")


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
