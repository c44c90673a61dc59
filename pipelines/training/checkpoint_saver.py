"""Saving the checkpoints of one worker: written to local disk while the training waits, uploaded while it goes on.

1. the worker writes its shards, rank 0 the small files beside them
2. Ray Train uploads the folder in a thread; a checkpoint counts once every worker's upload is reported, so half of one
   is never resumed from
3. a new checkpoint waits for the upload of the one before, so that at most one folder lies on the local disk, and the
   second of a run for the commit of the first, so that two whole ones without a record of either mean a lost record
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint, CheckpointUploadMode

from pipelines.checkpoint.committed import CHECKPOINT_PREFIX
from pipelines.checkpoint.local import new_folder
from pipelines.checkpoint.losses import LossFile, LossLog, write_losses
from pipelines.checkpoint.parity_file import ParityBatch
from pipelines.checkpoint.shards import save_shards
from pipelines.checkpoint.state import (
    LEDGER_FILE,
    PARITY_FILE,
    POINTS_FILE,
    RECIPE_FILE,
    STATE_FILE,
    TrainState,
)
from pipelines.checkpoint.weight_sums import Precision
from pipelines.compat.deepspeed import checkpoint_bytes
from pipelines.data.ledger import Ledger
from pipelines.data.sample_id import SampleId, SampleIds
from pipelines.io.local_disk import writing
from pipelines.io.pulse import Phase, mark
from pipelines.io.run_folder import RunFolder
from pipelines.recovery.preemption import wait_committed
from pipelines.recovery.run_lock import DONE
from pipelines.tracking.metric_points import MetricPoint, points_to_jsonl
from pipelines.training.batches import MicroBatch
from pipelines.training.validation_turn import ValidationTurn
from pipelines.training.worker import Worker

TOGETHER_S = 10.0
FIRST_COMMIT_S = 60.0
"""So long the second checkpoint waits for the commit of the first, which takes a second; then it goes on."""
Upload = Callable[[Checkpoint, str], Checkpoint]
"""A local checkpoint and the name of its folder -> the uploaded one."""


@dataclass
class CheckpointSaver:
    """Writes and uploads the checkpoints of one worker, and keeps the ledger of what they contain.

    Args:
        worker: which worker it is.
        run_url: folder of the run.
        precision: of the training weights.
        lora_scale: of the adapters; None without.
        recipe: every setting.
        ledger: samples of the checkpoint that the training started at; used on rank 0 alone.
        losses: of the steps since the last checkpoint; stored by rank 0.
        upload: moves a folder to storage.
        retry_s: seconds for which the losses' upload outlasts a storage that fails.
        require_lease: raises LeaseLostError where another job has taken the run over.
        validation: decides which checkpoints are validated.
        saved: checkpoints made so far.
    """

    worker: Worker
    run_url: str
    precision: Precision
    lora_scale: float | None
    recipe: Mapping[str, Any]
    ledger: Ledger
    losses: LossLog
    upload: Upload
    retry_s: float
    require_lease: Callable[[], None]
    validation: ValidationTurn
    saved: int
    _uploaded: threading.Event = field(default_factory=threading.Event)
    _trained: list[SampleId] = field(default_factory=list)
    _dropped: list[SampleId] = field(default_factory=list)
    _loss_file: tuple[LossFile, bytes] | None = None
    _first: str | None = None
    """The run's first checkpoint, where it was the last one that was saved."""

    def __post_init__(self) -> None:
        self._uploaded.set()

    def trained(self, members: Sequence[MicroBatch], loss: float) -> None:
        """Note a step: what it consumed (samples, trained or dropped) and its loss."""
        self.losses.add(loss)
        for batch in members:
            self._trained += batch.samples
            self._dropped += [dropped.sample for dropped in batch.dropped]

    def validates_next(self, state: TrainState) -> bool:
        """Whether the next checkpoint, of `state`, is to be validated; every worker must call it once before `save`."""
        if not self.validation.is_due(self.saved + 1, state):
            return False
        mark(Phase.UPLOAD)
        self._await_upload()  # only what is committed is known to wait for its validation
        mark(Phase.CHECKPOINT)
        begins = [self.worker.rank == 0 and self.validation.begins(state)]
        torch.distributed.broadcast_object_list(begins, src=0)
        return begins[0]

    def save(self, state: TrainState, pending: Sequence[MetricPoint], parity: ParityBatch | None = None) -> str:
        """Save a checkpoint of `state`; every worker must call it. Returns the name of its folder in storage.

        With a parity batch it is validated, unless it is the last one, whose batch is of the held-out samples.
        The last checkpoint of a training is uploaded before it returns.
        """
        self._gather()
        mark(Phase.UPLOAD)
        self._await_upload()
        self._await_first_commit()
        mark(Phase.CHECKPOINT)
        folder = new_folder(self.run_url)
        self._loss_file = self.losses.take()
        need = checkpoint_bytes(self.worker.engine)
        with writing(folder, need, f"this worker's part of the checkpoint of step {state.step}"):
            save_shards(self.worker.engine, folder, self.worker.start, self.lora_scale)
            if self.worker.rank == 0:
                self._write_common(folder, state, pending, parity)
        if state.done and self.worker.rank == 0:
            self.validation.conclude()
        mark(Phase.UPLOAD)
        self._uploaded.clear()
        # Unique, so that files of an upload that was cut short never mix with those of its repetition; the clock of
        # rank 0 counts.
        names = [f"{CHECKPOINT_PREFIX}{state.step:07d}-{time.time_ns():x}"]
        torch.distributed.broadcast_object_list(names, src=0)
        self._first = names[0] if self.saved == 0 else None
        self.saved += 1
        ray.train.report(
            {"step": state.step, "loss": state.last_losses[-1], DONE: state.done, **state.final},
            checkpoint=Checkpoint.from_directory(str(folder)),
            checkpoint_dir_name=names[0],
            checkpoint_upload_mode=CheckpointUploadMode.SYNC if state.done else CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
            checkpoint_upload_fn=self._upload,
            validation=parity is not None and not state.done,
        )
        return names[0]

    def _write_common(
        self, folder: Path, state: TrainState, pending: Sequence[MetricPoint], parity: ParityBatch | None
    ) -> None:
        """What rank 0 writes beside its shards."""
        (folder / STATE_FILE).write_text(state.to_json())
        (folder / LEDGER_FILE).write_bytes(self.ledger.to_bytes())
        (folder / RECIPE_FILE).write_text(json.dumps(self.recipe, indent=1, sort_keys=True) + "\n")
        (folder / POINTS_FILE).write_text(points_to_jsonl(pending))
        if parity is not None:
            parity.save(folder / PARITY_FILE, self.precision)

    def wait_committed(self, name: str, timeout_s: float) -> bool:
        """Whether the checkpoint that was saved last, in folder `name`, is committed within `timeout_s` seconds.

        Every worker asks for itself.
        """
        return wait_committed(name, timeout_s)

    def _await_upload(self) -> None:
        """Wait until the upload of the checkpoint before is through on all workers.

        They wait together: one that waited alone would let the collective operations of the others time out. A failed
        upload ends its worker.
        """
        while True:
            waiting = torch.tensor(int(not self._uploaded.wait(TOGETHER_S)), device=self.worker.device)
            torch.distributed.all_reduce(waiting)
            if not waiting.item():
                break

    def _await_first_commit(self) -> None:
        """Let Ray's record of the run begin before there is a second checkpoint.

        A start that finds two checkpoints and no record would have to take the record for lost.
        """
        if self._first is not None:
            self.wait_committed(self._first, FIRST_COMMIT_S)

    def _gather(self) -> None:
        """What all workers consumed since the last checkpoint goes into rank 0's ledger."""
        mine = SampleIds.of(self._trained), SampleIds.of(self._dropped)
        self._trained, self._dropped = [], []
        everywhere: list[Any] | None = [None] * self.worker.world if self.worker.rank == 0 else None
        torch.distributed.gather_object(mine, everywhere, dst=0)
        for trained, dropped in everywhere or ():
            self.ledger.add(trained)
            self.ledger.add(dropped, dropped=True)

    def _upload(self, checkpoint: Checkpoint, name: str) -> Checkpoint:
        self.require_lease()
        if self.worker.rank == 0 and self._loss_file is not None:  # first: a committed checkpoint has its losses
            write_losses(RunFolder(self.run_url), *self._loss_file, self.retry_s)
        uploaded = self.upload(checkpoint, name)
        self.require_lease()  # again: an upload may take long, and what returns from here is committed
        self._uploaded.set()
        return uploaded
