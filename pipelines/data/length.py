"""What becomes of a sample of more tokens than `data.max_length`: its length is no fault of it.

Whole exchanges (a question and its reply) go from the end, with their images, until the rest fits. Where not even the
first one fits, its reply is cut at the limit, and with it goes the end token, so that nobody learns to stop there. A
question is never cut, nor is a visual token: where the first question alone is too long, nothing can be trained.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from meteor_model.chat import IGNORE_INDEX, IMAGE_PLACEHOLDER
from pipelines.data.schema import SampleError, Turn

TooLong = Literal["truncate", "drop", "fail"]

Encode = Callable[[Sequence[tuple[str, str]], int], Any]
"""(role, text) turns and their number of images -> an object with `input_ids` and `labels`, lists of equal length."""


class SampleTooLongError(ValueError):
    """A sample is longer than `data.max_length`, and `data.too_long` is fail; the message names it."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """A conversation, or what of it fits.

    Attributes:
        input_ids: at most as many as the limit.
        labels: as many.
        num_images: the first so many images of the sample.
        cut: tokens of the sample that were left out; 0 of a whole one.
    """

    input_ids: list[int]
    labels: list[int]
    num_images: int
    cut: int


def fit(turns: Sequence[Turn], num_images: int, encode: Encode, max_length: int, too_long: TooLong) -> Fitted:
    """The tokens of a sample, at most `max_length`.

    Raises:
        SampleError: too_long; under "drop", or where nothing can be trained within the limit.
        SampleTooLongError: under "fail".
    """
    whole = encode([(turn.role, turn.text) for turn in turns], num_images)
    length = len(whole.input_ids)
    if length <= max_length:
        return Fitted(whole.input_ids, whole.labels, num_images, 0)
    found = f"{length} tokens, the limit is {max_length}"
    if too_long == "fail":
        raise SampleTooLongError(f"{found} (data.max_length): raise it, or set data.too_long to truncate or drop")
    if too_long == "drop":
        raise SampleError("too_long", found)
    fitted = _truncated(turns, encode, max_length, length)
    if fitted is None:
        raise SampleError("too_long", f"{found}, and the first question alone needs as many")
    return fitted


def _truncated(turns: Sequence[Turn], encode: Encode, max_length: int, length: int) -> Fitted | None:
    ends = [position + 1 for position, turn in enumerate(turns) if turn.role == "assistant"]

    def first(exchanges: int) -> Fitted:
        kept = [(turn.role, turn.text) for turn in turns[: ends[exchanges - 1]]]
        images = sum(text.count(IMAGE_PLACEHOLDER) for _, text in kept)
        part = encode(kept, images)
        return Fitted(part.input_ids, part.labels, images, length - len(part.input_ids))

    best, fits, exceeds = first(1), 1, len(ends)
    if len(best.input_ids) > max_length:
        labels = best.labels[:max_length]
        if all(label == IGNORE_INDEX for label in labels[1:]):  # the loss predicts from the token before
            return None
        return Fitted(best.input_ids[:max_length], labels, best.num_images, length - max_length)
    while exceeds - fits > 1:
        middle = (fits + exceeds) // 2
        part = first(middle)
        if len(part.input_ids) <= max_length:
            best, fits = part, middle
        else:
            exceeds = middle
    return best
