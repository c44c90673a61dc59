"""How well a model answers a fixed suite of questions: it is asked, and gets a score (`pipelines.evaluation.scores`).

A suite is a sample of the replies of one split, each asked for by what stands before it in its own sample
(`pipelines.evaluation.questions`). For each question, with all three stages active as in `generate`:

1. vision     towers and fusion run once, for both measures
2. likelihood the prompt is prefilled through a cache that prunes it, the expected answer's tokens (its end token too)
              follow through that cache; the question's NLL is their mean
3. answer     greedy generation, where answers are asked for; the suite's scorer says what it earns

Legend: B questions, T prompt tokens, A answer tokens, C LLM width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.decoder.cache import MeteorCache
from meteor_model.flops import FlopReport, count_flops
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from pipelines.evaluation.embedded import Embed, embed_questions
from pipelines.evaluation.intervals import level
from pipelines.evaluation.questions import BATCH, Question, Questions
from pipelines.evaluation.scorers import Scorer, credit, normalise
from pipelines.evaluation.scores import Record, Score, ScoringError, counted
from pipelines.evaluation.suite import Suite

LONGEST_ANSWER = 64
"""Tokens generated at most. A longer expected answer counts as answered wrongly; its likelihood counts whole."""


# -------------------------------------------------------------------------------------------------------------- scoring


@torch.no_grad()
def score_model(
    model: MeteorForConditionalGeneration,
    processor: MeteorProcessor,
    questions: Questions,
    suite: Suite,
    batch: int = BATCH,
    report: Callable[[Sequence[Record]], None] | None = None,
    longest: int | None = None,
    answers: bool = True,
) -> Score:
    """Ask a model; greedy answers count.

    Args:
        model: in eval mode; stage 3 prunes where its lambda is set.
        processor: the model's, with its `tokens_per_image`.
        questions: `Suite.load`, or some of them.
        suite: that they are of; its scorer says what an answer earns.
        batch: questions at a time. The batches change no result beyond rounding.
        report: hears the records of all questions so far after every batch (`score_of_records` makes a score of them);
            what it raises ends the scoring.
        longest: tokens that are generated at most; by default `longest_answer` of the questions. Give that of the whole
            suite where it is asked in portions: an answer that is cut earlier may come out right.
        answers: whether the model answers, too; without, the score has likelihoods alone.

    Raises:
        ScoringError: for no question, a processor of another pruning, a training model, or stage 3 without its lambda.
    """
    if answers and longest is None and questions.asked:
        longest = longest_answer(questions.asked)
    records = ask_records(model, processor, questions, suite, batch, report, longest if answers else None)
    return score_of_records(model.config, records, suite, questions.left_out)


@torch.no_grad()
def ask_records(
    model: MeteorForConditionalGeneration,
    processor: MeteorProcessor,
    questions: Questions,
    suite: Suite,
    batch: int = BATCH,
    report: Callable[[Sequence[Record]], None] | None = None,
    longest: int | None = None,
    embed: Embed = embed_questions,
) -> list[Record]:
    """The records of questions alone: no FLOPs are counted, no interval is made.

    As `score_model`, but that `longest` None asks for likelihoods alone, and `embed` says how batches become prompts
    with visual tokens.
    """
    _check(model, processor, questions)
    asked = questions.asked
    records: list[Record] = []
    for start in range(0, len(asked), batch):
        records += _ask(model, processor, asked[start : start + batch], suite.scorer, longest, embed)
        if report is not None:
            report(tuple(records))
    return records


def score_of_records(
    config: MeteorConfig, records: Sequence[Record], suite: Suite, left_out: Mapping[str, int]
) -> Score:
    """The score of these questions under this configuration; `left_out` is what was not asked, by reason."""
    earned = [record.credit for record in records if record.credit is not None]
    nll = np.array([record.nll for record in records], dtype=np.float64)
    groups = [record.group for record in records]
    whole = len(earned) == len(records)
    kept = sum(record.kept_tokens for record in records) / sum(record.images for record in records)
    return Score(
        suite=suite.digest,
        questions=len(records),
        answered=sum(bool(normalise(record.answer or "")) for record in records) if whole else None,
        left_out=dict(left_out),
        accuracy=float(np.mean(earned)) if whole else None,
        accuracy_interval=level(np.array(earned), groups) if whole else None,
        answer_nll=float(nll.mean()),
        answer_nll_interval=level(nll, groups),
        tokens_per_image=config.tokens_per_image,
        kept_per_image=kept,
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


def longest_answer(questions: Sequence[Question]) -> int:
    """Tokens of the longest expected answer, its end token included, LONGEST_ANSWER at most."""
    return min(LONGEST_ANSWER, max(len(question.answer_ids) for question in questions))


# ---------------------------------------------------------------------------------------------------------- the asking


def _check(model: MeteorForConditionalGeneration, processor: MeteorProcessor, questions: Questions) -> None:
    if not questions.asked:
        raise ScoringError(f"there is no question to score (left out: {counted(questions.left_out)})")
    positions = model.config.text_config.max_position_embeddings
    for question in questions.asked:
        if question.length > positions:
            raise ScoringError(
                f"question {question.key!r} has {question.length} tokens with its answer, the model has {positions} "
                "positions: leave it out"
            )
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


def _ask(
    model: MeteorForConditionalGeneration,
    processor: MeteorProcessor,
    questions: Sequence[Question],
    scorer: Scorer,
    longest: int | None,
    embed: Embed,
) -> list[Record]:
    """The records of one batch; `longest` tokens are generated at most, None generates no answer."""
    mask_BT, embeds_BTC, is_image_BT, position_ids = embed(model, processor, questions)
    own: dict[str, Any] = {"position_ids": position_ids} if model.config.keeps_positions else {}
    cache = model.recording_cache()
    nll_B = answer_nll(model, embeds_BTC, mask_BT, is_image_BT, [q.answer_ids for q in questions], cache, **own)
    kept = _kept_by_image(model.config, cache, [len(question.images) for question in questions])
    answers: list[str | None] = [None] * len(questions)
    if longest is not None:
        ids_BA = model.generate(
            inputs_embeds=embeds_BTC,
            image_mask=is_image_BT,
            attention_mask=mask_BT,
            past_key_values=model.recording_cache(),
            max_new_tokens=longest,
            do_sample=False,
            pad_token_id=processor.tokenizer.pad_token_id,
            eos_token_id=processor.tokenizer.eos_token_id,
            **own,
        )
        answers = [processor.decode(ids_A) for ids_A in ids_BA]
    return [
        Record(
            key=question.key,
            group=question.group,
            prompt=question.prompt_digest(processor),
            expected=question.expected,
            answer=answer,
            credit=None if answer is None else credit(scorer, answer, question.expected),
            nll=float(nll),
            kept=of_images,
            tags=question.tags,
        )
        for question, answer, nll, of_images in zip(questions, answers, nll_B, kept, strict=True)
    ]


def _kept_by_image(
    config: MeteorConfig, cache: DynamicCache, images: Sequence[int]
) -> list[tuple[tuple[int, int, int], ...]]:
    """For each prompt and each of its images, visual tokens after stage 1, 2 and 3.

    Args:
        config: of the model.
        cache: after prefill.
        images: of each prompt.
    """
    encoded = sum(budget[-1] for budget in config.encode_budgets.values())
    entering = config.tokens_per_image
    counts = [[entering] * number for number in images]
    if isinstance(cache, MeteorCache):
        assert cache.decision is not None, "prefill decides"
        counts = [
            torch.bincount(places // entering, minlength=number).tolist()
            for places, number in zip(cache.decision.kept_visual(), images, strict=True)
        ]
    return [tuple((encoded, entering, kept) for kept in of_prompt) for of_prompt in counts]


def answer_nll(
    model: MeteorForConditionalGeneration,
    embeds_BTC: Tensor,
    mask_BT: Tensor,
    is_image_BT: Tensor,
    answers: Sequence[Sequence[int]],
    cache: DynamicCache,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Mean negative log-likelihood of each answer's tokens after its prompt, (B,) fp32 in nats.

    The answer follows in one pass; token by token where stage 3 chooses while it grows, so that no choice sees tokens
    that come later.

    Args:
        model: in eval mode.
        embeds_BTC: left-padded prompts with their visual tokens in place.
        mask_BT: attention mask of the prompts.
        is_image_BT: bool, where visual tokens are.
        answers: token ids of each answer, at least one.
        cache: a fresh one; a `MeteorCache` prunes the prompt as `generate` does.
        position_ids: of the prompts, where they are not counted over the mask.
    """
    device, lengths = embeds_BTC.device, [len(answer) for answer in answers]
    ids_BA = torch.zeros(len(answers), max(lengths), dtype=torch.long)
    for row, answer in enumerate(answers):
        ids_BA[row, : len(answer)] = torch.tensor(answer)
    ids_BA = ids_BA.to(device)
    there_BA = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
    options: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    prefilled = model(
        inputs_embeds=embeds_BTC,
        attention_mask=mask_BT,
        image_mask=is_image_BT,
        position_ids=position_ids,
        logits_to_keep=1,
        **options,
    )
    logits = [prefilled.logits]
    if max(lengths) > 1:
        fed_BA = ids_BA[:, :-1]
        mask_BL = torch.cat([mask_BT, there_BA[:, :-1].to(mask_BT.dtype)], dim=1)
        step = 1 if model.config.pruning.decode.selects_later else fed_BA.shape[1]
        for start in range(0, fed_BA.shape[1], step):
            embeds_BAC = model.get_input_embeddings()(fed_BA[:, start : start + step])
            seen_BL = mask_BL[:, : mask_BT.shape[1] + start + step]
            logits.append(model(inputs_embeds=embeds_BAC, attention_mask=seen_BL, **options).logits)
    logits_BAV = torch.cat(logits, dim=1).float()
    nll_BA = F.cross_entropy(logits_BAV.flatten(0, 1), ids_BA.flatten(), reduction="none").view_as(ids_BA)
    return (nll_BA * there_BA).sum(dim=1) / there_BA.sum(dim=1)
