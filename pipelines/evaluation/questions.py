"""Held-out samples and their questions, lambda solved on such questions, and pictures of what all stages keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import torch
from PIL import Image

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.images import ImageError
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from meteor_model.pruning import solve_lambda
from meteor_model.visualize import explain_kept
from pipelines.data import shards
from pipelines.data.schema import RawSample, SampleError, parse_sample

BATCH = 16


def readable_samples(manifest: shards.Manifest, split: str, processor: MeteorProcessor) -> Iterator[RawSample]:
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


def question_of(sample: RawSample) -> str:
    """The text of the sample's first question, with all of its image placeholders in front."""
    questions = [t.text for t in sample.turns if t.role == "user"]
    return "<image>" * len(sample.images) + "\n" + questions[0].replace("<image>", "").strip()


def solve_lambda_on(
    model: MeteorForConditionalGeneration, processor: MeteorProcessor, samples: Sequence[RawSample]
) -> float:
    """Lambda for which these prompts keep `pruning.decode.target_mean` visual tokens on average.

    Raises:
        ValueError: where the target cannot be reached.
    """
    decode = model.config.pruning.decode
    assert decode.target_mean is not None
    mass_B, num_visual_B = attention_masses(model, processor, samples)
    return solve_lambda(mass_B, num_visual_B, decode.target_mean, decode.k_min)


def solve_for_target(
    model: MeteorForConditionalGeneration, processor: MeteorProcessor, samples: Callable[[], Sequence[RawSample]]
) -> None:
    """Give a model, in place, stage 3's lambda for its target mean on these samples.

    One without a target is left as it is, and the samples are not asked for.

    Raises:
        ValueError: where the target cannot be reached.
    """
    decode = model.config.pruning.decode
    if decode.enabled and decode.target_mean is not None:
        model.config = with_lambda(model.config, solve_lambda_on(model, processor, samples()))


def attention_masses(
    model: MeteorForConditionalGeneration, processor: MeteorProcessor, samples: Sequence[RawSample]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention mass on visual tokens (B,) and their number (B,), of each sample's first question."""
    masses, counts = [], []
    for start in range(0, len(samples), BATCH):
        part = samples[start : start + BATCH]
        inputs = processor([question_of(s) for s in part], [list(s.images) for s in part]).to(model.device)
        mass_B, num_visual_B = model.visual_attention_mass(**inputs)
        masses.append(mass_B)
        counts.append(num_visual_B)
    return torch.cat(masses), torch.cat(counts)


def with_lambda(config: MeteorConfig, lam: float) -> MeteorConfig:
    """The configuration with stage 3's lambda."""
    return config.with_pruning(replace(config.pruning, decode=replace(config.pruning.decode, lam=lam)))


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
