"""What making or indexing a dataset finds out about its samples, so that nothing is passed over uncounted later.

A survey parses every sample as training will, without decoding images: it counts the faulty ones by reason and what is
passed over of the others, and keeps a digest of every image, so that a picture in two splits is found whatever its id.

Shape legend: N images of a split.
"""

from __future__ import annotations

import io
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.data.schema import SampleError, image_members, parse_sample, unread
from pipelines.io.fingerprint import sha256_bytes

Report = dict[str, dict[str, int]]
"""What was found -> how often, by the name of the section: the part of a manifest that is for people."""

LEFT_OUT = "left out"
"""Files and records that became no sample or member."""
FAULTY = "faulty"
"""Samples that training passes over, by reason."""
NOT_READ = "not read"
"""Fields and members that are passed over, by name."""
SHARED = "held-out images that are trained on too"
"""Under another id: by split."""
MOST_NAMES = 50
DIGESTS_NAME = "image-digests.parquet"


class NoSampleError(ValueError):
    """Not one sample of a dataset can be trained; the message counts the reasons and names the first."""


def image_digest(data: bytes) -> int:
    """The first 64 bits of the SHA-256 of an image's bytes: the same picture in other bytes is another one."""
    return int.from_bytes(sha256_bytes(data)[:8], "little")


@dataclass
class Survey:
    """What is known of the samples so far.

    Attributes:
        samples: how many there were.
        faulty: of them, by reason.
        not_read: fields and members of the good ones.
        first_fault: key, reason and detail of the first faulty one.
    """

    samples: int = 0
    faulty: Counter[str] = field(default_factory=Counter)
    not_read: Counter[str] = field(default_factory=Counter)
    first_fault: str = ""
    _images: dict[str, array[int]] = field(default_factory=dict)

    def add(self, split: str, key: str, members: Mapping[str, bytes]) -> None:
        """Look at one sample."""
        self.samples += 1
        try:
            images = parse_sample(key, members).images
            self.not_read.update(unread(members))
        except SampleError as error:
            self.faulty[error.reason] += 1
            self.first_fault = self.first_fault or f"{key}: {error}"
            return
        self._images.setdefault(split, array("Q")).extend(map(image_digest, images))

    def digests(self, split: str) -> NDArray[np.uint64]:
        """Digests of the images of a split, each once, sorted, (N,)."""
        return np.unique(np.frombuffer(self._images.get(split, array("Q")), dtype=np.uint64))

    def require_samples(self, url: str) -> None:
        """Raise NoSampleError where there are samples and none can be trained."""
        if self.samples and self.faulty.total() == self.samples:
            raise NoSampleError(
                f"{url}: none of the {self.samples} samples can be trained, by reason: {dict(self.faulty)}. First: "
                f"{self.first_fault}. docs/data.md says what a sample is"
            )

    def report(self, left_out: Mapping[str, int]) -> Report:
        """What was found, sections without anything left away."""
        common = self.not_read.most_common()
        named = dict(sorted(common[:MOST_NAMES]))
        if rest := sum(count for _, count in common[MOST_NAMES:]):
            named[f"{len(common) - MOST_NAMES} other names"] = rest
        sections = {
            LEFT_OUT: dict(sorted(left_out.items())),
            FAULTY: dict(sorted(self.faulty.items())),
            NOT_READ: named,
        }
        return {name: counts for name, counts in sections.items() if counts}

    def to_parquet(self, splits: Iterable[str]) -> bytes:
        """The digests of the splits as a table (split, digest)."""
        found = [(split, self.digests(split)) for split in splits]
        columns = {
            "split": pa.array([split for split, digests in found for _ in range(len(digests))], pa.string()),
            "digest": pa.array(np.concatenate([np.zeros(0, np.uint64), *(digests for _, digests in found)])),
        }
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns), buffer, compression="zstd")
        return buffer.getvalue()


def digests_from_parquet(data: bytes, split: str) -> NDArray[np.uint64]:
    """The digests of a split that `to_parquet` gave, sorted, (N,)."""
    table = pq.read_table(io.BytesIO(data), filters=[("split", "=", split)])
    return np.sort(table["digest"].to_numpy())


def shared(some: NDArray[np.uint64], others: NDArray[np.uint64]) -> int:
    """How many digests are in both."""
    return len(np.intersect1d(some, others, assume_unique=True))


def is_among(data: bytes, digests: NDArray[np.uint64]) -> bool:
    """Whether the digest of an image is among sorted ones."""
    digest = np.uint64(image_digest(data))
    place = int(np.searchsorted(digests, digest))
    return place < len(digests) and bool(digests[place] == digest)


def images_of(members: Mapping[str, bytes]) -> list[bytes]:
    """The images of a sample that may be faulty."""
    try:
        return [members[name] for name in image_members(tuple(members))]
    except SampleError:
        return []


def report_lines(report: Report) -> list[str]:
    """The report for people, a line for each section."""
    return [
        f"{name}: {', '.join(f'{count:,} {what}' for what, count in counts.items())}" for name, counts in report.items()
    ]
