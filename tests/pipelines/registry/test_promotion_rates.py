"""Promotion at its stated error rates: planted worse, equal and better versions, by simulated scores."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from mlflow.entities.model_registry import ModelVersion, ModelVersionTag

from pipelines.evaluation.intervals import Interval
from pipelines.evaluation.scores import MARGINS, Record, Score
from pipelines.registry import promotion
from pipelines.registry import scores as stored
from pipelines.registry.aliases import Move
from pipelines.registry.promotion import PromotionError, Terms, promote
from pipelines.registry.scores import StoredScore, score_tags
from pipelines.registry.versions import Registry
from tests.pipelines.mlflow_fixture import SUITE

QUESTIONS, REPETITIONS = 300, 80
MARGIN = MARGINS["answer_nll"]
SUITE_OF = replace(SUITE, questions=QUESTIONS)


def scored(nll: np.ndarray, groups: np.ndarray) -> Score:
    records = tuple(
        Record(f"s{place}#0", f"g{group}", "p", "red", None, None, float(value), ((64, 32, 12),))
        for place, (value, group) in enumerate(zip(nll, groups, strict=True))
    )
    middle = float(nll.mean())
    level = Interval(middle, middle)
    return Score(SUITE_OF.digest, QUESTIONS, None, {}, None, None, middle, level, 32, 12.0, 1e-4, records)


class Shelf:
    """A registered model of two versions: 1 is the champion, 2 wants to be."""

    name = "meteor"

    def __init__(self, scores: dict[int, Score]) -> None:
        self.scores, self.traces = scores, dict[str, str]()

    def version(self, number: int) -> ModelVersion:
        tags = {"parity_max_abs_diff": "0", **score_tags(StoredScore(SUITE_OF, self.scores[number], "a.json"))}
        listed = [ModelVersionTag(name, text) for name, text in tags.items()]
        return ModelVersion("meteor", str(number), 0, status="READY", tags=listed)

    def registered_model(self) -> Any:
        return SimpleNamespace(aliases={"champion": "1"})

    def describe_version(self, number: int, tags: dict[str, str]) -> None:
        self.traces |= tags


@pytest.mark.parametrize(
    ("shift", "least_passed", "most_passed", "least_better", "most_better"),
    [
        (MARGIN, 0.0, 0.06, 0.0, 0.0),  # worse by the margin: 2.5 %, two standard errors of the simulation aside
        (0.0, 0.9, 1.0, 0.0, 0.06),  # equal: passes; called better in 2.5 %
        (-MARGIN, 1.0, 1.0, 0.9, 1.0),  # better
    ],
    ids=["worse", "equal", "better"],
)
def test_promotion_keeps_its_error_rates(
    shift: float,
    least_passed: float,
    most_passed: float,
    least_better: float,
    most_better: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stored, "load_score", lambda registry, version, digest: registry.scores[int(version.version)])
    monkeypatch.setattr(promotion, "move_alias", lambda registry, alias, version: Move(alias, 1, version))
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(QUESTIONS), random.integers(1, 5, size=QUESTIONS))[:QUESTIONS]
    terms, seen = Terms(max_unanswered=1.0), Counter[str]()
    for _ in range(REPETITIONS):
        before = random.exponential(size=QUESTIONS)
        common, own = random.normal(size=(2, QUESTIONS))
        change = 0.07 * (np.sqrt(0.5) * common[groups] + np.sqrt(0.5) * own)
        change = np.where(random.random(QUESTIONS) < 0.5, change, 0.0) + shift
        shelf = Shelf({1: scored(before, groups), 2: scored(before + change, groups)})
        try:
            told = promote(cast(Registry, shelf), 2, "champion", terms).why
        except PromotionError:
            seen["refused"] += 1
            assert not shelf.traces
            continue
        assert "promoted.champion" in shelf.traces
        seen["better" if ": better at" in told else "passed"] += 1
    better = seen["better"] / REPETITIONS
    assert least_better <= better <= most_better
    assert least_passed <= better + seen["passed"] / REPETITIONS <= most_passed
