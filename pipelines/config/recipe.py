"""A recipe: everything that one run needs to know, as one typed value that checks itself."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, field, replace
from typing import Any, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from meteor_model.architectures import Architecture, architecture, build_config
from meteor_model.chat import chat_template
from meteor_model.configuration_meteor import DecodePruning, EncodePruning, FusePruning, PruningConfig
from meteor_model.decoder.packed import check_fusion, plan_packed
from pipelines.config.settings import DataSettings, SampleLimits, SettingsError, TrainingSettings
from pipelines.data.sources.openmoji import OpenMojiSettings
from pipelines.io.fingerprint import sha256
from pipelines.io.names import Name
from pipelines.io.redact import redact
from pipelines.io.validation import settings_class

OPERATION = (
    *("workers", "min_workers", "resize_interval_s", "micro_batch", "timeout_s", "cpus_per_worker", "gpus_per_worker"),
    *("threads_per_worker", "max_failures", "preemption_grace_s", "log_every_steps", "checkpoint_every_steps"),
    *("keep_checkpoints", "upload_patience_s", "validate_every_checkpoints", "validation_cpus", "validation_gpus"),
    *(
        "validation_timeout_s",
        "validation_wait_s",
        "room_wait_s",
        "max_drop_share",
        "stuck_after_s",
        "placement",
        "node_labels",
        "loss_chunk",
    ),
)
"""Training settings that may change when a run goes on: what is trained stays the same up to rounding."""


@settings_class("model", SettingsError)
class ModelSettings:
    """What the model is made of and where its weights start."""

    architecture: str = "tiny"
    """Named architecture: towers and LLM (meteor_model/architectures.py)."""
    start: str | None = None
    """Model to start from: models:/NAME@ALIAS, models:/NAME/VERSION, or a stored one (s3://.../runs/NAME/export or a
    local folder); None starts from the architecture and the pretrained parts that it names."""
    weights: dict[str, str] = field(default_factory=dict)
    """Sources of pretrained parts in place of those that the architecture names, by encoder or llm: a hub id, a folder,
    a safetensors file, or parts:NAME (meteor_model/weights/, pipelines/parts)."""
    parts_dir: str = field(default_factory=lambda: os.environ.get("METEOR_PARTS_DIR", ""))
    """Cache of parts:NAME on the machine that runs the job; by default METEOR_PARTS_DIR, or the stack's local state."""
    template: str = "vicuna_v1"
    """Chat template: plain, vicuna_v1, short or chatml."""
    vocab_size: PositiveInt = 512
    """Tokens of the BPE tokenizer that is trained on the run's texts, where none comes with pretrained parts."""
    seed: int = 0
    """Seed of random weights."""

    def __post_init__(self) -> None:
        chat_template(self.template)
        if self.start is None:
            self.pretrained()

    def pretrained(self) -> Architecture:
        """The architecture with the sources of these settings. Raises ValueError for a part that it does not have."""
        base = architecture(self.architecture)
        return replace(base, weights={**base.weights, **self.weights})


@settings_class("calibration", SettingsError)
class CalibrationSettings:
    """What is measured on a few samples: ranks before training, lambda after it."""

    samples: PositiveInt = 64
    """Images on which the ranks of the feature maps are measured."""
    batch: PositiveInt = 16
    """Images that one calibration task runs at a time."""
    decode_samples: PositiveInt = 64
    """Prompts on which lambda is solved for pruning.decode.target_mean."""


@settings_class("tracking", SettingsError)
class TrackingSettings:
    """MLflow: where runs are tracked and models registered."""

    uri: str = field(default_factory=lambda: os.environ.get("MLFLOW_TRACKING_URI", ""))
    """Address of the MLflow server; by default the environment's MLFLOW_TRACKING_URI."""
    experiment: str = "meteor"
    """Experiment that the run is filed under."""
    registered_model: Name = "meteor"
    """Name under which the trained model is registered."""
    parity_tolerance: NonNegativeFloat | None = None
    """Largest difference between the registered model's logits and the training model's, given the visual tokens that
    it kept. None allows 1e-3 where both compute in fp32, and 1/16 of the largest logit where one computes in bf16.
    Weights must be equal bit by bit whatever this says."""
    when_down: Literal["fail", "buffer"] = "fail"
    """What to do where MLflow does not answer at the start. fail: an error before anything starts. buffer: train
    without it; all records are kept with the run in storage and delivered when it answers, at the latest before the
    model is registered. In the middle of a run, records are buffered either way."""
    patience_s: NonNegativeFloat = 60.0
    """Seconds for which a request to MLflow at the start and the end of a run is repeated before the run stops."""


