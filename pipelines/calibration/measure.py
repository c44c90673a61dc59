"""Calibration: the expected rank of every encoder's feature map at each boundary, by Ray Data passes over shards.

1. plan      which images (pipelines/calibration/image_plan.py)
2. read      tasks decode the planned images to the travelling size, in batches that the plan alone decides
3. measure   actors with the model run every tower unpruned; a batch leaves as statistics of its images' ranks, some
             hundred bytes; features never leave the actor
4. merge     the driver merges them in the plan's order, so the number of actors changes nothing
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import ray
import torch

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from pipelines.calibration.image_plan import CalibrationError, ImagePlan, MeasureSettings, ReadBatches, plan_images
from pipelines.calibration.ranks import ESTIMATORS, RELATIVE_TOLERANCE, RankReport, as_rows, measures_of
from pipelines.calibration.statistics import RunningStatistics
from pipelines.data import shards
from pipelines.data.ray_data import work_items
from pipelines.io.pulse import begin_data_task
from pipelines.recovery.watchdog import watch_tasks
from pipelines.registry.open import device_for, open_model
from pipelines.registry.versions import PinnedModel


def calibrate_ranks(
    model: PinnedModel,
    manifest: shards.Manifest,
    split: str,
    samples: int,
    workers: MeasureSettings,
    *,
    seed: int | None = None,
    tolerance: float = RELATIVE_TOLERANCE,
) -> RankReport:
    """Measure ranks on images of a split.

    Args:
        model: as for `open_model`, readable by every node.
        manifest: the shards.
        split: which of its splits.
        samples: images to measure; all usable ones of the split where it has fewer.
        workers: how the cluster is used.
        seed: of a permutation of the split's shards; None takes them in manifest order.
        tolerance: relative half width at which images are enough.

    Raises:
        CalibrationError: when the split holds no usable image.
        ShardError: for a shard that differs from the manifest.
        ValueError: features that are not finite, naming the samples.
    """
    with open_model(model) as folder:
        config = MeteorConfig.from_pretrained(folder)
    plan = plan_images(manifest, split, samples, config.image_size, workers, seed)
    measured = measure_plan(model, plan, config.image_size, workers)
    return RankReport.of(measured, measures_of(config), plan.skipped, plan.text_only, tolerance)


# -------------------------------------------------------------------------------------------------------------- measure


def measure_plan(model: PinnedModel, plan: ImagePlan, image_size: int, workers: MeasureSettings) -> RunningStatistics:
    """Statistics of the ranks of the planned images, in the order of `measures_of`."""
    units = [{"unit": unit, "info": asdict(info), "places": places} for unit, (info, places) in enumerate(plan.units)]
    items = work_items(units, ordered=True, block_bytes=workers.batch * 3 * image_size**2)  # a batch is a block
    # A pool of another size than the actors': else Ray fuses both, and an actor has a whole shard to itself.
    total: RunningStatistics | None = None
    with watch_tasks() as mailbox:
        batches = items.flat_map(
            ReadBatches(plan.manifest, image_size, workers.batch, mailbox),
            num_cpus=workers.cpus,
            compute=ray.data.TaskPoolStrategy(workers.actors + 1),
        )
        measured = batches.map(
            _RankMeter,
            fn_constructor_args=(model, image_size, workers.gpus, mailbox),
            compute=ray.data.ActorPoolStrategy(size=workers.actors),
            num_cpus=workers.cpus,
            num_gpus=workers.gpus or None,
        )
        for row in measured.iter_rows():
            part = RunningStatistics(int(row["count"]), np.asarray(row["mean"]), np.asarray(row["squares"]))
            total = part if total is None else total.merged(part)
    if total is None or total.count != plan.images:
        raise CalibrationError(
            f"{plan.manifest}: {0 if total is None else total.count} of {plan.images} planned images were measured; "
            "calibrate again"
        )
    return total


class _RankMeter:
    """Actor: the model's towers, unpruned."""

    def __init__(self, model: PinnedModel, image_size: int, gpus: float, mailbox: str = "") -> None:
        begin_data_task(mailbox)
        device = device_for(gpus)
        with open_model(model) as folder:
            self._model = MeteorForConditionalGeneration.from_pretrained(folder, use_safetensors=True).eval()
        self._model.to(device)
        self._shape = (-1, 3, image_size, image_size)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        pixels = torch.from_numpy(np.frombuffer(row["pixels"], dtype=np.uint8).reshape(self._shape).copy())
        try:
            ranks_MK = as_rows(self._model.measure_ranks(pixels.to(self._model.device), ESTIMATORS))
            part = RunningStatistics.of(ranks_MK)
        except ValueError as error:
            raise CalibrationError(f"ranks cannot be measured on {row['where']}: {error}") from error
        return {"count": part.count, "mean": part.mean_K, "squares": part.squares_K}
