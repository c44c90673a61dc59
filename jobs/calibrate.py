#!/usr/bin/env python
"""Calibrate a model: `python jobs/calibrate.py --model models:/NAME@ALIAS`.

Measures the expected rank of every encoder's feature map at each boundary, distributed over shards; says how certain
the ranks and the token budgets made from them are, whether they hold on other data, and which lambda keeps a mean; with
--masking, what answers lose without each encoder.
Writes calibration.json and calibration.png beside the model and into MLflow.
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from jobs.command_line import Job
from jobs.settings import Device, Tracking, check_gpus, check_manifest, check_model, cluster_gpus
from pipelines.calibration.settings import CalibrateSettings


@dataclass(frozen=True)
class Calibrate:
    """One calibration."""

    settings: Annotated[CalibrateSettings, tyro.conf.arg(name="")]
    device: Device = "auto"
    """Where the copies of the model run; auto takes a GPU each where the cluster has any."""
    tracking: Tracking = field(default_factory=Tracking)
    """MLflow."""


def check(asked: Calibrate) -> None:
    """What can be wrong before anything is asked. Raises ValueError."""
    check_model(asked.settings.model, asked.tracking)
    check_manifest(asked.settings.manifest)
    check_gpus(asked.device, asked.settings.gpus)


def run(asked: Calibrate) -> None:
    """Measure, and say what was found."""
    from pipelines.calibration.job import calibrate  # here: it loads torch, which --help does not need

    gpus = cluster_gpus(asked.device, asked.settings.gpus)
    calibrate(replace(asked.settings, gpus=gpus), asked.tracking.uri)


JOB = Job("calibrate", Calibrate, run, __doc__, check=check, needs_ray=True)

if __name__ == "__main__":
    sys.exit(JOB.main())
