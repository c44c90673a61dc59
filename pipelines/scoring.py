"""How well a model answers a fixed suite of questions, and what it costs: the numbers that variants are compared by.

A suite is the first question of each sample of one split, in manifest order. For each question, with all three stages
active as in `generate`:

1. vision     towers and fusion run once, for both measures
2. answer     greedy generation; right where it equals the expected answer but for case, spaces and a final full stop
3. likelihood the prompt is prefilled through a cache that prunes it, the expected answer's tokens (its end token too)
              follow through that cache; the question's NLL is their mean

Intervals are 95 %: Wilson's score interval for the accuracy, a percentile bootstrap over questions (fixed seed) for
means and for paired differences.

Legend: B questions, T prompt tokens, A answer tokens, C LLM width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.decoder.cache import MeteorCache
from meteor_model.flops import count_flops
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from pipelines import shards
from pipelines.evaluate import BATCH, question_of, readable_samples
from pipelines.schema import RawSample

LONGEST_ANSWER = 64
"""Tokens generated at most. A longer expected answer counts as answered wrongly; its likelihood counts whole."""
RESAMPLES = 2000
Z95 = 1.959963984540054  # standard normal quantile at 0.975


class ScoringError(ValueError):
    """A suite or a score cannot be used; the message says which and why."""


@dataclass(frozen=True)
class Suite:
    """Which questions: the first one of each of the first `questions` samples with readable images of a split.

    Attributes:
        manifest: address of the manifest of the shards.
        sha256: the manifest's own hash, which covers the hashes of all shards.
        split: of the manifest.
        questions: how many.
    """

    manifest: str
    sha256: str
    split: str
    questions: int

    def __post_init__(self) -> None:
        if self.questions < 1:
            raise ScoringError(f"a suite of {self.questions} questions scores nothing; it needs at least 1")

    @classmethod
    def of(cls, manifest: shards.Manifest, split: str, questions: int) -> Suite:
        """The suite of a manifest that is loaded."""
        return cls(manifest.url, manifest.sha256, split, questions)

    @property
    def digest(self) -> str:
        """Short hash of the questions: scores with one digest may be compared. The manifest's address is no part."""
        text = shards.canonical_json({"sha256": self.sha256, "split": self.split, "questions": self.questions})
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def load(self, processor: MeteorProcessor) -> list[RawSample]:
        """The samples, read and checked against the manifest.

        Raises:
            ScoringError: where the manifest is not the suite's, or the split has fewer samples that can be asked.
            ShardError: a shard that is missing or damaged.
        """
        manifest = shards.load_manifest(self.manifest)
        if manifest.sha256 != self.sha256:
            raise ScoringError(
                f"{manifest.url} has SHA-256 {manifest.sha256[:12]}, the suite was made of {self.sha256[:12]}: other "
                "data gives other questions; restore it, or score everything anew"
            )
        samples = list(islice(readable_samples(manifest, self.split, processor), self.questions))
        if len(samples) < self.questions:
            raise ScoringError(
                f"split {self.split!r} of {manifest.url} has {len(samples)} samples with readable images, the suite "
                f"asks {self.questions}: take fewer questions"
            )
        return samples


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


# -------------------------------------------------------------------------------------------------------------- scoring


