"""Checkpoints of a run: what they hold, which one is resumed from, and how they become one model again.

A checkpoint is a folder `{storage}/runs/{run}/train/step-...` that Ray Train commits: it counts from the moment that
Ray's snapshot file names it, so a half-uploaded folder is never resumed from. It holds

    zero3/                  DeepSpeed's shards of weights and optimizer, the rank in every file's name
    train_state.json        `TrainState`
    ledger.bin              which samples were trained (`pipelines.data.ledger`)
    recipe.json             every setting of the run
    metrics.jsonl           metrics that MLflow had not taken yet
    parity.safetensors      only in the last one: a held-out batch and the training model's logits on it

all but the first written by rank 0. Random numbers need no file: they are a function of (seed, step, rank).

Ray Train's controller imports this module, to start the stream where the checkpoint stands; so that it need not load
torch and transformers (6 s of CPU), the functions that make a model import them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from pipelines.data.ledger import Int64s, Ledger
from pipelines.io import storage

if TYPE_CHECKING:
    import torch
    from ray.data import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel

    from meteor_model.processing_meteor import MeteorProcessor

STATE_FILE = "train_state.json"
LEDGER_FILE = "ledger.bin"
RECIPE_FILE = "recipe.json"
POINTS_FILE = "metrics.jsonl"
PARITY_FILE = "parity.safetensors"
ZERO3_TAG = "zero3"
SNAPSHOT_FILE = "checkpoint_manager_snapshot.json"
TRAIN_NAME = "train"
CHECKPOINT_PREFIX = "step-"
STATE_VERSION = 2
PROCESSOR_FOLDER = "processor"  # beside init/, without its weights: data tasks on every node need this alone
MAX_LISTED_DROPS = 200
SMOOTHED_STEPS = 10


class CheckpointError(ValueError):
    """A checkpoint is damaged, or does not fit the run that wants it; the message names it and what to do."""


@dataclass(frozen=True, order=True)
class DroppedSample:
    """One faulty sample: where it is and what is wrong with it."""

    row: int
    """Row of the plan."""
    dataset: int
    """Dataset of the mixture."""
    epoch: int
    shard: int
    index: int
    key: str
    reason: str
    detail: str


@dataclass(frozen=True)
class TrainState:
    """Where a training stands after optimizer step `step`; all counts are global, over all workers and restarts."""

    recipe_hash: str
    """Hash of the settings that decide the result; a run is only resumed under the same one."""
    world_size: int
    """Workers that wrote the checkpoint."""
    total_steps: int
    """Optimizer steps of the whole training."""
    mlflow_run_id: str | None = None
    """The MLflow run that the metrics go to."""
    step: int = 0
    """Optimizer steps done."""
    rows: int = 0
    """Rows of the plan consumed: step * global batch."""
    samples_seen: int = 0
    """Samples trained on."""
    seed: int = 0
    """Seed of the order of the data and, with step and rank, of every random number."""
    tokens: int = 0
    """Tokens trained on, visual ones included."""
    cells: int = 0
    """Places of all batches, padding included."""
    restarts: int = 0
    """How often the training went on from a checkpoint that this one descends from."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Faulty samples by reason."""
    dropped_samples: tuple[DroppedSample, ...] = ()
    """The first faulty samples, in the order of the plan."""
    losses: tuple[float, ...] = ()
    """Loss of every step: mean over the supervised tokens of the global batch."""
    step_seconds: float = 0.0
    """Wall-clock seconds of all steps, waiting for data included; without the start of workers and checkpoints."""
    final: dict[str, float] = field(default_factory=dict)
    """Held-out metrics; only after the last step."""
    version: int = STATE_VERSION
    """Version of this format."""

    @property
    def done(self) -> bool:
        """Whether every step has been made."""
        return self.step == self.total_steps

    @property
    def padding_share(self) -> float:
        """Share of the batches' places that was padding."""
        return 1 - self.tokens / self.cells if self.cells else 0.0

    @property
    def loss_first(self) -> float:
        """Mean loss of the first 10 steps (all, if fewer; NaN if none)."""
        return _mean(self.losses[:SMOOTHED_STEPS])

    @property
    def loss_last(self) -> float:
        """Mean loss of the last 10 steps (all, if fewer; NaN if none)."""
        return _mean(self.losses[-SMOOTHED_STEPS:])

    def to_json(self) -> str:
        """The state as JSON; floats keep every bit."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> TrainState:
        """The state in `text`, read from `source`.

        Raises:
            CheckpointError: if it is not a state of this version.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            if values["version"] != STATE_VERSION:
                raise CheckpointError(f"{source} has version {values['version']}, this code reads {STATE_VERSION}")
            drops = tuple(DroppedSample(**drop) for drop in values.pop("dropped_samples"))
            return cls(**{**values, "losses": tuple(values["losses"]), "dropped_samples": drops})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise CheckpointError(f"{source} is not a training state: {error!r}") from error


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values) if values else float("nan")


def run_url(root: str, run_name: str) -> str:
    """The folder of a run."""
    return storage.join(root, "runs", run_name)


@dataclass(frozen=True)
class CheckpointRef:
    """A committed checkpoint."""

    url: str
    state: TrainState


