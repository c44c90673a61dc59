"""Scoring: likelihoods against the plain forward and a slow computation, suites, intervals, comparisons."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.decoder.loop import decode_pruned
from meteor_model.generation_meteor import position_ids_of
from meteor_model.logits import token_loss
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor, collate
from pipelines.data import shards
from pipelines.data.schema import RawSample, Turn
from pipelines.evaluation.evaluate import _Question, score_model, score_of_records
from pipelines.evaluation.samples import first_question
from pipelines.evaluation.scores import (
    Interval,
    Record,
    Score,
    ScoringError,
    bootstrap,
    compare_scores,
    normalise,
    wilson,
)
from pipelines.evaluation.suite import Suite
from tests.meteor_model.builders import DENSE, PRUNED, counted_encodes, model, processor

ANSWERS = ("red", "left", "a grinning face", "left of the red square", "Red.")


def _png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _samples() -> list[RawSample]:
    """Prompts and answers of different lengths, one with two images."""
    samples = []
    for index, answer in enumerate(ANSWERS):
        images = tuple(_png(10 * index + i) for i in range(2 if index == 3 else 1))
        question = "<image>" * len(images) + "\nWhat is it" + " where" * index + "?"
        samples.append(RawSample(f"s{index}", images, (Turn("user", question), Turn("assistant", answer))))
    return samples


def _nll_of_the_plain_forward(built: MeteorForConditionalGeneration, made: MeteorProcessor, sample: RawSample) -> float:
    """The loss that training has on the same conversation."""
    turns = [("user", first_question(sample)), ("assistant", sample.turns[1].text)]
    encoded = made.encode(turns, len(sample.images))
    pixels = torch.stack([made.load_image(image) for image in sample.images])
    example = {"input_ids": encoded.input_ids, "labels": encoded.labels, "images": pixels}
    batch = collate([example], 0, made.image_size)
    labels = batch.pop("labels")
    with torch.no_grad():
        return float(token_loss(built(**batch, use_cache=False).logits, labels))


def _nll_one_token_at_a_time(
    built: MeteorForConditionalGeneration, made: MeteorProcessor, sample: RawSample
) -> tuple[float, int]:
    """One sample without padding: prefill, then token after token through `decode_pruned`."""
    inputs = made([first_question(sample)], [list(sample.images)])
    whole = made.encode([("user", first_question(sample)), ("assistant", sample.turns[1].text)], len(sample.images))
    answer = [label for label in whole.labels if label >= 0]
    cache = built.new_cache()
    assert cache is not None
    with torch.no_grad():
        embeds, is_image = built.embed_prompts(inputs["input_ids"], inputs["pixel_values"])
        mask = inputs["attention_mask"]
        out = decode_pruned(built.language_model, embeds, mask, position_ids_of(mask), is_image, cache)
        total, position = 0.0, embeds.shape[1]
        for token in answer:
            logits = built.lm_head(out.last_hidden_state[:, -1]).log_softmax(-1)
            total -= float(logits[0, token])
            mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
            place = torch.tensor([[position]])
            step = built.get_input_embeddings()(torch.tensor([[token]]))
            out = decode_pruned(built.language_model, step, mask, place, None, cache)
            position += 1
    assert cache.decision is not None
    return total / len(answer), int(cache.decision.kept_counts_B[0])


def test_nll_with_everything_kept_is_the_loss_of_the_plain_forward() -> None:
    built, made, samples = model(DENSE), processor(DENSE), _samples()
    score = score_model(built, made, samples, "suite", batch=3)
    expected = [_nll_of_the_plain_forward(built, made, sample) for sample in samples]
    np.testing.assert_allclose([r.nll for r in score.records], expected, rtol=1e-5, atol=1e-5)
    assert score.answer_nll == pytest.approx(np.mean(expected), rel=1e-5)
    assert score.visual_tokens == score.visual_tokens_mean == built.config.tokens_per_image


def test_a_cache_that_drops_nothing_gives_the_same_likelihood() -> None:
    """Stage 3 with a lambda so large that all tokens stay."""
    everything = replace(PRUNED, decode=replace(PRUNED.decode, lam=1e9, target_mean=None))
    without = replace(PRUNED, decode=replace(PRUNED.decode, enabled=False))
    through = score_model(model(everything), processor(everything), _samples(), "suite")
    plain = score_model(model(without), processor(without), _samples(), "suite")
    np.testing.assert_allclose([r.nll for r in through.records], [r.nll for r in plain.records], atol=1e-5)
    assert [r.answer for r in through.records] == [r.answer for r in plain.records]
    assert through.visual_tokens_mean == plain.visual_tokens_mean


def test_nll_with_stage_3_is_that_of_one_token_at_a_time() -> None:
    built, made, samples = model(), processor(), _samples()
    score = score_model(built, made, samples, "suite", batch=5)
    slow = [_nll_one_token_at_a_time(built, made, sample) for sample in samples]
    np.testing.assert_allclose([r.nll for r in score.records], [nll for nll, _ in slow], rtol=1e-4, atol=1e-5)
    assert [r.kept for r in score.records] == [kept for _, kept in slow]
    assert sum(r.kept for r in score.records) < sum(r.images for r in score.records) * built.config.tokens_per_image
    assert score.visual_tokens_mean == sum(kept for _, kept in slow) / 6, "six images"


def test_stage_3_changes_the_likelihood_that_is_scored() -> None:
    """So that the two tests above cannot both pass on an unpruned cache."""
    without = replace(PRUNED, decode=replace(PRUNED.decode, enabled=False))
    pruned = score_model(model(), processor(), _samples(), "suite")
    plain = score_model(model(without), processor(without), _samples(), "suite")
    assert any(abs(a.nll - b.nll) > 1e-4 for a, b in zip(pruned.records, plain.records, strict=True))
    assert pruned.tflops < plain.tflops


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_batches_change_no_result(batch: int) -> None:
    built, made = model(), processor()
    score, other = (score_model(built, made, _samples(), "suite", batch=size) for size in (batch, 4))
    np.testing.assert_allclose([r.nll for r in score.records], [r.nll for r in other.records], rtol=1e-4, atol=1e-5)
    assert [(r.answer, r.kept) for r in score.records] == [(r.answer, r.kept) for r in other.records]


def test_report_hears_growing_scores_and_can_stop() -> None:
    built, made, heard = model(), processor(), []
    final = score_model(built, made, _samples(), "suite", batch=2, report=lambda records: heard.append(records))
    assert [len(records) for records in heard] == [2, 4, 5]
    assert score_of_records(built.config, heard[-1], "suite") == final

    class Stopped(Exception):
        pass

    def stop(records: Sequence[Record]) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        score_model(built, made, _samples(), "suite", batch=2, report=stop)


def test_right_answers_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights never say anything right, so what is generated is given."""
    built, made = model(), processor()
    said = ("Red", "left.", "a grinning face", "left of the blue square", "")
    rows = [[*made.tokenizer.encode(text, add_special_tokens=False), 2] for text in said]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    monkeypatch.setattr(built, "generate", lambda **options: ids)
    score = score_model(built, made, _samples(), "suite", batch=5)
    assert [r.right for r in score.records] == [True, True, True, False, False]
    assert score.accuracy == 0.6
    assert score.accuracy_interval == wilson(3, 5)


