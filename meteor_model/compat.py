"""What differs between the supported releases of transformers (5.17 to 5.24), in one place.

Each entry says since which release and why, and is held by a test in tests/meteor_model/test_compat.py, which
`make test-versions` runs under every release of its table. An entry goes when the lowest release no longer needs it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ParamSpec, TypeVar

from transformers.modeling_outputs import BaseModelOutputWithPast

P = ParamSpec("P")
T = TypeVar("T")

CACHE_NAMES = ("past_key_values", "cache")
"""The names under which releases pass a key/value cache: the first up to 5.23, the second from 5.24 on."""

CACHE = next(name for name in CACHE_NAMES if name in {item.name for item in fields(BaseModelOutputWithPast)})
"""The name that the installed release uses, for arguments and for fields of outputs.

5.24 renames `past_key_values` to `cache` in all models and outputs. The old name still works there as an argument, with
a warning at every call, until 5.40. Calls into the library say `**{CACHE: cache}`; our own output classes inherit the
field from the library's.
"""


def accepts_either_cache_name(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function that takes `past_key_values` be called with `cache` as well.

    Users of every release call the model by the name that they know, and `generate` by the one of its release.

    Raises:
        ValueError: when it is called, where both names are given.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if "cache" in kwargs:
            cache = kwargs.pop("cache")
            if kwargs.get("past_key_values") is not None and cache is not None:
                raise ValueError("the cache is given twice, as past_key_values and as cache: give one of them")
            if cache is not None:
                kwargs["past_key_values"] = cache
        return function(*args, **kwargs)

    return run


def cache_of(output: Any) -> Any:
    """The key/value cache that a model's output carries, or None."""
    return getattr(output, CACHE)
