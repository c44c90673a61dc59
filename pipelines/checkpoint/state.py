"""What a checkpoint holds, and the state of a training in it.

A checkpoint is a folder `{storage}/runs/{run}/train/step-...` with

    zero3/                  DeepSpeed's shards of trained weights and optimizer, the rank in every file's name
    train_state.json        `TrainState`; the loss of every step is in `step-losses/` (`pipelines.checkpoint.losses`)
    ledger.bin              which samples were trained (`pipelines.data.ledger`)
    recipe.json             every setting of the run
    metrics.jsonl           metrics that MLflow had not taken yet
    parity.safetensors      in the last one and in validated ones: a batch and the training model's logits on it
    checksums-*.json        SHA-256 of every file, a list for each worker (`pipelines.io.sealed`)

all but the first and the last written by rank 0. What is frozen stays in the run's `init/`, whose weights the shards
name by digest (`pipelines.checkpoint.start_weights`). Random numbers need no file: they are a function of (seed, step,
rank).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meteor_model.foreign import foreign, quoted
from pipelines.checkpoint.throughput import Throughput
from pipelines.data.ledger import Ledger
from pipelines.data.sample_id import Int64s, SampleId

STATE_FILE = "train_state.json"
LEDGER_FILE = "ledger.bin"
RECIPE_FILE = "recipe.json"
POINTS_FILE = "metrics.jsonl"
PARITY_FILE = "parity.safetensors"
ZERO3_TAG = "zero3"
WEIGHT_FILE_BYTES = 2_000_000_000
"""Most bytes of a weight file of a start model or an export: files are sent whole, so what fails goes again."""
STATE_VERSION = 4
READ_VERSIONS = (2, 3, 4)
"""2 held the loss of every step; up to 3 the shards held what is frozen."""
MAX_LISTED_DROPS = 200
TOO_LONG = "too_long"
"""The reason that is no fault of a sample (`pipelines.data.schema.REASONS`)."""
SMOOTHED_STEPS = 10
KEPT_LAST_LOSSES = 16


class CheckpointError(ValueError):
    """A checkpoint is damaged, or does not fit the run that wants it; the message names it and what to do."""


@dataclass(frozen=True, order=True)
class DroppedSample:
    """One faulty sample: where it is and what is wrong with it."""

    row: int
    """Row of the plan."""
    sample: SampleId
    """Which one."""
    reason: str
    """One of `pipelines.data.schema.REASONS`."""
    detail: str
    """What is wrong, for people."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the sample's own beside the others."""
        place = dataclasses.asdict(self.sample)
        return {"row": self.row, **place, "reason": self.reason, "detail": self.detail}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DroppedSample:
        """What `to_dict` gave. Raises KeyError, TypeError."""
        rest = dict(values)
        row, reason, detail = rest.pop("row"), rest.pop("reason"), rest.pop("detail")
        return cls(row, SampleId(**rest), reason, detail)


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
    """Samples that trained nothing, by reason: faulty ones, and `TOO_LONG` ones."""
    truncated: int = 0
    """Samples trained on of which a part was left out, because they are too long."""
    dropped_samples: tuple[DroppedSample, ...] = ()
    """The first faulty samples, in the order of the plan."""
    first_losses: tuple[float, ...] = ()
    """Loss of the first `SMOOTHED_STEPS` steps: mean over the supervised tokens of the global batch."""
    last_losses: tuple[float, ...] = ()
    """Loss of the last `KEPT_LAST_LOSSES` steps; all are in `step-losses/` (`pipelines.checkpoint.losses`)."""
    step_seconds: float = 0.0
    """Wall-clock seconds of all steps, waiting for data included; without the start of workers and checkpoints."""
    data_seconds: tuple[float, ...] = ()
    """By worker, since their number last changed: seconds that its steps waited for data."""
    own_seconds: tuple[float, ...] = ()
    """By worker: seconds of its steps without the wait for the other workers at their beginning."""
    measured: Throughput = field(default_factory=Throughput)
    """The steps behind the first few of every start, up to the last progress line (`pipelines.training.pace`)."""
    final: dict[str, float] = field(default_factory=dict)
    """Held-out metrics; after the last step alone."""
    losses_in_version_2: tuple[float, ...] = ()
    """Loss of every step, of a state that was read from a checkpoint of version 2, which held them; never written."""

    @property
    def done(self) -> bool:
        """Whether every step has been made."""
        return self.step == self.total_steps

    @property
    def faulty(self) -> int:
        """Samples that trained nothing because something is wrong with them."""
        return sum(count for reason, count in self.dropped.items() if reason != TOO_LONG)

    @property
    def padding_share(self) -> float:
        """Share of the batches' places that was padding."""
        return 1 - self.tokens / self.cells if self.cells else 0.0

    @property
    def loss_first(self) -> float:
        """Mean loss of the first 10 steps (all, if fewer; NaN if none)."""
        return _mean(self.first_losses)

    @property
    def loss_last(self) -> float:
        """Mean loss of the last 10 steps (all, if fewer; NaN if none)."""
        return _mean(self.last_losses[-SMOOTHED_STEPS:])

    def with_loss(self, loss: float) -> TrainState:
        """The state with the loss of one more step."""
        first = self.first_losses if len(self.first_losses) == SMOOTHED_STEPS else (*self.first_losses, loss)
        last = (*self.last_losses, loss)[-KEPT_LAST_LOSSES:]
        return dataclasses.replace(self, first_losses=first, last_losses=last)

    def to_json(self) -> str:
        """The state as JSON; floats keep every bit."""
        values = dataclasses.asdict(self)
        values["dropped_samples"] = [dropped.to_dict() for dropped in self.dropped_samples]
        del values["losses_in_version_2"]
        return json.dumps({**values, "version": STATE_VERSION}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, source: str) -> TrainState:
        """The state in `text`, read from `source`.

        Raises:
            CheckpointError: if it is not a state of this version or of the two before.
        """
        with foreign(lambda what: CheckpointError(f"{source} is not a training state: {what}"), (CheckpointError,)):
            values: dict[str, Any] = json.loads(text)
            version = values.pop("version")
            if version not in READ_VERSIONS:
                raise CheckpointError(f"{source} has version {quoted(version)}, this code reads {READ_VERSIONS}")
            if version == 2:
                losses = values.pop("losses")
                values["losses_in_version_2"] = losses
                values["first_losses"], values["last_losses"] = losses[:SMOOTHED_STEPS], losses[-KEPT_LAST_LOSSES:]
            drops = tuple(DroppedSample.from_dict(drop) for drop in values.pop("dropped_samples"))
            measured = Throughput(**values.pop("measured", {}))  # not in states of before 2026-12-01
            tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
            return cls(**{**values, **tuples, "dropped_samples": drops, "measured": measured})


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values) if values else float("nan")


def load_ledger(directory: Path, sizes: Sequence[Sequence[int] | Int64s]) -> Ledger:
    """The ledger of a local checkpoint; `sizes` are the samples of every shard, by dataset."""
    return Ledger.from_bytes((directory / LEDGER_FILE).read_bytes(), sizes)


def load_state(directory: Path) -> TrainState:
    """The training state of a local checkpoint."""
    path = directory / STATE_FILE
    return TrainState.from_json(path.read_bytes(), str(path))