def test_normalised_answers() -> None:
    assert normalise("  A  Grinning face. ") == normalise("a grinning face")
    assert normalise("red") != normalise("reddish")


def test_a_score_survives_its_dictionary() -> None:
    score = score_model(model(), processor(), _samples(), "suite")
    assert Score.from_dict(score.to_dict(records=True)) == score
    assert Score.from_dict(score.to_dict()) == replace(score, records=())
    with pytest.raises(ScoringError, match="this document holds no score: questions is missing"):
        Score.from_dict({"suite": "x"})


def test_paired_comparison() -> None:
    first, second = (score_model(model(seed=seed), processor(), _samples(), "suite") for seed in (0, 1))
    compared = compare_scores(first, second)
    differences = np.array([b.nll - a.nll for a, b in zip(first.records, second.records, strict=True)])
    assert compared.answer_nll == pytest.approx(second.answer_nll - first.answer_nll)
    assert compared.answer_nll_interval == bootstrap(differences)
    same = compare_scores(first, first)
    assert same.answer_nll_interval == same.accuracy_interval == Interval(0.0, 0.0)


def test_unlike_scores_are_not_compared() -> None:
    score = score_model(model(), processor(), _samples(), "suite")
    with pytest.raises(ScoringError, match="two suites"):
        compare_scores(score, replace(score, suite="other"))
    with pytest.raises(ScoringError, match="5 and 0 questions"):
        compare_scores(score, replace(score, records=()))
    with pytest.raises(ScoringError, match="5 and 4 questions"):
        compare_scores(score, replace(score, records=score.records[1:]))


def test_what_cannot_be_scored() -> None:
    built, made = model(), processor()
    with pytest.raises(ScoringError, match="empty"):
        score_model(built, made, [], "suite")
    with pytest.raises(ScoringError, match="training mode"):
        score_model(model().train(), made, _samples(), "suite")
    with pytest.raises(ScoringError, match="192 placeholders"):
        score_model(built, processor(DENSE), _samples(), "suite")
    with pytest.raises(ScoringError, match="'s0' has no reply"):
        score_model(built, made, [RawSample("s0", (_png(0),), (Turn("user", "<image>\nwhat?"),))], "suite")
    unsolved = replace(PRUNED, decode=replace(PRUNED.decode, lam=None))
    built.config = MeteorConfig(**{**built.config.to_dict(), "pruning": unsolved})
    with pytest.raises(ScoringError, match="lam is not set"):
        score_model(built, made, _samples(), "suite")


