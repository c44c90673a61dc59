"""The start model of a run: built or pulled, calibrated, and stored as `init/` before the first step.

A run begins from a stored folder, whatever it began from: workers of any number load the same files, a restart loads
them again, and pre-training and fine-tuning share everything after this module. `init/READY.json` is written last.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.fs
import torch

from meteor_model.architectures import architecture, build_config
from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.image_processing_meteor import MeteorImageProcessor
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from meteor_model.tokenizer import train_tokenizer
from pipelines import shards, storage
from pipelines.calibrate import calibrate_ranks
from pipelines.checkpoint import PROCESSOR_FOLDER, local_copy
from pipelines.export import pull_model
from pipelines.recipe import Recipe
from pipelines.schema import SampleError, parse_sample

READY_FILE = "READY.json"
RANKS_FILE = "ranks.json"
TOKENIZER_TEXTS = 20_000


def prepare_start(recipe: Recipe, manifest: shards.Manifest, run_url: str) -> dict[str, Any]:
    """Make sure that `init/` and `ranks.json` of a run exist; what an earlier start completed is kept.

    Returns: the content of `ranks.json`.

    Raises:
        ValueError: where the recipe's pruning does not fit the model, or the start model cannot be pulled.
    """
    init_url, ranks_url = storage.join(run_url, "init"), storage.join(run_url, RANKS_FILE)
    if storage.exists(storage.join(init_url, READY_FILE)):
        ranks: dict[str, Any] = storage.read_json(ranks_url)
        return ranks
    with tempfile.TemporaryDirectory(prefix="meteor-start-") as name:
        folder = Path(name)
        model, processor = _pulled(recipe) if recipe.model.start else _built(recipe, manifest)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        upload_folder(folder, init_url)
        with tempfile.TemporaryDirectory(prefix="meteor-processor-") as small:
            processor.save_pretrained(small)  # apart from the weights: data tasks on every node need this alone
            upload_folder(Path(small), storage.join(run_url, PROCESSOR_FOLDER))
        report = calibrate_ranks(
            init_url,
            manifest,
            recipe.data.train_split,
            image_size=model.config.image_size,
            samples=recipe.calibration.samples,
            batch=recipe.calibration.batch,
            task_cpus=recipe.data.data_task_cpus,
        )
        config = with_pruning(model.config, recipe, report.expected(recipe.pruning.encode.rank_estimator))
        config.save_pretrained(folder)
        ranks = {
            **report.to_dict(),
            "estimator": recipe.pruning.encode.rank_estimator,
            "exponent": recipe.pruning.encode.rank_exponent,
            "budgets": {name: list(budget) for name, budget in config.encode_budgets.items()},
        }
        storage.write_json(ranks_url, ranks)
        storage.write_bytes(storage.join(init_url, "config.json"), (folder / "config.json").read_bytes())
        parameters = sum(parameter.numel() for parameter in model.parameters())
        storage.write_json(storage.join(init_url, READY_FILE), {"parameters": parameters})
    return ranks


def with_pruning(config: MeteorConfig, recipe: Recipe, ranks: dict[str, list[float]] | None) -> MeteorConfig:
    """The configuration with the recipe's pruning, and ranks where they are measured."""
    data = {**config.to_dict(), "pruning": recipe.pruning, "ranks": ranks}
    return MeteorConfig(**data)


def _built(recipe: Recipe, manifest: shards.Manifest) -> tuple[MeteorForConditionalGeneration, MeteorProcessor]:
    """Random weights, and a tokenizer trained on the run's own texts."""
    texts = islice(_texts(manifest, recipe.data.train_split), TOKENIZER_TEXTS)
    tokenizer = train_tokenizer(texts, recipe.model.vocab_size)
    special_ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    config = build_config(recipe.model.architecture, recipe.pruning, len(tokenizer), special_ids, image_token_id)
    torch.manual_seed(recipe.model.seed)
    model = MeteorForConditionalGeneration(config)
    images = MeteorImageProcessor(architecture(recipe.model.architecture).image_size)
    return model, MeteorProcessor(images, tokenizer, config.tokens_per_image, template=recipe.model.template)


def _pulled(recipe: Recipe) -> tuple[MeteorForConditionalGeneration, MeteorProcessor]:
    """A registered or stored model under the recipe's pruning and chat template."""
    start = recipe.model.start
    assert start is not None
    with tempfile.TemporaryDirectory(prefix="meteor-pull-") as name, ExitStack() as stored:
        if storage.is_s3(start):
            start = str(stored.enter_context(local_copy(start)))
        folder = pull_model(start, Path(name) / "model", recipe.tracking.uri)
        model = MeteorForConditionalGeneration.from_pretrained(folder)
        processor = MeteorProcessor.from_pretrained(folder)
    model.config = config = with_pruning(model.config, recipe, None)
    processor.tokens_per_image, processor.template = config.tokens_per_image, recipe.model.template
    return model, processor


def _texts(manifest: shards.Manifest, split: str) -> Iterator[str]:
    """The turns of a split's samples, shard by shard; faulty samples are left to the training stream to count."""
    for info in manifest.split(split):
        for key, members in shards.read_shard(manifest.url, info):
            try:
                sample = parse_sample(key, members)
            except SampleError:
                continue
            yield from (turn.text for turn in sample.turns)


def upload_folder(folder: Path, url: str) -> None:
    """Every file of a local folder to a URL."""
    filesystem, path = storage.arrow_filesystem(url)
    with storage.storage_errors(url):
        filesystem.create_dir(path, recursive=True)
        pyarrow.fs.copy_files(str(folder), path, pyarrow.fs.LocalFileSystem(), filesystem)
