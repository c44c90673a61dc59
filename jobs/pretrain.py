"""Pre-train a pruned multi-encoder vision-language model, end to end: `ray job submit -- python jobs/pretrain.py`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.training_job import main

if __name__ == "__main__":
    sys.exit(main("pretrain", "Train from shards in object storage to a registered model."))
