"""The start model of a run: built or pulled, calibrated, and stored as `init/` before the first step.

A run begins from a stored folder, whatever it began from: workers of any number load the same files, a restart loads
them again, and pre-training and fine-tuning share everything after this module. `init/READY.json` is written last.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from meteor_model.architectures import LLM_PART, build_config
from meteor_model.chat import IMAGE_PLACEHOLDER
from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.image_processing_meteor import MeteorImageProcessor
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from meteor_model.sample_encoder import save_sample_encoder
from meteor_model.tokenizer import pretrained_tokenizer, train_tokenizer
from meteor_model.weights import LoadedPart, load_parts, vocabulary_rows
from pipelines.calibration.image_plan import MeasureSettings
from pipelines.calibration.measure import calibrate_ranks
from pipelines.calibration.ranks import RankReport
from pipelines.checkpoint.start_weights import SUMS_FILE, write_sums
from pipelines.checkpoint.zero3 import save_for_sharding
from pipelines.config.recipe import Recipe
from pipelines.data import shards
from pipelines.data.samples import SampleReader
from pipelines.io import sealed, storage
from pipelines.io.console import say
from pipelines.io.local_disk import writing
from pipelines.io.run_folder import RunFolder
from pipelines.io.upload import upload_folder
from pipelines.parts import default_parts_dir, resolve_sources
from pipelines.registry.open import load_model
from pipelines.registry.versions import PinnedModel, pin_model

TOKENIZER_TEXTS = 20_000


@dataclass(frozen=True)
class StoredStart:
    """What a run starts from, as it was stored.

    Attributes:
        config: of the model, without budgets.
        parameters: their number.
        parts: name, source, size and checksum of the pretrained parts.
        sums: of the files in `init/`.
    """

    config: MeteorConfig
    parameters: int
    parts: list[dict[str, Any]]
    sums: dict[str, sealed.FileSum]


Build = Callable[[], StoredStart]
"""Builds and stores a start model: the one part of this module that holds it in memory."""


def prepare_start(
    recipe: Recipe,
    manifest: shards.Manifest,
    run: RunFolder,
    started_from: str | None = None,
    within: Callable[[Build], StoredStart] = lambda build: build(),
) -> dict[str, Any]:
    """Make sure that `init/` and `ranks.json` of a run exist; what an earlier start completed is kept.

    Args:
        recipe: of the run.
        manifest: of its first dataset.
        run: its folder.
        started_from: what `model.start` named when the run was begun; None takes what it names now.
        within: calls what it is given, here or where there is room for a whole model.

    Returns: the content of `ranks.json`.

    Raises:
        ValueError: where the recipe's pruning does not fit the model, or the start model cannot be pulled.
    """
    if storage.exists(run.init_ready):
        return sealed.read_document(run.ranks)
    stored = within(partial(store_start, recipe, manifest, run, started_from))
    report = _measure_ranks(recipe, manifest, run)
    config = stored.config.with_pruning(recipe.pruning, report.expected(recipe.pruning.encode.rank_estimator))
    ranks = {
        **report.to_dict(),
        "estimator": recipe.pruning.encode.rank_estimator,
        "exponent": recipe.pruning.encode.rank_exponent,
        "budgets": {name: list(budget) for name, budget in config.encode_budgets.items()},
    }
    sealed.write_document(run.ranks, ranks)
    with tempfile.TemporaryDirectory(prefix="meteor-start-") as name:
        config.save_pretrained(name)
        storage.write_bytes(run.init_config, (Path(name) / "config.json").read_bytes())
        sealed.write_list(run.init, {**stored.sums, **sealed.sums_of(Path(name))})
    sealed.write_document(run.init_ready, {"parameters": stored.parameters, "parts": stored.parts})
    return ranks


def store_start(
    recipe: Recipe, manifest: shards.Manifest, run: RunFolder, started_from: str | None = None
) -> StoredStart:
    """Build or pull the start model of a run and store it; arguments and errors as `prepare_start`."""
    loaded: list[LoadedPart] = []
    if recipe.model.start:
        model, processor = _pulled(recipe, started_from or recipe.model.start)
    else:
        model, processor, loaded = _built(recipe, manifest)
    parts = [{**asdict(part), "dropped": len(part.dropped)} for part in loaded]
    sums = _store(model, processor, parts, run)
    return StoredStart(model.config, sum(parameter.numel() for parameter in model.parameters()), parts, sums)


def needs_local_files(recipe: Recipe) -> bool:
    """Whether the start model is built from files on the driver's machine: pretrained parts."""
    return not recipe.model.start and bool(recipe.model.pretrained().weights)


