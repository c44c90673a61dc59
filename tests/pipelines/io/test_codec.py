"""Stored values come back bit for bit, and what is not as it was written is named by file and field."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.recipes import recipe
from pipelines.config.recipe import Recipe
from pipelines.config.settings import SettingsError
from pipelines.evaluation.intervals import Interval
from pipelines.evaluation.scores import Record, Score
from pipelines.io import codec
from pipelines.registry.scores import StoredScore
from tune.records import TrialRecord


@dataclass(frozen=True)
class Inner:
    """A part of a stored value."""

    key: str
    value: float


@dataclass(frozen=True)
class StoredThing:
    """Every kind of field that is stored."""

    name: str
    count: int
    value: float
    status: Literal["begun", "done"] = "begun"
    parts: tuple[Inner, ...] = ()
    by_name: dict[str, list[float]] | None = None
    free: dict[str, Any] = field(default_factory=dict)


@settings(deadline=None)  # the first call makes the adapter
@given(st.floats(width=64), st.text(), st.integers(-(2**63), 2**63 - 1))
def test_every_bit_comes_back(value: float, text: str, count: int) -> None:
    thing = StoredThing(text, count, value, "done", (Inner(text, -value),), {text: [value, 0.0]}, {"any": [1, None]})
    read = codec.decode(StoredThing, codec.encode(thing), "file")
    assert codec.encode(read) == codec.encode(thing)
    if not math.isnan(value):
        assert struct.pack("d", read.value) == struct.pack("d", value)
        assert read == thing


def test_the_bytes_are_those_of_json() -> None:
    thing = StoredThing("ä", 1, math.nan)
    assert codec.encode(thing) == json.dumps(asdict(thing))
    assert '"name": "\\u00e4", "count": 1, "value": NaN' in codec.encode(thing)
    assert codec.encode(Inner("a", 1.0), indent=1) == '{\n "key": "a",\n "value": 1.0\n}'


def test_what_was_written_before_a_field_was_added_is_read() -> None:
    assert codec.decode(StoredThing, b'{"name": "a", "count": 1, "value": 2}', "file") == StoredThing("a", 1, 2.0)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            '{"name": "a", "count": 1, "value": 2, "staus": "done"}',
            "staus is unknown; known: .*; did you mean 'status'",
        ),
        ('{"name": "a", "count": 1}', "value is missing"),
        ('{"name": "a", "count": "1", "value": 2}', "count is '1'; it must be a whole number"),
        ('{"name": "a", "count": 1.5, "value": 2}', "count is 1.5; it must be"),
        ('{"name": "a", "count": true, "value": 2}', "count is True; it must be a whole number"),
        ('{"name": "a", "count": 1, "value": 2, "status": "gone"}', "status is 'gone'; it must be 'begun' or 'done'"),
        ('{"name": "a", "count": 1, "value": 2, "parts": [{"key": "b"}]}', r"parts\.0\.value is missing"),
        (
            '{"name": "a", "count": 1, "value": 2, "by_name": {"b": ["c"]}}',
            r"by_name\.b\.0 is 'c'; it must be a number",
        ),
        ("[]", r"StoredThing is \[\]; it must be"),
        ('{"name": "a"', "it is not JSON"),
        ("", "it is not JSON"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_field(document: str, message: str) -> None:
    with pytest.raises(SettingsError, match=f"^s3://b/x.json holds no stored thing: .*{message}"):
        codec.decode(StoredThing, document, "s3://b/x.json", SettingsError)


def test_a_recipe_survives_and_a_misspelt_setting_is_refused() -> None:
    base = recipe("pretrain", "small")
    assert codec.from_plain(Recipe, base.to_dict(), "recipe.json") == base
    assert json.loads(codec.encode(base)) == base.to_dict()
    for where, name, message in [
        ("training", "wokers", r"training\.wokers is unknown; known: workers, .*; did you mean 'workers'\?"),
        ("pruning", "fuze", r"pruning\.fuze is unknown; known: encode, fuse, decode; did you mean 'fuse'\?"),
    ]:
        plain = base.to_dict()
        plain[where][name] = 3
        with pytest.raises(ValueError, match=f"^recipe.json holds no recipe: {message}"):
            codec.from_plain(Recipe, plain, "recipe.json")
    plain = base.to_dict()
    plain["training"]["workers"] = 0
    with pytest.raises(ValueError, match=r"training\.workers is 0; it must be at least 1$"):
        codec.from_plain(Recipe, plain, "recipe.json")
    plain["training"]["workers"] = 64
    with pytest.raises(ValueError, match=r"recipe: training\.workers is 64, but training\.global_batch 16 has only"):
        codec.from_plain(Recipe, plain, "recipe.json")


SCORE = Score(
    "5f",
    1,
    1,
    {"text_only": 2},
    1.0,
    Interval(0.2, 1.0),
    0.25,
    Interval(0.25, 0.25),
    32,
    15.5,
    0.004,
    (Record("k", "g", "p", "a", "a", 1.0, 0.25, ((64, 32, 16),)),),
)


def test_what_earlier_versions_stored_is_read() -> None:
    """Documents as they were written before this codec."""
    plain = asdict(SCORE)
    plain["records"] = [dict(record) for record in plain["records"]]
    assert Score.from_dict(json.loads(json.dumps(plain))) == SCORE
    del plain["records"]
    tag = json.dumps({"suite": None, "score": plain, "artifact": "scores/a.json", "asked_as": 3})
    assert StoredScore.from_json(tag, "tag").score == Score.from_dict(plain)
    trial = (
        '{"id": "front-1", "study": "front", "choices": {"layer": 2}, "pruning": {}, "ranks": null, '
        '"status": "started", "of": "", "objective": null, "score": null, "ms": null, "error": null, "seconds": null, '
        '"run_id": null}'
    )
    written = TrialRecord("front-1", "front", {"layer": 2}, {}, None)
    assert codec.decode(TrialRecord, trial, "trial") == written
    assert json.loads(codec.encode(written)) == {**json.loads(trial), "towers": None, "maps": None}
