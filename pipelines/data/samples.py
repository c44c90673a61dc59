"""Parsed samples outside of training: what can be used, and a count by reason of what cannot.

Training keeps faulty samples as rows of its stream (`pipelines.data.stream`). Everything else that reads samples reads
them here, so that none is left out unseen.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

from pipelines.data import shards
from pipelines.data.schema import RawSample, SampleError, parse_sample

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SampleFault:
    """Why a sample cannot be used.

    Attributes:
        reason: one of `pipelines.data.schema.REASONS`.
        detail: what was found.
    """

    reason: str
    detail: str


def try_sample(key: str, members: Mapping[str, bytes], use: Callable[[RawSample], T]) -> T | SampleFault:
    """What `use` makes of a sample, or the fault that parsing it or `use` has found.

    Args:
        key: of the sample.
        members: its files by extension.
        use: may decode images; whatever else it raises is raised.
    """
    from meteor_model.images import ImageError  # here, so that processes which only read never load torch

    try:
        return use(parse_sample(key, members))
    except (SampleError, ImageError) as fault:
        return SampleFault(fault.reason, fault.detail)


class SampleReader(Generic[T]):
    """What `use` makes of the samples of a split, shard by shard.

    Args:
        manifest: of the dataset.
        split: of it.
        use: the part of a sample that is wanted.

    Attributes:
        skipped: faulty samples that were passed over so far, by reason.
    """

    def __init__(self, manifest: shards.Manifest, split: str, use: Callable[[RawSample], T]) -> None:
        self.skipped: Counter[str] = Counter()
        self._manifest = manifest
        self._split = split
        self._use = use

    def __iter__(self) -> Iterator[T]:
        """From the first shard on. Raises ShardError, StorageError."""
        for info in self._manifest.split(self._split):
            for key, members in shards.read_shard(self._manifest.url, info):
                found = try_sample(key, members, self._use)
                if isinstance(found, SampleFault):
                    self.skipped[found.reason] += 1
                else:
                    yield found

    def take(self, count: int, where: Callable[[T], bool] = lambda item: True) -> list[T]:
        """The first `count` that fulfil `where`; a warning counts the faulty samples before the last of them."""
        items = list(islice(filter(where, self), count))
        self.warn()
        return items

    def warn(self) -> None:
        """Say in the log what was passed over; nothing where that is nothing."""
        if self.skipped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()))
            logger.warning("split %r of %s: faulty samples passed over: %s", self._split, self._manifest.url, reasons)
