"""Questions of a split: what suites, lambda and pictures are made of, each as training has encoded it.

A question is a reply of a sample and all that stands before it: the system turn, earlier turns with the replies that
the data gives them, images where they stand. What is asked of a model is `MeteorProcessor.encode_questions`, cut out of
the ids that training has of the same sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from meteor_model.chat import IMAGE_PLACEHOLDER
from meteor_model.processing_meteor import MeteorProcessor
from meteor_model.turn_encoder import Encoded
from pipelines.data import shards
from pipelines.data.samples import SampleReader
from pipelines.data.schema import RawSample
from pipelines.evaluation.scores import TEXT_ONLY, Replies
from pipelines.io.fingerprint import sha256

BATCH = 16
TOO_LONG = "too_long"
"""Reason of a question that does not fit the model's positions. Beside `TEXT_ONLY` there are those of a sample that
cannot be read (`pipelines.data.schema.REASONS`)."""


@dataclass(frozen=True)
class Question:
    """One reply of a sample, to be asked for.

    Attributes:
        key: of the sample, then `#` and which of its replies, from 0: unique in a split.
        text: words of the turn that is answered, for people.
        expected: the reply.
        prompt: ids up to the reply, as training has them.
        answer_ids: those of the reply that training supervises, its end token too.
        images: encoded, those that stand in the prompt.
        turns: before the reply.
        group: equal for the questions of a suite that share an image, directly or by others between them.
    """

    key: str
    text: str
    expected: str
    prompt: Encoded
    answer_ids: list[int]
    images: tuple[bytes, ...]
    turns: tuple[tuple[str, str], ...]
    group: str = ""

    @property
    def sample(self) -> str:
        """Key of the sample alone."""
        return self.key.rpartition("#")[0]

    def encoded_by(self, processor: MeteorProcessor) -> Question:
        """The same question for a processor of another pruning, which writes another number of placeholders."""
        turns = [*self.turns, ("assistant", self.expected)]
        asked = processor.encode_questions(turns, len(self.images))[-1]
        return replace(self, prompt=asked.prompt, answer_ids=asked.answer_ids)

    @property
    def length(self) -> int:
        """Tokens of prompt and expected answer."""
        return len(self.prompt.input_ids) + len(self.answer_ids)


@dataclass(frozen=True)
class Questions:
    """Questions that can be asked, and what was left out on the way to the last of them.

    Attributes:
        asked: in manifest order, those of a sample in the order of its turns.
        left_out: by reason, questions without an image or too long for the model; a sample that cannot be read counts
            once.
    """

    asked: tuple[Question, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)


def questions_of(sample: RawSample, processor: MeteorProcessor, replies: Replies = "all") -> list[Question]:
    """The questions of a sample: one a reply, or the first alone."""
    turns = tuple(sample.conversation)
    found = [
        Question(
            f"{sample.key}#{number}",
            turns[asked.place - 1][1].replace(IMAGE_PLACEHOLDER, "").strip(),
            turns[asked.place][1],
            asked.prompt,
            asked.answer_ids,
            sample.images[: asked.num_images],
            turns[: asked.place],
        )
        for number, asked in enumerate(processor.encode_questions(turns, len(sample.images)))
    ]
    return found[:1] if replies == "first" else found


def read_questions(
    manifest: shards.Manifest,
    split: str,
    processor: MeteorProcessor,
    count: int,
    *,
    positions: int,
    replies: Replies = "all",
) -> Questions:
    """The first `count` questions of a split that can be asked; fewer where it has fewer.

    Args:
        manifest: of the dataset.
        split: of it.
        processor: of the model that is asked.
        count: of questions.
        positions: of the model; a prompt that does not fit them with its answer is left out.
        replies: every reply of a sample is a question, or the first alone.

    Raises:
        ShardError: a shard that is missing or damaged.
        StorageError: where it cannot be read.
    """

    def decoded(sample: RawSample) -> RawSample:
        for image in sample.images:
            processor.load_image(image)
        return sample

    reader = SampleReader(manifest, split, decoded)
    asked: list[Question] = []
    left_out: Counter[str] = Counter()
    for question in _all_questions(reader, processor, replies):
        if not question.images:
            left_out[TEXT_ONLY] += 1
        elif question.length > positions:
            left_out[TOO_LONG] += 1
        else:
            asked.append(question)
            if len(asked) == count:
                break
    return Questions(grouped(asked), dict(sorted((left_out + reader.skipped).items())))


def _all_questions(reader: SampleReader[RawSample], processor: MeteorProcessor, replies: Replies) -> Iterator[Question]:
    for sample in reader:
        yield from questions_of(sample, processor, replies)


def grouped(questions: Sequence[Question]) -> tuple[Question, ...]:
    """The questions with their groups: those of one image are no independent draws of a score."""
    digests = [[sha256(image)[:12] for image in question.images] for question in questions]
    parent = {digest: digest for shown in digests for digest in shown}

    def root(digest: str) -> str:
        while parent[digest] != digest:
            parent[digest] = parent[parent[digest]]
            digest = parent[digest]
        return digest

    for shown in digests:
        for digest in shown[1:]:
            low, high = sorted((root(shown[0]), root(digest)))
            parent[high] = low
    return tuple(
        replace(question, group=root(shown[0]) if shown else "")
        for question, shown in zip(questions, digests, strict=True)
    )
