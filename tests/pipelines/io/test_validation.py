"""Settings classes: a range in the type refuses by dotted name, value and range; nothing is coerced or ignored."""

from __future__ import annotations

import pickle
from dataclasses import asdict, field, replace
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Interval, Lt
from pydantic import PositiveFloat, PositiveInt

from pipelines.io.validation import Share, ShareBelowOne, bounds, settings_class


class WrongError(ValueError):
    """What these settings raise."""


@settings_class("part.inner", WrongError)
class Inner:
    """Settings of every kind."""

    count: PositiveInt = 2
    limit: PositiveInt | None = None
    share: ShareBelowOne = 0.5
    kind: Literal["a", "b"] = "a"
    on: bool = False
    text: str = ""
    weights: dict[str, PositiveFloat] = field(default_factory=dict)
    budgets: tuple[PositiveFloat, ...] = ()

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit > self.count:
            raise WrongError(f"part.inner.limit is {self.limit}, above part.inner.count {self.count}")


@settings_class(error=WrongError)
class Outer:
    """Settings that hold others."""

    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "part.inner.count is 0; it must be at least 1"),
        ({"limit": 0}, "part.inner.limit is 0; it must be at least 1, or None"),
        ({"share": 1.0}, "part.inner.share is 1.0; it must be in [0, 1)"),
        ({"share": float("nan")}, "part.inner.share is nan; it must be a finite number"),
        ({"kind": "c"}, "part.inner.kind is 'c'; it must be 'a' or 'b'"),
        ({"count": True}, "part.inner.count is True; it must be a whole number"),
        ({"count": "3"}, "part.inner.count is '3'; it must be a whole number"),
        ({"on": "false"}, "part.inner.on is 'false'; it must be true or false"),
        ({"text": 5}, "part.inner.text is 5; it must be text"),
        ({"weights": {"s3://b/a.b": -1.0}}, "part.inner.weights.s3://b/a.b is -1.0; it must be above 0"),
        ({"budgets": (1.0, 0.0)}, "part.inner.budgets.1 is 0.0; it must be above 0"),
        ({"limit": 3}, "part.inner.limit is 3, above part.inner.count 2"),
        (
            {"coutn": 1},
            "part.inner.coutn is unknown; known: count, limit, share, kind, on, text, weights, budgets; "
            "did you mean 'count'?",
        ),
        (
            {"count": 0, "on": 1},
            "part.inner.count is 0; it must be at least 1; part.inner.on is 1; it must be true or false",
        ),
    ],
)
def test_what_is_wrong_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(WrongError) as refused:
        Inner(**values)
    assert str(refused.value) == message


def test_a_long_value_is_cut() -> None:
    with pytest.raises(WrongError, match=r"part\.inner\.on is 'x{199}\.\.\. \(100002 characters\); it must be"):
        Inner(on="x" * 100_000)  # type: ignore[arg-type]


def test_replace_checks_again_however_deep() -> None:
    outer = Outer()
    with pytest.raises(WrongError, match=r"part\.inner\.count is 0"):
        replace(outer, inner=replace(outer.inner, count=0))
    with pytest.raises(WrongError, match=r"part\.inner\.limit is 2, above part\.inner\.count 1"):
        replace(Inner(limit=2), count=1)


def test_a_mapping_is_no_settings_object() -> None:
    with pytest.raises(WrongError, match=r"inner is \{'count': 1\}; it must be"):
        Outer(inner={"count": 1})  # type: ignore[arg-type]


def test_they_are_dataclasses_as_any_other() -> None:
    outer = Outer(inner=Inner(share=0))
    assert asdict(outer)["inner"] == asdict(Inner(share=0.0))
    assert pickle.loads(pickle.dumps(outer)) == outer
    with pytest.raises(AttributeError):
        outer.inner = Inner()  # type: ignore[misc]


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (PositiveInt, "at least 1"),
        (PositiveFloat | None, "above 0, or None"),
        (Share, "in [0, 1]"),
        (Annotated[int, Interval(gt=0, lt=8)], "in [1, 7]"),
        (Annotated[float, Lt(3)], "below 3"),
        (int | None, ""),
        (str, ""),
    ],
)
def test_bounds_in_words(hint: Any, text: str) -> None:
    assert bounds(hint) == text
