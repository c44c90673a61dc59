"""Scores of registered versions: filed with the version, read again, and compared in pairs on one suite.

A score has two places. The whole, question by question, is an artifact of the version's run, in `scores/`; the numbers,
with the suite and the path of the whole, are the version's tag `score.SUITE`, one per suite. The suite that was scored
last stands in plain tags as well (`suite`, `accuracy`, ...), for people and for MLflow's search.

Scores of code that drew or asked its questions in another way (`suite.ASKED_AS`) are void: they stay where they are,
are never compared, and every refusal that meets them says how to make new ones.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlflow.entities.model_registry import ModelVersion

from meteor_model.foreign import foreign
from pipelines.evaluation.scores import Comparison, Score, ScoringError, compare_scores, counted
from pipelines.evaluation.suite import ASKED_AS, Suite
from pipelines.io import codec
from pipelines.io.redact import redact_text
from pipelines.registry.card import with_scores
from pipelines.registry.tags import (
    ANSWERED_TAG,
    ASKED_TAG,
    LEFT_OUT_TAG,
    MANIFEST_TAG,
    SCORE_TAG,
    SUITE_NAME_TAG,
    SUITE_TAG,
)
from pipelines.registry.versions import Registry
from pipelines.tracking.mlflow_run import MlflowRun
from pipelines.tracking.server import TrackingError, call_mlflow


@dataclass(frozen=True)
class StoredScore:
    """What a version's tag says of one suite.

    Attributes:
        suite: which questions, its manifest without secrets; None where only their digest is known.
        score: without its questions.
        artifact: path of the whole among the artifacts of the version's run.
        asked_as: how questions were drawn and asked (`pipelines.evaluation.suite.ASKED_AS`).
    """

    suite: Suite | None
    score: Score
    artifact: str
    asked_as: int = ASKED_AS

    @property
    def name(self) -> str:
        """Of the suite, for people."""
        return suite_name(self.suite)

    def to_json(self) -> str:
        """The tag's value."""
        plain = {**asdict(self), "score": self.score.to_dict()}
        return json.dumps(plain)

    @classmethod
    def from_json(cls, text: str, where: str) -> StoredScore:
        """The tag's value, read. Raises ScoringError that names `where`."""
        try:
            return codec.decode(cls, text, where)
        except ValueError as error:
            raise ScoringError(f"{error}; evaluate the version again") from None


def suite_name(suite: Suite | None) -> str:
    """A suite for people; None is one of which only the digest is known."""
    if suite is None:
        return "suite"
    which = "" if suite.replies == "all" else f", {suite.replies} replies"
    which += "" if suite.every is None else f", every {suite.every}"
    which += "" if suite.scorer == "exact" else f", scorer {suite.scorer}"
    part = "" if suite.part == "all" else f", part {suite.part}"
    return f"{suite.questions} x {suite.split} of {redact_text(suite.manifest)}{part}{which}"


_FORMATS = {"accuracy": ".4f", "answer_nll": ".4f", "kept_per_image": ".2f", "tflops": ".6g"}


def score_tags(stored: StoredScore) -> dict[str, str]:
    """The tags of a version that hold a score."""
    numbers = stored.score.numbers()
    answered = stored.score.answered
    return {
        SUITE_TAG: stored.score.suite,
        SUITE_NAME_TAG: stored.name,
        ASKED_TAG: str(stored.score.questions),
        ANSWERED_TAG: "not asked for" if answered is None else str(answered),
        LEFT_OUT_TAG: counted(stored.score.left_out),
        **{name: f"{numbers[name]:{spec}}" for name, spec in _FORMATS.items() if name in numbers},
        **{
            f"{name}_interval": f"{numbers[f'{name}_low']:.4f} {numbers[f'{name}_high']:.4f}"
            for name in ("accuracy", "answer_nll")
            if name in numbers
        },
        SCORE_TAG + stored.score.suite: stored.to_json(),
    }


def stored_scores(version: ModelVersion) -> dict[str, StoredScore]:
    """Digest of a suite -> what the version's tags say of it, void scores left out.

    Raises ScoringError for a tag that holds no score.
    """
    void = void_scores(version)
    return {
        key.removeprefix(SCORE_TAG): StoredScore.from_json(value, f"tag {key} of {version.name}/{version.version}")
        for key, value in version.tags.items()
        if key.startswith(SCORE_TAG) and key.removeprefix(SCORE_TAG) not in void
    }


def void_scores(version: ModelVersion) -> list[str]:
    """Suites of scores that say nothing today: their questions were drawn or asked in another way.

    Those before 2026-11-30 do not say in which.
    """
    return [
        key.removeprefix(SCORE_TAG)
        for key, value in version.tags.items()
        if key.startswith(SCORE_TAG) and '"score": {' in value and f'"asked_as": {ASKED_AS}' not in value
    ]


