"""Scores as values: what a model answered to each question of a suite, the numbers of it, and paired differences.

Intervals are 95 %: Wilson's score interval for the accuracy, a percentile bootstrap over questions (fixed seed) for
means and for paired differences.

Imports no torch: the registry stores and compares scores without a model (`pipelines.evaluation.evaluate` makes them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from pipelines.io import codec

CONFIDENCE = 0.95
RESAMPLES = 2000
MEASURED = (
    *("accuracy", "accuracy_interval", "answer_nll", "answer_nll_interval"),
    *("visual_tokens", "visual_tokens_mean", "tflops"),
)
"""Fields of a score that were measured, in the order in which people read them."""
TEXT_ONLY = "text_only"
"""Reason of a question without an image: left out of every suite, and no loss."""


class ScoringError(ValueError):
    """A suite or a score cannot be used; the message says which and why."""


@dataclass(frozen=True)
class Interval:
    """Ends of a 95 % confidence interval."""

    low: float
    high: float

    def beside(self, value: float, sign: str = "") -> str:
        """The value with its interval, for people: `0.7500 [0.3006, 0.9544]`; `sign` "+" shows a plus, too."""
        return f"{value:{sign}.4f} [{self.low:{sign}.4f}, {self.high:{sign}.4f}]"


@dataclass(frozen=True)
class Record:
    """One question of a suite.

    Attributes:
        key: of its sample, and which of its replies.
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
        answered: of those, how many got an answer with words in it.
        left_out: by reason, what was not asked on the way to the last question.
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
    answered: int
    left_out: dict[str, int]
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

    @property
    def unanswered_share(self) -> float:
        """Share of the questions with images that have no answer: left out, or answered without a word."""
        lost = sum(number for reason, number in self.left_out.items() if reason != TEXT_ONLY)
        return (self.questions - self.answered + lost) / (self.questions + lost)

    @property
    def coverage(self) -> str:
        """Asked, answered, left out by reason: for people."""
        return f"{self.questions} asked, {self.answered} answered, left out: {counted(self.left_out)}"

    def numbers(self) -> dict[str, float]:
        """Every measured number under a name of its own; the ends of an interval as `NAME_low` and `NAME_high`."""
        flat: dict[str, float] = {}
        for name in MEASURED:
            value = getattr(self, name)
            if isinstance(value, Interval):
                measured = name.removesuffix("_interval")
                flat |= {f"{measured}_low": value.low, f"{measured}_high": value.high}
            else:
                flat[name] = value
        return flat

    @classmethod
    def from_dict(cls, data: Any, where: str = "this document") -> Score:
        """What `to_dict` gave. Raises ScoringError that names `where` and the field, where it is something else."""
        return codec.from_plain(cls, data, where, ScoringError)


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


def counted(left_out: Mapping[str, int]) -> str:
    """What was left out by reason, for people."""
    return ", ".join(f"{number} {reason}" for reason, number in left_out.items()) or "none"


def normalise(answer: str) -> str:
    """An answer without case, outer and repeated spaces, and a final full stop."""
    return " ".join(answer.casefold().split()).removesuffix(".").rstrip()


def wilson(successes: int, trials: int) -> Interval:
    """95 % score interval of a share (E. B. Wilson, J. Am. Stat. Assoc. 22, 1927)."""
    from scipy import stats  # here: its import costs 0.7 s, and who reads stored scores measures none

    found = stats.binomtest(successes, trials).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(float(found.low), float(found.high))


def bootstrap(values: np.ndarray) -> Interval:
    """95 % percentile bootstrap interval of the mean; the seed is fixed, so equal values give equal intervals.

    Args:
        values: one number a question; a single one gives an interval without width.
    """
    from scipy import stats

    if len(values) == 1:  # scipy refuses to resample it
        return Interval(float(values[0]), float(values[0]))
    found = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(float(found.low), float(found.high))
