"""The samples of `make bench-train`, decoded beforehand: an image and a text of its own length each, from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import ray.data

from meteor_model.architectures import architecture
from pipelines.data.blocks import block_of, rows_to_table
from pipelines.data.ledger import Ledger
from pipelines.data.ray_data import configure
from pipelines.data.sample_id import SampleId, SampleIds
from pipelines.data.schema import Row

PAD, IMAGE, FIRST_WORD = 0, 3, 4
VOCABULARY = 512
TEXT_TOKENS = (8, 40)
"""Tokens of the shortest and the longest text."""
LEARNED = 6
"""Tokens at the end of a text that are learned."""


@dataclass(frozen=True)
class Plan:
    """So many samples of one shard, in their order, once."""

    total_rows: int

    @property
    def total_samples(self) -> int:
        """All of them."""
        return self.total_rows

    @property
    def sizes(self) -> list[list[int]]:
        """Of the shard."""
        return [[self.total_rows]]

    def consumed(self, rows: int) -> Ledger:
        """The first of them."""
        ledger, index = Ledger(self.sizes), np.arange(rows)
        ledger.add(SampleIds(np.zeros_like(index), np.zeros_like(index), np.zeros_like(index), index))
        return ledger


def sample(place: int, visual_tokens: int) -> Row:
    """Sample number `place`."""
    random, size = np.random.default_rng(place), architecture("tiny").image_size
    text = random.integers(FIRST_WORD, VOCABULARY, random.integers(*TEXT_TOKENS, endpoint=True))
    ids = [*[IMAGE] * visual_tokens, *text.tolist()]
    labels = [*[-100] * (len(ids) - LEARNED), *ids[-LEARNED:]]
    pixels = random.integers(0, 256, 3 * size**2, dtype=np.uint8).tobytes()
    return Row(place, SampleId(0, 0, 0, place, str(place)), "", "", ids, labels, pixels, 1, size)


@cache
def samples(count: int, visual_tokens: int) -> Sequence[Row]:
    """The first `count` samples."""
    return [sample(place, visual_tokens) for place in range(count)]


def stream(count: int, visual_tokens: int, micro_batch: int, start: int = 0) -> ray.data.Dataset:
    """The samples from `start` on as blocks in the object store, a micro-batch each: no task reads or decodes."""
    rows = samples(count, visual_tokens)
    blocks = [block_of(rows_to_table(rows[cut : cut + micro_batch])) for cut in range(start, count, micro_batch)]
    return configure(ray.data.from_arrow(blocks), ordered=True)