@settings_class("run", SettingsError)
class RunSettings:
    """Name and place of one run."""

    storage: str = field(default_factory=lambda: os.environ.get("METEOR_STORAGE", ""))
    """Root of all data and runs, s3://bucket/prefix or a path that every node sees; by default METEOR_STORAGE."""
    name: Name | None = None
    """Name of the run. A name that exists goes on where it stopped. None continues the last unfinished run of this job
    and recipe, or begins a new one."""
    output: str | None = None
    """Folder of the machine that runs the job where the summary and the pictures are written as well."""
    pictures: NonNegativeInt = 3
    """Held-out images for which the kept tokens are drawn."""
    export: Literal["best", "last"] = "last"
    """Checkpoint that becomes the exported, registered model. best: the one with the lowest held-out loss of those that
    were validated (training.validate_every_checkpoints) and the last."""
    export_precision: Literal["as_trained", "fp32", "bf16"] = "as_trained"
    """Number format of the exported weights, in which they are served and scored, too. as_trained: that of
    training.precision; a bf16 training has fp32 masters, which fp32 exports at twice the size."""
    resume_step: PositiveInt | None = None
    """Optimizer step of the checkpoint to go on from, once; newer ones are set aside. None goes on from the newest
    whole one. It also brings a run back whose list of checkpoints is lost."""


def _default_pruning() -> PruningConfig:
    return PruningConfig(
        EncodePruning(totals=(96, 64, 64)), FusePruning(keep=32), DecodePruning(layer=2, target_mean=16.0)
    )


@settings_class(error=SettingsError)
class Recipe:
    """One run: model, pruning, data, training, calibration, tracking."""

    name: Name = "tiny"
    """Name of the recipe."""
    model: ModelSettings = field(default_factory=ModelSettings)
    """What the model is made of and where its weights start."""
    pruning: PruningConfig = field(default_factory=_default_pruning)
    """The three stages."""
    data: DataSettings = field(default_factory=DataSettings)
    """Where the samples come from, and how they are read."""
    source: OpenMojiSettings = field(default_factory=OpenMojiSettings)
    """The shards that are made first where data.manifest is empty."""
    training: TrainingSettings = field(default_factory=TrainingSettings)
    """Size, optimizer and resources of the training."""
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    """What is measured before and after training."""
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    """MLflow."""
    run: RunSettings = field(default_factory=RunSettings)
    """Name and place of the run."""

    def __post_init__(self) -> None:
        if self.run.export == "best" and not self.training.validate_every_checkpoints:
            raise SettingsError(
                "run.export is best, but training.validate_every_checkpoints is 0, so none would be validated: set it "
                "to 1 or more, or run.export to last"
            )
        packed = self.training.batching == "packed"
        if packed:
            check_fusion(self.pruning.fuse)
        if self.model.start is None:  # a pulled model is checked when it is there
            built = build_config(self.model.architecture, self.pruning, self.model.vocab_size, {}, image_token_id=0)
            if packed:
                plan_packed(built.text_config)

    @property
    def export_precision(self) -> Literal["fp32", "bf16"]:
        """Number format of the exported weights."""
        return self.training.precision if self.run.export_precision == "as_trained" else self.run.export_precision

    def to_dict(self) -> dict[str, Any]:
        """Every setting, nested, as plain values, without secrets: what is stored, logged and shown of a recipe."""
        plain: dict[str, Any] = redact(json.loads(json.dumps(asdict(self))))
        return plain

    def identity(self) -> dict[str, Any]:
        """The settings that decide what is trained: all but names, places, and how the cluster is used.

        Two runs of one name must agree in it.
        """
        plain = self.to_dict()
        for where, keys in {
            "model": ("parts_dir",),
            "run": ("name", "output", "storage", "pictures", "export", "export_precision", "resume_step"),
            "tracking": tuple(plain["tracking"]),
            "training": OPERATION,
            "data": ("data_task_cpus", "data_tasks", "read_patience_s", "bad_shards"),
        }.items():
            for key in keys:
                plain[where].pop(key)
        del plain["training"]["zero3"]["secondary_partition"]  # where weights rest, not what is trained
        if plain["data"]["too_long"] == "truncate":  # so that runs from before this setting go on
            del plain["data"]["too_long"]
        if self.data.limits == SampleLimits():  # younger than runs that are stored
            plain["data"].pop("limits")
        plain["pruning"] = json.loads(json.dumps(self.pruning.as_stored()))
        if self.training.lora.rank is None:  # the same; what the others say then trains nothing
            plain["training"].pop("lora")
        return plain

    def digest(self) -> str:
        """Short hash of `identity()`."""
        return sha256(json.dumps(self.identity(), sort_keys=True))[:12]  # not canonical JSON: stored runs hold it
