"""Calibration: the expected rank of every encoder's feature map at each boundary, by Ray Data passes over shards.

1. plan      which images: the first usable ones of a split, in manifest order or that of a seeded permutation of its
             shards; what cannot be used is counted by reason. Every shard is checked against the manifest
2. read      tasks decode the planned images to the travelling size, in batches that the plan alone decides
3. measure   actors with the model run every tower unpruned; a batch leaves as moments of its images' ranks, some
             hundred bytes; features never leave the actor
4. merge     the driver merges moments in the plan's order, so the number of actors changes nothing
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import ray
import torch

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.images import ImageError, decode_image
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from pipelines import shards
from pipelines.checkpoint import local_copy
from pipelines.export import pull_model
from pipelines.model_folder import CHECKSUMS_FILE, verify_checksums
from pipelines.moments import Moments
from pipelines.ranks import ESTIMATORS, RELATIVE_TOLERANCE, CalibrationError, RankReport, as_rows, measures_of
from pipelines.schema import RawSample, SampleError, parse_sample
from pipelines.stream import quieten

USABLE, TEXT_ONLY = "", "text_only"


@dataclass(frozen=True)
class Workers:
    """How the cluster is used; it does not change the result.

    Attributes:
        actors: copies of the model that measure side by side.
        batch: images that an actor runs at a time.
        cpus: that a task or an actor reserves; may be a fraction.
        gpus: that an actor reserves; 0 runs on the CPU.
        bad_shards: what becomes of a shard that is wrong at rest (`shards.fetch_shard`).
    """

    actors: int = 1
    batch: int = 16
    cpus: float = 1.0
    gpus: float = 0.0
    bad_shards: shards.BadShards = "fail"

    def __post_init__(self) -> None:
        for name in ("actors", "batch"):
            if self.__dict__[name] < 1:
                raise CalibrationError(f"{name} is {self.__dict__[name]}; it must be at least 1")
        for name in ("cpus", "gpus"):
            if self.__dict__[name] < 0:
                raise CalibrationError(f"{name} is {self.__dict__[name]}; it must not be negative")


@dataclass(frozen=True)
class ImagePlan:
    """Which images are measured.

    Attributes:
        manifest: address of the shards' manifest.
        units: shards with the positions of their samples whose first image is measured.
        skipped: samples before the last of them whose first image cannot be used, by reason.
        text_only: samples before it without an image.
    """

    manifest: str
    units: tuple[tuple[shards.ShardInfo, tuple[int, ...]], ...]
    skipped: dict[str, int]
    text_only: int

    @property
    def images(self) -> int:
        """How many."""
        return sum(len(places) for _, places in self.units)


def calibrate_ranks(
    model: str,
    manifest: shards.Manifest,
    split: str,
    samples: int,
    workers: Workers,
    *,
    seed: int | None = None,
    tolerance: float = RELATIVE_TOLERANCE,
    uri: str | None = None,
) -> RankReport:
    """Measure ranks on images of a split.

    Args:
        model: a saved model's folder that every node can read, or models:/NAME/VERSION.
        manifest: the shards.
        split: which of its splits.
        samples: images to measure; all usable ones of the split where it has fewer.
        workers: how the cluster is used.
        seed: of a permutation of the split's shards; None takes them in manifest order.
        tolerance: relative half width at which images are enough.
        uri: of the tracking server, for a registered model.

    Raises:
        CalibrationError: when the split holds no usable image.
        ShardError: for a shard that differs from the manifest.
        ValueError: features that are not finite, naming the samples.
    """
    with open_model(model, uri) as folder:
        config = MeteorConfig.from_pretrained(folder)
    plan = plan_images(manifest, split, samples, config.image_size, workers, seed)
    moments = measure_plan(model, plan, config.image_size, workers, uri)
    return RankReport.of(moments, measures_of(config), plan.skipped, plan.text_only, tolerance)


@contextmanager
def open_model(model: str, uri: str | None = None) -> Iterator[Path]:
    """The files of a model on this machine: a folder, one in object storage, or a registered model.

    Those with checksums are checked byte by byte. Raises ExportError, TrackingError, StorageError.
    """
    if model.startswith("models:"):
        with TemporaryDirectory(prefix="meteor-pull-") as scratch:
            yield pull_model(model, Path(scratch) / "model", uri)
        return
    with local_copy(model) as folder:
        if (folder / CHECKSUMS_FILE).is_file():
            verify_checksums(folder)
        elif not (folder / "config.json").is_file():
            raise CalibrationError(f"{model} holds no model: there is no config.json")
        yield folder


# ---------------------------------------------------------------------------------------------------------------- plan


def plan_images(
    manifest: shards.Manifest, split: str, samples: int, image_size: int, workers: Workers, seed: int | None = None
) -> ImagePlan:
    """The first `samples` usable images in order. Raises CalibrationError for a split without any."""
    if samples < 1:
        raise CalibrationError(f"samples is {samples}; it must be at least 1")
    infos = manifest.split(split)
    order = range(len(infos)) if seed is None else np.random.Generator(np.random.PCG64(seed)).permutation(len(infos))
    waiting = [infos[index] for index in order]
    units: list[tuple[shards.ShardInfo, tuple[int, ...]]] = []
    counts: dict[str, int] = {}
    missing = samples
    while missing and waiting:
        wave = _next_wave(waiting, missing)
        for info, states in zip(wave, _survey(manifest.url, wave, missing, image_size, workers), strict=True):
            if not missing:
                break
            places = [place for place, state in enumerate(states) if state == USABLE][:missing]
            missing -= len(places)
            seen = states if missing else states[: places[-1] + 1]
            for state in seen:
                if state != USABLE:
                    counts[state] = counts.get(state, 0) + 1
            if places:
                units.append((info, tuple(places)))
    text_only = counts.pop(TEXT_ONLY, 0)
    plan = ImagePlan(manifest.url, tuple(units), counts, text_only)
    if not plan.images:
        raise CalibrationError(
            f"{manifest.url}: no usable image in split {split!r} (skipped: {counts or 'none'}; without image: "
            f"{text_only})"
        )
    return plan


def _next_wave(waiting: list[shards.ShardInfo], missing: int) -> list[shards.ShardInfo]:
    """Takes the next shards that would do if every sample had a usable image."""
    wave, held = [], 0
    while waiting and held < missing:
        wave.append(waiting.pop(0))
        held += wave[-1].samples
    return wave


def _survey(
    manifest_url: str, infos: Sequence[shards.ShardInfo], most: int, image_size: int, workers: Workers
) -> Iterator[list[str]]:
    """For each shard the states of its samples in order, up to its `most`-th usable image."""
    survey = _Survey(manifest_url, most, image_size, workers.bad_shards)
    items = ray.data.from_items([{"info": asdict(info)} for info in infos], override_num_blocks=len(infos))
    items.context.execution_options.preserve_order = True
    quieten(items.context)
    items.context.raise_original_map_exception = True
    for row in items.map(survey, num_cpus=workers.cpus).iter_rows():
        yield list(row["states"])


@dataclass(frozen=True)
class _Survey:
    """Task: which samples of a shard have a first image that can be decoded."""

    manifest_url: str
    most: int
    image_size: int
    bad_shards: shards.BadShards

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        info, states = shards.ShardInfo(**row["info"]), []
        for key, members in shards.fetch_shard(self.manifest_url, info, bad_shards=self.bad_shards):
            try:
                image = _first_image(parse_sample(key, members))
                if image is not None:
                    decode_image(image, self.image_size)
                states.append(TEXT_ONLY if image is None else USABLE)
            except (SampleError, ImageError) as error:
                states.append(error.reason)
            if states.count(USABLE) == self.most:
                break
        return {"states": states}


def _first_image(sample: RawSample) -> bytes | None:
    return sample.images[0] if sample.images else None


# ------------------------------------------------------------------------------------------------------------- measure


def measure_plan(model: str, plan: ImagePlan, image_size: int, workers: Workers, uri: str | None = None) -> Moments:
    """Moments of the ranks of the planned images, in the order of `measures_of`."""
    units = [{"unit": unit, "info": asdict(info), "places": places} for unit, (info, places) in enumerate(plan.units)]
    items = ray.data.from_items(units, override_num_blocks=len(units))
    items.context.execution_options.preserve_order = True
    items.context.target_max_block_size = workers.batch * 3 * image_size**2  # a batch is a block: actors share them
    items.context.raise_original_map_exception = True
    quieten(items.context)
    batches = items.flat_map(_ReadBatches(plan.manifest, image_size, workers.batch), num_cpus=workers.cpus)
    measured = batches.map(
        _RankMeter,
        fn_constructor_args=(model, uri, image_size, workers.gpus > 0),
        compute=ray.data.ActorPoolStrategy(size=workers.actors),
        num_cpus=workers.cpus,
        num_gpus=workers.gpus or None,
    )
    total: Moments | None = None
    for row in measured.iter_rows():
        part = Moments(int(row["count"]), np.asarray(row["mean"]), np.asarray(row["squares"]))
        total = part if total is None else total.merged(part)
    if total is None or total.count != plan.images:
        raise CalibrationError(
            f"{plan.manifest}: {0 if total is None else total.count} of {plan.images} planned images were measured; "
            "calibrate again"
        )
    return total


@dataclass(frozen=True)
class _ReadBatches:
    """Task: the planned images of one shard, a row per batch."""

    manifest_url: str
    image_size: int
    batch: int

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        info, places = shards.ShardInfo(**row["info"]), list(row["places"])
        samples = shards.read_shard(self.manifest_url, info)
        for start in range(0, len(places), self.batch):
            chosen = [samples[place] for place in places[start : start + self.batch]]
            images = [_first_image(parse_sample(key, members)) for key, members in chosen]
            pixels = [decode_image(image, self.image_size).numpy() for image in images if image is not None]
            # As bytes: batches differ in length, and a column of tensors does not.
            keys = [key for key, _ in chosen]
            yield {"where": f"{info.path}: {', '.join(keys)}", "pixels": np.stack(pixels).tobytes()}


class _RankMeter:
    """Actor: the model's towers, unpruned."""

    def __init__(self, model: str, uri: str | None, image_size: int, gpu: bool) -> None:
        if gpu and not torch.cuda.is_available():
            raise CalibrationError("gpus is above 0, but torch finds no CUDA device where the actor runs")
        with open_model(model, uri) as folder:
            self._model = MeteorForConditionalGeneration.from_pretrained(folder).eval()
        self._model.to("cuda" if gpu else "cpu")
        self._shape = (-1, 3, image_size, image_size)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        pixels = torch.from_numpy(np.frombuffer(row["pixels"], dtype=np.uint8).reshape(self._shape).copy())
        try:
            moments = Moments.of(as_rows(self._model.measure_ranks(pixels.to(self._model.device), ESTIMATORS)))
        except ValueError as error:
            raise CalibrationError(f"ranks cannot be measured on {row['where']}: {error}") from error
        return {"count": moments.count, "mean": moments.mean_K, "squares": moments.squares_K}
