"""Scoring: likelihoods against the plain forward and a slow computation, suites, intervals, comparisons."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from PIL import Image

from meteor_model.collate import collate
from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.decoder.loop import decode_pruned
from meteor_model.generation_meteor import position_ids_of
from meteor_model.logits import token_loss
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from meteor_model.prompts import Prompt
from pipelines.data import shards
from pipelines.data.schema import RawSample, Turn
from pipelines.evaluation.evaluate import score_model, score_of_records
from pipelines.evaluation.intervals import Interval, mean, share
from pipelines.evaluation.pictures import draw_questions
from pipelines.evaluation.questions import Questions, questions_of, read_prompts, read_questions
from pipelines.evaluation.scores import Record, Score, ScoringError, compare_scores
from pipelines.evaluation.suite import Suite
from pipelines.evaluation.target_mean import attention_masses, solve_lambda_on
from tests.meteor_model.builders import DENSE, PRUNED, counted_encodes, model, processor
from tests.meteor_model.test_prompts import conversations, images_of

SUITE = Suite("s3://b/manifest.parquet", "ab" * 32, "heldout", 5)
ANSWERS = ("red", "left", "a grinning face", "left of the red square", "Red.")


def _png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _samples() -> list[RawSample]:
    """Prompts and answers of different lengths; one with two images, one whose image comes last, one after a turn."""
    samples = []
    for index, answer in enumerate(ANSWERS):
        images = tuple(_png(10 * index + i) for i in range(2 if index == 3 else 1))
        question = "<image>" * len(images) + "\nWhat is it" + " where" * index + "?"
        turns = [Turn("user", question), Turn("assistant", answer)]
        if index == 1:
            turns[0] = Turn("user", "What is this? <image>")
        if index == 3:
            turns[0] = Turn("user", "A: <image> B: <image> which?")
        if index == 4:
            turns = [Turn("system", "Be terse."), Turn("user", "hi"), Turn("assistant", "hello"), *turns]
        samples.append(RawSample(f"s{index}", images, tuple(turns)))
    return samples


def _asked(made: MeteorProcessor | None = None, samples: Sequence[RawSample] | None = None) -> Questions:
    """The questions about images of the samples."""
    made = made or processor()
    found = [q for sample in samples or _samples() for q in questions_of(sample, made)]
    return Questions(tuple(replace(q, group=q.sample) for q in found if q.images), {"text_only": 1})


def _nll_of_the_plain_forward(built: MeteorForConditionalGeneration, made: MeteorProcessor, sample: RawSample) -> float:
    """The loss that training has on the last reply of the same conversation."""
    encoded = made.encode(sample.conversation, len(sample.images))
    last = [label if place >= encoded.replies[-1][0] else -100 for place, label in enumerate(encoded.labels)]
    pixels = torch.stack([made.load_image(image) for image in sample.images])
    example = {"input_ids": encoded.input_ids, "labels": last, "images": pixels}
    batch = collate([example], 0, made.image_size)
    labels = batch.pop("labels")
    with torch.no_grad():
        return float(token_loss(built(**batch, use_cache=False).logits, labels))


def _nll_one_token_at_a_time(
    built: MeteorForConditionalGeneration, made: MeteorProcessor, sample: RawSample
) -> tuple[float, int]:
    """One sample without padding: prefill, then token after token through `decode_pruned`."""
    prompt = made.encode(sample.conversation[:-1], len(sample.images), add_generation_prompt=True)
    inputs = made.batch_prompts([prompt], [list(sample.images)])
    whole = made.encode(sample.conversation, len(sample.images))
    answer = whole.input_ids[len(prompt.input_ids) :]
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
    score = score_model(built, made, _asked(made, samples), SUITE, batch=3)
    expected = [_nll_of_the_plain_forward(built, made, sample) for sample in samples]
    np.testing.assert_allclose([r.nll for r in score.records], expected, rtol=1e-5, atol=1e-5)
    assert score.answer_nll == pytest.approx(np.mean(expected), rel=1e-5)
    assert score.tokens_per_image == score.kept_per_image == built.config.tokens_per_image


def test_a_cache_that_drops_nothing_gives_the_same_likelihood() -> None:
    """Stage 3 with a lambda so large that all tokens stay."""
    everything = replace(PRUNED, decode=replace(PRUNED.decode, lam=1e9, target_mean=None))
    without = replace(PRUNED, decode=replace(PRUNED.decode, enabled=False))
    through = score_model(model(everything), processor(everything), _asked(), SUITE)
    plain = score_model(model(without), processor(without), _asked(), SUITE)
    np.testing.assert_allclose([r.nll for r in through.records], [r.nll for r in plain.records], atol=1e-5)
    assert [r.answer for r in through.records] == [r.answer for r in plain.records]
    assert through.kept_per_image == plain.kept_per_image


def test_nll_with_stage_3_is_that_of_one_token_at_a_time() -> None:
    built, made, samples = model(), processor(), _samples()
    score = score_model(built, made, _asked(made, samples), SUITE, batch=5)
    slow = [_nll_one_token_at_a_time(built, made, sample) for sample in samples]
    np.testing.assert_allclose([r.nll for r in score.records], [nll for nll, _ in slow], rtol=1e-4, atol=1e-5)
    assert [r.kept_tokens for r in score.records] == [kept for _, kept in slow]
    assert [len(r.kept) for r in score.records] == [len(sample.images) for sample in samples]
    encoded, entering = sum(b[-1] for b in built.config.encode_budgets.values()), built.config.tokens_per_image
    assert {stages[:2] for r in score.records for stages in r.kept} == {(encoded, entering)}
    assert sum(r.kept_tokens for r in score.records) < 6 * entering
    assert score.kept_per_image == sum(kept for _, kept in slow) / 6, "six images"


def test_stage_3_changes_the_likelihood_that_is_scored() -> None:
    """So that the two tests above cannot both pass on an unpruned cache."""
    without = replace(PRUNED, decode=replace(PRUNED.decode, enabled=False))
    pruned = score_model(model(), processor(), _asked(), SUITE)
    plain = score_model(model(without), processor(without), _asked(), SUITE)
    assert any(abs(a.nll - b.nll) > 1e-4 for a, b in zip(pruned.records, plain.records, strict=True))
    assert pruned.tflops < plain.tflops


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_batches_change_no_result(batch: int) -> None:
    built, made = model(), processor()
    score, other = (score_model(built, made, _asked(), SUITE, batch=size) for size in (batch, 4))
    np.testing.assert_allclose([r.nll for r in score.records], [r.nll for r in other.records], rtol=1e-4, atol=1e-5)
    assert [(r.answer, r.kept) for r in score.records] == [(r.answer, r.kept) for r in other.records]


def test_report_hears_growing_scores_and_can_stop() -> None:
    built, made, heard = model(), processor(), []
    final = score_model(built, made, _asked(), SUITE, batch=2, report=lambda records: heard.append(records))
    assert [len(records) for records in heard] == [2, 4, 5]
    assert score_of_records(built.config, heard[-1], SUITE, {"text_only": 1}) == final

    class Stopped(Exception):
        pass

    def stop(records: Sequence[Record]) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        score_model(built, made, _asked(), SUITE, batch=2, report=stop)


def test_right_answers_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights never say anything right, so what is generated is given."""
    built, made = model(), processor()
    said = ("Red", "left.", "a grinning face", "left of the blue square", "")
    rows = [[*made.tokenizer.encode(text, add_special_tokens=False), 2] for text in said]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    monkeypatch.setattr(built, "generate", lambda **options: ids)
    score = score_model(built, made, _asked(), SUITE, batch=5)
    assert [r.credit for r in score.records] == [1, 1, 1, 0, 0]
    assert score.accuracy == 0.6
    groups = [record.group for record in score.records]
    assert score.accuracy_interval == share(np.array([1, 1, 1, 0, 0]), groups)
    partly = score_model(built, made, _asked(), replace(SUITE, scorer="anls"), batch=5)
    assert [r.credit for r in partly.records] == [1, 1, 1, pytest.approx(1 - 4 / 23), 0]
    assert partly.suite != score.suite


