"""Pictures of what all stages keep of held-out samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from PIL import Image

from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from meteor_model.visualize import explain_kept
from pipelines.data.schema import RawSample


def draw_samples(
    model: MeteorForConditionalGeneration, processor: MeteorProcessor, samples: Sequence[RawSample], count: int
) -> Iterator[tuple[str, Image.Image]]:
    """File name and picture of the kept tokens, stage by stage, for the first `count` samples with one image."""
    single = (sample for sample in samples if len(sample.images) == 1)
    for sample in islice(single, count):
        questions = [t.text.replace("<image>", "").strip() for t in sample.turns if t.role == "user"]
        different = [question for question in dict.fromkeys(questions) if question]
        prompts = different[:2] if model.new_cache() is not None else []
        for stage, picture in explain_kept(model, processor, sample.images[0], prompts).items():
            yield f"kept-{sample.key}-{stage}.png", picture
