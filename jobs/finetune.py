"""Fine-tune a registered or stored model, end to end: `ray job submit -- python jobs/finetune.py`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.training_job import main

if __name__ == "__main__":
    sys.exit(main("finetune", "Train on from a registered or stored model, to a registered one."))
