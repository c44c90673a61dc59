"""A rendered conversation as token ids: the text that it is, tokenized once, with the place of every reply."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from meteor_model.chat import (
    IGNORE_INDEX,
    IMAGE_PLACEHOLDER,
    TURN_TOKEN,
    Piece,
    Special,
    Turns,
    content_parts,
    render,
)


class Encoded(NamedTuple):
    """One conversation as token ids, and labels that are IGNORE_INDEX except on replies and their end token.

    Attributes:
        input_ids: tokens, each image as its placeholders.
        labels: as many.
        replies: where each reply begins in them, and where it ends, its end token included.
    """

    input_ids: list[int]
    labels: list[int]
    replies: tuple[tuple[int, int], ...] = ()


class EncodedQuestion(NamedTuple):
    """A reply of a conversation, and what it answers.

    Attributes:
        prompt: the conversation up to the reply, as training encodes it.
        answer_ids: those of the reply that training supervises, its end token too.
        num_images: images in the prompt, the first ones of the conversation.
        place: of the reply among the turns.
    """

    prompt: Encoded
    answer_ids: list[int]
    num_images: int
    place: int


class Tokenizer(Protocol):
    """What is asked of a tokenizer; transformers' are such, and `meteor_model.sample_encoder.LightTokenizer`."""

    @property
    def bos_token(self) -> Any:
        """Beginning of a sequence; None without one."""

    @property
    def eos_token(self) -> Any:
        """End of a sequence, and of a reply."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """Id -> a token that was added, with its `content` and whether it is `special`."""

    def encode(self, text: str, *, add_special_tokens: bool, split_special_tokens: bool = False) -> Any:
        """The ids of a text."""

    def convert_tokens_to_ids(self, tokens: str) -> Any:
        """The id of a token."""


def encode_conversation(
    tokenizer: Tokenizer,
    template: str,
    image_token: str,
    tokens_per_image: int,
    turns: Turns,
    num_images: int,
    add_generation_prompt: bool = False,
    continue_final: bool = False,
) -> Encoded:
    """One conversation -> ids and labels: the one place where they come from.

    Args:
        tokenizer: of the model.
        template: name of the chat template.
        image_token: the placeholder token.
        tokens_per_image: how many of them stand for an image.
        turns: (role, content) pairs; each `<image>` in a string stands for one image, in order.
        num_images: images that come with it.
        add_generation_prompt: end where the model is to answer.
        continue_final: leave the last reply open, for the model to go on with.

    Raises:
        ValueError: on a placeholder count that differs from the images.
    """
    written = sum(content_parts(content).count(Special.IMAGE) for _, content in turns)
    if written != num_images:
        raise ValueError(f"{written} {IMAGE_PLACEHOLDER} placeholders in the conversation, {num_images} images")
    pieces = render(template, turns, add_generation_prompt, continue_final)
    return TurnEncoder(tokenizer, image_token, tokens_per_image).encode(pieces)


class TurnEncoder:
    """Tokenizes one rendered conversation as the text that it is.

    The ids are those that the tokenizer gives the conversation's text (`jinja_template`): what it does at the borders
    of words depends on what stands beside them, and many a tokenizer begins a text with a blank. Two things differ:

    - Words that spell a special token stay words.
    - A reply begins with a token of its own, also where the tokenizer would join its beginning to what stands before.
      So a prompt is always the beginning of what training has seen.

    Args:
        tokenizer: of the model.
        image_token: the placeholder token.
        tokens_per_image: how many of them stand for an image.
    """

    def __init__(self, tokenizer: Tokenizer, image_token: str, tokens_per_image: int) -> None:
        self._tokenizer = tokenizer
        self._tokens_per_image = tokens_per_image
        self._special_words = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._written = {
            Special.BEGIN: tokenizer.bos_token,
            Special.END: tokenizer.eos_token,
            Special.TURN: TURN_TOKEN,
            Special.IMAGE: image_token,
        }
        self._ids: list[int] = []
        self._labels: list[int] = []
        self._in_reply = False
        # The run of text since the last special token: what precedes it, and its words before and in a reply.
        self._before = ""
        self._asked, self._reply = "", ""
        self._asked_ids: list[int] = []

    def encode(self, pieces: Iterable[Piece]) -> Encoded:
        """Ids, labels and replies of the pieces of a conversation."""
        replies: list[tuple[int, int]] = []
        for parts, supervised in pieces:
            if supervised:
                self._begin_reply()
            begin = len(self._ids)
            for part in parts:
                if isinstance(part, Special):
                    self._add_special(part)
                elif self._in_reply:
                    self._reply += part
                else:
                    self._asked += part
            if supervised and parts[-1] is Special.END:  # a reply to go on with has none
                replies.append((begin, len(self._ids)))
                self._in_reply = False
        self._end_run("")
        return Encoded(self._ids, self._labels, tuple(replies))

    def _begin_reply(self) -> None:
        self._asked_ids = self._ids_of(self._before, self._asked, "")
        self._add(self._asked_ids, supervised=False)
        self._in_reply = True

    def _end_run(self, after: str) -> None:
        """Add what is open of the run of text that the special token `after`, or nothing, ends."""
        if not self._in_reply:
            self._add(self._ids_of(self._before, self._asked, after), supervised=False)
        else:
            whole, asked = self._ids_of(self._before, self._asked + self._reply, after), self._asked_ids
            if whole[: len(asked)] == asked:
                self._add(whole[len(asked) :], supervised=True)
            else:
                self._add(self._ids_of(self._tokenizer.eos_token, self._reply, after), supervised=True)
        self._asked, self._asked_ids, self._reply = "", [], ""

    def _add_special(self, part: Special) -> None:
        written = self._written[part]
        if written is None:  # a tokenizer without a beginning of sequence
            return
        self._end_run(written)
        number = self._tokenizer.convert_tokens_to_ids(written)
        if part is Special.IMAGE:
            self._add([number] * self._tokens_per_image, supervised=False)  # seen in a reply, never said
        else:
            self._add([number], supervised=self._in_reply)
        self._before = written

    def _add(self, ids: list[int], supervised: bool) -> None:
        self._ids += ids
        self._labels += ids if supervised else [IGNORE_INDEX] * len(ids)

    def _ids_of(self, before: str, text: str, after: str) -> list[int]:
        """The ids of a text between two special tokens ("": none), which are not among them."""
        if not text:
            return []
        ids: list[int] = self._tokenizer.encode(
            before + text + after, add_special_tokens=False, split_special_tokens=False
        )
        first, last = int(bool(before)), len(ids) - int(bool(after))
        borders = ids[:first] + ids[last:]
        expected = [self._tokenizer.convert_tokens_to_ids(token) for token in (before, after) if token]
        if borders == expected and not any(word in text for word in self._special_words):
            return ids[first:last]
        return self._ids_of_words(text)

    def _ids_of_words(self, text: str) -> list[int]:
        """The ids of a text that spells special tokens, and holds none: they are tokenized as the words they are."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        found = {self._tokenizer.convert_tokens_to_ids(word) for word in self._special_words if word in text}
        if found.isdisjoint(ids):
            return ids
        # A Unigram model finds them in its vocabulary even so: they are cut behind their first character.
        words = "|".join(sorted(map(re.escape, self._special_words), key=len, reverse=True))
        cuts = [match.start() + 1 for match in re.finditer(words, text)]
        pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        return [
            number for piece in pieces if piece for number in self._tokenizer.encode(piece, add_special_tokens=False)
        ]
