"""Which version production pulls: promotion under evidence.

A version is promoted to an alias only with both proofs in its tags: the parity of its export, within the tolerance, and
a score on a suite of which at most `MAX_UNANSWERED` is without an answer. Each refusal names what is missing and the
command that makes it good.
"""

from __future__ import annotations

import math

from mlflow.entities.model_registry import ModelVersion

from pipelines.registry.aliases import Move, move_alias
from pipelines.registry.proof import allowed_difference
from pipelines.registry.scores import evaluate_command, stored_scores, void_scores
from pipelines.registry.tags import LARGEST_LOGIT_TAG, PARITY_TAG, PRECISION_TAG, SUITE_TAG
from pipelines.registry.versions import Registry

MAX_UNANSWERED = 0.01
"""Largest share of a suite's questions that was left out or answered without a word; text alone is no loss. As many as
a training may drop (`training.max_drop_share`)."""


class PromotionError(ValueError):
    """A version lacks what an alias for production asks; the message says what, and the commands."""


def promote(
    registry: Registry,
    version: int,
    alias: str,
    tolerance: float | None = None,
    max_unanswered: float = MAX_UNANSWERED,
) -> Move:
    """Let an alias point to a version that has both proofs.

    Args:
        registry: of the registered model.
        version: to promote.
        alias: e.g. champion.
        tolerance: largest difference of a logit that its parity may show; None takes that of its precision.
        max_unanswered: largest share of a suite that may be without an answer.

    Raises:
        PromotionError: for a version without them.
        TrackingError: an unknown version, or a server that is away.
    """
    if lacking := missing_evidence(registry.version(version), tolerance, max_unanswered):
        raise PromotionError(
            f"version {version} of {registry.name} is not promoted to {alias}:\n"
            + "\n".join(f"  - {item}" for item in lacking)
        )
    return move_alias(registry, alias, version)


def missing_evidence(
    version: ModelVersion, tolerance: float | None = None, max_unanswered: float = MAX_UNANSWERED
) -> list[str]:
    """What keeps a version from being promoted, each with the command that makes it good; empty where nothing does.

    Raises:
        ScoringError: for a tag that holds no score.
    """
    lacking = []
    if version.status != "READY":
        lacking.append(f"its files are not there (status {version.status}): register it again")
    parity, measure = version.tags.get(PARITY_TAG), _parity_command(version)
    if tolerance is None:
        precision, largest = version.tags.get(PRECISION_TAG, "fp32"), _number(version.tags.get(LARGEST_LOGIT_TAG, "0"))
        tolerance = allowed_difference(precision, largest)
    if parity is None:
        lacking.append(f"its parity is missing (tag {PARITY_TAG}); measure it:\n      {measure}")
    elif not _number(parity) <= tolerance:  # also where it is not a number
        lacking.append(
            f"its parity {parity} exceeds {tolerance:g}: the registered files do not compute what the model computed; "
            f"export and register it again, or measure anew:\n      {measure}"
        )
    return [*lacking, *_missing_score(version, max_unanswered)]


def _missing_score(version: ModelVersion, max_unanswered: float) -> list[str]:
    """What keeps the version's scores from being evidence; one score that answers its suite is enough."""
    scores, command = stored_scores(version), f"score it:\n      {evaluate_command(version)}"
    if any(stored.score.unanswered_share <= max_unanswered for stored in scores.values()):
        return []
    if scores:
        stored = scores.get(version.tags.get(SUITE_TAG, ""), next(iter(scores.values())))
        return [
            f"its score on {stored.suite} leaves {stored.score.unanswered_share:.1%} of the questions without an answer"
            f" ({stored.score.coverage}), {max_unanswered:.1%} are allowed: mend the data or the model and "
            f"{command}\n    or allow it with --max-unanswered"
        ]
    if void := void_scores(version):
        return [
            f"its score on suite {void[-1]} is void: made before 2026-11-30, it asked otherwise than training does and "
            f"counted nothing that it left out; {command}"
        ]
    return [f"it has no suite result; {command}"]


def _parity_command(version: ModelVersion) -> str:
    return f"python jobs/register.py parity --tracking.registered-model {version.name} --version {version.version}"


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
