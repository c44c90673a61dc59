"""A suite: a fixed set of questions, known by its digest. Scores on one suite may be compared.

Imports no torch: the registry files and compares scores without a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.data import shards
from pipelines.data.schema import RawSample
from pipelines.evaluation.scores import ScoringError
from pipelines.io.fingerprint import sha256_of_json

if TYPE_CHECKING:
    from meteor_model.processing_meteor import MeteorProcessor


@dataclass(frozen=True)
class Suite:
    """Which questions: the first one of each of the first `questions` samples with readable images of a split.

    Attributes:
        manifest: address of the manifest of the shards.
        sha256: the manifest's own hash, which covers the hashes of all shards.
        split: of the manifest.
        questions: how many.
    """

    manifest: str
    sha256: str
    split: str
    questions: int

    def __post_init__(self) -> None:
        if self.questions < 1:
            raise ScoringError(f"a suite of {self.questions} questions scores nothing; it needs at least 1")

    @classmethod
    def of(cls, manifest: shards.Manifest, split: str, questions: int) -> Suite:
        """The suite of a manifest that is loaded."""
        return cls(manifest.url, manifest.sha256, split, questions)

    @property
    def digest(self) -> str:
        """Short hash of the questions: scores with one digest may be compared. The manifest's address is no part."""
        identity = {"sha256": self.sha256, "split": self.split, "questions": self.questions}
        return sha256_of_json(identity)[:12]

    def load(self, processor: MeteorProcessor) -> list[RawSample]:
        """The samples, read and checked against the manifest.

        Raises:
            ScoringError: where the manifest is not the suite's, or the split has fewer samples that can be asked.
            ShardError: a shard that is missing or damaged.
        """
        from pipelines.evaluation.samples import samples_with_images  # here: it loads torch

        manifest = shards.load_manifest(self.manifest)
        if manifest.sha256 != self.sha256:
            raise ScoringError(
                f"{manifest.url} has SHA-256 {manifest.sha256[:12]}, the suite was made of {self.sha256[:12]}: other "
                "data gives other questions; restore it, or score everything anew"
            )
        samples = samples_with_images(manifest, self.split, processor, self.questions)
        if len(samples) < self.questions:
            raise ScoringError(
                f"split {self.split!r} of {manifest.url} has {len(samples)} samples with readable images, the suite "
                f"asks {self.questions}: take fewer questions"
            )
        return samples
