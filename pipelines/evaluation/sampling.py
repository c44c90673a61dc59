"""Which replies of a split are asked: every one is found first, then a stratified sample of them is read.

1. `find_replies`  every sample is parsed, no image decoded: its replies about images, with their groups
2. `drawn`         every k-th of one part, in manifest order: each shard gives its share
3. the shards that hold any of them are read again (`pipelines.evaluation.questions`)

A sample that cannot be parsed keeps one place, so that a sample of the split has its share of the faults.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from meteor_model.chat import IMAGE_PLACEHOLDER
from pipelines.data import shards
from pipelines.data.samples import SampleFault, try_sample
from pipelines.data.schema import RawSample
from pipelines.evaluation.groups import Part, components, part_of
from pipelines.evaluation.scores import Replies
from pipelines.io.fingerprint import sha256

MOST_SHARDS = 16
"""Shards that are read for prompts of which no part is asked: a training split may have thousands."""


@dataclass(frozen=True)
class Reply:
    """A reply of a split that has an image before it, or a sample that cannot be parsed.

    Attributes:
        shard: number of the shard in the split.
        key: of the sample.
        number: of the reply in its sample, from 0; 0 of a faulty sample.
        names: of its images and groups; of a faulty sample its key.
        group: see `pipelines.evaluation.groups`.
    """

    shard: int
    key: str
    number: int
    names: tuple[str, ...]
    group: str = ""


@dataclass(frozen=True)
class FoundReplies:
    """What a split holds.

    Attributes:
        found: in manifest order.
        text_only: replies before which there is no image.
    """

    found: tuple[Reply, ...]
    text_only: int


def find_replies(
    manifest: shards.Manifest, split: str, replies: Replies = "all", only: Iterable[int] | None = None
) -> FoundReplies:
    """All replies of a split, or of its shards `only`, with their groups. Raises ShardError, StorageError."""
    infos = manifest.split(split)
    found: list[Reply] = []
    text_only = 0
    for shard in range(len(infos)) if only is None else only:
        for key, members in shards.read_shard(manifest.url, infos[shard]):
            sample = try_sample(key, members, lambda parsed: parsed)
            if isinstance(sample, SampleFault):
                found.append(Reply(shard, key, 0, (f"key:{key}",)))
                continue
            of_sample = _replies_of(shard, sample)[: 1 if replies == "first" else None]
            about_images = [reply for reply in of_sample if reply.names]
            text_only += len(of_sample) - len(about_images)
            found += about_images
    groups = components([reply.names for reply in found])
    return FoundReplies(
        tuple(replace(reply, group=group) for reply, group in zip(found, groups, strict=True)), text_only
    )


def _replies_of(shard: int, sample: RawSample) -> list[Reply]:
    digests = [sha256(image)[:12] for image in sample.images]
    named = [f"group:{name}" for name in sample.groups]
    found: list[Reply] = []
    shown = 0
    for turn in sample.turns:
        shown += turn.text.count(IMAGE_PLACEHOLDER) if turn.role == "user" else 0
        if turn.role == "assistant":
            names = (*digests[: None if sample.apart else shown], *named) if shown else ()
            found.append(Reply(shard, sample.key, len(found), names))
    return found


def of_part(found: Sequence[Reply], split: str, part: Part) -> list[Reply]:
    """The replies of one part of a split."""
    return [reply for reply in found if part in ("all", part_of(reply.group, split))]


def drawn(found: Sequence[Reply], count: int, every: int | None) -> list[Reply]:
    """Every `every`-th reply from the first on, `count` at most; None spreads them evenly over all.

    Fewer where there are fewer.
    """
    if every is not None:
        return list(found[::every][:count])
    count = min(count, len(found))
    return [found[place * len(found) // count] for place in range(count)]


def spread_shards(total: int) -> list[int]:
    """At most MOST_SHARDS shard numbers of `total`, evenly spread."""
    count = min(MOST_SHARDS, total)
    return [place * total // count for place in range(count)]
