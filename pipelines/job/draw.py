"""Pictures of what a model does with one image, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from meteor_model.loading import load_model_and_processor
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from meteor_model.pruners.counts import solve_lambda
from meteor_model.visualize import explain, explain_kept, explain_pruners
from pipelines.evaluation.target_mean import with_lambda
from pipelines.io.console import say
from pipelines.registry.open import open_model
from pipelines.registry.versions import pin_model


def load(model: str, device: str, uri: str) -> tuple[MeteorForConditionalGeneration, MeteorProcessor]:
    """A model, wherever it is kept, on a device of this machine; and its processor."""
    with open_model(pin_model(model, uri)) as folder:
        loaded, processor = load_model_and_processor(folder)
    return loaded.to(device), processor


def calibrate_for(
    model: MeteorForConditionalGeneration,
    processor: MeteorProcessor,
    image: Path,
    prompts: Sequence[str],
    mean: float,
) -> None:
    """Give the model the lambda for which these prompts keep `mean` visual tokens on average.

    Raises:
        ValueError: there is none.
    """
    measured = [
        model.visual_attention_mass(**processor(text=[prompt], images=[[image]]).to(model.device)) for prompt in prompts
    ]
    mass_B, num_visual_B = (torch.cat(parts) for parts in zip(*measured, strict=True))
    lam = solve_lambda(mass_B, num_visual_B, mean, model.config.pruning.decode.k_min)
    model.config = with_lambda(model.config, lam, mean)
    say(f"lambda {lam:.4g} keeps {mean:g} tokens on average of these prompts")


def draw(
    model: MeteorForConditionalGeneration,
    processor: MeteorProcessor,
    image: Path,
    prompts: tuple[str, ...],
    only: tuple[str, ...],
    rank_images: tuple[Path, ...],
    output: Path,
    compare: int = 0,
) -> list[Path]:
    """Write the pictures into a folder; the files, which are said as well.

    Without prompts: of stages 1 and 2 alone. With `compare`: the first prompt under every pruner as well, at so many
    tokens.
    """
    if prompts or only != ("kept",):
        pictures = explain(model, processor, image, prompts, only, rank_images)
    else:
        pictures = explain_kept(model, processor, image, ())
    if compare:
        pictures["pruners"] = explain_pruners(model, processor, image, prompts[0], compare)
    output.mkdir(parents=True, exist_ok=True)
    files = []
    for name, picture in pictures.items():
        files.append(output / f"{name}.png")
        picture.save(files[-1], optimize=True)
        say(f"{files[-1]}  {picture.width} x {picture.height}")
    return files
