"""Questions of a split: what suites, lambda and pictures are made of, each as training has encoded it.

A question is a reply of a sample and all that stands before it: the system turn, earlier turns with the replies that
the data gives them, images where they stand. What is asked of a model is `MeteorProcessor.encode_questions`, cut out of
the ids that training has of the same sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from meteor_model.chat import IMAGE_PLACEHOLDER
from meteor_model.processing_meteor import MeteorProcessor
from meteor_model.turn_encoder import Encoded
from pipelines.data import shards
from pipelines.data.samples import SampleFault, try_sample
from pipelines.data.schema import RawSample
from pipelines.evaluation.groups import Part
from pipelines.evaluation.sampling import Reply, drawn, find_replies, of_part, spread_shards
from pipelines.evaluation.scores import TEXT_ONLY, Replies
from pipelines.io.fingerprint import sha256_of_json

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
        group: of the questions that are no independent draws (`pipelines.evaluation.groups`).
        tags: what the data says that it is about.
    """

    key: str
    text: str
    expected: str
    prompt: Encoded
    answer_ids: list[int]
    images: tuple[bytes, ...]
    turns: tuple[tuple[str, str], ...]
    group: str = ""
    tags: tuple[str, ...] = ()

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

    def prompt_digest(self, processor: MeteorProcessor) -> str:
        """Short hash of the prompt's ids, an image counted as one of them: the same under every pruning."""
        token, length = processor.image_token_id, processor.tokens_per_image
        ids, shown = list[int](), 0
        for number in self.prompt.input_ids:
            if number != token or shown % length == 0:
                ids.append(number)
            shown += number == token
        return sha256_of_json(ids)[:12]


@dataclass(frozen=True)
class Questions:
    """Questions that can be asked, and what was left out of those that were drawn.

    Attributes:
        asked: in manifest order, those of a sample in the order of its turns.
        left_out: by reason, questions too long for the model; a sample that cannot be read counts once. `TEXT_ONLY`
            counts the replies of the split that have no image, none of which is ever drawn.
        drawn: how many were drawn; 0 where they were put together by hand.
    """

    asked: tuple[Question, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)
    drawn: int = 0


def questions_of(sample: RawSample, processor: MeteorProcessor, replies: Replies = "all") -> list[Question]:
    """The questions of a sample: one a reply, or the first alone."""
    replied = [turn for turn in sample.turns if turn.role == "assistant"][: 1 if replies == "first" else None]
    conversations = _apart(sample) if sample.apart else [sample.conversation]
    asked = [
        (turns, question)
        for turns in conversations
        for question in processor.encode_questions(turns, len(sample.images))
    ]
    return [
        Question(
            f"{sample.key}#{number}",
            _words(turns[question.place - 1][1]),
            reply.text,
            question.prompt,
            question.answer_ids,
            sample.images[: question.num_images],
            tuple(turns[: question.place]),
            tags=reply.tags,
        )
        for number, (reply, (turns, question)) in enumerate(zip(replied, asked, strict=False))
    ]


def _words(text: str) -> str:
    return text.replace(IMAGE_PLACEHOLDER, "").strip()


def _apart(sample: RawSample) -> list[list[tuple[str, str]]]:
    """A conversation for each reply: the system turn, all images before the question's own turn, and the reply."""
    system, rest = (sample.turns[:1], sample.turns[1:]) if sample.turns[0].role == "system" else ((), sample.turns)
    opening = f"{IMAGE_PLACEHOLDER}\n" * len(sample.images)
    return [
        [
            *((turn.role, turn.text) for turn in system),
            (user.role, opening + _words(user.text)),
            (reply.role, reply.text),
        ]
        for user, reply in zip(rest[::2], rest[1::2], strict=True)
    ]


def read_questions(
    manifest: shards.Manifest,
    split: str,
    processor: MeteorProcessor,
    count: int,
    *,
    positions: int,
    replies: Replies = "all",
    part: Part = "all",
    every: int | None = None,
) -> Questions:
    """A stratified sample of a part of a split; fewer questions where the part has fewer.

    The whole split is read once to find the part, for a group may lie in several shards; its drawn shards are read
    again.

    Args:
        manifest: of the dataset.
        split: of it.
        processor: of the model that is asked.
        count: of questions that are drawn.
        positions: of the model; a prompt that does not fit them with its answer is left out.
        replies: every reply of a sample is a question, or the first alone.
        part: of the split.
        every: every so many-th question of the part from the first on; None spreads `count` over all.

    Raises:
        ShardError: a shard that is missing or damaged.
        StorageError: where it cannot be read.
    """
    found = find_replies(manifest, split, replies)
    chosen = drawn(of_part(found.found, split, part), count, every)
    return _read(manifest, split, processor, chosen, positions, {TEXT_ONLY: found.text_only})


def read_prompts(
    manifest: shards.Manifest, split: str, processor: MeteorProcessor, count: int, *, positions: int
) -> Questions:
    """Questions of a split for what is calibrated on it: evenly spread over MOST_SHARDS of its shards at most.

    Args and Raises: as `read_questions`.
    """
    only = spread_shards(len(manifest.split(split)))
    found = find_replies(manifest, split, only=only)
    return _read(manifest, split, processor, drawn(found.found, count, None), positions, {TEXT_ONLY: found.text_only})


def _read(
    manifest: shards.Manifest,
    split: str,
    processor: MeteorProcessor,
    chosen: Sequence[Reply],
    positions: int,
    left_out: Mapping[str, int],
) -> Questions:
    """The questions of these replies, or why they cannot be asked; a faulty sample counts once."""

    def decoded(sample: RawSample) -> RawSample:
        for image in sample.images:
            processor.load_image(image)
        return sample

    wanted: dict[int, dict[str, list[Reply]]] = {}
    for reply in chosen:
        wanted.setdefault(reply.shard, {}).setdefault(reply.key, []).append(reply)
    infos = manifest.split(split)
    asked: list[Question] = []
    counts = Counter({reason: number for reason, number in left_out.items() if number})
    for shard, by_key in sorted(wanted.items()):
        for key, members in shards.read_shard(manifest.url, infos[shard]):
            if key not in by_key:
                continue
            sample = try_sample(key, members, decoded)
            if isinstance(sample, SampleFault):
                counts[sample.reason] += 1
                continue
            of_sample = questions_of(sample, processor)
            for reply in by_key[key]:
                question = replace(of_sample[reply.number], group=reply.group)
                if question.length > positions:
                    counts[TOO_LONG] += 1
                else:
                    asked.append(question)
    return Questions(tuple(asked), dict(sorted(counts.items())), len(chosen))
