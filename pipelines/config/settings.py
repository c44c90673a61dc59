"""Settings of training and of its data: frozen dataclasses that check themselves.

The command line is made from these classes, so every field has one line of documentation under it, and every
contradiction is an error that names the setting and the numbers.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

Part = Literal["projector", "towers", "llm"]
"""The parts of the model that have a learning rate of their own."""

PARTS: tuple[Part, ...] = ("projector", "towers", "llm")


class SettingsError(ValueError):
    """A setting is out of range, or contradicts another one; the message names both and the numbers."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SettingsError(message)


@dataclass(frozen=True)
class LearningRates:
    """Peak learning rate of each part; None freezes the part."""

    projector: float | None = 1e-3
    """Peak learning rate of the projectors into the width of the language model; None freezes them."""
    towers: float | None = 1e-3
    """Peak learning rate of the vision encoders; None freezes them."""
    llm: float | None = 1e-3
    """Peak learning rate of the language model; None freezes it."""

    def __post_init__(self) -> None:
        for part in PARTS:
            rate = self.of(part)
            _require(
                rate is None or rate > 0, f"learning_rates.{part} is {rate}; it must be above 0, or None to freeze"
            )
        _require(any(self.of(part) is not None for part in PARTS), "learning_rates: every part is None, nothing trains")

    def of(self, part: Part) -> float | None:
        """The peak learning rate of `part`, or None if it is frozen."""
        rates: dict[Part, float | None] = {"projector": self.projector, "towers": self.towers, "llm": self.llm}
        return rates[part]


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW, the same for every part but for the learning rate."""

    learning_rates: LearningRates = field(default_factory=LearningRates)
    """Peak learning rate of each part."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW, for every trained parameter."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.95
    """Decay of AdamW's second moment."""
    epsilon: float = 1e-8
    """AdamW's term against division by zero."""
    clip_norm: float = 1.0
    """Largest L2 norm of the whole gradient; 0 leaves it as it is."""

    def __post_init__(self) -> None:
        _require(self.weight_decay >= 0, f"weight_decay is {self.weight_decay}; it must not be negative")
        _require(0 <= self.beta1 < 1, f"beta1 is {self.beta1}; it must lie in [0, 1)")
        _require(0 <= self.beta2 < 1, f"beta2 is {self.beta2}; it must lie in [0, 1)")
        _require(self.epsilon > 0, f"epsilon is {self.epsilon}; it must be above 0")
        _require(self.clip_norm >= 0, f"clip_norm is {self.clip_norm}; it must not be negative")


@dataclass(frozen=True)
class ScheduleSettings:
    """Linear warm-up, then half a cosine."""

    warmup_share: float = 0.03
    """Share of all steps in which the learning rate rises from 0 to its peak."""
    final_share: float = 0.0
    """Learning rate after the last step, as a share of the peak."""

    def __post_init__(self) -> None:
        _require(0 <= self.warmup_share < 1, f"warmup_share is {self.warmup_share}; it must lie in [0, 1)")
        _require(0 <= self.final_share <= 1, f"final_share is {self.final_share}; it must lie in [0, 1]")


@dataclass(frozen=True)
class Zero3Settings:
    """DeepSpeed ZeRO stage 3."""

    persistence_threshold: int = 0
    """Parameters of at most this many elements stay gathered on every worker between steps."""
    model_persistence_threshold: int = 100_000_000
    """At most this many elements stay gathered on every worker, all parameters together."""
    reduce_bucket: int = 50_000_000
    """Gradient elements that are reduced in one message."""
    prefetch_bucket: int = 50_000_000
    """Parameter elements that are gathered ahead of their use."""
    max_live_parameters: int = 1_000_000_000
    """Gathered parameter elements that may be alive at a time."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What rests in host memory instead of on the GPU: nothing, the optimizer state, or parameters as well."""

    def __post_init__(self) -> None:
        for name in ("persistence_threshold", "model_persistence_threshold"):
            _require(self.__dict__[name] >= 0, f"zero3.{name} is {self.__dict__[name]}; it must not be negative")
        for name in ("reduce_bucket", "prefetch_bucket", "max_live_parameters"):
            _require(self.__dict__[name] > 0, f"zero3.{name} is {self.__dict__[name]}; it must be above 0")