def store_score(
    registry: Registry, version: int, score: Score, suite: Suite | None, settings: Mapping[str, Any] | None = None
) -> None:
    """File a score with a version: the whole as an artifact first, then the tags that name it, then the description.

    Args:
        registry: of the registered model.
        version: which one.
        score: with its questions.
        suite: for its name; None where it is not known.
        settings: what else belongs to the measurement (e.g. commit, device); kept with the whole.

    Raises:
        ScoringError: a score without its questions, or one that is no number.
        TrackingError: an unknown version, one without a run, or a server that is away.
    """
    if len(score.records) != score.questions:
        raise ScoringError(f"a score is filed with its {score.questions} questions, this one has {len(score.records)}")
    for measure in (score.accuracy, score.answer_nll, score.kept_per_image, score.tflops):
        if measure is not None and not math.isfinite(measure):
            raise ScoringError(
                f"{registry.name}/{version}: the score holds {measure}; a model whose answers have no likelihood"
            )
    found = registry.version(version)
    if not found.run_id:
        raise TrackingError(f"version {version} of {registry.name} belongs to no run, which would hold its score")
    shown = None if suite is None else replace(suite, manifest=redact_text(suite.manifest))
    stored = StoredScore(shown, replace(score, records=()), f"scores/{registry.name}-{version}-{score.suite}.json")
    whole = {
        "model": registry.address(version),
        "suite": None if shown is None else asdict(shown),
        "score": score.to_dict(records=True),
        "settings": dict(settings or {}),
    }
    MlflowRun(registry.uri, found.run_id).log_documents({stored.artifact: whole})
    scores = {**stored_scores(found), score.suite: stored}
    card = with_scores(found.description or "", {item.name: item.score for item in scores.values()})
    registry.describe_version(version, tags=score_tags(stored), description=card)


def load_score(registry: Registry, version: ModelVersion, digest: str) -> Score:
    """The whole score of a version on a suite, with its questions.

    Raises:
        ScoringError: it has none, or the artifact is another score than the tag's.
        TrackingError: an artifact that is gone, or a server that is away.
    """
    known = stored_scores(version)
    where = f"version {version.version} of {version.name}"
    if digest in void_scores(version):
        raise ScoringError(f"{where}: {void_text(digest)}; score it:\n  {evaluate_command(version)}")
    if digest not in known:
        raise ScoringError(f"{where} has no score on suite {digest}; it has: {', '.join(known) or 'none'}")
    stored, client = known[digest], registry.client
    with tempfile.TemporaryDirectory(prefix="meteor-score-") as folder:
        path = call_mlflow(
            f"the score of {where}", lambda: client.download_artifacts(version.run_id, stored.artifact, folder)
        )
        with foreign(
            lambda what: ScoringError(f"{stored.artifact} of run {version.run_id} is damaged ({what}): evaluate again")
        ):
            score = Score.from_dict(json.loads(Path(path).read_bytes())["score"])
    if score.to_dict() != stored.score.to_dict():
        raise ScoringError(
            f"{stored.artifact} of run {version.run_id} is not the score that {where} was given: evaluate it again"
        )
    return score


@dataclass(frozen=True)
class VersionComparison:
    """Two versions on one suite, and the paired differences, second minus first."""

    suite: str
    first: Score
    second: Score
    difference: Comparison


def compare_versions(
    registry: Registry, first: ModelVersion, second: ModelVersion, digest: str | None = None
) -> VersionComparison:
    """Two versions on the suite `digest`.

    By default on the one that both have, that of the first's last score if there are several.

    Raises:
        ScoringError: where no suite is common to both, with the command that scores one of them.
    """
    known, others = stored_scores(first), stored_scores(second)
    common = [suite for suite in known if suite in others]
    if digest is None and common:
        last = first.tags.get(SUITE_TAG, "")
        digest = last if last in common else common[-1]
    if digest is None or digest not in common:
        wanted = "no suite in common" if digest is None else f"no score of both on suite {digest}"
        lines = [
            f"  version {version.version}: "
            + ("; ".join(f"{suite} ({item.name})" for suite, item in scores.items()) or _none_but_void(version))
            for version, scores in ((first, known), (second, others))
        ]
        raise ScoringError(
            f"versions {first.version} and {second.version} of {first.name} have {wanted}; their scores:\n"
            + "\n".join(lines)
            + "\nother questions cannot be compared: score both on one suite, e.g.\n"
            + f"  {_command_for_both(first, second, digest)}"
        )
    a, b = load_score(registry, first, digest), load_score(registry, second, digest)
    return VersionComparison(known[digest].name, a, b, compare_scores(a, b))


def void_text(digest: str) -> str:
    """Why a void score is none."""
    return f"its score on suite {digest} is void: earlier code drew or asked its questions otherwise than this does"


def _none_but_void(version: ModelVersion) -> str:
    void = void_scores(version)
    return "none" + (f" (void, made by earlier code: {', '.join(void)})" if void else "")


def _command_for_both(first: ModelVersion, second: ModelVersion, digest: str | None) -> str:
    """Scores one of two versions on a suite of the other: the one that is asked for, or the other's last."""
    pairs = [(second, first), (first, second)]
    for lacking, scored in pairs:
        if digest is not None and digest in stored_scores(scored):
            return evaluate_command(lacking, stored_scores(scored)[digest])
    for lacking, scored in pairs:
        if found := stored_scores(scored):
            return evaluate_command(lacking, found.get(scored.tags.get(SUITE_TAG, ""), next(iter(found.values()))))
    return evaluate_command(first)


def evaluate_command(version: ModelVersion, on: StoredScore | None = None) -> str:
    """The command that scores a version: on the data that it was made with, or on the suite of another's score."""
    command = f"python jobs/evaluate.py --model models:/{version.name}/{version.version} --manifest "
    if on is None or on.suite is None:
        return command + version.tags.get(MANIFEST_TAG, "MANIFEST")
    return f"{command}{on.suite.manifest} {on.suite.options}"
