"""Draw what a model does with an image, as PNG files.

python jobs/visualize.py --model MODEL --image FILE --prompt TEXT --prompt TEXT --out FOLDER

overview.png shows all stages on one sheet, an encoder a row, a step a column; encode.png, fuse.png and decode.png the
cells whose tokens each stage keeps; ranks.png the rank of each encoder's feature map at each boundary; vav.png the
attention mass on visual tokens by LLM layer and head, and the heads that stage 3 listens to.
"""

import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro

from jobs.command_line import run_command
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from meteor_model.pruning import solve_lambda
from meteor_model.visualize import explain
from pipelines.evaluation.questions import with_lambda
from pipelines.registry.publish import pull_model
from pipelines.registry.versions import pin_model


@dataclass(frozen=True)
class Visualize:
    """What is drawn."""

    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, or the folder of an exported model."""
    image: Path
    """An image file (JPEG, PNG, WebP, GIF)."""
    out: Path
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


def check(settings: Visualize) -> None:
    """What can be wrong before anything is downloaded. Raises ValueError."""
    for file in (settings.image, *settings.rank_images):
        if not file.is_file():
            raise ValueError(f"image {file} does not exist")
    if not settings.only:
        raise ValueError("only is empty: choose from kept, ranks, vav")
    if not settings.prompt and set(settings.only) != {"ranks"}:
        raise ValueError("prompt is missing: stage 3 is drawn for a prompt, better for two different ones")
    if settings.out.exists() and not settings.out.is_dir():
        raise ValueError(f"out {settings.out} is not a folder")
    if settings.model.startswith("models:") and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ValueError(
            "MLFLOW_TRACKING_URI is not set, so there is no registry to ask: set it to the address of the MLflow "
            "server (`make status` shows the local one)"
        )


def solve_for(
    model: MeteorForConditionalGeneration,
    processor: MeteorProcessor,
    image: Path,
    prompts: tuple[str, ...],
    mean: float,
) -> float:
    """The lambda for which these prompts keep `mean` visual tokens on average. Raises ValueError where none does."""
    measured = [
        model.visual_attention_mass(**processor(text=[prompt], images=[[image]]).to(model.device)) for prompt in prompts
    ]
    mass_B, num_visual_B = (torch.cat(parts) for parts in zip(*measured, strict=True))
    return solve_lambda(mass_B, num_visual_B, mean, model.config.pruning.decode.k_min)


def visualize(settings: Visualize) -> list[Path]:
    """Load, draw, write; prints and returns the files."""
    check(settings)
    with tempfile.TemporaryDirectory(prefix="meteor-visualize-") as scratch:
        folder = pull_model(pin_model(settings.model), Path(scratch) / "model")
        processor = MeteorProcessor.from_pretrained(folder)
        model = MeteorForConditionalGeneration.from_pretrained(folder, use_safetensors=True).eval()
    if settings.decode_mean is not None and settings.prompt:
        lam = solve_for(model, processor, settings.image, settings.prompt, settings.decode_mean)
        model.config = with_lambda(model.config, lam)
        print(f"lambda {lam:.4g} keeps {settings.decode_mean:g} tokens on average of these prompts")
    pictures = explain(model, processor, settings.image, settings.prompt, settings.only, settings.rank_images)
    settings.out.mkdir(parents=True, exist_ok=True)
    files = []
    for name, picture in pictures.items():
        files.append(settings.out / f"{name}.png")
        picture.save(files[-1], optimize=True)
        print(f"{files[-1]}  {picture.width} x {picture.height}")
    return files


def main() -> int:
    """Command line; a fault of the input is one line on stderr and exit code 2."""
    settings = tyro.cli(Visualize, description=__doc__)
    return run_command(lambda: visualize(settings))


if __name__ == "__main__":
    sys.exit(main())
