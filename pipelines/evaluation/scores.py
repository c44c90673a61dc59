"""Scores: what a model answered to each question of a suite, the numbers that come of it, and paired differences.

Intervals are 95 %: Wilson's score interval for the accuracy, a percentile bootstrap over questions (fixed seed) for
means and for paired differences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.flops import count_flops

RESAMPLES = 2000
Z95 = 1.959963984540054  # standard normal quantile at 0.975


class ScoringError(ValueError):
    """A suite or a score cannot be used; the message says which and why."""


@dataclass(frozen=True)
class Interval:
    """Ends of a 95 % confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Record:
    """One question of a suite.

    Attributes:
        key: of its sample.
        expected: what the data says.
        answer: what the model said.
        right: whether they are equal (`normalise`).
        nll: mean negative log-likelihood of the expected answer's tokens, in nats.
        kept: visual tokens after stage 3, over the question's images.
        images: of the question.
    """

    key: str
    expected: str
    answer: str
    right: bool
    nll: float
    kept: int
    images: int


@dataclass(frozen=True)
class Score:
    """One model on one suite.

    Attributes:
        suite: digest of the suite.
        questions: how many were asked.
        accuracy: share of right answers.
        accuracy_interval: Wilson's.
        answer_nll: mean over questions of the NLL per token of the expected answer, in nats.
        answer_nll_interval: bootstrap over questions.
        visual_tokens: per image, that enter the LLM.
        visual_tokens_mean: per image, mean after stage 3.
        tflops: of one image and a prompt of `meteor_model.flops.TEXT_TOKENS`, stage 3 at its measured mean.
        records: question by question; empty in a score that was stored without them.
    """

    suite: str
    questions: int
    accuracy: float
    accuracy_interval: Interval
    answer_nll: float
    answer_nll_interval: Interval
    visual_tokens: int
    visual_tokens_mean: float
    tflops: float
    records: tuple[Record, ...] = field(default=(), repr=False)

    def to_dict(self, records: bool = False) -> dict[str, Any]:
        """Plain dictionary, by default without the questions."""
        plain = asdict(self if records else replace(self, records=()))
        plain["records"] = list(plain["records"])
        if not records:
            del plain["records"]
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Score:
        """What `to_dict` gave. Raises ScoringError where it is something else."""
        try:
            intervals = {name: Interval(**data[name]) for name in ("accuracy_interval", "answer_nll_interval")}
            records = tuple(Record(**record) for record in data.get("records", ()))
            return cls(**{**data, **intervals, "records": records})
        except (KeyError, TypeError) as error:
            raise ScoringError(f"this is no stored score: {error}") from None


@dataclass(frozen=True)
class Comparison:
    """Paired differences, second minus first, question by question on one suite."""

    suite: str
    questions: int
    accuracy: float
    accuracy_interval: Interval
    answer_nll: float
    answer_nll_interval: Interval
    visual_tokens_mean: float
    tflops: float


def summarise(config: MeteorConfig, records: Sequence[Record], suite_digest: str) -> Score:
    """The score of these questions under this configuration."""
    right = np.array([record.right for record in records], dtype=np.float64)
    nll = np.array([record.nll for record in records], dtype=np.float64)
    kept = sum(record.kept for record in records) / sum(record.images for record in records)
    return Score(
        suite=suite_digest,
        questions=len(records),
        accuracy=float(right.mean()),
        accuracy_interval=wilson(int(right.sum()), len(right)),
        answer_nll=float(nll.mean()),
        answer_nll_interval=bootstrap(nll),
        visual_tokens=config.tokens_per_image,
        visual_tokens_mean=kept,
        tflops=count_flops(at_mean(config, kept)).total / 1e12,
        records=tuple(records),
    )


def compare_scores(first: Score, second: Score) -> Comparison:
    """Second minus first, paired by question.

    Raises:
        ScoringError: for two suites, or scores that were stored without their questions.
    """
    if first.suite != second.suite:
        raise ScoringError(
            f"the scores are of two suites, {first.suite} and {second.suite}: other questions cannot be compared; "
            "score both models on one suite"
        )
    keys, others = [r.key for r in first.records], [r.key for r in second.records]
    if not keys or keys != others:
        raise ScoringError(
            f"the scores hold {len(keys)} and {len(others)} questions, and a paired comparison needs the same ones in "
            "both: store them with records=True, and score each model on the whole suite"
        )
    pairs = list(zip(first.records, second.records, strict=True))
    right = np.array([float(b.right) - float(a.right) for a, b in pairs])
    nll = np.array([b.nll - a.nll for a, b in pairs])
    return Comparison(
        suite=first.suite,
        questions=len(pairs),
        accuracy=float(right.mean()),
        accuracy_interval=bootstrap(right),
        answer_nll=float(nll.mean()),
        answer_nll_interval=bootstrap(nll),
        visual_tokens_mean=second.visual_tokens_mean - first.visual_tokens_mean,
        tflops=second.tflops - first.tflops,
    )


def normalise(answer: str) -> str:
    """An answer without case, outer and repeated spaces, and a final full stop."""
    return " ".join(answer.casefold().split()).removesuffix(".").rstrip()


def at_mean(config: MeteorConfig, kept: float) -> MeteorConfig:
    """The configuration with stage 3's target at `kept` visual tokens an image, for `count_flops`; as it is where
    stage 3 is off.
    """
    decode = config.pruning.decode
    if not decode.enabled:
        return config
    target = min(max(kept, float(decode.k_min)), float(config.tokens_per_image))
    pruning = replace(config.pruning, decode=replace(decode, target_mean=target))
    return MeteorConfig(**{**config.to_dict(), "pruning": pruning})


def wilson(successes: int, trials: int) -> Interval:
    """95 % score interval of a share (E. B. Wilson, J. Am. Stat. Assoc. 22, 1927)."""
    share, z2 = successes / trials, Z95**2
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def bootstrap(values: np.ndarray) -> Interval:
    """95 % percentile bootstrap interval of the mean; the seed is fixed, so equal values give equal intervals."""
    drawn = np.random.default_rng(0).integers(0, len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), [0.025, 0.975])
    return Interval(float(low), float(high))
