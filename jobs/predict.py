"""Ask a registered model: `python jobs/predict.py --model models:/NAME@ALIAS --image FILE --prompt TEXT`.

Needs nothing but MLFLOW_TRACKING_URI: the model comes from the registry, every byte checked.

`python jobs/predict.py shards --help` is batch inference: the samples of a split to Parquet, on Ray.
"""

import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ray
import torch
import tyro

from jobs.command_line import run_command
from meteor_model.answering import Answerer, Budget, Question
from meteor_model.chat import IMAGE_PLACEHOLDER
from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.images import ImageError
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from pipelines.config.workers import Workers
from pipelines.data import shards
from pipelines.inference.batch import predict_split
from pipelines.inference.output import PredictError, Questions
from pipelines.registry.folder import tokens_by_stage
from pipelines.registry.open import open_model
from pipelines.registry.publish import pull_model
from pipelines.registry.versions import pin_model
from pipelines.tracking.redact import hide_passwords


@dataclass(frozen=True)
class Predict:
    """What is asked."""

    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, or the folder of an exported model."""
    prompt: str
    """The question. `<image>` in it says where each image stands; without it they stand in front."""
    image: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = field(default=())
    """An image file (JPEG, PNG, WebP, GIF); may be given several times, or not at all."""
    max_new_tokens: int = 32
    """Longest answer, in tokens."""


def load_images(files: tuple[Path, ...], processor: MeteorProcessor) -> list[torch.Tensor]:
    """The images as (3, S, S) uint8. Raises ValueError that names the file."""
    images = []
    for file in files:
        try:
            images.append(processor.load_image(file.read_bytes()))
        except OSError as error:
            raise ValueError(f"image {file} cannot be read: {error.strerror}") from None
        except ImageError as error:
            raise ValueError(f"image {file} cannot be used: {error}") from None
    return images


def check(settings: Predict) -> None:
    """What can be wrong before anything is downloaded. Raises ValueError."""
    for file in settings.image:
        if not file.is_file():
            raise ValueError(f"image {file} does not exist")
    written = settings.prompt.count(IMAGE_PLACEHOLDER)
    if written not in (0, len(settings.image)):
        raise ValueError(
            f"the prompt has {written} {IMAGE_PLACEHOLDER} placeholders, {len(settings.image)} images are given"
        )
    if settings.max_new_tokens < 1:
        raise ValueError(f"max-new-tokens is {settings.max_new_tokens}; it must be at least 1")
    if settings.model.startswith("models:") and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ValueError(
            "MLFLOW_TRACKING_URI is not set, so there is no registry to ask: set it to the address of the MLflow "
            "server (`make status` shows the local one)"
        )


def predict(settings: Predict) -> None:
    """Load, answer, and print answer and token counts."""
    check(settings)
    with tempfile.TemporaryDirectory(prefix="meteor-predict-") as scratch:
        folder = pull_model(pin_model(settings.model), Path(scratch) / "model")
        processor = MeteorProcessor.from_pretrained(folder)
        images = load_images(settings.image, processor)
        model = MeteorForConditionalGeneration.from_pretrained(folder, use_safetensors=True).eval()
    question = Question.of(settings.prompt, processor, images)
    (answer,) = Answerer(model, processor).answer([question], Budget(settings.max_new_tokens))
    print(f"answer: {answer.text}")
    if images:
        for stage, counts in tokens_by_stage(model.config).items():
            if stage != "visual_tokens.decode":
                print(f"{stage}: {counts}")
        entering = len(images) * model.config.tokens_per_image
        print(f"visual_tokens.decode: {entering} > {answer.visual_tokens} ({len(images)} image(s))")


@dataclass(frozen=True)
class PredictShards:
    """Batch inference: every sample of a split once, to Parquet. Started again, it answers what is missing."""

    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, or the folder of a model that all nodes can read (also s3://)."""
    manifest: str
    """Dataset: s3://BUCKET/PREFIX or a folder."""
    output: str
    """Folder or s3:// prefix for the Parquet parts; one output holds one model's answers to one split."""
    split: str = "heldout"
    """Split of the dataset."""
    prompt: str = ""
    """Asked of every sample with all its images; by default the samples' own questions."""
    questions: Questions = "first"
    """Which of a sample's own questions."""
    max_new_tokens: int = 32
    """Longest answer, in tokens."""
    visual_tokens: int | None = None
    """Most visual tokens that stage 3 keeps of a question; by default lambda alone decides."""
    part_samples: int = 1024
    """Most samples of a part: what a killed job answers again."""
    bad_shards: shards.BadShards = "fail"
    """What to do with a shard that is missing or damaged: fail, or drop it and count its samples."""
    actors: int = 1
    """Copies of the model that answer side by side."""
    cpus: float = 0.5
    """Ray CPUs that one of them reserves."""
    gpus: float = 0.0
    """GPUs that one of them reserves; 0 runs on CPUs."""


def predict_shards(settings: PredictShards) -> None:
    """Check, answer, print the counts. Raises ValueError for what is wrong with the settings or the data."""
    if settings.questions != "first" and settings.prompt:
        raise PredictError("prompt and questions='all' contradict each other: give one of them")
    workers = Workers(settings.actors, settings.cpus, settings.gpus)
    model = pin_model(settings.model)
    with open_model(model) as folder:
        wanted = {"max_new_tokens": settings.max_new_tokens, "visual_tokens": settings.visual_tokens}
        budget = Budget.of(wanted, MeteorConfig.from_pretrained(folder))
    manifest = shards.load_manifest(settings.manifest)
    manifest.split(settings.split)
    ray.init(ignore_reinit_error=True, logging_level="WARNING")
    done = predict_split(
        model,
        manifest,
        settings.split,
        settings.output.rstrip("/"),
        budget,
        workers,
        prompt=settings.prompt,
        questions=settings.questions,
        part_samples=settings.part_samples,
        bad_shards=settings.bad_shards,
    )
    print(f"{done['samples']} samples, {done['rows']} rows, without answer: {done['errors'] or 'none'}")
    print(f"written   {hide_passwords(settings.output)}")


def main() -> int:
    """Command line; a fault of the input is one line on stderr and exit code 2."""
    if sys.argv[1:2] == ["shards"]:
        of_split = tyro.cli(PredictShards, args=sys.argv[2:], prog="predict.py shards")
        return run_command(lambda: predict_shards(of_split))
    settings = tyro.cli(Predict, description=__doc__)
    return run_command(lambda: predict(settings))


if __name__ == "__main__":
    sys.exit(main())