def test_likelihoods_alone_generate_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    built, made = model(), processor()
    whole = score_model(built, made, _asked(), SUITE)
    monkeypatch.setattr(built, "generate", None)
    score = score_model(built, made, _asked(), SUITE, answers=False)
    assert [r.nll for r in score.records] == [r.nll for r in whole.records]
    assert (score.answered, score.accuracy, score.records[0].answer) == (None, None, None)
    assert "answers not asked for" in score.coverage
    assert Score.from_dict(score.to_dict(records=True)) == score
    assert compare_scores(whole, score).accuracy is None
    with pytest.raises(ScoringError, match="likelihoods alone"):
        compare_scores(whole, score).verdict("accuracy")


def test_the_digest_of_a_prompt_is_that_under_every_pruning() -> None:
    narrow = replace(PRUNED, fuse=replace(PRUNED.fuse, keep=13))
    for wide, other in zip(_asked().asked, _asked(processor(narrow)).asked, strict=True):
        assert wide.prompt.input_ids != other.prompt.input_ids
        assert wide.prompt_digest(processor()) == other.prompt_digest(processor(narrow))
    assert len({q.prompt_digest(processor()) for q in _asked().asked}) == 5


def test_lambda_is_for_tokens_per_image_whatever_the_images_of_a_prompt() -> None:
    """Four images in every other prompt: per prompt the same target would keep far fewer of each."""
    built, made = model(), processor()
    samples = [
        RawSample(
            f"m{i}", tuple(_png(100 + 4 * i + j) for j in range(count)),
            (Turn("user", "<image>" * count + " which?"), Turn("assistant", "red")),
        )
        for i, count in enumerate([1, 4] * 6)
    ]  # fmt: skip
    questions = _asked(made, samples).asked
    target = 0.4 * built.config.tokens_per_image
    decode = replace(built.config.pruning.decode, target_mean=target, lam=None)
    built.config = built.config.with_pruning(replace(built.config.pruning, decode=decode))
    decode = replace(decode, lam=solve_lambda_on(built, made, questions))
    built.config = built.config.with_pruning(replace(built.config.pruning, decode=decode))
    score = score_model(built, made, Questions(questions), SUITE)
    assert score.kept_per_image == pytest.approx(target, rel=0.02)
    assert [record.images for record in score.records] == [1, 4] * 6
    everything = replace(decode, target_mean=float(built.config.tokens_per_image), lam=None)
    built.config = built.config.with_pruning(replace(built.config.pruning, decode=everything))
    assert solve_lambda_on(built, made, questions) > 0


