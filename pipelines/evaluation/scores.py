"""Scores as values: what a model answered to each question of a suite, the numbers of it, and paired differences.

Intervals are 95 % over groups of questions that share an image (`pipelines.evaluation.intervals`).

Imports no torch: the registry stores and compares scores without a model (`pipelines.evaluation.evaluate` makes them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from pipelines.evaluation.intervals import Interval, mean, paired_share, smallest_visible
from pipelines.io import codec

MEASURED = (
    *("accuracy", "accuracy_interval", "answer_nll", "answer_nll_interval"),
    *("visual_tokens", "visual_tokens_mean", "tflops"),
)
"""Fields of a score that were measured, in the order in which people read them."""
Replies = Literal["all", "first"]
"""Which replies of a sample are questions."""
TEXT_ONLY = "text_only"
"""Reason of a question without an image: left out of every suite, and no loss."""


class ScoringError(ValueError):
    """A suite or a score cannot be used; the message says which and why."""


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
        group: of the questions that share an image with it; in scores that were stored without, its sample.
    """

    key: str
    expected: str
    answer: str
    right: bool
    nll: float
    kept: int
    images: int
    group: str = ""

    @property
    def unit(self) -> str:
        """What is sampled: the group, or the sample."""
        return self.group or self.key.partition("#")[0]


@dataclass(frozen=True)
class Score:
    """One model on one suite.

    Attributes:
        suite: digest of the suite.
        questions: how many were asked.
        answered: of those, how many got an answer with words in it.
        left_out: by reason, what was not asked on the way to the last question.
        accuracy: share of right answers.
        accuracy_interval: Wilson's over groups.
        answer_nll: mean over questions of the NLL per token of the expected answer, in nats.
        answer_nll_interval: studentised bootstrap over groups.
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
    """Paired differences, second minus first, question by question on one suite.

    Attributes:
        suite: digest of the suite.
        questions: in both scores.
        groups: of questions that share an image.
        flipped: questions that one model alone answers rightly.
        accuracy: difference.
        accuracy_interval: Tango's over groups.
        answer_nll: difference, in nats.
        answer_nll_interval: studentised bootstrap over groups.
        answer_nll_visible: smallest true difference of the NLL that such a comparison finds in four of five cases.
        visual_tokens_mean: difference.
        tflops: difference.
    """

    suite: str
    questions: int
    groups: int
    flipped: int
    accuracy: float
    accuracy_interval: Interval
    answer_nll: float
    answer_nll_interval: Interval
    answer_nll_visible: float
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
    groups = [record.unit for record in first.records]
    return Comparison(
        suite=first.suite,
        questions=len(pairs),
        groups=len(set(groups)),
        flipped=int(np.count_nonzero(right)),
        accuracy=float(right.mean()),
        accuracy_interval=paired_share(right, groups),
        answer_nll=float(nll.mean()),
        answer_nll_interval=mean(nll, groups),
        answer_nll_visible=smallest_visible(nll, groups),
        visual_tokens_mean=second.visual_tokens_mean - first.visual_tokens_mean,
        tflops=second.tflops - first.tflops,
    )


def counted(left_out: Mapping[str, int]) -> str:
    """What was left out by reason, for people."""
    return ", ".join(f"{number} {reason}" for reason, number in left_out.items()) or "none"


def normalise(answer: str) -> str:
    """An answer without case, outer and repeated spaces, and a final full stop."""
    return " ".join(answer.casefold().split()).removesuffix(".").rstrip()
