"""Which version production pulls: promotion under evidence.

A version is promoted to an alias only with both proofs in its tags: the parity of its export, within the tolerance, and
a score on a suite. Each refusal names what is missing and the command that makes it good.
"""

from __future__ import annotations

import math

from mlflow.entities.model_registry import ModelVersion

from pipelines.registry.aliases import Move, move_alias
from pipelines.registry.folder import PARITY_TOLERANCE
from pipelines.registry.scores import evaluate_command, stored_scores
from pipelines.registry.tags import PARITY_TAG
from pipelines.registry.versions import Registry


class PromotionError(ValueError):
    """A version lacks what an alias for production asks; the message says what, and the commands."""


def promote(registry: Registry, version: int, alias: str, tolerance: float = PARITY_TOLERANCE) -> Move:
    """Let an alias point to a version that has both proofs.

    Args:
        registry: of the registered model.
        version: to promote.
        alias: e.g. champion.
        tolerance: largest difference of a logit that its parity may show.

    Raises:
        PromotionError: for a version without them.
        TrackingError: an unknown version, or a server that is away.
    """
    if lacking := missing_evidence(registry.version(version), tolerance):
        raise PromotionError(
            f"version {version} of {registry.name} is not promoted to {alias}:\n"
            + "\n".join(f"  - {item}" for item in lacking)
        )
    return move_alias(registry, alias, version)


def missing_evidence(version: ModelVersion, tolerance: float = PARITY_TOLERANCE) -> list[str]:
    """What keeps a version from being promoted, each with the command that makes it good; empty where nothing does.

    Raises:
        ScoringError: for a tag that holds no score.
    """
    lacking = []
    if version.status != "READY":
        lacking.append(f"its files are not there (status {version.status}): register it again")
    parity, measure = version.tags.get(PARITY_TAG), _parity_command(version)
    if parity is None:
        lacking.append(f"its parity is missing (tag {PARITY_TAG}); measure it:\n      {measure}")
    elif not _number(parity) <= tolerance:  # also where it is not a number
        lacking.append(
            f"its parity {parity} exceeds {tolerance:g}: the registered files do not compute what the model computed; "
            f"export and register it again, or measure anew:\n      {measure}"
        )
    if not stored_scores(version):
        lacking.append(f"it has no suite result; score it:\n      {evaluate_command(version)}")
    return lacking


def _parity_command(version: ModelVersion) -> str:
    return f"python jobs/register.py parity --tracking.registered-model {version.name} --version {version.version}"


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
