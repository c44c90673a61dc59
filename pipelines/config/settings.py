"""Settings of training and of its data: frozen dataclasses that check themselves.

The command line is made from these classes, so every field has one line of documentation under it. Its range stands in
its type; what several fields must have in common stands in `__post_init__`. Every fault is an error that names the
setting and the numbers.
"""

from __future__ import annotations

import math
import re
from dataclasses import field, replace
from typing import Annotated, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, StringConstraints

from meteor_model.limits import MAX_CHARACTERS, ImageLimits
from pipelines.io.validation import Share, ShareBelowOne, settings_class

Part = Literal["projector", "towers", "llm"]
"""The parts of the model that have a learning rate of their own."""

NodeLabel = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$")]
"""Value of a label of a Ray node."""
PARTS: tuple[Part, ...] = ("projector", "towers", "llm")


class SettingsError(ValueError):
    """A setting is out of range, or contradicts another one; the message names both and the numbers."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SettingsError(message)


@settings_class("training.optimizer.learning_rates", SettingsError)
class LearningRates:
    """Peak learning rate of each part; None freezes the part."""

    projector: PositiveFloat | None = 1e-3
    """Peak learning rate of the projectors into the width of the language model; None freezes them."""
    towers: PositiveFloat | None = 1e-3
    """Peak learning rate of the vision encoders; None freezes them."""
    llm: PositiveFloat | None = 1e-3
    """Peak learning rate of the language model; None freezes it."""

    def __post_init__(self) -> None:
        _require(
            any(self.of(part) is not None for part in PARTS),
            "training.optimizer.learning_rates: every part is None, nothing trains; give one of them a rate",
        )

    def of(self, part: Part) -> float | None:
        """The peak learning rate of `part`, or None if it is frozen."""
        rates: dict[Part, float | None] = {"projector": self.projector, "towers": self.towers, "llm": self.llm}
        return rates[part]


@settings_class("training.optimizer", SettingsError)
class OptimizerSettings:
    """AdamW, the same for every part but for the learning rate."""

    learning_rates: LearningRates = field(default_factory=LearningRates)
    """Peak learning rate of each part."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of AdamW, for every trained parameter."""
    beta1: ShareBelowOne = 0.9
    """Decay of AdamW's first moment."""
    beta2: ShareBelowOne = 0.95
    """Decay of AdamW's second moment."""
    epsilon: PositiveFloat = 1e-8
    """AdamW's term against division by zero."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest L2 norm of the whole gradient; 0 leaves it as it is."""


@settings_class("training.schedule", SettingsError)
class ScheduleSettings:
    """Linear warm-up, then half a cosine."""

    warmup_share: ShareBelowOne = 0.03
    """Share of all steps in which the learning rate rises from 0 to its peak."""
    final_share: Share = 0.0
    """Learning rate after the last step, as a share of the peak."""


@settings_class("training.zero3", SettingsError)
class Zero3Settings:
    """DeepSpeed ZeRO stage 3."""

    persistence_threshold: NonNegativeInt = 0
    """Parameters of at most this many elements stay gathered on every worker between steps."""
    model_persistence_threshold: NonNegativeInt = 100_000_000
    """At most this many elements stay gathered on every worker, all parameters together."""
    reduce_bucket: PositiveInt = 50_000_000
    """Gradient elements that are reduced in one message."""
    prefetch_bucket: PositiveInt = 50_000_000
    """Parameter elements that are gathered ahead of their use."""
    max_live_parameters: PositiveInt = 1_000_000_000
    """Gathered parameter elements that may be alive at a time."""
    secondary_partition: PositiveInt = 1
    """Workers, those of a node, that hold all weights once more among them, so that the backward pass gathers them
    without leaving the node (hierarchical partitioning, ZeRO++); it divides workers. 1 holds them once."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What rests in host memory instead of on the GPU: nothing, the optimizer state (its step then runs on the CPU), or
    parameters as well."""


