"""A driver that never gets past row 64, to be killed: `python -m tests.pipelines.training.driver ROOT RUN`."""

import sys
from pathlib import Path

import ray

from pipelines.training.trainer import fit
from tests.pipelines.training.stand_in import make_job

STUCK_ROW = 64

if __name__ == "__main__":
    root, run_name = sys.argv[1:]
    ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    fit(make_job(Path(root), run_name, stuck_at=STUCK_ROW))
