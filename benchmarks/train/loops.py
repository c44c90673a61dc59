"""The same training twice: by `pipelines.training` on Ray Train, and by a loop around DeepSpeed that does nothing else.

Both train the recipe `tiny` with the same ZeRO-3, optimizer, samples and micro-batches. One stopwatch reads the clock
after the last step of the warm-up and after the last step of all, so whatever is done between two steps counts on both
sides: waiting for data, counting, progress lines. There are no checkpoints in that time, and no MLflow.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn

from benchmarks.harness import SPECIAL_IDS
from benchmarks.train.rows import IMAGE, PAD, VOCABULARY, Plan, samples, stream
from jobs.recipes import recipe
from meteor_model.architectures import build_config
from meteor_model.collate import collate
from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from pipelines.checkpoint.zero3 import adamw, deepspeed_config, load_sharded, parameter_groups, save_for_sharding
from pipelines.compat.deepspeed import ignore_deprecated_collectives, import_deepspeed
from pipelines.config.settings import TrainingSettings
from pipelines.data.stream import data_config
from pipelines.io import sealed
from pipelines.io.run_folder import run_folder
from pipelines.sizing.work import training_flops
from pipelines.training.batches import BatchReader, MicroBatch, Share, iterate_rows
from pipelines.training.job import TrainingJob
from pipelines.training.loop import StepRecord
from pipelines.training.pace import WARM_UP_STEPS
from pipelines.training.trainer import fit


@dataclass(frozen=True)
class Stopwatch:
    """Worker 0's clocks after the last step of the warm-up and after the last of all, in files: both loops read it so.

    Attributes:
        folder: of the files.
        steps: of the training.
    """

    folder: Path
    steps: int

    def __call__(self, record: StepRecord) -> None:
        """Our loop's observer (`TrainingJob.observe`)."""
        if record.rank == 0:
            self.read(record.step)

    def read(self, step: int) -> None:
        """Optimizer step `step` (from 1) is made."""
        if step in (WARM_UP_STEPS, self.steps):
            self._file(step).write_text(json.dumps([time.perf_counter(), time.process_time(), time.thread_time()]))

    def metrics(self, samples_a_step: int) -> dict[str, float]:
        """Samples per second of wall-clock; seconds that worker 0, and its loop's own thread, computed for a step."""
        readings = [json.loads(self._file(step).read_text()) for step in (WARM_UP_STEPS, self.steps)]
        wall_s, cpu_s, main_s = (end - start for start, end in zip(*readings, strict=True))
        made = self.steps - WARM_UP_STEPS
        return {
            "wall_samples_per_s": made * samples_a_step / wall_s,
            "cpu_s_per_step": cpu_s / made,
            "loop_thread_cpu_s_per_step": main_s / made,
        }

    def _file(self, step: int) -> Path:
        return self.folder / f"clocks-{step}.json"


def settings_of(workers: int) -> TrainingSettings:
    """Those of the recipe `tiny` on so many workers; one checkpoint, after the last step."""
    return replace(
        recipe("pretrain", "tiny").training,
        workers=workers,
        checkpoint_every_steps=10**6,
        validate_every_checkpoints=0,
        max_failures=0,
    )


def model_config() -> MeteorConfig:
    """The recipe `tiny`'s model."""
    return build_config("tiny", recipe("pretrain", "tiny").pruning, VOCABULARY, SPECIAL_IDS, IMAGE)


def write_start(root: Path, run_name: str) -> Path:
    """The start model of a run, with random weights."""
    torch.manual_seed(0)
    folder = Path(run_folder(str(root), run_name).init)
    save_for_sharding(MeteorForConditionalGeneration(model_config()), folder)
    sealed.write_list(str(folder), sealed.sums_of(folder))
    return folder


def ours(root: Path, run_name: str, workers: int, steps: int) -> dict[str, float]:
    """The stopwatch's metrics of `steps` steps of the project's own training, and its own; Ray must be initialised."""
    watch = Stopwatch(write_start(root, run_name).parent, steps)
    settings, config = settings_of(workers), model_config()
    tokens, rows = config.tokens_per_image, steps * settings.global_batch
    job = TrainingJob(
        storage=str(root),
        run_name=run_name,
        settings=settings,
        model_class=MeteorForConditionalGeneration,
        collate=partial(collate, pad_token_id=PAD, image_size=config.image_size),
        pad_token_id=PAD,
        plan=Plan(rows),
        train_data=partial(stream, rows, tokens, settings.micro_batch),
        heldout_rows=settings.micro_batch,
        heldout_data=partial(stream, settings.micro_batch, tokens, settings.micro_batch),
        iterate=iterate_rows,
        data_config=data_config(),
        recipe={"name": "bench-train"},
        recipe_hash="bench-train",
        observe=watch,
        flops=training_flops(config, settings),
    )
    measured = fit(job).checkpoint.state.measured.metrics()
    return {**measured, **watch.metrics(settings.global_batch)}


def bare(root: Path, run_name: str, workers: int, steps: int) -> dict[str, float]:
    """The stopwatch's metrics of as many steps by DeepSpeed alone, in processes of its own."""
    folder = write_start(root, run_name)
    watch = Stopwatch(folder.parent, steps)
    spawn(_bare_worker, (workers, watch, folder), nprocs=workers)
    return watch.metrics(settings_of(workers).global_batch)


def _bare_worker(rank: int, workers: int, watch: Stopwatch, folder: Path) -> None:
    torch.set_num_threads(1)
    ignore_deprecated_collectives()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(workers), LOCAL_RANK=str(rank))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder.parent}/group", rank=rank, world_size=workers
    )
    deepspeed = import_deepspeed(uses_gpu=False)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    settings = settings_of(workers)
    config = deepspeed_config(settings)
    model = load_sharded(MeteorForConditionalGeneration, folder, config, torch.float32, uses_gpu=False)
    optimizer = adamw(parameter_groups(model, settings.optimizer), settings)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    batches = bare_batches(rank, settings, watch.steps, model.config)
    for step, members in enumerate(batches, start=1):
        for batch in members:
            loss = engine(**batch.inputs).loss
            engine.backward(loss)
            engine.step()
        loss.item()
        if rank == 0:
            watch.read(step)
    torch.distributed.destroy_process_group()


def bare_batches(rank: int, settings: TrainingSettings, steps: int, config: MeteorConfig) -> list[list[MicroBatch]]:
    """The micro-batches of every step of one worker, made before its clock runs."""
    rows = samples(steps * settings.global_batch, config.tokens_per_image)
    share = Share(rank, settings.workers, settings.micro_batches_per_step)
    makes: Any = partial(collate, pad_token_id=PAD, image_size=config.image_size)
    reader = BatchReader(makes, PAD, settings.micro_batch, share, by_length=settings.batching == "length")
    cuts = range(rank * settings.micro_batch, len(rows), settings.workers * settings.micro_batch)
    own = iter([rows[cut : cut + settings.micro_batch] for cut in cuts])
    return list(reader.read(own, 0, len(rows)))