def latest_checkpoint(root: str, run_name: str) -> CheckpointRef | None:
    """The checkpoint that Ray Train would resume run `run_name` of storage `root` from, or None for a new run.

    Ray's checkpoint manager names it in its snapshot file, which it writes after every worker has uploaded.

    Raises:
        CheckpointError: if the snapshot or the state in the checkpoint is damaged.
        StorageError: if storage cannot be read.
    """
    folder = storage.join(run_url(root, run_name), TRAIN_NAME)
    snapshot_url = storage.join(folder, SNAPSHOT_FILE)
    if not storage.exists(snapshot_url):
        return None
    try:
        latest = json.loads(storage.read_bytes(snapshot_url))["latest_checkpoint_result"]
        if latest is None:
            return None
        url = storage.join(folder, latest["checkpoint_dir_name"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{snapshot_url} is damaged ({error!r}); start again under another run name, or remove {folder}"
        ) from error
    state_url = storage.join(url, STATE_FILE)
    return CheckpointRef(url, TrainState.from_json(storage.read_bytes(state_url).decode(), state_url))


def remaining_stream(root: str, run_name: str, stream: Callable[[int], Dataset]) -> Dataset:
    """The part of a stream that run `run_name` has not consumed.

    Ray Train's controller calls it just before the workers get their checkpoint, at every start of them. Both take the
    latest result of the controller's snapshot; `pipelines.training.batches.BatchReader` checks that they agree.

    Args:
        stream: makes the stream from a given row of the plan on.
    """
    checkpoint = latest_checkpoint(root, run_name)
    return stream(checkpoint.state.rows if checkpoint else 0)


def sweep_uncommitted(root: str, run_name: str) -> list[str]:
    """Remove what an interrupted upload left: folders of checkpoints that Ray's snapshot does not name.

    Only while no worker of the run is alive. Returns the names of the folders.
    """
    folder = storage.join(run_url(root, run_name), TRAIN_NAME)
    listed = storage.list_files(folder)
    files = [path for path in listed if path.startswith(CHECKPOINT_PREFIX)]
    names = {path.partition("/")[0] for path in files}
    if SNAPSHOT_FILE in listed:  # asked of the same listing, so that a false "not found" cannot cost a checkpoint
        snapshot = json.loads(storage.read_bytes(storage.join(folder, SNAPSHOT_FILE)))
        named = [snapshot["latest_checkpoint_result"], *snapshot["checkpoint_results"]]
        names -= {result["checkpoint_dir_name"] for result in named if result is not None}
    for path in files:
        if path.partition("/")[0] in names:
            storage.delete(storage.join(folder, path))
    return sorted(names)


@contextmanager
def local_copy(url: str) -> Iterator[Path]:
    """The files of the folder `url` on this machine; a local folder is given as it is."""
    import ray.train

    filesystem, path = storage.arrow_filesystem(url)
    with ray.train.Checkpoint(path=path, filesystem=filesystem).as_directory() as directory:
        yield Path(directory)


def load_processor(url: str) -> MeteorProcessor:
    """The processor of the run at `url`, on any machine that reads its storage."""
    from meteor_model.processing_meteor import MeteorProcessor  # here: the controller only passes this function on

    with local_copy(storage.join(url, PROCESSOR_FOLDER)) as folder:
        return MeteorProcessor.from_pretrained(folder)


def new_folder(run: str) -> Path:
    """A fresh local folder for one worker's files of one checkpoint of the run at `run`; Ray deletes it after the
    upload. What killed workers of the run left on this machine is removed first.
    """
    prefix = f"meteor-checkpoint-{hashlib.sha256(run.encode()).hexdigest()[:12]}-"
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        owner = folder.name.removeprefix(prefix).partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-"))


def load_ledger(directory: Path, sizes: Sequence[Sequence[int] | Int64s]) -> Ledger:
    """The ledger of a local checkpoint; `sizes` are the samples of every shard, by dataset."""
    return Ledger.from_bytes((directory / LEDGER_FILE).read_bytes(), sizes)


def load_state(directory: Path) -> TrainState:
    """The training state of a local checkpoint."""
    path = directory / STATE_FILE
    return TrainState.from_json(path.read_text(), str(path))


def consolidate(
    directory: Path, model_class: type[PreTrainedModel], init: Path, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """One whole model, on the CPU, from the ZeRO-3 shards of a local checkpoint.

    Args:
        directory: the checkpoint.
        model_class: class of the model.
        init: folder with the model's config (the folder that training started from).
        dtype: number format of the weights; None keeps the fp32 that the shards hold.

    Raises:
        CheckpointError: if the shards lack a parameter or buffer of the model, hold one too many, or another shape.
    """
    import torch
    from transformers.initialization import no_init_weights

    dtype = dtype or torch.float32
    weights = {name: _cast(tensor, dtype) for name, tensor in read_shards(directory).items()}
    with no_init_weights():
        model = model_class(model_class.config_class.from_pretrained(init))
    expected = model.state_dict()
    faults = [f"{name} is missing" for name in expected if name not in weights]
    faults += [f"{name} is not in the model" for name in weights if name not in expected]
    faults += [
        f"{name} has shape {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if faults:
        raise CheckpointError(f"{directory} does not fit {model_class.__name__}: {'; '.join(faults[:5])}")
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    model.config.dtype = dtype
    return model.eval()


def read_shards(directory: Path) -> dict[str, Tensor]:
    """All weights in the ZeRO-3 shards of a local checkpoint, fp32 where they were trained.

    Only read checkpoints that this project wrote: DeepSpeed's files are pickles.

    Raises:
        CheckpointError: if shards are missing.
    """
    import torch

    from pipelines.checkpoint.zero3 import import_deepspeed

    import_deepspeed(uses_gpu=torch.cuda.is_available())
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            weights: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(directory), tag=ZERO3_TAG)
    except (FileNotFoundError, ValueError) as error:
        raise CheckpointError(f"{directory} is not a whole ZeRO-3 checkpoint: {error}") from error
    return weights


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
