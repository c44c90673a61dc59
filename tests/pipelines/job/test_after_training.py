"""A job that is started again after MLflow was away does not export, answer or register twice."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
from mlflow import MlflowClient

from meteor_model.configuration_meteor import MeteorConfig
from pipelines.checkpoint.committed import CheckpointRef
from pipelines.checkpoint.state import TrainState
from pipelines.config.recipe import Recipe, TrackingSettings
from pipelines.evaluation.suite import ASKED_AS
from pipelines.io import storage
from pipelines.io.run_folder import RunFolder
from pipelines.io.sealed import DamagedFileError
from pipelines.job.answers import HeldoutAnswer, HeldoutAnswers, answer_heldout
from pipelines.job.export import export_run
from pipelines.job.register import POINTS_FILE, TrainedRun, register_run, undelivered_points
from pipelines.job.train import Training
from pipelines.registry.proof import Parity
from pipelines.registry.versions import RegisteredVersion
from pipelines.tracking.metric_points import MetricPoint, points_to_jsonl
from tests.pipelines.mlflow_fixture import MODEL_NAME, SUITE, Server, record, score_of

pytestmark = pytest.mark.stack

UNUSED = cast(Any, None)


@pytest.fixture
def checkpoint(tmp_path: Path) -> CheckpointRef:
    state = TrainState("hash", 2, 4, step=4, final={"heldout_loss": 1.5})
    return CheckpointRef(str(tmp_path / "step-4"), state)


def ended(last: CheckpointRef) -> Training:
    return Training(last, last, planned_samples=8)


def test_an_earlier_export_is_taken_whole_or_refused(exported: Path, tmp_path: Path, checkpoint: CheckpointRef) -> None:
    run_url = tmp_path / "run"
    shutil.copytree(exported, run_url / "export")
    storage.write_json(str(run_url / "exported.json"), {"checkpoint": checkpoint.url, "parity": 2e-6})
    found = export_run(Recipe(), RunFolder(str(run_url)), UNUSED, checkpoint)
    assert found.parity == Parity(2e-6)
    assert found.config.to_dict() == MeteorConfig.from_pretrained(exported).to_dict()
    (run_url / "export" / "config.json").write_text("{}")
    with pytest.raises(DamagedFileError, match=r"export/config\.json is damaged"):
        export_run(Recipe(), RunFolder(str(run_url)), UNUSED, checkpoint)
    other = dataclasses.replace(checkpoint, url=str(tmp_path / "step-5"))
    with pytest.raises(storage.ObjectMissingError, match="processor"):  # exported anew, for which all is missing here
        export_run(Recipe(), RunFolder(str(run_url)), UNUSED, other)


def test_earlier_answers_are_taken(tmp_path: Path, checkpoint: CheckpointRef) -> None:
    answer = HeldoutAnswer("a", "q", "e", "e", 1.0)
    run_url = tmp_path / "run"
    answers = HeldoutAnswers((answer,), {}, SUITE, score_of([record(0), record(1, right=False, nll=1 / 3)]))
    stored = {"checkpoint": checkpoint.url, **answers.to_dict()}
    storage.write_json(str(run_url / "answers.json"), {**stored, "asked_as": ASKED_AS})
    found = answer_heldout(Recipe(), RunFolder(str(run_url)), UNUSED, ended(checkpoint), {})
    assert found == answers
    # Those of code that asked otherwise than training does are not taken.
    storage.write_json(str(run_url / "answers.json"), stored)
    with pytest.raises(storage.ObjectMissingError, match="export"):  # asked anew, for which all is missing here
        answer_heldout(Recipe(), RunFolder(str(run_url)), UNUSED, ended(checkpoint), {})


def test_the_version_of_an_earlier_start_is_taken(
    server: Server, registered: RegisteredVersion, checkpoint: CheckpointRef
) -> None:
    recipe = Recipe(tracking=TrackingSettings(uri=server.uri, registered_model=MODEL_NAME))
    client = MlflowClient(server.uri)
    before = client.search_model_versions(f"name = '{MODEL_NAME}'")
    trained = TrainedRun(recipe, "adopt", "r", registered.run_id, "abc", ended(checkpoint), Parity(0.0), ())
    again = register_run(trained, UNUSED, HeldoutAnswers((), {}))
    newest = max(before, key=lambda item: int(item.version))
    assert again.version == int(newest.version)
    assert again.model_id == registered.model_id or again.version != registered.version
    assert len(client.search_model_versions(f"name = '{MODEL_NAME}'")) == len(before)
    assert int(client.get_model_version_by_alias(MODEL_NAME, "latest-adopt").version) == again.version
    client.delete_registered_model_alias(MODEL_NAME, "latest-adopt")


def test_what_the_last_checkpoint_holds_is_delivered(checkpoint: CheckpointRef) -> None:
    assert [point.name for point in undelivered_points(checkpoint)] == ["heldout_loss"]
    kept = [MetricPoint("loss", 0.5, 7, 3), MetricPoint("loss", 0.25, 8, 4)]
    storage.write_bytes(storage.join(checkpoint.url, POINTS_FILE), points_to_jsonl(kept).encode())
    *first, last = undelivered_points(checkpoint)
    assert first == kept
    assert (last.name, last.value, last.step) == ("heldout_loss", 1.5, 4)