def test_a_score_survives_its_dictionary() -> None:
    score = score_model(model(), processor(), _asked(), SUITE)
    assert Score.from_dict(score.to_dict(records=True)) == score
    assert Score.from_dict(score.to_dict()) == replace(score, records=())
    with pytest.raises(ScoringError, match="this document holds no score: questions is missing"):
        Score.from_dict({"suite": "x"})


def test_paired_comparison() -> None:
    first, second = (score_model(model(seed=seed), processor(), _asked(), SUITE) for seed in (0, 1))
    compared = compare_scores(first, second)
    differences = np.array([b.nll - a.nll for a, b in zip(first.records, second.records, strict=True)])
    assert compared.answer_nll.mean == pytest.approx(second.answer_nll - first.answer_nll)
    groups = [record.group for record in first.records]
    assert compared.answer_nll.interval == mean(differences, groups)
    assert compared.answer_nll.differing == 5
    assert compared.groups == len(set(groups))
    assert compared.adjusted["answer_nll"] >= compared.answer_nll.p_value
    assert "5 of 5 differ, p " in compared.text("answer_nll")
    assert "(Holm), visible from " in compared.text("answer_nll")
    same = compare_scores(first, first)
    assert same.answer_nll.interval == Interval(0.0, 0.0)
    assert same.accuracy is not None
    assert (same.accuracy.differing, same.accuracy.mean, same.accuracy.p_value) == (0, 0.0, 1.0)
    assert same.accuracy.interval.low < 0 < same.accuracy.interval.high, "no flip among five says little"
    assert same.accuracy.visible > 0.3
    assert same.text("answer_nll") == "none of 5 questions differs: non-inferior at a margin of 0.02"
    prompts = replace(second, records=tuple(replace(record, prompt="other") for record in second.records))
    assert compare_scores(first, prompts).other_prompts == 5


def test_unlike_scores_are_not_compared() -> None:
    score = score_model(model(), processor(), _asked(), SUITE)
    with pytest.raises(ScoringError, match="two suites"):
        compare_scores(score, replace(score, suite="other"))
    with pytest.raises(ScoringError, match="5 and 0 questions"):
        compare_scores(score, replace(score, records=()))
    with pytest.raises(ScoringError, match="5 and 4 questions"):
        compare_scores(score, replace(score, records=score.records[1:]))