def test_numbers_are_flat_and_lose_nothing() -> None:
    score = score_model(model(), processor(), _samples(), "suite")
    numbers = score.numbers()
    assert Interval(numbers["answer_nll_low"], numbers["answer_nll_high"]) == score.answer_nll_interval
    assert numbers["tflops"] == score.tflops
    assert set(numbers) == {
        *("accuracy", "accuracy_low", "accuracy_high", "answer_nll", "answer_nll_low", "answer_nll_high"),
        *("visual_tokens", "visual_tokens_mean", "tflops"),
    }
    assert Interval(-0.5, 0.25).beside(0.125, "+") == "+0.1250 [-0.5000, +0.2500]"


def test_wilson_interval() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263 and 15 of 148.
    assert (round(wilson(81, 263).low, 4), round(wilson(81, 263).high, 4)) == (0.2553, 0.3662)
    assert (round(wilson(15, 148).low, 4), round(wilson(15, 148).high, 4)) == (0.0624, 0.1605)
    assert wilson(0, 20).low == 0.0
    assert wilson(20, 20).high == 1.0


@pytest.mark.parametrize("values", [[0.5], [1.0, 1.0, 1.0], [0.1, 0.7, 0.2, 0.4, 0.9, 0.3]])
def test_bootstrap_is_the_percentile_interval_of_resampled_means(values: list[float]) -> None:
    given = np.array(values)
    drawn = np.random.default_rng(0).integers(0, len(given), size=(2000, len(given)))
    low, high = np.quantile(given[drawn].mean(axis=1), [0.025, 0.975])
    found = bootstrap(given)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-14)


def test_bootstrap_covers_the_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    intervals = [bootstrap(rng.normal(1.0, 2.0, 60)) for _ in range(200)]
    assert 0.89 <= np.mean([i.low <= 1.0 <= i.high for i in intervals]) <= 0.99


def test_a_suite_is_its_data(tmp_path: Path) -> None:
    record = (
        b'{"id": "k", "conversations": [{"from": "human", "value": "<image>\\nwhat?"}, {"from": "gpt", "value": "a"}]}'
    )
    rows = [(f"k{i}", {"json": record, "png": _png(i)}) for i in range(4)] + [("bad", {"json": record, "png": b"no"})]
    infos = shards.write_shards(rows, str(tmp_path), "heldout", 3)
    manifest = shards.save_manifest(str(tmp_path), infos, {"source": "test"})
    suite = Suite.of(manifest, "heldout", 4)
    made = processor()
    assert [sample.key for sample in suite.load(made)] == ["k0", "k1", "k2", "k3"]
    assert suite.digest == replace(suite, manifest="elsewhere").digest
    assert len({suite.digest, replace(suite, questions=3).digest, replace(suite, sha256="0" * 64).digest}) == 3
    with pytest.raises(ScoringError, match="has 4 samples with readable images, the suite asks 5"):
        replace(suite, questions=5).load(made)
    shards.save_manifest(str(tmp_path), infos, {"source": "other"})
    with pytest.raises(ScoringError, match="the suite was made of"):
        suite.load(made)
    with pytest.raises(ScoringError, match="at least 1"):
        Suite("m", "0", "heldout", 0)


# ------------------------------------------------------------------------------------------------------------- encoding


def test_every_question_is_encoded_once() -> None:
    built, made, samples = model(), processor(), _samples()
    with counted_encodes() as calls:
        score_model(built, made, samples, "suite", batch=2)
    assert calls == [len(sample.images) for sample in samples]


@pytest.mark.parametrize("template", ["plain", "vicuna_v1", "short"])
def test_the_prompt_of_a_question_ends_where_its_answer_begins(template: str) -> None:
    """What `score_model` cuts out of the whole conversation is what a user who asks gives to `generate`."""
    made = processor(template=template)
    for sample in _samples():
        question = _Question.of(sample, made)
        asked = made([first_question(sample)], [list(sample.images)])
        batch = made.batch_prompts([question.prompt], [list(sample.images)])
        assert batch.keys() == asked.keys()
        assert all(torch.equal(batch[name], asked[name]) for name in asked)
        whole = made.encode([("user", first_question(sample)), ("assistant", question.expected)], len(sample.images))
        length = len(question.prompt.input_ids)
        assert whole.input_ids[length : length + len(question.answer_ids)] == question.answer_ids
        assert question.answer_ids[-1] == made.tokenizer.eos_token_id
