"""Requests from outside to answers: one format, one set of limits, whoever serves the model.

1. `Budget.of`      parameters of a request: longest answer, most visual tokens
2. `read_rows`      rows with a prompt and an image in base64 -> questions; what is wrong is named by its row. Headers
                    are read first (`open_rows`), so that limits speak before anything is decoded (`decode_rows`)
3. `Answerer`       questions of equal budget -> answers, in one batch. What stage 3 decides lives in that batch's own
                    cache, so requests at the same time, with other budgets, do not meet
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from meteor_model.chat import IMAGE_PLACEHOLDER
from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.decoder.cache import MeteorCache
from meteor_model.foreign import SHOWN_DETAIL, quoted, shown
from meteor_model.images import ImageError, OpenedImage, open_image
from meteor_model.limits import RequestLimits
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from meteor_model.turn_encoder import Encoded

DEFAULT_NEW_TOKENS = 32
ROWS_PER_BATCH = 32


class RequestError(ValueError):
    """A request that cannot be served as it is; the message says which row or parameter, and what is allowed.

    It is bounded: it holds words of the request.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shown(message, SHOWN_DETAIL))


@dataclass(frozen=True)
class Budget:
    """What one request may spend.

    Attributes:
        max_new_tokens: longest answer, in tokens.
        visual_tokens: most visual tokens that stage 3 keeps of a row: K = min(visual_tokens, what lambda
            gives the row). It lowers a count and never raises one. None: lambda alone.
    """

    max_new_tokens: int = DEFAULT_NEW_TOKENS
    visual_tokens: int | None = None

    @classmethod
    def of(cls, parameters: Mapping[str, Any], config: MeteorConfig) -> Budget:
        """From a request's parameters, checked against the model.

        Raises:
            RequestError: for an unknown parameter, one that is no whole number, one out of its range, or
                `visual_tokens` on a model whose stage 3 does not act.
        """
        unknown = sorted(set(parameters) - {"max_new_tokens", "visual_tokens"})
        if unknown:
            raise RequestError(f"parameter {shown(unknown[0])} is unknown; there are max_new_tokens and visual_tokens")
        given = parameters.get("max_new_tokens")
        longest = config.text_config.max_position_embeddings
        new_tokens = DEFAULT_NEW_TOKENS if given is None else _whole("max_new_tokens", given)
        if not 1 <= new_tokens <= longest:
            raise RequestError(f"max_new_tokens is {quoted(new_tokens)}; it must be in 1..{longest}")
        most = parameters.get("visual_tokens")
        if most is None:
            return cls(new_tokens)
        decode = config.pruning.decode
        if not decode.acts:
            raise RequestError("visual_tokens cannot be set: this model prunes nothing in the LLM; leave it out")
        least, all_of_them = min(decode.k_min, config.tokens_per_image), config.tokens_per_image
        if not least <= _whole("visual_tokens", most) <= all_of_them:
            raise RequestError(f"visual_tokens is {quoted(most)}; it must be in {least}..{all_of_them}")
        return cls(new_tokens, int(most))


