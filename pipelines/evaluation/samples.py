"""Samples with images, and the question that is asked of each: what suites, lambda and pictures are made of."""

from __future__ import annotations

from collections.abc import Iterator

from meteor_model.images import ImageError
from meteor_model.processing_meteor import MeteorProcessor
from pipelines.data import shards
from pipelines.data.schema import RawSample, SampleError, parse_sample

BATCH = 16


def samples_with_images(manifest: shards.Manifest, split: str, processor: MeteorProcessor) -> Iterator[RawSample]:
    """The samples of a split that have images, shard by shard, without those that cannot be decoded."""
    for info in manifest.split(split):
        for key, members in shards.read_shard(manifest.url, info):
            try:
                sample = parse_sample(key, members)
                for image in sample.images:
                    processor.load_image(image)
            except (SampleError, ImageError):
                continue
            if sample.images:
                yield sample


def first_question(sample: RawSample) -> str:
    """The text of the sample's first question, with all of its image placeholders in front."""
    questions = [t.text for t in sample.turns if t.role == "user"]
    return "<image>" * len(sample.images) + "\n" + questions[0].replace("<image>", "").strip()
