"""Which images of a dataset are measured, and how they are read: Ray Data tasks over shards.

1. plan  the first usable images of a split, in manifest order or that of a seeded permutation of its shards; what
         cannot be used is counted by reason. Every shard is checked against the manifest
2. read  the planned images at the travelling size, in batches that the plan alone decides

Tasks import this module, so it imports no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from pydantic import PositiveInt

from meteor_model.images import decode_image
from pipelines.calibration.settings import CalibrationError
from pipelines.config.settings import SettingsError
from pipelines.config.workers import Workers
from pipelines.data import shards
from pipelines.data.ray_data import work_items
from pipelines.data.samples import SampleFault, try_sample
from pipelines.data.schema import RawSample, parse_sample
from pipelines.io.pulse import begin_data_task
from pipelines.io.validation import settings_class
from pipelines.recovery.watchdog import watch_tasks

USABLE, TEXT_ONLY = "", "text_only"


@settings_class(error=SettingsError)
class MeasureSettings(Workers):
    """How the cluster measures; it does not change the result.

    Attributes:
        batch: images that an actor runs at a time.
        bad_shards: what becomes of a shard that is wrong at rest (`shards.fetch_shard`).
    """

    batch: PositiveInt = 16
    bad_shards: shards.BadShards = "fail"


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


# ----------------------------------------------------------------------------------------------------------------- plan


def plan_images(
    manifest: shards.Manifest,
    split: str,
    samples: int,
    image_size: int,
    workers: MeasureSettings,
    seed: int | None = None,
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
    manifest_url: str, infos: Sequence[shards.ShardInfo], most: int, image_size: int, workers: MeasureSettings
) -> Iterator[list[str]]:
    """For each shard the states of its samples in order, up to its `most`-th usable image."""
    items = work_items([{"info": asdict(info)} for info in infos], ordered=True)
    with watch_tasks() as mailbox:
        survey = _Survey(manifest_url, most, image_size, workers.bad_shards, mailbox)
        for row in items.map(survey, num_cpus=workers.cpus).iter_rows():
            yield list(row["states"])


@dataclass(frozen=True)
class _Survey:
    """Task: which samples of a shard have a first image that can be decoded."""

    manifest_url: str
    most: int
    image_size: int
    bad_shards: shards.BadShards
    mailbox: str = ""

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        begin_data_task(self.mailbox)
        info, states = shards.ShardInfo(**row["info"]), []
        for key, members in shards.fetch_shard(self.manifest_url, info, bad_shards=self.bad_shards):
            found = try_sample(key, members, self._state)
            states.append(found.reason if isinstance(found, SampleFault) else found)
            if states.count(USABLE) == self.most:
                break
        return {"states": states}

    def _state(self, sample: RawSample) -> str:
        image = _first_image(sample)
        if image is None:
            return TEXT_ONLY
        decode_image(image, self.image_size)
        return USABLE


def _first_image(sample: RawSample) -> bytes | None:
    return sample.images[0] if sample.images else None


# ----------------------------------------------------------------------------------------------------------------- read


@dataclass(frozen=True)
class ReadBatches:
    """Task: the planned images of one shard, a row per batch."""

    manifest_url: str
    image_size: int
    batch: int
    mailbox: str = ""

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The planned images of the shard in `row`: pixels and keys, a batch at a time."""
        begin_data_task(self.mailbox)
        info, places = shards.ShardInfo(**row["info"]), list(row["places"])
        samples = shards.read_shard(self.manifest_url, info)
        for start in range(0, len(places), self.batch):
            chosen = [samples[place] for place in places[start : start + self.batch]]
            images = [_first_image(parse_sample(key, members)) for key, members in chosen]
            pixels = [decode_image(image, self.image_size).numpy() for image in images if image is not None]
            # As bytes: batches differ in length, and a column of tensors does not.
            keys = [key for key, _ in chosen]
            yield {"where": f"{info.path}: {', '.join(keys)}", "pixels": np.stack(pixels).tobytes()}