def _whole(name: str, value: Any) -> int:
    """Raises RequestError for anything but a whole number; numpy's integers are some."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise RequestError(f"{name} must be a whole number, got {quoted(value)}")
    return int(value)


@dataclass(frozen=True)
class Question:
    """A prompt, encoded once, and its images.

    Attributes:
        encoded: token ids, with the placeholders of the images.
        images: each (3, S, S) uint8.
    """

    encoded: Encoded
    images: list[torch.Tensor]

    @classmethod
    def of(cls, prompt: str, processor: MeteorProcessor, images: Sequence[torch.Tensor] = ()) -> Question:
        """A question; `<image>` in the prompt says where the images stand, or they lead.

        Raises:
            ValueError: where the prompt places another number of images, or is rendered by a template already.
        """
        return cls(processor.encode_question(prompt, len(images)), list(images))

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.encoded.input_ids)


@dataclass(frozen=True)
class Answer:
    """The greedy answer, and the visual tokens of its prompt that the upper layers of the LLM saw."""

    text: str
    visual_tokens: int


@dataclass(frozen=True)
class OpenedRow:
    """A row of a request, checked, its image not decoded.

    Attributes:
        prompt: the question.
        image: what it is about, if anything.
    """

    prompt: str
    image: OpenedImage | None


def read_rows(
    rows: Sequence[Mapping[str, Any]],
    processor: MeteorProcessor,
    limits: RequestLimits = RequestLimits(),  # noqa: B008 - frozen
) -> list[Question]:
    """The questions of a request: `open_rows`, then `decode_rows`."""
    return decode_rows(open_rows(rows, limits), processor)


def open_rows(
    rows: Sequence[Mapping[str, Any]],
    limits: RequestLimits = RequestLimits(),  # noqa: B008 - frozen
) -> list[OpenedRow]:
    """Check the rows of a request, and read the headers of its images.

    Args:
        rows: mappings with `prompt` and perhaps `image`: an image file (JPEG, PNG, WebP, GIF) in base64; an empty or
            missing one asks the language model alone.
        limits: the most that is accepted.

    Raises:
        RequestError: naming the row and what is wrong with it; also for what is above the limits.
    """
    if not 1 <= len(rows) <= limits.rows:
        raise RequestError(
            f"the request has {len(rows)} rows; 1..{limits.rows} are allowed, send more in several requests"
        )
    most = (limits.image_bytes + 2) // 3 * 4
    encoded = [_encoded_image(index, row, most) for index, row in enumerate(rows)]
    if sum(map(len, encoded)) > most:
        raise RequestError(
            f"the images of the request have {sum(map(len, encoded))} base64 characters, the limit is {most}: send "
            "them in several requests"
        )
    opened = [
        _open_row(index, row, image, limits) for index, (row, image) in enumerate(zip(rows, encoded, strict=True))
    ]
    if num_characters(opened) > limits.all_characters:
        raise RequestError(
            f"the prompts of the request have {num_characters(opened)} characters, the limit is "
            f"{limits.all_characters}: send them in several requests"
        )
    if num_pixels(opened) > limits.pixels:
        raise RequestError(
            f"the images of the request have {num_pixels(opened)} pixels, the limit is {limits.pixels}: send them in "
            "several requests, or smaller"
        )
    return opened


def num_pixels(rows: Sequence[OpenedRow]) -> int:
    """Pixels of all images: what decoding them costs goes by that."""
    return sum(row.image.num_pixels for row in rows if row.image is not None)


def num_characters(rows: Sequence[OpenedRow]) -> int:
    """Characters of all prompts: what tokenizing them costs goes by that."""
    return sum(len(row.prompt) for row in rows)


def decode_rows(
    rows: Sequence[OpenedRow], processor: MeteorProcessor, check: Callable[[], None] = lambda: None
) -> list[Question]:
    """The questions of checked rows.

    Args:
        rows: of `open_rows`.
        processor: encodes the prompts.
        check: called before each row; what it raises ends the work.

    Raises:
        RequestError: naming the row whose image cannot be decoded, or whose prompt cannot be encoded.
    """
    questions = []
    for index, row in enumerate(rows):
        check()
        with _named_image(index):
            images = [] if row.image is None else [row.image.decode(processor.image_size)]
        try:
            questions.append(Question.of(row.prompt, processor, images))
        except ValueError as error:
            raise RequestError(f"row {index}: {error}") from None
    return questions


def _encoded_image(index: int, row: Mapping[str, Any], most: int) -> str:
    unknown = sorted(str(name) for name in row if name not in ("prompt", "image"))
    if unknown:
        raise RequestError(f"row {index}: column {quoted(unknown[0])} is unknown; there are `prompt` and `image`")
    image = row.get("image")
    if image is None or (isinstance(image, float) and image != image):  # NaN is how pandas says None
        return ""
    if not isinstance(image, str):
        raise RequestError(f"row {index}: image must be a base64 string, got {type(image).__name__}")
    if len(image) > most:
        raise RequestError(f"row {index}: image has {len(image)} base64 characters, the limit is {most}")
    return image


def _open_row(index: int, row: Mapping[str, Any], encoded: str, limits: RequestLimits) -> OpenedRow:
    prompt = row.get("prompt")
    if not isinstance(prompt, str):
        raise RequestError(f"row {index}: prompt must be a string, got {type(prompt).__name__}")
    if len(prompt) > limits.characters:
        raise RequestError(f"row {index}: prompt has {len(prompt)} characters, the limit is {limits.characters}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"row {index}: prompt is not valid Unicode: {error.reason}") from None
    written = prompt.count(IMAGE_PLACEHOLDER)
    if written not in (0, int(bool(encoded))):
        raise RequestError(
            f"row {index}: the prompt has {written} {IMAGE_PLACEHOLDER} placeholders, the row "
            f"{int(bool(encoded))} images"
        )
    if not encoded and not prompt:
        raise RequestError(f"row {index}: there is neither an image nor a prompt")
    return OpenedRow(prompt, _open_image(index, encoded, limits) if encoded else None)


def _open_image(index: int, encoded: str, limits: RequestLimits) -> OpenedImage:
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"row {index}: image is no base64 text: {error}") from None
    with _named_image(index):
        return open_image(data, limits.image)


@contextmanager
def _named_image(index: int) -> Iterator[None]:
    try:
        yield
    except ImageError as error:
        raise RequestError(f"row {index}: image cannot be used: {error}") from None


class Answerer:
    """A model and its processor that answer questions, greedily, with the prunings of the model's configuration.

    Nothing of a request stays on the model; several threads may ask.

    Args:
        model: in eval mode, on its device.
        processor: its own.
    """

    def __init__(self, model: MeteorForConditionalGeneration, processor: MeteorProcessor) -> None:
        self.model = model
        self.processor = processor

    def budget(self, parameters: Mapping[str, Any]) -> Budget:
        """A request's budget. Raises RequestError."""
        return Budget.of(parameters, self.model.config)

    def require_room(self, questions: Sequence[Question], budget: Budget) -> None:
        """Raise RequestError, naming the row, where prompt and answer are longer than the model's positions."""
        longest = self.model.config.text_config.max_position_embeddings
        for index, question in enumerate(questions):
            if question.length + budget.max_new_tokens > longest:
                raise RequestError(
                    f"row {index}: the prompt has {question.length} tokens and max_new_tokens is "
                    f"{budget.max_new_tokens}, together over the model's {longest}: shorten one of them"
                )

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question], budget: Budget) -> list[Answer]:
        """The answers, from left-padded batches of at most ROWS_PER_BATCH.

        Raises:
            RequestError: where a question does not fit the model's positions.
        """
        self.require_room(questions, budget)
        answers: list[Answer] = []
        for start in range(0, len(questions), ROWS_PER_BATCH):
            answers += self._answer(questions[start : start + ROWS_PER_BATCH], budget)
        return answers

    def _answer(self, questions: Sequence[Question], budget: Budget) -> list[Answer]:
        model, tokenizer = self.model, self.processor.tokenizer
        batch = self.processor.batch_prompts([q.encoded for q in questions], [q.images for q in questions])
        batch = batch.to(model.device)
        cache = model.new_cache(budget.visual_tokens) or DynamicCache(config=model.config.text_config)
        output_ids = model.generate(
            **batch,
            past_key_values=cache,
            max_new_tokens=budget.max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        kept_B = (batch["input_ids"] == model.config.image_token_id).sum(dim=1)
        if isinstance(cache, MeteorCache):
            assert cache.decision is not None, "prefill decides"
            kept_B = cache.decision.kept_counts_B
        prompt_length = batch["input_ids"].shape[1]
        texts = [self.processor.decode(ids[prompt_length:]) for ids in output_ids]
        return [Answer(text, kept) for text, kept in zip(texts, kept_B.tolist(), strict=True)]
