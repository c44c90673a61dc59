"""What a process pays for before it does anything: modules that hold values or talk to MLflow or S3 load no model code.

A module that is heavier than its line says is named, with the library that it brought along.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = ("torch", "transformers")
SERVICES = (*MODEL, "mlflow", "ray", "pandas", "scipy.stats")

LIGHT: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("pipelines.registry.tags", SERVICES),
    ("pipelines.io.redact", SERVICES),
    ("pipelines.io.storage", SERVICES),
    ("pipelines.tracking.metric_points", SERVICES),
    ("pipelines.tracking.metric_logger", SERVICES),
    ("pipelines.evaluation.scores", SERVICES),
    ("pipelines.evaluation.suite", SERVICES),
    ("pipelines.registry.folder", SERVICES),
    ("pipelines.registry.card", SERVICES),
    ("pipelines.data.shards", SERVICES),
    ("pipelines.io.console", SERVICES),
    ("jobs.make_parts", SERVICES),
    ("jobs.make_shards", SERVICES),
    ("jobs.calibrate", SERVICES),
    ("jobs.evaluate", SERVICES),
    ("jobs.predict", SERVICES),
    ("jobs.predict_shards", SERVICES),
    ("jobs.register", SERVICES),
    ("jobs.serve", SERVICES),
    ("jobs.visualize", SERVICES),
    ("pipelines.checkpoint.committed", MODEL),
    ("pipelines.tracking.server", MODEL),
    ("pipelines.tracking.delivery", MODEL),
    ("pipelines.tracking.mlflow_run", MODEL),
    ("pipelines.tracking.run_tracker", MODEL),
    ("pipelines.registry.versions", MODEL),
    ("pipelines.registry.aliases", MODEL),
    ("pipelines.registry.scores", MODEL),
    ("pipelines.registry.promotion", MODEL),
    ("pipelines.registry.tables", MODEL),
)
"""Module, and the libraries that its import must not bring along; lightest first, since all are imported in turn."""

COMPOSER: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("pipelines.data.sources.scenes", (*SERVICES, "pyarrow", "pydantic", "annotated_types", "emoji", "matplotlib")),
)
"""What composes scenes where the model alone is installed."""

NO_IMAGE = ("torchvision", "transformers", "timm")
DATA_TASK: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("meteor_model.sample_encoder", SERVICES),
    ("pipelines.data.stream", MODEL),
    ("pipelines.checkpoint.local", MODEL),
    ("meteor_model.images", NO_IMAGE),
)
"""What a process loads that reads, decodes and encodes samples: torch, for the resizing, and nothing of the model."""

IMPORT_IN_TURN = """
import importlib, json, sys
found, seen = [], set()
for module, forbidden in json.load(sys.stdin):
    importlib.import_module(module)
    there = {name for name in forbidden if name in sys.modules}
    found += [f"{module} loads {name}" for name in sorted(there - seen)]
    seen |= there
print(json.dumps(found))
"""


def heavy_imports(table: tuple[tuple[str, tuple[str, ...]], ...]) -> list[str]:
    """What the table forbids and its modules load nevertheless, in a process of their own."""
    command = [sys.executable, "-c", IMPORT_IN_TURN]
    done = subprocess.run(command, input=json.dumps(table), capture_output=True, text=True, cwd=ROOT, check=True)
    found: list[str] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def test_light_modules_load_no_heavy_library() -> None:
    assert heavy_imports(LIGHT) == []


def test_data_tasks_load_no_model_library() -> None:
    assert heavy_imports(DATA_TASK) == []


def test_scenes_are_composed_without_the_libraries_of_training() -> None:
    assert heavy_imports(COMPOSER) == []


def test_a_heavy_module_is_named() -> None:
    planted = (("json", SERVICES), ("mlflow.utils.credentials", ("mlflow",)), ("json", ("mlflow",)))
    assert heavy_imports(planted) == ["mlflow.utils.credentials loads mlflow"]
