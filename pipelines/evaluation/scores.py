"""Scores as values: what a model answered to each question of a suite, the numbers of it, and paired differences.

Intervals are 95 % over groups of questions that are no independent draws (`pipelines.evaluation.intervals`). Tokens are
counted per image, whatever the number of images in a prompt.

Imports no torch: the registry stores and compares scores without a model (`pipelines.evaluation.evaluate` makes them).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from pipelines.evaluation.intervals import Difference, Interval, Verdict, difference, holm, non_inferiority
from pipelines.io import codec

MEASURED = (
    *("accuracy", "accuracy_interval", "answer_nll", "answer_nll_interval"),
    *("tokens_per_image", "kept_per_image", "tflops"),
)
"""Fields of a score that were measured, in the order in which people read them."""
Measure = Literal["answer_nll", "accuracy"]
Replies = Literal["all", "first"]
"""Which replies of a sample are questions."""
TEXT_ONLY = "text_only"
"""Reason of a question without an image: left out of every suite, and no loss."""
LARGER_IS_BETTER: dict[Measure, bool] = {"answer_nll": False, "accuracy": True}
MARGINS: dict[Measure, float] = {"answer_nll": 0.02, "accuracy": 0.02}
"""What a model may lose, unless another margin is stated: nats per token (2 % of perplexity), or 2 answers of 100."""


class ScoringError(ValueError):
    """A suite or a score cannot be used; the message says which and why."""


@dataclass(frozen=True)
class Record:
    """One question of a suite.

    Attributes:
        key: of its sample, and which of its replies.
        group: of the questions that are no independent draws.
        prompt: short hash of the prompt's ids, an image counted as one.
        expected: what the data says.
        answer: what the model said; None where only likelihoods were asked for.
        credit: what that earns by the suite's scorer, 0 to 1; None without an answer.
        nll: mean negative log-likelihood of the expected answer's tokens, in nats.
        kept: for each image of the prompt, visual tokens after stage 1, 2 and 3.
        tags: what the data says that it is about.
    """

    key: str
    group: str
    prompt: str
    expected: str
    answer: str | None
    credit: float | None
    nll: float
    kept: tuple[tuple[int, int, int], ...]
    tags: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        """Of the prompt."""
        return len(self.kept)

    @property
    def kept_tokens(self) -> int:
        """Visual tokens of the prompt after stage 3, all its images together."""
        return sum(last for _, _, last in self.kept)


@dataclass(frozen=True)
class Score:
    """One model on one suite.

    Attributes:
        suite: digest of the suite.
        questions: how many were asked.
        answered: of those, how many got an answer with words in it; None where only likelihoods were asked for.
        left_out: by reason, what was drawn and not asked.
        accuracy: mean credit of the answers by the suite's scorer; None where only likelihoods were asked for.
        accuracy_interval: `intervals.level`; None with the accuracy.
        answer_nll: mean over questions of the NLL per token of the expected answer, in nats.
        answer_nll_interval: `intervals.level`.
        tokens_per_image: visual tokens of an image that enter the LLM.
        kept_per_image: visual tokens of an image after stage 3, mean over the images of all questions.
        tflops: of one image and a prompt of `meteor_model.flops.TEXT_TOKENS`, stage 3 at its measured mean.
        records: question by question; empty in a score that was stored without them.
    """

    suite: str
    questions: int
    answered: int | None
    left_out: dict[str, int]
    accuracy: float | None
    accuracy_interval: Interval | None
    answer_nll: float
    answer_nll_interval: Interval
    tokens_per_image: int
    kept_per_image: float
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
        """Share of the drawn questions that have no answer: left out, or answered without a word."""
        lost = sum(number for reason, number in self.left_out.items() if reason != TEXT_ONLY)
        return (self.questions - (self.answered or 0) + lost) / (self.questions + lost)

    @property
    def coverage(self) -> str:
        """Asked, answered, left out by reason: for people."""
        answered = "answers not asked for" if self.answered is None else f"{self.answered} answered"
        return f"{self.questions} asked, {answered}, left out: {counted(self.left_out)}"

    @property
    def accuracy_text(self) -> str:
        """The accuracy with its interval, for people."""
        if self.accuracy is None or self.accuracy_interval is None:
            return "not asked for"
        return self.accuracy_interval.beside(self.accuracy)

    def numbers(self) -> dict[str, float]:
        """Every measured number under a name of its own; the ends of an interval as `NAME_low` and `NAME_high`."""
        flat: dict[str, float] = {}
        for name in MEASURED:
            value = getattr(self, name)
            if isinstance(value, Interval):
                measured = name.removesuffix("_interval")
                flat |= {f"{measured}_low": value.low, f"{measured}_high": value.high}
            elif value is not None:
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
        groups: of questions that are no independent draws.
        other_prompts: questions whose prompts differ in more than the number of visual tokens.
        accuracy: of the credits; None where one of the scores has no answers.
        answer_nll: in nats.
        adjusted: p-values of the measures that are there, adjusted as one family (Holm).
        kept_per_image: difference.
        tflops: difference.
    """

    suite: str
    questions: int
    groups: int
    other_prompts: int
    accuracy: Difference | None
    answer_nll: Difference
    adjusted: dict[str, float]
    kept_per_image: float
    tflops: float

    def of(self, measure: Measure) -> Difference:
        """The difference of one measure. Raises ScoringError for an accuracy that was not asked for."""
        found = self.answer_nll if measure == "answer_nll" else self.accuracy
        if found is None:
            raise ScoringError(
                f"one of the scores on suite {self.suite} holds likelihoods alone: evaluate both models with answers"
            )
        return found

    def verdict(self, measure: Measure, margin: float | None = None) -> Verdict:
        """What the interval of a measure says at a margin stated before; None takes that of MARGINS."""
        margin = MARGINS[measure] if margin is None else margin
        return non_inferiority(self.of(measure).interval, margin, larger_is_better=LARGER_IS_BETTER[measure])

    def text(self, measure: Measure, margin: float | None = None) -> str:
        """All that is said of one measure, for people."""
        found, margin = self.of(measure), MARGINS[measure] if margin is None else margin
        if found.differing == 0:
            return (
                f"none of {self.questions} questions differs: {self.verdict(measure, margin)} at a margin of {margin:g}"
            )
        return (
            f"{found.interval.beside(found.mean, '+')}, {found.differing} of {self.questions} differ, "
            f"p {self.adjusted[measure]:.3g} (Holm), visible from {found.visible:.2g}: "
            f"{self.verdict(measure, margin)} at a margin of {margin:g}"
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
    accuracy = None
    if first.accuracy is not None and second.accuracy is not None:
        accuracy = paired(first, second, lambda record: record.credit or 0.0)
    nll = paired(first, second, lambda record: record.nll)
    measured = {"answer_nll": nll.p_value} | ({} if accuracy is None else {"accuracy": accuracy.p_value})
    return Comparison(
        suite=first.suite,
        questions=len(keys),
        groups=len({record.group for record in first.records}),
        other_prompts=sum(a.prompt != b.prompt for a, b in zip(first.records, second.records, strict=True)),
        accuracy=accuracy,
        answer_nll=nll,
        adjusted=dict(zip(measured, holm(list(measured.values())), strict=True)),
        kept_per_image=second.kept_per_image - first.kept_per_image,
        tflops=second.tflops - first.tflops,
    )


def paired(first: Score, second: Score, value: Callable[[Record], float]) -> Difference:
    """Second minus first of any value of a question, over the groups of the first."""
    mine, other = (np.array([value(record) for record in score.records]) for score in (first, second))
    return difference(mine, other, [record.group for record in first.records])


def counted(left_out: Mapping[str, int]) -> str:
    """What was left out by reason, for people."""
    return ", ".join(f"{number} {reason}" for reason, number in left_out.items()) or "none"
