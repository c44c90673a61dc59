"""Samples of more tokens than allowed: truncated by whole exchanges, dropped or refused, and never uncounted."""

import io
from functools import cache
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from meteor_model.chat import IGNORE_INDEX, TEMPLATES
from meteor_model.image_processing_meteor import MeteorImageProcessor
from meteor_model.processing_meteor import MeteorProcessor
from meteor_model.tokenizer import train_tokenizer
from pipelines.checkpoint.state import TOO_LONG
from pipelines.config.settings import DataSettings
from pipelines.data.length import SampleTooLongError, TooLong, fit
from pipelines.data.sample_id import SampleId
from pipelines.data.schema import REASONS, SampleError, Turn, build_members
from pipelines.data.stream import RowEncoder

IMAGE_TOKENS = 6
WORDS = ["a", "cat", "sat on", "the mat", "where?", "here it is, as far as one can see"]


@cache
def processor(template: str = "short") -> MeteorProcessor:
    tokenizer = train_tokenizer(WORDS, 300)
    return MeteorProcessor(MeteorImageProcessor(16), tokenizer, IMAGE_TOKENS, template=template)


def encoded(turns: tuple[Turn, ...], template: str = "short") -> Any:
    images = sum(turn.text.count("<image>") for turn in turns)
    return processor(template).encode([(turn.role, turn.text) for turn in turns], images)


texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map(" ".join)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Turn, ...]:
    turns = [Turn("system", draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 5))):
        turns += [Turn("user", "<image>" * draw(st.integers(0, 2)) + draw(texts)), Turn("assistant", draw(texts))]
    return tuple(turns)


@settings(deadline=None, max_examples=200)
@given(conversations(), st.integers(1, 150), st.sampled_from(sorted(set(TEMPLATES) - {"chatml"})))
def test_what_fits_is_the_longest_beginning_of_whole_exchanges(
    turns: tuple[Turn, ...], limit: int, template: str
) -> None:
    """And where that is none, the first exchange with its reply cut: never a question, never a visual token."""
    ends = [position + 1 for position, turn in enumerate(turns) if turn.role == "assistant"]
    parts = [encoded(turns[:end], template) for end in ends]
    images = [sum(turn.text.count("<image>") for turn in turns[:end]) for end in ends]
    whole = len(parts[-1].input_ids)
    fitting = [number for number, part in enumerate(parts) if len(part.input_ids) <= limit]
    if all(label == IGNORE_INDEX for label in parts[0].labels[1:limit]):
        with pytest.raises(SampleError, match=rf"^too_long: {whole} tokens, the limit is {limit}") as refused:
            fit(turns, images[-1], processor(template).encode, limit, "truncate")
        assert refused.value.reason == "too_long"
        return
    found = fit(turns, images[-1], processor(template).encode, limit, "truncate")
    assert found.cut == whole - len(found.input_ids)
    assert found.input_ids.count(processor(template).image_token_id) == found.num_images * IMAGE_TOKENS
    if fitting:
        assert (found.input_ids, found.labels) == parts[fitting[-1]][:2]
        assert found.num_images == images[fitting[-1]]
    else:
        assert (found.input_ids, found.labels) == (parts[0].input_ids[:limit], parts[0].labels[:limit])
        assert (len(found.input_ids), found.num_images) == (limit, images[0])
        assert found.labels[-1] != IGNORE_INDEX or len(parts[0].labels) - limit < 3, "it ends within the reply"
    assert any(label != IGNORE_INDEX for label in found.labels[1:])


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(buffer, "JPEG")
    return buffer.getvalue()


def members(*turns: tuple[str, str], images: int = 1) -> dict[str, bytes]:
    record = {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]}
    return build_members(record, [("jpg", jpeg())] * images)


PLACE = SampleId(0, 0, 3, 4, "k7")
SHORT = members(("human", "<image>where?"), ("gpt", "the mat"))
TWO = members(
    ("human", "<image>where?"), ("gpt", "the mat"), ("human", "<image>" + "a cat " * 20), ("gpt", "here"), images=2
)
ONE_LONG = members(("human", "<image>where?"), ("gpt", "here it is " * 30))
NO_ROOM = members(("human", "<image>" + "a cat " * 90), ("gpt", "here"))


def row(sample: dict[str, bytes], too_long: TooLong, limit: int = 40) -> Any:
    return RowEncoder(processor, 0, limit, too_long)(5, PLACE, sample)


def test_each_policy_and_what_it_counts() -> None:
    for policy in get_args(TooLong):
        whole = row(SHORT, policy)
        assert (whole.reason, whole.cut, whole.num_images) == ("", 0, 1)
    cut = row(TWO, "truncate")
    assert (cut.reason, cut.num_images, cut.input_ids) == ("", 1, whole.input_ids)
    assert cut.cut > 40
    shortened = row(ONE_LONG, "truncate")
    assert (len(shortened.input_ids), shortened.num_images, shortened.reason) == (40, 1, "")
    assert processor().tokenizer.eos_token_id not in shortened.input_ids, "nobody learns to stop where it was cut"
    for sample in (TWO, ONE_LONG, NO_ROOM):
        dropped = row(sample, "drop")
        assert (dropped.reason, dropped.cut, dropped.num_images) == ("too_long", 0, 0)
        with pytest.raises(
            SampleTooLongError, match=r"^sample 'k7' \(dataset 0, epoch 0, shard 3, index 4\) has \d+ tok"
        ):
            row(sample, "fail")
    assert row(NO_ROOM, "truncate").detail.endswith("the limit is 40, and the first question alone needs as many")


def test_images_of_what_does_not_fit_are_not_decoded() -> None:
    broken = {**TWO, "1.jpg": b"no image at all"}
    assert row(broken, "truncate").reason == ""
    assert row(broken, "truncate", limit=400).reason == "undecodable_image"
    assert row({**NO_ROOM, "jpg": b"no image at all"}, "truncate").reason == "too_long"


def test_one_name_for_one_thing() -> None:
    assert TOO_LONG in REASONS
    assert get_type_hints(DataSettings)["too_long"] == TooLong