def test_what_cannot_be_scored() -> None:
    built, made = model(), processor()
    with pytest.raises(ScoringError, match=r"there is no question to score \(left out: 2 bad_json\)"):
        score_model(built, made, Questions((), {"bad_json": 2}), SUITE)
    long_one = replace(_asked().asked[0], answer_ids=[5] * built.config.text_config.max_position_embeddings)
    with pytest.raises(ScoringError, match=r"question 's0#0' has \d+ tokens with its answer"):
        score_model(built, made, Questions((long_one,)), SUITE)
    with pytest.raises(ScoringError, match="training mode"):
        score_model(model().train(), made, _asked(), SUITE)
    with pytest.raises(ScoringError, match="192 placeholders"):
        score_model(built, processor(DENSE), _asked(), SUITE)
    unsolved = replace(PRUNED, decode=replace(PRUNED.decode, lam=None))
    built.config = MeteorConfig(**{**built.config.to_dict(), "pruning": unsolved})
    with pytest.raises(ScoringError, match="lam is not set"):
        score_model(built, made, _asked(), SUITE)


def test_numbers_are_flat_and_lose_nothing() -> None:
    score = score_model(model(), processor(), _asked(), SUITE)
    numbers = score.numbers()
    assert Interval(numbers["answer_nll_low"], numbers["answer_nll_high"]) == score.answer_nll_interval
    assert numbers["tflops"] == score.tflops
    assert set(numbers) == {
        *("accuracy", "accuracy_low", "accuracy_high", "answer_nll", "answer_nll_low", "answer_nll_high"),
        *("tokens_per_image", "kept_per_image", "tflops"),
    }
    assert Interval(-0.5, 0.25).beside(0.125, "+") == "+0.1250 [-0.5000, +0.2500]"


def _shards(folder: Path, members: dict[str, dict[str, bytes]]) -> shards.Manifest:
    infos = shards.write_shards(list(members.items()), str(folder), "heldout", 3)
    return shards.save_manifest(str(folder), infos, {"source": "test"})


def _record(*turns: str) -> bytes:
    """Turns of human and gpt in alternation; a first one that begins with `system:` is the system's."""
    speakers = ["system"] * turns[0].startswith("system:") + ["human", "gpt"] * len(turns)
    said = [{"from": who, "value": text} for who, text in zip(speakers, turns, strict=False)]
    return json.dumps({"id": "k", "conversations": said}).encode()


def test_a_suite_is_its_data(tmp_path: Path) -> None:
    one = _record("<image>\nwhat?", "a")
    members = {f"k{i}": {"json": one, "png": _png(i)} for i in range(4)} | {"bad": {"json": one, "png": b"no"}}
    manifest = _shards(tmp_path, members)
    suite = Suite.of(manifest, "heldout", 5, part="all")
    made = processor()
    found = suite.load(made, 512)
    assert [question.key for question in found.asked] == ["k0#0", "k1#0", "k2#0", "k3#0"]
    assert (found.left_out, found.drawn) == ({"undecodable_image": 1}, 5)
    assert suite.digest == replace(suite, manifest="elsewhere").digest
    others: list[dict[str, Any]] = [
        {"questions": 3}, {"sha256": "0" * 64}, {"replies": "first"}, {"part": "final"}, {"every": 2}, {"scorer": "vqa"}
    ]  # fmt: skip
    assert len({Suite(**{**asdict(suite), **other}).digest for other in ({}, *others)}) == 7
    few = r"has 5 questions about images \(of those left out: 1 undecodable_image\), the suite asks 6"
    with pytest.raises(ScoringError, match=few):
        replace(suite, questions=6).load(made, 512)
    with pytest.raises(ScoringError, match="has no question about a readable image"):
        replace(suite, questions=1, every=9).read(made, 5)
    shards.save_manifest(str(tmp_path), list(manifest.split("heldout")), {"source": "other"})
    with pytest.raises(ScoringError, match="the suite was made of"):
        suite.load(made, 512)
    with pytest.raises(ScoringError, match="at least 1"):
        Suite("m", "0", "heldout", 0)
    with pytest.raises(ScoringError, match="every is 0"):
        replace(suite, every=0)
    command = replace(suite, every=2, replies="first", scorer="vqa").options
    assert command == "--split heldout --part all --questions 5 --every 2 --replies first --scorer vqa"


