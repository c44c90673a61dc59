"""How well a model answers a fixed suite of questions: it is asked, and gets a score (`pipelines.evaluation.scores`).

A suite is the first question of each sample of one split, in manifest order. For each question, with all three stages
active as in `generate`:

1. vision     towers and fusion run once, for both measures
2. answer     greedy generation; right where it equals the expected answer but for case, spaces and a final full stop
3. likelihood the prompt is prefilled through a cache that prunes it, the expected answer's tokens (its end token too)
              follow through that cache; the question's NLL is their mean

Legend: B questions, T prompt tokens, A answer tokens, C LLM width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from meteor_model.chat import IGNORE_INDEX
from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.decoder.cache import MeteorCache
from meteor_model.flops import FlopReport, count_flops
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import Encoded, MeteorProcessor
from pipelines.data.schema import RawSample
from pipelines.evaluation.samples import BATCH, first_question
from pipelines.evaluation.scores import Record, Score, ScoringError, bootstrap, normalise, wilson

LONGEST_ANSWER = 64
"""Tokens generated at most. A longer expected answer counts as answered wrongly; its likelihood counts whole."""


# -------------------------------------------------------------------------------------------------------------- scoring


@torch.no_grad()
def score_model(
    model: MeteorForConditionalGeneration,
    processor: MeteorProcessor,
    samples: Sequence[RawSample],
    suite_digest: str,
    batch: int = BATCH,
    report: Callable[[Sequence[Record]], None] | None = None,
    longest: int | None = None,
) -> Score:
    """Ask a model the first question of each sample; the answers that count are the first ones.

    Args:
        model: in eval mode; stage 3 prunes where its lambda is set.
        processor: the model's, with its `tokens_per_image`.
        samples: `Suite.load`.
        suite_digest: `Suite.digest`, which the score carries.
        batch: questions at a time. The batches change no result beyond rounding.
        report: hears the records of all questions so far after every batch (`score_of_records` makes a score of them);
            what it raises ends the scoring.
        longest: tokens that are generated at most; by default `longest_answer` of the samples. Give that of the whole
            suite where it is asked in portions: an answer that is cut earlier may come out right.

    Raises:
        ScoringError: for no sample, a sample without a reply, a processor of another pruning, a training model, or
            stage 3 without its lambda.
    """
    _check(model, processor, samples)
    questions = [_Question.of(sample, processor) for sample in samples]
    longest = _longest(questions) if longest is None else longest
    records: list[Record] = []
    for start in range(0, len(questions), batch):
        records += _ask(model, processor, questions[start : start + batch], longest)
        if report is not None:
            report(tuple(records))
    return score_of_records(model.config, records, suite_digest)


def score_of_records(config: MeteorConfig, records: Sequence[Record], suite_digest: str) -> Score:
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
        tflops=measured_cost(config, kept).total / 1e12,
        records=tuple(records),
    )


def measured_cost(config: MeteorConfig, kept: float) -> FlopReport:
    """FLOPs of one image and prompt where stage 3, if it is on, keeps its measured mean of `kept` visual tokens."""
    decode = config.pruning.decode
    if decode.enabled:
        target = min(max(kept, float(decode.k_min)), float(config.tokens_per_image))
        config = config.with_pruning(replace(config.pruning, decode=replace(decode, target_mean=target, lam=None)))
    return count_flops(config)


def longest_answer(processor: MeteorProcessor, samples: Sequence[RawSample]) -> int:
    """Tokens of the longest expected answer, its end token included, LONGEST_ANSWER at most."""
    return _longest([_Question.of(sample, processor) for sample in samples])


def _longest(questions: Sequence[_Question]) -> int:
    return min(LONGEST_ANSWER, max(len(question.answer_ids) for question in questions))


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
            "stage 3 is enabled but pruning.decode.lam is not set: solve it "
            "(pipelines.evaluation.target_mean.solve_lambda_on)"
        )


def _expected(sample: RawSample) -> str:
    for turn in sample.turns:
        if turn.role == "assistant":
            return turn.text
    raise ScoringError(f"sample {sample.key!r} has no reply to score")


@dataclass(frozen=True)
class _Question:
    """A question of a suite, encoded once.

    Attributes:
        sample: that it is of.
        expected: answer.
        prompt: its ids.
        answer_ids: those of the expected answer, its end token too: the ones that training supervises.
    """

    sample: RawSample
    expected: str
    prompt: Encoded
    answer_ids: list[int]

    @classmethod
    def of(cls, sample: RawSample, processor: MeteorProcessor) -> _Question:
        expected = _expected(sample)
        ids, labels = processor.encode([("user", first_question(sample)), ("assistant", expected)], len(sample.images))
        answer_ids = [label for label in labels if label != IGNORE_INDEX]
        begin = next(place for place, label in enumerate(labels) if label != IGNORE_INDEX)
        return cls(sample, expected, Encoded(ids[:begin], labels[:begin]), answer_ids)


def _ask(
    model: MeteorForConditionalGeneration, processor: MeteorProcessor, questions: Sequence[_Question], longest: int
) -> list[Record]:
    """The records of one batch."""
    inputs = processor.batch_prompts([q.prompt for q in questions], [q.sample.images for q in questions])
    inputs = inputs.to(model.device)
    mask_BT = inputs["attention_mask"]
    embeds_BTC, is_image_BT = model.embed_prompts(inputs["input_ids"], inputs["pixel_values"])
    cache = model.new_cache() or DynamicCache(config=model.config.text_config)
    nll_B = answer_nll(model, embeds_BTC, mask_BT, is_image_BT, [q.answer_ids for q in questions], cache)
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
    for row, question in enumerate(questions):
        sample, answer = question.sample, processor.decode(ids_BA[row])
        right = normalise(answer) == normalise(question.expected)
        records.append(
            Record(
                sample.key, question.expected, answer, right, float(nll_B[row]), int(kept_B[row]), len(sample.images)
            )
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
