#!/usr/bin/env python
"""Fine-tune a registered or stored model, end to end: `ray job submit --working-dir . -- python jobs/finetune.py`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.training_job import training_job

JOB = training_job("finetune", "Train on from a registered or stored model, end to end, to a registered version.")

if __name__ == "__main__":
    sys.exit(JOB.main())
