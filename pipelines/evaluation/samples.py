"""Samples with images, and the question that is asked of each: what suites, lambda and pictures are made of."""

from __future__ import annotations

from meteor_model.processing_meteor import MeteorProcessor
from pipelines.data import shards
from pipelines.data.samples import SampleReader
from pipelines.data.schema import RawSample

BATCH = 16


def samples_with_images(
    manifest: shards.Manifest, split: str, processor: MeteorProcessor, count: int
) -> list[RawSample]:
    """The first `count` samples of a split that have images, all of which can be decoded.

    Faulty samples before the last of them are counted in a warning. Raises ShardError, StorageError.
    """

    def decoded(sample: RawSample) -> RawSample:
        for image in sample.images:
            processor.load_image(image)
        return sample

    return SampleReader(manifest, split, decoded).take(count, where=lambda sample: bool(sample.images))


def first_question(sample: RawSample) -> str:
    """The text of the sample's first question, with all of its image placeholders in front."""
    questions = [t.text for t in sample.turns if t.role == "user"]
    return "<image>" * len(sample.images) + "\n" + questions[0].replace("<image>", "").strip()
