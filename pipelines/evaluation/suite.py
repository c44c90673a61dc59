"""A suite: a fixed set of questions, known by its digest. Scores on one suite may be compared.

Imports no torch: the registry files and compares scores without a model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipelines.data import shards
from pipelines.evaluation.groups import SEARCH_SHARE, Part, split_of_part
from pipelines.evaluation.scorers import Scorer
from pipelines.evaluation.scores import Replies, ScoringError, counted
from pipelines.io.fingerprint import sha256_of_json

if TYPE_CHECKING:
    from meteor_model.processing_meteor import MeteorProcessor
    from pipelines.evaluation.questions import Questions

ASKED_AS = 3
"""How questions are drawn and asked; part of every digest, for scores of questions that were asked in another way say
nothing about these. 1, until 2026-11-30: the first user turn alone, its images moved to the front. 2: the first
questions of a split, in groups by image alone."""


@dataclass(frozen=True)
class Suite:
    """Which questions, and by which scorer their answers are held against the expected ones.

    Attributes:
        manifest: address of the manifest of the shards.
        sha256: the manifest's own hash, which covers the hashes of all shards.
        split: of the manifest.
        questions: how many are drawn.
        part: of the split (`pipelines.evaluation.groups`).
        every: every so many-th question of the part; None spreads them over all.
        replies: every reply of a sample is a question, or the first alone.
        scorer: see `pipelines.evaluation.scorers`.
    """

    manifest: str
    sha256: str
    split: str
    questions: int
    part: Part = "final"
    every: int | None = None
    replies: Replies = "all"
    scorer: Scorer = "exact"

    def __post_init__(self) -> None:
        if self.questions < 1:
            raise ScoringError(f"a suite of {self.questions} questions scores nothing; it needs at least 1")
        if self.every is not None and self.every < 1:
            raise ScoringError(f"every is {self.every}; every 1st is the least (all, from the first on)")

    @classmethod
    def of(
        cls,
        manifest: shards.Manifest,
        split: str,
        questions: int,
        *,
        part: Part = "final",
        every: int | None = None,
        replies: Replies = "all",
        scorer: Scorer = "exact",
    ) -> Suite:
        """The suite of a manifest that is loaded; of a dataset without `split`, the split that is the part."""
        split = split_of_part(manifest.splits, split, part)
        return cls(manifest.url, manifest.sha256, split, questions, part, every, replies, scorer)

    @property
    def digest(self) -> str:
        """Short hash of the questions and their scorer: scores with one digest may be compared.

        The manifest's address is no part.
        """
        identity = {
            "sha256": self.sha256,
            "split": self.split,
            "questions": self.questions,
            "part": self.part,
            "search_share": SEARCH_SHARE,
            "every": self.every,
            "replies": self.replies,
            "scorer": self.scorer,
            "asked_as": ASKED_AS,
        }
        return sha256_of_json(identity)[:12]

    @property
    def options(self) -> str:
        """What `jobs/evaluate.py` is given for these questions, but for the model and the address of the manifest."""
        options = [f"--split {self.split}", f"--part {self.part}", f"--questions {self.questions}"]
        options += [] if self.every is None else [f"--every {self.every}"]
        options += [] if self.replies == "all" else [f"--replies {self.replies}"]
        options += [] if self.scorer == "exact" else [f"--scorer {self.scorer}"]
        return " ".join(options)

    def fitted(self, manifest: shards.Manifest) -> Suite:
        """The suite of what the part has, where these are fewer questions. Raises ScoringError where it has none."""
        from pipelines.evaluation.sampling import drawn, find_replies, of_part

        found = find_replies(manifest, self.split, self.replies).found
        there = len(drawn(of_part(found, self.split, self.part), self.questions, self.every))
        if not there:
            raise ScoringError(
                f"part {self.part!r} of split {self.split!r} of {manifest.url} has no question about an image: take "
                "another split, or one with more groups"
            )
        return replace(self, questions=there)

    def read(self, processor: MeteorProcessor, positions: int) -> Questions:
        """The questions that are there, checked against the manifest; fewer than the suite's where the part has fewer.

        Args:
            processor: of the model that is asked.
            positions: of that model.

        Raises:
            ScoringError: where the manifest is not the suite's, or no question is there.
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
            manifest,
            self.split,
            processor,
            self.questions,
            positions=positions,
            replies=self.replies,
            part=self.part,
            every=self.every,
        )
        if not found.asked:
            raise ScoringError(
                f"part {self.part!r} of split {self.split!r} of {manifest.url} has no question about a readable image "
                f"(left out: {counted(found.left_out)}): take --part all, or another split"
            )
        return found

    def load(self, processor: MeteorProcessor, positions: int) -> Questions:
        """The questions, all of those that the suite draws.

        Args and Raises: as `read`; ScoringError where the part has fewer, too.
        """
        found = self.read(processor, positions)
        if found.drawn < self.questions:
            raise ScoringError(
                f"part {self.part!r} of split {self.split!r} of {self.manifest} has {found.drawn} questions about "
                f"images (of those left out: {counted(found.left_out)}), the suite asks {self.questions}: take fewer "
                "questions, or a larger part"
            )
        return found