def _store(
    model: MeteorForConditionalGeneration, processor: MeteorProcessor, parts: list[dict[str, Any]], run: RunFolder
) -> dict[str, sealed.FileSum]:
    """Write the model with its processor as `init/`, and the processor apart from the weights.

    Returns:
        The sums of the files in `init/`, whose list is written once its configuration is complete.
    """
    for url in (run.init, run.processor):  # of a start that died before READY.json: it is made anew
        storage.delete(storage.join(url, sealed.list_name()))
    with tempfile.TemporaryDirectory(prefix="meteor-start-") as name:
        folder, small = Path(name) / "whole", Path(name) / "processor"
        folder.mkdir()
        if parts:
            (folder / PurePosixPath(run.init_parts).name).write_text(json.dumps(parts, indent=2) + "\n")
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        with writing(folder, weights, "the start model"):
            save_for_sharding(model, folder)
            processor.save_pretrained(folder)
        sums = sealed.sums_of(folder)
        sums[SUMS_FILE] = sealed.sum_of(write_sums(folder, sums))
        upload_folder(folder, run.init)
        processor.save_pretrained(small)  # data tasks on every node need this alone
        save_sample_encoder(processor, small)
        upload_folder(small, run.processor)
        sealed.write_list(run.processor, sealed.sums_of(small))
    return sums


def _measure_ranks(recipe: Recipe, manifest: shards.Manifest, run: RunFolder) -> RankReport:
    """Ranks of the stored model's unpruned feature maps on the training split."""
    settings = MeasureSettings(
        batch=recipe.calibration.batch,
        cpus=recipe.data.data_task_cpus,
        gpus=recipe.training.gpus_per_worker,
        bad_shards=recipe.data.bad_shards,
    )
    model = PinnedModel(run.init)
    return calibrate_ranks(model, manifest, recipe.data.train_split, recipe.calibration.samples, settings)


def loaded_parts(run: RunFolder) -> list[dict[str, Any]]:
    """Name, source, size and checksum of the pretrained parts that a prepared run starts from."""
    parts: list[dict[str, Any]] = sealed.read_document(run.init_ready)["parts"]
    return parts


def _built(
    recipe: Recipe, manifest: shards.Manifest
) -> tuple[MeteorForConditionalGeneration, MeteorProcessor, list[LoadedPart]]:
    """A model from the architecture: its pretrained parts loaded, the rest random.

    The tokenizer is the LLM's; without a pretrained LLM, one that is trained on the run's own texts.
    """
    settings = recipe.model
    parts = settings.pretrained()
    sources = resolve_sources(parts.weights, Path(settings.parts_dir or default_parts_dir()), say)
    rows = 0
    if LLM_PART in sources:
        tokenizer = pretrained_tokenizer(sources[LLM_PART])
        rows = vocabulary_rows(sources[LLM_PART])  # may be more than the tokenizer's
    else:
        # What is faulty among them, the training stream counts again.
        samples = SampleReader(manifest, recipe.data.train_split, lambda sample: [turn.text for turn in sample.turns])
        tokenizer = train_tokenizer(islice(chain.from_iterable(samples), TOKENIZER_TEXTS), settings.vocab_size)
        samples.warn()
    special_ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
    vocabulary = max(len(tokenizer), rows)
    config = build_config(settings.architecture, recipe.pruning, vocabulary, special_ids, image_token_id)
    torch.manual_seed(settings.seed)
    model = MeteorForConditionalGeneration(config)
    loaded = load_parts(model, sources)
    images = MeteorImageProcessor(parts.image_size)
    return model, MeteorProcessor(images, tokenizer, config.tokens_per_image, template=settings.template), loaded


def _pulled(recipe: Recipe, start: str) -> tuple[MeteorForConditionalGeneration, MeteorProcessor]:
    """A registered or stored model under the recipe's pruning and chat template."""
    model, processor = load_model(pin_model(start, recipe.tracking.uri))
    model.config = config = model.config.with_pruning(recipe.pruning, None)
    processor.tokens_per_image, processor.template = config.tokens_per_image, recipe.model.template
    return model, processor