@dataclass(frozen=True)
class TrainingSettings:
    """One training: its size, its optimizer, and what it needs from the cluster."""

    workers: int = 2
    """Number of Ray Train workers, one process each (the world size). May change between restarts of a run."""
    min_workers: int | None = None
    """Elastic training: go on with any number of workers from this one to `workers`, as the cluster has room; None asks
    for exactly `workers`. The global batch stays the same."""
    resize_interval_s: float = 60.0
    """Elastic training: seconds between two looks at whether the cluster has room for more workers."""
    micro_batch: int = 8
    """Samples that one worker runs through the model at a time."""
    global_batch: int = 32
    """Samples of one optimizer step over all workers; a multiple of micro_batch."""
    batching: Literal["length", "plan"] = "length"
    """How a worker groups its samples of a step into micro-batches: by length, which pads less, or as they come."""
    epochs: int = 1
    """How often the data is passed."""
    seed: int = 0
    """Seed of the order of the data and of every random number in training."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of weights and activations (the optimizer keeps fp32 master weights either way)."""
    gradient_checkpointing: bool = False
    """Store only the input of every block and recompute the rest in the backward pass: less memory, more time."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    """AdamW and the learning rates."""
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    """Course of the learning rate."""
    zero3: Zero3Settings = field(default_factory=Zero3Settings)
    """DeepSpeed ZeRO-3."""
    checkpoint_every_steps: int = 100
    """Optimizer steps between two checkpoints; the last step always makes one."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay in storage; the best validated one stays as well."""
    upload_patience_s: float = 300.0
    """Seconds for which the upload of a checkpoint outlasts a store that fails; after that the training restarts from
    the last whole one."""
    validate_every_checkpoints: int = 1
    """Checkpoints between two validations on held-out samples, which run beside the training; 0 makes none."""
    validation_cpus: float = 1.0
    """Ray CPUs that a validation reserves."""
    validation_gpus: float = 0.0
    """Ray GPUs that a validation reserves."""
    validation_timeout_s: float = 1800.0
    """Seconds after which a validation is given up; the training does not wait for it."""
    log_every_steps: int = 10
    """Optimizer steps between two progress lines."""
    max_drop_share: float = 0.01
    """Largest share of faulty samples, judged over at least the first 1,000 samples (or all, if fewer); beyond it
    the job fails."""
    max_failures: int = 3
    """How often in a row, without a new checkpoint in between, failed workers are started again before the job fails.
    Faults of data or settings fail at once; a preemption is no failure."""
    preemption_grace_s: float = 30.0
    """Seconds that a preemption notice by SIGTERM leaves for a last checkpoint."""
    timeout_s: int = 600
    """Seconds after which a collective operation between the workers fails."""
    cpus_per_worker: float = 1.0
    """Ray CPUs that one worker reserves (leave some for the data tasks)."""
    gpus_per_worker: float = 0.0
    """Ray GPUs that one worker reserves; above 0 trains on GPUs over NCCL, 0 on CPUs over gloo."""
    threads_per_worker: int = 1
    """Torch threads in one worker on CPUs."""

    def __post_init__(self) -> None:
        counts = {
            "workers": self.workers,
            "micro_batch": self.micro_batch,
            "global_batch": self.global_batch,
            "epochs": self.epochs,
            "checkpoint_every_steps": self.checkpoint_every_steps,
            "keep_checkpoints": self.keep_checkpoints,
            "log_every_steps": self.log_every_steps,
            "timeout_s": self.timeout_s,
            "threads_per_worker": self.threads_per_worker,
        }
        for name, value in counts.items():
            _require(value >= 1, f"{name} is {value}; it must be at least 1")
        _require(0 <= self.max_drop_share <= 1, f"max_drop_share is {self.max_drop_share}; it must lie in [0, 1]")
        _require(self.cpus_per_worker >= 0, f"cpus_per_worker is {self.cpus_per_worker}; it must not be negative")
        _require(self.gpus_per_worker >= 0, f"gpus_per_worker is {self.gpus_per_worker}; it must not be negative")
        for name in ("max_failures", "validate_every_checkpoints", "validation_cpus", "validation_gpus"):
            _require(self.__dict__[name] >= 0, f"{name} is {self.__dict__[name]}; it must not be negative")
        for name in ("resize_interval_s", "upload_patience_s", "validation_timeout_s", "preemption_grace_s"):
            _require(self.__dict__[name] > 0, f"{name} is {self.__dict__[name]}; it must be above 0")
        _require(
            self.gpus_per_worker > 0 or self.zero3.offload == "none",
            f"zero3.offload is {self.zero3.offload!r} but gpus_per_worker is 0: on CPUs there is nothing to offload",
        )
        _require(
            self.global_batch % self.micro_batch == 0,
            f"micro_batch is {self.micro_batch}, which does not divide global_batch {self.global_batch}; choose it "
            f"from {_divisors(self.global_batch)}",
        )
        _require(
            self.workers <= self.micro_batches_per_step,
            f"workers is {self.workers}, but global_batch {self.global_batch} has only {self.micro_batches_per_step} "
            f"micro-batches of {self.micro_batch}: some workers would have none; use fewer workers or a smaller "
            "micro_batch",
        )
        _require(
            self.min_workers is None or 1 <= self.min_workers <= self.workers,
            f"min_workers is {self.min_workers}; it must lie in [1, workers = {self.workers}]",
        )

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches of one optimizer step, over all workers."""
        return self.global_batch // self.micro_batch

    @property
    def accumulation(self) -> int:
        """Micro-batches that every worker runs in one optimizer step.

        Where `workers` does not divide those of a step, some of them are empty.
        """
        return -(-self.micro_batches_per_step // self.workers)

    @property
    def spare_rows(self) -> int:
        """Void rows that the stream needs behind its end, so that it splits evenly whatever the number of workers."""
        fixed = self.min_workers is None or self.min_workers == self.workers
        return 0 if fixed and self.micro_batches_per_step % self.workers == 0 else self.workers * self.micro_batch

    def at_world(self, world: int) -> "TrainingSettings":
        """The same for `world` workers.

        `global_batch` counts the places of empty micro-batches, too, as DeepSpeed's own check of batch sizes wants it.
        """
        forwards = -(-self.micro_batches_per_step // world)
        nominal = self.micro_batch * forwards * world
        return replace(self, workers=world, min_workers=None, global_batch=nominal)

    @property
    def uses_gpu(self) -> bool:
        """Whether the workers train on GPUs."""
        return self.gpus_per_worker > 0


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@dataclass(frozen=True)
class DataSettings:
    """Where the samples come from, and how they are read."""

    manifest: str = ""
    """Address of the manifest of the shards (manifest.parquet), an s3:// URL or a local path."""
    weight: float = 1.0
    """How often the training split of this manifest is passed in an epoch: 2 takes every sample twice, 0.5 half of them
    (the other half in the next epoch)."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Further manifests whose training split is mixed in evenly: ADDRESS WEIGHT ADDRESS WEIGHT ... Held-out data,
    calibration and the tokenizer's text stay with the one above."""
    train_split: str = "train"
    """Split of the manifest to train on."""
    heldout_split: str = "heldout"
    """Split of the manifest for the held-out loss; its samples are never trained on."""
    heldout_samples: int = 64
    """Held-out samples for the loss at the end of training."""
    window_shards: int = 4
    """Consecutive shards of an epoch whose samples are shuffled together; in a mixture, of the dataset whose shards are
    used up fastest (the others get fewer)."""
    read_patience_s: float = 120.0
    """Seconds for which reading outlasts a storage that fails or restarts, counted from the first fault."""
    bad_shards: Literal["fail", "drop"] = "fail"
    """A shard that is missing, damaged, or not the one the manifest describes: stop, or drop all its samples as
    bad_shard, counted under max_drop_share."""
    max_length: int = 512
    """Longest sample in tokens, visual tokens included; longer samples are dropped as too_long."""
    data_task_cpus: float = 0.5
    """Ray CPUs that one data task (reading, decoding, encoding) reserves."""
    data_tasks: int = 2
    """Data tasks that run side by side."""

    def __post_init__(self) -> None:
        for name in ("heldout_samples", "window_shards", "max_length", "data_tasks"):
            _require(self.__dict__[name] >= 1, f"{name} is {self.__dict__[name]}; it must be at least 1")
        _require(self.read_patience_s >= 0, f"read_patience_s is {self.read_patience_s}; it must not be negative")
        _require(self.bad_shards in ("fail", "drop"), f"bad_shards is {self.bad_shards!r}; it must be 'fail' or 'drop'")
        for address, weight in {self.manifest or "data.manifest": self.weight, **self.mixture}.items():
            _require(0 < weight < math.inf, f"the weight of {address} is {weight}; it must be above 0")
        _require(
            self.manifest not in self.mixture,
            f"data.mixture holds {self.manifest!r}, which is data.manifest; raise data.weight instead",
        )
        _require("" not in self.mixture, "data.mixture holds an empty address; give that of a manifest")
        _require(self.data_task_cpus > 0, f"data_task_cpus is {self.data_task_cpus}; it must be above 0")
        _require(
            self.train_split != self.heldout_split,
            f"train_split and heldout_split are both {self.train_split!r}; held-out samples must not be trained on",
        )

    @property
    def others(self) -> tuple[tuple[str, float], ...]:
        """Address and weight of the further manifests in the order in which they are datasets 1, 2, ...: by address."""
        return tuple(sorted(self.mixture.items()))

    @property
    def weights(self) -> tuple[float, ...]:
        """Weight of every dataset."""
        return (self.weight, *(weight for _, weight in self.others))