def test_parts_share_no_image_and_a_sample_gives_every_shard_its_share(tmp_path: Path) -> None:
    """Forty images, each in two samples of different shards; some samples show two of them."""
    one, two = _record("<image>\nwhat?", "a", "where?", "b"), _record("<image><image> which?", "a")
    members: dict[str, dict[str, bytes]] = {f"k{i:02d}": {"json": one, "png": _png(i % 40)} for i in range(80)}
    members |= {f"m{i}": {"json": two, "0.png": _png(i), "1.png": _png(i + 20)} for i in range(3)}
    manifest, made = _shards(tmp_path, members), processor()

    def read(**options: Any) -> Questions:
        return read_questions(manifest, "heldout", made, options.pop("count", 1000), positions=512, **options)

    parts = {part: read(part=part) for part in ("search", "final", "all")}
    images = {part: {image for q in found.asked for image in q.images} for part, found in parts.items()}
    assert images["search"] | images["final"] == images["all"]
    assert not images["search"] & images["final"]
    assert 0 < len(images["search"]) < len(images["final"])
    assert len(parts["all"].asked) == 163
    by_group: dict[str, set[bytes]] = {}
    for question in parts["all"].asked:
        by_group.setdefault(question.group, set()).update(question.images)
    assert sorted(map(len, by_group.values())) == [1] * 34 + [2] * 3
    keys = [question.key for question in parts["all"].asked]
    assert [q.key for q in read(every=10, count=5).asked] == keys[::10][:5]
    spread = read(count=20)
    assert spread.drawn == 20
    places = [keys.index(question.key) for question in spread.asked]
    assert {int(np.ceil(gap)) for gap in np.diff(places)} <= {8, 9}, "evenly over the whole split"
    prompts = read_prompts(manifest, "heldout", made, 20, positions=512)
    assert len({question.sample for question in prompts.asked}) == 20


def test_a_source_may_name_its_groups(tmp_path: Path) -> None:
    def record(*groups: str) -> bytes:
        return json.dumps({**json.loads(_record("<image> what?", "a")), "group": list(groups)}).encode()

    named = [("cat",), ("dog",), ("cat", "cow"), ("cow",), ()]
    members = {f"k{i}": {"json": record(*groups), "png": _png(i)} for i, groups in enumerate(named)}
    found = read_questions(_shards(tmp_path, members), "heldout", processor(), 9, positions=512).asked
    groups = [question.group for question in found]
    assert groups[0] == groups[2] == groups[3]
    assert len(set(groups)) == 3


# -------------------------------------------------------------------------------------------------------- what is asked

_SPLIT = {
    "two": {"json": _record("<image>\nwhat?", "a", "and where?", "b"), "png": _png(0)},
    "text": {
        "json": _record("hi", "a", "and you?", "b"),
    },
    "late": {"json": _record("hi", "a", "A: <image> B?", "b"), "png": _png(1)},
    "broken": {"json": _record("<image>", "a"), "png": b"no image"},
    "words": {"json": b"[", "png": _png(2)},
    "less": {"json": _record("hi", "a"), "png": _png(3)},
    "aa": {"json": _record("<image>", "a"), "png": _png(4)},
    "a": {"json": _record("<image>", "a", "more?", "b"), "png": _png(5)},
    "long": {"json": _record("<image>" + "word " * 400, "a"), "png": _png(6)},
}


def test_every_question_of_a_split_is_asked_or_counted(tmp_path: Path) -> None:
    manifest, made = _shards(tmp_path, _SPLIT), processor()
    found = read_questions(manifest, "heldout", made, 100, positions=512)
    assert [question.key for question in found.asked] == ["two#0", "two#1", "late#1", "aa#0", "a#0", "a#1"]
    assert found.left_out == {
        "bad_json": 1, "placeholder_missing": 1, "text_only": 3, "too_long": 1, "undecodable_image": 1
    }  # fmt: skip
    assert found.drawn == 10
    first = read_questions(manifest, "heldout", made, 100, positions=512, replies="first")
    assert [question.key for question in first.asked] == ["two#0", "aa#0", "a#0"]
    few = read_questions(manifest, "heldout", made, 2, positions=512, every=1)
    assert ([question.key for question in few.asked], few.left_out) == (["two#0", "two#1"], {"text_only": 3})
    score = score_model(model(), made, found, SUITE)
    assert (score.questions, score.left_out) == (6, found.left_out)
    assert score.answered is not None
    assert score.unanswered_share == (6 - score.answered + 4) / 10
    assert score.coverage == (
        f"6 asked, {score.answered} answered, left out: 1 bad_json, 1 placeholder_missing, 3 text_only, 1 too_long, "
        "1 undecodable_image"
    )