@settings_class("training.lora", SettingsError)
class LoraSettings:
    """Low-rank adapters on the language model, in place of its own weights; merged into them at export."""

    rank: PositiveInt | None = None
    """Rank of the adapters, which learn at optimizer.learning_rates.llm while the model's own weights are frozen; None
    trains without adapters."""
    alpha: PositiveInt = 32
    """Scale of the adapters: their product counts alpha / rank times."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers of the language model that get one, by the last part of their names."""

    def __post_init__(self) -> None:
        _require(bool(self.targets), "training.lora.targets is empty; name layers such as q_proj, or set rank to None")
        for target in self.targets:
            _require(
                re.fullmatch(r"\w+", target) is not None,
                f"training.lora.targets has {target!r}; give the last part of a layer's name, such as q_proj",
            )

    @property
    def scale(self) -> float | None:
        """What the product of an adapter's matrices is multiplied by; None without adapters."""
        return None if self.rank is None else self.alpha / self.rank


@settings_class("training", SettingsError)
class TrainingSettings:
    """One training: its size, its optimizer, and what it needs from the cluster."""

    workers: PositiveInt = 2
    """Number of Ray Train workers, one process each (the world size). May change between restarts of a run."""
    min_workers: PositiveInt | None = None
    """Elastic training: go on with any number of workers from this one to `workers`, as the cluster has room; None asks
    for exactly `workers`. The global batch stays the same."""
    resize_interval_s: PositiveFloat = 60.0
    """Elastic training: seconds between two looks at whether the cluster has room for more workers."""
    micro_batch: PositiveInt = 8
    """Samples that one worker runs through the model at a time."""
    global_batch: PositiveInt = 32
    """Samples of one optimizer step over all workers; a multiple of micro_batch."""
    batching: Literal["length", "plan", "packed"] = "length"
    """How a worker groups its samples of a step into micro-batches. length: by length, which pads less. plan: as they
    come. packed: several in a row of up to data.max_length tokens, none of which sees another; hardly any padding, the
    same loss."""
    epochs: PositiveInt = 1
    """How often the data is passed."""
    seed: int = 0
    """Seed of the order of the data and of every random number in training."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of weights and activations (the optimizer keeps fp32 master weights either way)."""
    gradient_checkpointing: bool = False
    """Store only the input of every block and recompute the rest in the backward pass: less memory, more time."""
    loss_chunk: PositiveInt | None = None
    """Supervised tokens whose logits are in memory at a time: the head runs on them alone, chunk by chunk, in training
    and for held-out losses. None makes the logits of every token at once. The loss is the same to rounding, not to the
    bit; the recipes of large vocabularies set 1024."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    """AdamW and the learning rates."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """Adapters on the language model."""
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    """Course of the learning rate."""
    zero3: Zero3Settings = field(default_factory=Zero3Settings)
    """DeepSpeed ZeRO-3."""
    checkpoint_every_steps: PositiveInt = 100
    """Optimizer steps between two checkpoints; the last step always makes one."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints that stay in storage; the best validated one stays as well."""
    upload_patience_s: PositiveFloat = 300.0
    """Seconds for which the upload of a checkpoint outlasts a store that fails; after that the training restarts from
    the last whole one."""
    validate_every_checkpoints: NonNegativeInt = 1
    """Checkpoints between two validations on held-out samples, which run beside the training; 0 makes none. A
    checkpoint that comes while a validation runs is passed over, and the next one after it is validated."""
    validation_cpus: NonNegativeFloat = 1.0
    """Ray CPUs that a validation reserves."""
    validation_gpus: NonNegativeFloat | None = None
    """Ray GPUs that a validation reserves, beside those of the workers; None: 1 where the workers train on GPUs."""
    validation_timeout_s: PositiveFloat | None = None
    """Seconds after which a validation is given up; the training does not wait for it. None: half an hour, and what a
    model of this size takes on a slow machine."""
    validation_wait_s: NonNegativeFloat = 300.0
    """Seconds after the last step for which the job waits for a validation that still runs; then it is given up."""
    log_every_steps: PositiveInt = 10
    """Optimizer steps between two progress lines."""
    max_drop_share: Share = 0.01
    """Largest share of faulty samples, judged over at least the first 1,000 samples (or all, if fewer); beyond it
    the job fails."""
    max_failures: NonNegativeInt = 3
    """How often in a row, without a new checkpoint in between, failed workers are started again before the job fails.
    Faults of data or settings fail at once; a preemption is no failure."""
    preemption_grace_s: PositiveFloat = 30.0
    """Seconds that a preemption notice by SIGTERM leaves for a last checkpoint."""
    stuck_after_s: PositiveFloat = 120.0
    """Seconds without a sign of life of a process, or without progress of the workers (there at least ten times their
    slowest step), after which what is stuck is ended and started again; while they start, what timeout_s says."""
    timeout_s: PositiveInt = 600
    """Seconds after which a collective operation between the workers fails, and, five times stuck_after_s at least, a
    part of their start counts as stuck."""
    room_wait_s: NonNegativeFloat = 900.0
    """Seconds for which a start of the workers waits for nodes to join, where all nodes together have too little room
    for them; then the job ends with an error. What others hold is waited for without a limit, and said."""
    cpus_per_worker: NonNegativeFloat = 1.0
    """Ray CPUs that one worker reserves (leave some for the data tasks)."""
    gpus_per_worker: NonNegativeFloat = 0.0
    """Ray GPUs that one worker reserves: 1 trains on GPUs over NCCL, 0 on CPUs over gloo."""
    placement: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = "PACK"
    """Where Ray puts the workers. PACK: on as few nodes as it can; STRICT_PACK: on one node, or not at all; SPREAD: on
    as many as it can; STRICT_SPREAD: each on another node, or not at all."""
    node_labels: dict[str, NodeLabel] = field(default_factory=dict)
    """Labels that a node must have to get a worker: NAME VALUE NAME VALUE ..., such as ray.io/accelerator-type H100,
    which Ray itself sets."""
    threads_per_worker: PositiveInt = 1
    """Torch threads in one worker on CPUs."""

    def __post_init__(self) -> None:
        _require(
            self.lora.rank is None or self.optimizer.learning_rates.llm is not None,
            f"training.lora.rank is {self.lora.rank}, but training.optimizer.learning_rates.llm is None: adapters "
            "learn at that rate; give one, or set training.lora.rank to None",
        )
        _require(
            self.gpus_per_worker in (0.0, 1.0),
            f"training.gpus_per_worker is {self.gpus_per_worker:g}, but a worker is one process that trains on a whole "
            "GPU of its own: two cannot share one, and a second one would idle. Give 1 (and more training.workers for "
            "more GPUs), or 0 for CPUs",
        )
        _require(
            self.global_batch % self.micro_batch == 0,
            f"training.micro_batch is {self.micro_batch}, which does not divide training.global_batch "
            f"{self.global_batch}; choose it from {_divisors(self.global_batch)}",
        )
        _require(
            self.workers <= self.micro_batches_per_step,
            f"training.workers is {self.workers}, but training.global_batch {self.global_batch} has only "
            f"{self.micro_batches_per_step} micro-batches of {self.micro_batch}: some workers would have none; use "
            "fewer workers or a smaller training.micro_batch",
        )
        _require(
            self.workers % self.zero3.secondary_partition == 0,
            f"training.zero3.secondary_partition is {self.zero3.secondary_partition}, which does not divide "
            f"training.workers {self.workers}: give the number of workers of one node, or 1",
        )
        _require(
            self.min_workers is None or self.min_workers <= self.workers,
            f"training.min_workers is {self.min_workers}; it must be in [1, training.workers = {self.workers}]",
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

    def at_world(self, world: int) -> TrainingSettings:
        """The same for `world` workers.

        `global_batch` counts the places of empty micro-batches, too, as DeepSpeed's own check of batch sizes wants it.
        """
        forwards = -(-self.micro_batches_per_step // world)
        nominal = self.micro_batch * forwards * world
        zero3 = replace(self.zero3, secondary_partition=math.gcd(self.zero3.secondary_partition, world))
        return replace(self, workers=world, min_workers=None, global_batch=nominal, zero3=zero3)

    @property
    def gpus_per_validation(self) -> float:
        """GPUs that a validation reserves."""
        return float(self.uses_gpu) if self.validation_gpus is None else self.validation_gpus

    @property
    def uses_gpu(self) -> bool:
        """Whether the workers train on GPUs."""
        return self.gpus_per_worker > 0


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@settings_class("data.limits", SettingsError)
class SampleLimits:
    """The most that is accepted of one sample; above it the sample is dropped, with its reason."""

    image_bytes: PositiveInt = ImageLimits.bytes
    """Bytes of an image file."""
    image_pixels: PositiveInt = ImageLimits.pixels
    """Pixels of an image, by its header."""
    image_aspect: PositiveInt = ImageLimits.aspect
    """Longer side of an image by its shorter one."""
    jpeg_scans: PositiveInt = ImageLimits.scans
    """Scans of a JPEG, each of which costs a pass over all pixels; encoders write about ten."""
    characters: PositiveInt = MAX_CHARACTERS
    """Characters of all turns of a conversation."""

    @property
    def image(self) -> ImageLimits:
        """Those of one image."""
        return ImageLimits(self.image_bytes, self.image_pixels, self.image_aspect, self.jpeg_scans)


@settings_class("data", SettingsError)
class DataSettings:
    """Where the samples come from, and how they are read."""

    manifest: str = ""
    """Address of the manifest of the shards (manifest.parquet), an s3:// URL or a local path."""
    weight: PositiveFloat = 1.0
    """How often the training split of this manifest is passed in an epoch: 2 takes every sample twice, 0.5 half of them
    (the other half in the next epoch)."""
    mixture: dict[str, PositiveFloat] = field(default_factory=dict)
    """Further manifests whose training split is mixed in evenly: ADDRESS WEIGHT ADDRESS WEIGHT ... Held-out data,
    calibration and the tokenizer's text stay with the one above."""
    train_split: str = "train"
    """Split of the manifest to train on."""
    heldout_split: str = "heldout"
    """Split of the manifest for the held-out loss; its samples are never trained on."""
    heldout_samples: PositiveInt = 64
    """Held-out samples for the loss at the end of training."""
    window_shards: PositiveInt = 4
    """Consecutive shards of an epoch whose samples are shuffled together; in a mixture, of the dataset whose shards are
    used up fastest (the others get fewer)."""
    read_patience_s: NonNegativeFloat = 120.0
    """Seconds for which reading outlasts a storage that fails or restarts, counted from the first fault."""
    bad_shards: Literal["fail", "drop"] = "fail"
    """A shard that is missing, damaged, or not the one the manifest describes: stop, or drop all its samples as
    bad_shard, counted under max_drop_share."""
    max_length: PositiveInt = 512
    """Longest sample in tokens, visual tokens included."""
    too_long: Literal["truncate", "drop", "fail"] = "truncate"
    """What becomes of longer samples. truncate: whole exchanges go from the end, then the end of the first reply, never
    a part of a question or of an image. drop: they are passed over. fail: the job stops and names the first. Truncated
    and dropped ones are counted, and apart from faulty ones."""
    limits: SampleLimits = field(default_factory=SampleLimits)
    """The most that is accepted of one sample in training."""
    data_task_cpus: PositiveFloat = 0.5
    """Ray CPUs that one data task (reading, decoding, encoding) reserves."""
    data_tasks: PositiveInt = 2
    """Data tasks that run side by side."""

    def __post_init__(self) -> None:
        _require(
            self.manifest not in self.mixture,
            f"data.mixture holds {self.manifest!r}, which is data.manifest; raise data.weight instead",
        )
        _require("" not in self.mixture, "data.mixture holds an empty address; give that of a manifest")
        _require(
            self.train_split != self.heldout_split,
            f"data.train_split and data.heldout_split are both {self.train_split!r}; held-out samples must not be "
            "trained on",
        )

    @property
    def others(self) -> tuple[tuple[str, float], ...]:
        """Address and weight of the further manifests in the order in which they are datasets 1, 2, ...: by address."""
        return tuple(sorted(self.mixture.items()))

    @property
    def weights(self) -> tuple[float, ...]:
        """Weight of every dataset."""
        return (self.weight, *(weight for _, weight in self.others))
