#!/usr/bin/env python
"""Draw what a model does with an image: `python jobs/visualize.py --model M --image FILE --prompt TEXT --output DIR`.

overview.png shows all stages on one sheet, an encoder a row, a step a column; encode.png, fuse.png and decode.png the
cells whose tokens each stage keeps; ranks.png the rank of each encoder's feature map at each boundary; vav.png the
attention mass on visual tokens by LLM layer and head, and the heads that stage 3 listens to; with --compare,
pruners.png the cells that every pruner keeps of as many tokens.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from jobs.command_line import Job
from jobs.settings import Device, OtherPruner, Tracking, check_device, check_files, check_model, torch_device


@dataclass(frozen=True)
class Visualize:
    """What is drawn."""

    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, s3://BUCKET/PREFIX, or the folder of an exported model."""
    image: Path
    """An image file (JPEG, PNG, WebP, GIF)."""
    output: Path
    """Folder for the PNG files; made where it is missing."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = field(default=())
    """A question about the image; give two to see what stage 3 makes of the difference. Not needed for ranks alone."""
    only: tuple[Literal["kept", "ranks", "vav"], ...] = ("kept", "ranks", "vav")
    """Which pictures: cells kept, ranks by boundary, attention on visual tokens by head."""
    rank_images: tuple[Path, ...] = ()
    """More image files for the chart of ranks, to show their spread over images."""
    decode_mean: float | None = None
    """Solve stage 3's lambda on these prompts for this mean number of tokens, instead of the model's own; for a model
    that is not calibrated."""
    pruner: OtherPruner = field(default_factory=OtherPruner)
    """Another way to drop visual tokens than the model's own; the cells that it keeps are drawn."""
    compare: int = 0
    """Visual tokens an image that every pruner is to keep in pruners.png, the first prompt's answers below; 0: no such
    picture."""
    device: Device = "auto"
    """Where the model runs; auto takes a GPU where there is one."""
    tracking: Tracking = field(default_factory=Tracking)
    """MLflow."""


def check(settings: Visualize) -> None:
    """What can be wrong before anything is asked. Raises ValueError."""
    check_model(settings.model, settings.tracking)
    check_files((settings.image, *settings.rank_images), "image")
    if not settings.only:
        raise ValueError("only is empty: choose from kept, ranks, vav")
    if not settings.prompt and set(settings.only) != {"ranks"}:
        raise ValueError("prompt is missing: stage 3 is drawn for a prompt, better for two different ones")
    if settings.output.exists() and not settings.output.is_dir():
        raise ValueError(f"output {settings.output} is not a folder")
    settings.pruner.check()
    if settings.pruner.name and settings.only != ("kept",):
        raise ValueError("pruner.name is given: ranks and vav are those of the model's own stages; set only to kept")
    if settings.compare < 0:
        raise ValueError(
            f"compare is {settings.compare}; it must be a number of visual tokens, or 0 for no such picture"
        )
    if settings.compare and (not settings.prompt or settings.pruner.name):
        raise ValueError("compare asks the first prompt under every pruner: give a prompt, and no pruner.name")
    check_device(settings.device)


def run(settings: Visualize) -> None:
    """Load, draw, write."""
    from pipelines.job.draw import calibrate_for, draw, load  # here: it loads torch, which --help does not need
    from pipelines.registry.open import apply_pruner

    model, processor = load(settings.model, torch_device(settings.device), settings.tracking.uri)
    apply_pruner(model, processor, *settings.pruner.chosen)
    if settings.decode_mean is not None and settings.prompt:
        calibrate_for(model, processor, settings.image, settings.prompt, settings.decode_mean)
    prompts = settings.prompt if model.config.pruning.decode.enabled or not settings.pruner.name else ()
    drawn = (settings.only, settings.rank_images, settings.output, settings.compare)
    draw(model, processor, settings.image, prompts, *drawn)


JOB = Job("visualize", Visualize, run, __doc__, check=check)

if __name__ == "__main__":
    sys.exit(JOB.main())
