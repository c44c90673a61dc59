"""A planted secret is in no file that a run leaves and in nothing that it prints, whatever goes wrong."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from jobs.command_line import Job
from jobs.recipes import recipe
from pipelines.config.recipe import Recipe
from pipelines.data.shards import Manifest
from pipelines.io import console, storage
from pipelines.io.run_folder import run_folder
from pipelines.job import run as run_module
from pipelines.job.names import ChosenRun, RunFacts
from pipelines.tracking.server import TrackingAwayError

PLANTED = "Xq7-pl@nted/pw"
TOKEN = "hf_" + "PlantedPlantedPlantedPlanted12"
MANIFEST = Manifest("s3://bucket/data/manifest.parquet", (), {})
UNUSED = cast(Any, None)
NOBODY = f"http://me:{PLANTED}@127.0.0.1:9"


def settings(root: Path) -> Recipe:
    base = recipe("pretrain", "tiny")
    return replace(
        base,
        tracking=replace(base.tracking, uri=NOBODY, when_down="buffer", patience_s=0.0),
        model=replace(base.model, parts_dir=f"https://{TOKEN}@host/parts"),
        run=replace(base.run, storage=str(root / "storage"), name="r", output=str(root / "output")),
    )


def work(given: Recipe) -> None:
    """A run up to its training, with an MLflow that is away, libraries that print addresses, and a fault at the end."""
    run_module.check_places(given)
    facts = RunFacts.begun(given, "pretrain", [MANIFEST])
    chosen = ChosenRun("r", facts, continued=False)
    run = run_module._open(given, "pretrain", chosen, [MANIFEST], UNUSED)
    console.keep_log(run.folder.logs)
    try:
        print(f"View run r at: {NOBODY}/#/experiments/1")
        os.write(2, f"native code: AWS_SECRET_ACCESS_KEY={TOKEN}\n".encode())
        logging.getLogger("pipelines.tracking").warning("no answer of %s", NOBODY)
        run.tracker.log_documents({"recipe.json": given.to_dict(), "note.json": {"uri": NOBODY}})
        run.tracker.deliver()
    finally:
        run.tracker.stop()


def test_no_file_and_no_line_has_the_secret(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOBODY)
    log = tmp_path / "output" / "pretrain.log"
    job = Job("pretrain", Recipe, work, "", log=lambda _: log)
    with pytest.raises(TrackingAwayError) as caught, console.quiet(log):
        job._work(settings(tmp_path))
    printed = capfd.readouterr()
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    names = {path.name for path in files}
    assert {"run.json", "recipe.json", "0001.json", "note.json", "pretrain.log"} <= names
    assert [name for name in names if name.endswith("-pretrain.log")], "the log is kept with the run"
    for secret in (PLANTED, PLANTED.replace("@", "%40"), TOKEN):
        assert [str(path) for path, data in files.items() if secret.encode() in data] == []
        assert secret not in printed.out + printed.err
        assert secret not in str(caught.value)
    stored = storage.read_json(run_folder(str(tmp_path / "storage"), "r").recipe)
    assert stored["tracking"]["uri"] == "http://(redacted)@127.0.0.1:9"
