"""Calibration: the expected rank of every encoder's feature map at each boundary, by a Ray Data pass over shards.

1. the first shards of the training split that hold enough images are read, checked against the manifest
2. the first image of each sample is decoded to the travelling size; what cannot be decoded is counted
3. a task with the start model runs every tower unpruned and measures each image's rank at each boundary
4. mean and spread over images become `ranks.json`, and the means decide the budgets (MeteorConfig.encode_budgets)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray
import torch

from meteor_model.images import ImageError, decode_image
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.pruning import RANK_ESTIMATORS
from pipelines import checkpoint, shards
from pipelines.schema import SampleError, parse_sample
from pipelines.stream import quieten


class CalibrationError(ValueError):
    """Ranks could not be measured; the message says on what and why."""


@dataclass(frozen=True)
class RankStatistic:
    """Rank of one encoder's feature map at one boundary, over images."""

    mean: float
    std: float


@dataclass(frozen=True)
class RankReport:
    """What calibration measured.

    Attributes:
        images: how many images.
        skipped: images that could not be used, by reason.
        ranks: estimator -> encoder -> one statistic per boundary.
    """

    images: int
    skipped: dict[str, int]
    ranks: dict[str, dict[str, tuple[RankStatistic, ...]]]

    def expected(self, estimator: str) -> dict[str, list[float]]:
        """Mean rank of each encoder at each boundary: `MeteorConfig.ranks`."""
        return {name: [item.mean for item in items] for name, items in self.ranks[estimator].items()}

    def to_dict(self) -> dict[str, Any]:
        """`ranks.json`."""
        return asdict(self)


def calibrate_ranks(
    model_url: str,
    manifest: shards.Manifest,
    split: str,
    image_size: int,
    samples: int,
    batch: int,
    task_cpus: float,
) -> RankReport:
    """Measure ranks on the first `samples` images of a split.

    Args:
        model_url: folder of a saved model that every node can read.
        manifest: the shards.
        split: which of its splits.
        image_size: side S at which images travel.
        samples: images to measure.
        batch: images a task runs at a time.
        task_cpus: Ray CPUs that a reading task reserves.

    Raises:
        CalibrationError: when the split holds no usable image.
        ShardError: for a shard that differs from the manifest.
    """
    chosen, found = [], 0
    for info in manifest.split(split):
        chosen.append(info)
        found += info.samples
        if found >= 2 * samples:  # some samples are text only
            break
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    quieten(context)
    images = ray.data.from_items([{"info": asdict(info)} for info in chosen], override_num_blocks=len(chosen)).flat_map(
        _FirstImages(manifest.url, image_size), num_cpus=task_cpus
    )
    measured = images.map_batches(
        _RankMeter,
        fn_constructor_args=(model_url,),
        batch_size=batch,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=task_cpus,
    )
    rows: list[Mapping[str, Any]] = []
    skipped: dict[str, int] = {}
    for row in measured.iter_rows():
        if row["reason"]:
            skipped[row["reason"]] = skipped.get(row["reason"], 0) + 1
        elif len(rows) < samples:
            rows.append(row)
        if len(rows) == samples:
            break
    if not rows:
        raise CalibrationError(f"{manifest.url}: no usable image in split {split!r} (skipped: {skipped or 'none'})")
    return RankReport(len(rows), skipped, _statistics(rows))


def _statistics(rows: list[Mapping[str, Any]]) -> dict[str, dict[str, tuple[RankStatistic, ...]]]:
    columns = [key for key in rows[0] if key.startswith("rank/")]
    ranks: dict[str, dict[str, tuple[RankStatistic, ...]]] = {}
    for column in columns:
        _, estimator, encoder = column.split("/")
        values = np.stack([np.asarray(row[column], dtype=np.float64) for row in rows])
        spread = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])
        ranks.setdefault(estimator, {})[encoder] = tuple(
            RankStatistic(float(mean), float(std)) for mean, std in zip(values.mean(axis=0), spread, strict=True)
        )
    return ranks


@dataclass(frozen=True)
class _FirstImages:
    """Reads one shard; a row per sample with an image, or with the reason why it has none that can be used."""

    manifest_url: str
    image_size: int

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        info = shards.ShardInfo(**row["info"])
        empty = np.zeros((3, self.image_size, self.image_size), dtype=np.uint8)
        for key, members in shards.read_shard(self.manifest_url, info):
            try:
                sample = parse_sample(key, members)
                if sample.images:
                    pixels = decode_image(sample.images[0], self.image_size).numpy()
                    yield {"reason": "", "pixels": pixels}
            except (SampleError, ImageError) as error:
                yield {"reason": error.reason, "pixels": empty}


class _RankMeter:
    """Actor: the start model's towers, unpruned."""

    def __init__(self, model_url: str) -> None:
        with checkpoint.local_copy(model_url) as folder:
            self._model = MeteorForConditionalGeneration.from_pretrained(folder).eval()
        if torch.cuda.is_available():
            self._model.cuda()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        pixels = torch.from_numpy(np.stack(list(batch["pixels"]))).to(self._model.device)
        measured = self._model.measure_ranks(pixels, tuple(RANK_ESTIMATORS))
        columns = {
            f"rank/{estimator}/{name}": values
            for estimator, by_encoder in measured.items()
            for name, values in by_encoder.items()
        }
        return {"reason": batch["reason"], **columns}
