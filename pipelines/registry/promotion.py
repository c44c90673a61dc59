"""Which version production pulls: promotion under evidence.

A version is promoted to an alias only with three proofs:

1. parity    of its export, within the tolerance
2. score     on the final part of a split, of enough questions, of which few are without an answer
3. no worse  than the version that the alias points to: a paired non-inferiority test on one suite of that kind. The
             margin is stated beforehand; at the 2.5 % level a version that is worse by the margin passes once in forty

Each refusal names what is missing and the command that makes it good. Whoever forces a promotion gives a reason, which
stays with the version.
"""

from __future__ import annotations

import getpass
import math
import socket
import time
from dataclasses import dataclass

from mlflow.entities.model_registry import ModelVersion

from pipelines.evaluation.intervals import Verdict
from pipelines.evaluation.scores import MARGINS, Measure
from pipelines.registry.aliases import Move, move_alias
from pipelines.registry.proof import allowed_difference
from pipelines.registry.scores import (
    StoredScore,
    compare_versions,
    evaluate_command,
    stored_scores,
    void_scores,
    void_text,
)
from pipelines.registry.tags import FORCED_TAG, LARGEST_LOGIT_TAG, PARITY_TAG, PRECISION_TAG, PROMOTED_TAG
from pipelines.registry.versions import Registry

TRACE_LENGTH = 1000
"""Characters of a trace in a tag."""


class PromotionError(ValueError):
    """A version lacks what an alias for production asks; the message says what, and the commands."""


@dataclass(frozen=True)
class Terms:
    """What a promotion asks for.

    Attributes:
        tolerance: largest difference of a logit that its parity may show; None takes that of its precision.
        max_unanswered: largest share of a suite's questions that was left out or answered without a word; text alone is
            no loss. As many as a training may drop (`training.max_drop_share`).
        least_questions: of a suite that counts.
        measure: that is compared with the version before.
        margin: loss of the measure that is accepted; None takes that of `MARGINS`.
    """

    tolerance: float | None = None
    max_unanswered: float = 0.01
    least_questions: int = 256
    measure: Measure = "answer_nll"
    margin: float | None = None

    @property
    def stated_margin(self) -> float:
        """The margin as a number."""
        return MARGINS[self.measure] if self.margin is None else self.margin


@dataclass(frozen=True)
class Promotion:
    """An alias that moved, and why it could."""

    move: Move
    why: str


def promote(registry: Registry, version: int, alias: str, terms: Terms | None = None, force: str = "") -> Promotion:
    """Let an alias point to a version that has all proofs.

    Args:
        registry: of the registered model.
        version: to promote.
        alias: e.g. champion.
        terms: what it asks for; None takes the defaults.
        force: a reason to promote although proofs are missing; who, when and why stay in the version's tags.

    Raises:
        PromotionError: for a version without them, or one without files, which nothing forces.
        TrackingError: an unknown version, or a server that is away.
    """
    terms = terms or Terms()
    found = registry.version(version)
    lacking = missing_evidence(found, terms)
    before = registry.registered_model().aliases.get(alias)
    why = f"nothing stood before it under {alias}"
    if before is not None and int(before) != version and not lacking:
        why, passed = _against(registry, registry.version(int(before)), found, terms)
        lacking += [] if passed else [why]
    ready = found.status == "READY"
    if lacking and not (force and ready):
        raise PromotionError(
            f"version {version} of {registry.name} is not promoted to {alias}:\n"
            + "\n".join(f"  - {item}" for item in lacking)
            + ("\n  or promote it all the same with --force REASON, which is kept with the version" if ready else "")
        )
    if lacking:
        why = f"forced: {force}; without: " + "; ".join(" ".join(item.split()) for item in lacking)
    # Before the alias moves: no version is found in production without its trace.
    trace = f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} by {_who()}: {why}"
    registry.describe_version(version, tags={(FORCED_TAG if lacking else PROMOTED_TAG) + alias: trace[:TRACE_LENGTH]})
    return Promotion(move_alias(registry, alias, version), why)


def _who() -> str:
    return f"{getpass.getuser()}@{socket.gethostname()}"


def _against(registry: Registry, champion: ModelVersion, version: ModelVersion, terms: Terms) -> tuple[str, bool]:
    """What the paired comparison with the version before says, and whether it lets the version pass."""
    suites, there = _evidence(version, terms), stored_scores(champion)
    common = [digest for digest in suites if digest in there]
    if not common:
        on = max(suites.values(), key=lambda stored: stored.score.questions)
        return (
            f"version {champion.version}, which stands before it, has no score on suite {on.score.suite} to compare it "
            f"with; score it:\n      {evaluate_command(champion, on)}",
            False,
        )
    digest = max(common, key=lambda suite: suites[suite].score.questions)
    compared = compare_versions(registry, champion, version, digest).difference
    verdict = compared.verdict(terms.measure, terms.stated_margin)
    told = (
        f"{terms.measure} against version {champion.version} on suite {digest}: "
        f"{compared.text(terms.measure, terms.stated_margin)}"
    )
    if verdict in (Verdict.BETTER, Verdict.NON_INFERIOR):
        return told, True
    if verdict is Verdict.INFERIOR:
        return f"it is worse than the version before: {told}", False
    return f"whether it is worse than the version before is open: {told}; ask more questions (--questions)", False


def missing_evidence(version: ModelVersion, terms: Terms | None = None) -> list[str]:
    """What keeps a version from being promoted whatever stands before it, each with the command that makes it good.

    Raises:
        ScoringError: for a tag that holds no score.
    """
    terms = terms or Terms()
    lacking = []
    if version.status != "READY":
        lacking.append(f"its files are not there (status {version.status}): register it again")
    parity, measure = version.tags.get(PARITY_TAG), _parity_command(version)
    tolerance = terms.tolerance
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
    return [*lacking, *_missing_score(version, terms)]


def _evidence(version: ModelVersion, terms: Terms) -> dict[str, StoredScore]:
    """The scores of a version that count."""
    return {digest: stored for digest, stored in stored_scores(version).items() if _fault(stored, terms) is None}


def _fault(stored: StoredScore, terms: Terms) -> str | None:
    """Why a score is no evidence; None where it is."""
    score, suite = stored.score, stored.suite
    if suite is None or suite.part != "final":
        part = "an unknown part" if suite is None else f"part {suite.part!r}"
        return f"is of {part} of its split: what was chosen there is not proven there; score it on --part final"
    if score.questions < terms.least_questions:
        return (
            f"has {score.questions} questions, {terms.least_questions} are the least: ask more of them (--questions), "
            "or allow it with --least-questions"
        )
    if score.unanswered_share > terms.max_unanswered:
        return (
            f"leaves {score.unanswered_share:.1%} of the questions without an answer ({score.coverage}), "
            f"{terms.max_unanswered:.1%} are allowed: mend the data or the model, or allow it with --max-unanswered"
        )
    return None


def _missing_score(version: ModelVersion, terms: Terms) -> list[str]:
    """What keeps the version's scores from being evidence; one that is evidence is enough."""
    scores, command = stored_scores(version), f"score it:\n      {evaluate_command(version)}"
    faults = {digest: _fault(stored, terms) for digest, stored in scores.items()}
    if None in faults.values():
        return []
    if faults:
        return [f"its score on {scores[digest].name} {fault}; {command}" for digest, fault in faults.items()]
    if void := void_scores(version):
        return [f"{void_text(void[-1])}; {command}"]
    return [f"it has no suite result; {command}"]


def _parity_command(version: ModelVersion) -> str:
    return f"python jobs/register.py parity --tracking.registered-model {version.name} --version {version.version}"


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
