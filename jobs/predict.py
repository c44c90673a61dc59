#!/usr/bin/env python
"""Ask a model about images: `python jobs/predict.py --model models:/NAME@ALIAS --image FILE --prompt TEXT`.

A registered model needs nothing but the address of MLflow: it comes from the registry, every byte checked. A whole
split of a dataset is answered by `jobs/predict_shards.py`.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from jobs.command_line import Job
from jobs.settings import Device, OtherPruner, Tracking, check_device, check_files, check_model, torch_device
from meteor_model.chat import IMAGE_PLACEHOLDER
from pipelines.io.console import say


@dataclass(frozen=True)
class Predict:
    """What is asked."""

    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, s3://BUCKET/PREFIX, or the folder of an exported model."""
    prompt: str
    """The question. `<image>` in it says where each image stands; without it they stand in front."""
    image: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = field(default=())
    """An image file (JPEG, PNG, WebP, GIF); may be given several times, or not at all."""
    max_new_tokens: int = 32
    """Longest answer, in tokens."""
    pruner: OtherPruner = field(default_factory=OtherPruner)
    """Another way to drop visual tokens than the model's own."""
    device: Device = "auto"
    """Where the model runs; auto takes a GPU where there is one."""
    tracking: Tracking = field(default_factory=Tracking)
    """MLflow."""


def check(settings: Predict) -> None:
    """What can be wrong before anything is asked. Raises ValueError."""
    check_model(settings.model, settings.tracking)
    check_files(settings.image, "image")
    written = settings.prompt.count(IMAGE_PLACEHOLDER)
    if written not in (0, len(settings.image)):
        raise ValueError(
            f"prompt has {written} {IMAGE_PLACEHOLDER} placeholders, {len(settings.image)} images are given"
        )
    if settings.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {settings.max_new_tokens}; it must be at least 1")
    settings.pruner.check()
    check_device(settings.device)


def run(settings: Predict) -> None:
    """Ask, and show answer and token counts."""
    from pipelines.inference.ask import ask  # here: it loads torch, which --help does not need

    device = torch_device(settings.device)
    asked = (settings.model, settings.prompt, settings.image, settings.max_new_tokens, device, settings.tracking.uri)
    reply = ask(*asked, settings.pruner.chosen)
    say(f"answer: {reply.text}")
    for stage, counts in reply.visual_tokens.items():
        say(f"{stage}: {counts}")


JOB = Job("predict", Predict, run, __doc__, check=check)

if __name__ == "__main__":
    sys.exit(JOB.main())
