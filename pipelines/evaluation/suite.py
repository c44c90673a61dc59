"""A suite: a fixed set of questions, known by its digest. Scores on one suite may be compared.

Imports no torch: the registry files and compares scores without a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.data import shards
from pipelines.evaluation.scores import Replies, ScoringError, counted
from pipelines.io.fingerprint import sha256_of_json

if TYPE_CHECKING:
    from meteor_model.processing_meteor import MeteorProcessor
    from pipelines.evaluation.questions import Questions

ASKED_AS = 2
"""How a question is asked; part of every digest, for scores of questions that were asked in another way say nothing
about these. 1, until 2026-11-30: the first user turn alone, its images moved to the front."""


@dataclass(frozen=True)
class Suite:
    """Which questions: the first `questions` replies of a split that follow a readable image.

    Attributes:
        manifest: address of the manifest of the shards.
        sha256: the manifest's own hash, which covers the hashes of all shards.
        split: of the manifest.
        questions: how many.
        replies: every reply of a sample is a question, or the first alone.
    """

    manifest: str
    sha256: str
    split: str
    questions: int
    replies: Replies = "all"

    def __post_init__(self) -> None:
        if self.questions < 1:
            raise ScoringError(f"a suite of {self.questions} questions scores nothing; it needs at least 1")

    @classmethod
    def of(cls, manifest: shards.Manifest, split: str, questions: int, replies: Replies = "all") -> Suite:
        """The suite of a manifest that is loaded."""
        return cls(manifest.url, manifest.sha256, split, questions, replies)

    @property
    def digest(self) -> str:
        """Short hash of the questions: scores with one digest may be compared. The manifest's address is no part."""
        identity = {
            "sha256": self.sha256,
            "split": self.split,
            "questions": self.questions,
            "replies": self.replies,
            "asked_as": ASKED_AS,
        }
        return sha256_of_json(identity)[:12]

    def load(self, processor: MeteorProcessor, positions: int) -> Questions:
        """The questions, read and checked against the manifest.

        Args:
            processor: of the model that is asked.
            positions: of that model.

        Raises:
            ScoringError: where the manifest is not the suite's, or the split has fewer questions that can be asked.
            ShardError: a shard that is missing or damaged.
        """
        from pipelines.evaluation.questions import read_questions  # here: it loads torch

        manifest = shards.load_manifest(self.manifest)
        if manifest.sha256 != self.sha256:
            raise ScoringError(
                f"{manifest.url} has SHA-256 {manifest.sha256[:12]}, the suite was made of {self.sha256[:12]}: other "
                "data gives other questions; restore it, or score everything anew"
            )
        found = read_questions(
            manifest, self.split, processor, self.questions, positions=positions, replies=self.replies
        )
        if len(found.asked) < self.questions:
            raise ScoringError(
                f"split {self.split!r} of {manifest.url} has {len(found.asked)} questions about readable images (left "
                f"out: {counted(found.left_out)}), the suite asks {self.questions}: take fewer questions"
            )
        return found
