"""What a calibration measures on what. The command line is made from it, so it imports no model."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Interval
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from pipelines.data.shards import BadShards
from pipelines.io.validation import settings_class

RELATIVE_TOLERANCE = 0.02
"""Half width of a mean's interval, as a share of the mean, at which images are enough."""


class CalibrationError(ValueError):
    """Ranks cannot be measured, read or compared; the message says which and why."""


@settings_class(error=CalibrationError)
class CalibrateSettings:
    """What is measured on what, and with what."""

    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, or the folder of a model that all nodes can read (also s3://)."""
    manifest: str = ""
    """Dataset: s3://BUCKET/PREFIX or a folder; by default the one that the registered version was trained on."""
    split: str = "train"
    """Split of the dataset."""
    samples: Annotated[int, Ge(2)] = 256
    """Images to measure: the first usable ones; all of the split's where it has fewer."""
    seed: int | None = None
    """Take shards in a random order of this seed, not in that of the manifest."""
    against: str = ""
    """Check for drift against MANIFEST[:SPLIT] (the same split by default) or an earlier calibration.json."""
    target_per_image: float | None = None
    """Visual tokens of an image that stage 3 shall keep on average, for which lambda is solved; by default the model's
    own target."""
    decode_split: str = "heldout"
    """Held-back split with the prompts for lambda."""
    decode_samples: NonNegativeInt = 64
    """Prompts to solve lambda on; as many others check it. 0 solves none."""
    masking: NonNegativeInt = 0
    """Questions of decode_split that are asked with all encoders and without each, which gives the usefulness of every
    encoder (pruning.encode.usefulness). 0 masks none."""
    tolerance: Annotated[float, Interval(gt=0, lt=1)] = RELATIVE_TOLERANCE
    """Images are enough when the mean's 95 % interval is within this share of it to either side."""
    output: str = ""
    """Folder or s3:// prefix for the result; by default MODEL-calibration, and MLflow alone for a registered model."""
    actors: PositiveInt = 1
    """Copies of the model that measure side by side."""
    batch: PositiveInt = 16
    """Images that one of them runs at a time."""
    cpus: NonNegativeFloat = 0.5
    """Ray CPUs that a task or a copy of the model reserves."""
    gpus: NonNegativeFloat = 0.0
    """GPUs that a copy of the model reserves; fractions of one too; 0 leaves it to device."""
    bad_shards: BadShards = "fail"
    """What to do with a shard that is missing or damaged: fail, or drop it and count its samples."""
    experiment: str = "meteor"
    """MLflow experiment for a model that is not registered."""

    def __post_init__(self) -> None:
        if self.decode_samples == 1:
            raise CalibrationError("decode_samples is 1; it must be 0 (no lambda) or at least 2")
        if self.target_per_image is not None and not self.decode_samples:
            raise CalibrationError("target_per_image is given and decode_samples is 0: no lambda would be solved")