@torch.no_grad()
def score_model(
    model: MeteorForConditionalGeneration,
    processor: MeteorProcessor,
    samples: Sequence[RawSample],
    suite_digest: str,
    batch: int = BATCH,
    report: Callable[[Sequence[Record]], None] | None = None,
) -> Score:
    """Ask a model the first question of each sample; the answers that count are the first ones.

    Args:
        model: in eval mode; stage 3 prunes where its lambda is set.
        processor: the model's, with its `tokens_per_image`.
        samples: `Suite.load`.
        suite_digest: `Suite.digest`, which the score carries.
        batch: questions at a time. The batches change no result beyond rounding.
        report: hears the records of all questions so far after every batch (`summarise` makes a score of them); what it
            raises ends the scoring.

    Raises:
        ScoringError: for no sample, a sample without a reply, a processor of another pruning, a training model, or
            stage 3 without its lambda.
    """
    _check(model, processor, samples)
    longest = max(len(_tokens(processor, sample)[1]) for sample in samples)
    records: list[Record] = []
    for start in range(0, len(samples), batch):
        records += _ask(model, processor, samples[start : start + batch], min(longest, LONGEST_ANSWER))
        if report is not None:
            report(tuple(records))
    return summarise(model.config, records, suite_digest)


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
    stage 3 is off."""
    decode = config.pruning.decode
    if not decode.enabled:
        return config
    target = min(max(kept, float(decode.k_min)), float(config.tokens_per_image))
    pruning = replace(config.pruning, decode=replace(decode, target_mean=target))
    return MeteorConfig(**{**config.to_dict(), "pruning": pruning})


# ---------------------------------------------------------------------------------------------------------- the asking


def _check(model: MeteorForConditionalGeneration, processor: MeteorProcessor, samples: Sequence[RawSample]) -> None:
    if not samples:
        raise ScoringError("there is no question to score: the suite is empty")
    if model.training:
        raise ScoringError("the model is in training mode: call .eval() before it is scored")
    if processor.tokens_per_image != model.config.tokens_per_image:
        raise ScoringError(
            f"the processor writes {processor.tokens_per_image} placeholders an image, the model's pruning keeps "
            f"{model.config.tokens_per_image}: set processor.tokens_per_image"
        )
    if model.config.pruning.decode.enabled and model.new_cache() is None:
        raise ScoringError(
            "stage 3 is enabled but pruning.decode.lam is not set: solve it (pipelines.evaluate.solve_lambda_on)"
        )


def _expected(sample: RawSample) -> str:
    for turn in sample.turns:
        if turn.role == "assistant":
            return turn.text
    raise ScoringError(f"sample {sample.key!r} has no reply to score")


def _tokens(processor: MeteorProcessor, sample: RawSample) -> tuple[list[int], list[int]]:
    """Ids of the prompt, and of the expected answer with its end token: the ones that training supervises."""
    turns = [("user", question_of(sample)), ("assistant", _expected(sample))]
    whole = processor.encode(turns, len(sample.images))
    prompt = processor.encode(turns[:1], len(sample.images), add_generation_prompt=True).input_ids
    answer = [label for label in whole.labels if label >= 0]
    assert whole.input_ids[: len(prompt) + len(answer)] == prompt + answer, "a template's pieces are encoded apart"
    return prompt, answer


def _ask(
    model: MeteorForConditionalGeneration, processor: MeteorProcessor, samples: Sequence[RawSample], longest: int
) -> list[Record]:
    """The records of one batch."""
    inputs = processor([question_of(s) for s in samples], [list(s.images) for s in samples]).to(model.device)
    mask_BT = inputs["attention_mask"]
    embeds_BTC, is_image_BT = model.embed_prompts(inputs["input_ids"], inputs["pixel_values"])
    answers = [_tokens(processor, sample)[1] for sample in samples]
    cache = model.new_cache() or DynamicCache(config=model.config.text_config)
    nll_B = answer_nll(model, embeds_BTC, mask_BT, is_image_BT, answers, cache)
    kept_B = is_image_BT.sum(dim=1)
    if isinstance(cache, MeteorCache):
        assert cache.decision is not None, "prefill decides"
        kept_B = cache.decision.kept_counts_B
    ids_BA = model.generate(
        inputs_embeds=embeds_BTC,
        image_mask=is_image_BT,
        attention_mask=mask_BT,
        past_key_values=model.new_cache() or DynamicCache(config=model.config.text_config),
        max_new_tokens=longest,
        do_sample=False,
        pad_token_id=processor.tokenizer.pad_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
    )
    records = []
    for row, sample in enumerate(samples):
        answer, expected = processor.decode(ids_BA[row]), _expected(sample)
        right = normalise(answer) == normalise(expected)
        records.append(
            Record(sample.key, expected, answer, right, float(nll_B[row]), int(kept_B[row]), len(sample.images))
        )
    return records


def answer_nll(
    model: MeteorForConditionalGeneration,
    embeds_BTC: Tensor,
    mask_BT: Tensor,
    is_image_BT: Tensor,
    answers: Sequence[Sequence[int]],
    cache: DynamicCache,
) -> Tensor:
    """Mean negative log-likelihood of each answer's tokens after its prompt, (B,) fp32 in nats.

    Args:
        model: in eval mode.
        embeds_BTC: left-padded prompts with their visual tokens in place.
        mask_BT: attention mask of the prompts.
        is_image_BT: bool, where visual tokens are.
        answers: token ids of each answer, at least one.
        cache: a fresh one; a `MeteorCache` prunes the prompt as `generate` does.
    """
    device, lengths = embeds_BTC.device, [len(answer) for answer in answers]
    ids_BA = torch.zeros(len(answers), max(lengths), dtype=torch.long)
    for row, answer in enumerate(answers):
        ids_BA[row, : len(answer)] = torch.tensor(answer)
    ids_BA = ids_BA.to(device)
    there_BA = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
    options: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    prefilled = model(
        inputs_embeds=embeds_BTC, attention_mask=mask_BT, image_mask=is_image_BT, logits_to_keep=1, **options
    )
    logits = [prefilled.logits]
    if max(lengths) > 1:
        fed_BA = ids_BA[:, :-1]
        mask_BL = torch.cat([mask_BT, there_BA[:, :-1].to(mask_BT.dtype)], dim=1)
        embeds_BAC = model.get_input_embeddings()(fed_BA)
        logits.append(model(inputs_embeds=embeds_BAC, attention_mask=mask_BL, **options).logits)
    logits_BAV = torch.cat(logits, dim=1).float()
    nll_BA = F.cross_entropy(logits_BAV.flatten(0, 1), ids_BA.flatten(), reduction="none").view_as(ids_BA)
    return (nll_BA * there_BA).sum(dim=1) / there_BA.sum(dim=1)


# ----------------------------------------------------------------------------------------------------------- intervals


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
