"""Where benchmarks write what they found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
"""The folder of the results that belong to the repository."""


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write `results` as JSON and say so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written: {path}")
