"""Answers to held-out questions come back from storage as they were, also those that earlier versions stored."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipelines.job.answers import HeldoutAnswer, HeldoutAnswers
from tests.pipelines.mlflow_fixture import SUITE, record, score_of


def test_answers_come_back() -> None:
    answer = HeldoutAnswer("k", "What?", "red", "blue", 0.0)
    whole = HeldoutAnswers((answer,), {"bad_json": 1}, SUITE, score_of([record(0), record(1, right=False, nll=1 / 3)]))
    for answers in (whole, HeldoutAnswers((), {}), HeldoutAnswers((answer,), {})):
        stored = json.loads(json.dumps({**answers.to_dict(), "checkpoint": "s3://b/step-4"}))
        assert HeldoutAnswers.from_dict(stored, "file") == answers


def test_what_is_wrong_with_stored_answers_is_named() -> None:
    stored: dict[str, Any] = {
        "answers": [{"key": "k", "question": "What?"}],
        "suite": None,
        "score": None,
        "left_out": {},
        "checkpoint": "c",
    }
    with pytest.raises(ValueError, match=r"^file holds no heldout answers: answers\.0\.expected is missing"):
        HeldoutAnswers.from_dict(stored, "file")