def test_ids_of_questions_are_unique_for_any_key() -> None:
    turns = (Turn("user", "x"), Turn("assistant", "y")) * 3
    keys = ["a", "a#1", "a#1#0", "#"]
    asked = [question for key in keys for question in questions_of(RawSample(key, (), turns), processor())]
    assert len({question.key for question in asked}) == len(asked) == 12
    assert [question.sample for question in asked[::3]] == keys


def test_an_answer_without_a_word_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    built, made = model(), processor()
    space = made.tokenizer.encode(" ", add_special_tokens=False)
    red = made.tokenizer.encode("red", add_special_tokens=False)
    longest = max(len(space), len(red)) + 1
    rows = [row + [2] * (longest - len(row)) for row in (space, [2], red, red, red)]
    monkeypatch.setattr(built, "generate", lambda **options: torch.tensor(rows))
    score = score_model(built, made, _asked(), SUITE, batch=5)
    assert (score.questions, score.answered, score.unanswered_share) == (5, 3, 0.4)


@pytest.mark.parametrize("template", ["plain", "vicuna_v1", "short"])
@settings(max_examples=20, deadline=None)
@given(turns=conversations())
def test_the_prompt_of_every_question_is_the_prefix_of_training(template: str, turns: list[tuple[str, str]]) -> None:
    """Of suite, lambda and pictures: one value, `Question.prompt`."""
    made, count = processor(template=template), images_of(turns)
    sample = RawSample("k", tuple(_PIXELS[:1] * count), tuple(Turn(cast(Any, role), text) for role, text in turns))
    trained = made.encode(sample.conversation, count)
    questions = questions_of(sample, made)
    assert [question.key for question in questions] == [f"k#{number}" for number in range(len(trained.replies))]
    for question, (begin, end) in zip(questions, trained.replies, strict=True):
        assert question.prompt.input_ids == trained.input_ids[:begin]
        assert question.answer_ids == trained.input_ids[begin:end]
        assert question.prompt.input_ids.count(made.image_token_id) == len(question.images) * made.tokens_per_image
        asked = Prompt.of(question.text, question.turns, {"add_generation_prompt": True})
        inputs = made([asked], [list(question.images)])
        assert inputs["input_ids"][0].tolist() == question.prompt.input_ids
        assert question.encoded_by(made) == question


_PIXELS = [_png(0)]


def test_lambda_and_pictures_see_the_prompts_of_the_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    built, made = model(), processor()
    asked = _asked(made).asked
    seen: list[list[int]] = []

    read = built.read_prompts

    def noted(ids_BT: torch.Tensor, pixels: torch.Tensor, embeds: None, mask_BT: torch.Tensor) -> object:
        seen.extend(ids[mask.bool()].tolist() for ids, mask in zip(ids_BT, mask_BT, strict=True))
        return read(ids_BT, pixels, embeds, mask_BT)

    monkeypatch.setattr(built, "read_prompts", noted)
    attention_masses(built, made, asked)
    assert seen == [question.prompt.input_ids for question in asked]
    seen.clear()
    monkeypatch.undo()  # pictures embed their prompts, too
    pruned = built.prune_prompts

    def drawn(**inputs: torch.Tensor) -> object:
        seen.append(inputs["input_ids"][0].tolist())
        return pruned(**inputs)

    monkeypatch.setattr(built, "prune_prompts", drawn)
    files = [name for name, _ in draw_questions(built, made, asked, 10)]
    assert {name.split("-")[1] for name in files} == {"s0", "s1", "s2", "s4"}, "samples with one image"
    assert seen == [question.prompt.input_ids for question in asked if len(question.images) == 1]


# ------------------------------------------------------------------------------------------------------------- encoding


def test_scoring_encodes_nothing_again() -> None:
    """What is asked is what was read: no second way to a prompt."""
    built, made, samples = model(), processor(), _samples()
    with counted_encodes() as calls:
        score_model(built, made, _asked(made, samples), SUITE, batch=2)
    assert calls == [len(sample.images) for sample in samples]
