"""The registry and the metric outbox on MLflow's own store, in this process: no server is started."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipelines.io import storage
from pipelines.io.run_folder import RunFolder
from pipelines.registry.aliases import Move, alias_history, move_alias, roll_back
from pipelines.registry.versions import PinnedModel, Registry, find_version, pin_model, training_manifest
from pipelines.tracking.delivery import Sent, deliver_outbox
from pipelines.tracking.metric_logger import MetricLogger
from pipelines.tracking.metric_points import MetricPoint, write_points
from pipelines.tracking.mlflow_run import MlflowRun
from pipelines.tracking.server import TrackingError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> MlflowRun:
    """A run in a new store, whose tags name its data."""
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = MlflowClient(uri)
    experiment_id = client.create_experiment("plain", artifact_location=f"file://{folder / 'artifacts'}")
    opened = MlflowRun(uri, client.create_run(experiment_id).info.run_id, retry_s=0)
    opened.set_tags({"manifest": "s3://data"})
    return opened


@pytest.fixture(scope="module")
def registry(run: MlflowRun) -> Registry:
    """Three versions, the third with tags of its own."""
    made = Registry(run.uri, "meteor")
    made.client.create_registered_model("meteor")
    for _ in range(3):
        made.client.create_model_version("meteor", "file:///nowhere", run_id=run.run_id)
    made.describe_version(3, tags={"manifest": "s3://other", "hub_token": "hidden"}, description="x" * 6000)
    return made


def test_versions_are_found_by_number_alias_and_run(registry: Registry, run: MlflowRun) -> None:
    move_alias(registry, "found", 2)
    assert [int(version.version) for version in registry.versions(run.run_id)] == [1, 2, 3]
    assert registry.versions("f" * 32) == []
    assert (registry.resolve("found"), registry.resolve("3"), registry.target("found")) == (2, 3, 2)
    assert find_version("models:/meteor@found", registry.uri) == (registry, 2)
    assert registry.version(3).tags["hub_token"] == "(redacted)"
    assert (registry.version(3).description or "").endswith("(cut; the whole card is the model's README.md)")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("models:/none/1", "no registered model 'none'; there are: meteor"),
        ("models:/meteor@best", r"no alias 'best'; it has: .*\(version \d\)"),
        ("models:/meteor/77", "no version 77; it has: 1, 2, 3"),
        ("models:/meteor", "models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("models:/meteor/latest", "models:/NAME@ALIAS or models:/NAME/VERSION"),
    ],
)
def test_unknown_models_are_named(registry: Registry, model: str, message: str) -> None:
    move_alias(registry, "known", 1)
    with pytest.raises(TrackingError, match=message):
        find_version(model, registry.uri)


def test_a_version_names_its_data_or_its_run_does(registry: Registry) -> None:
    assert training_manifest(PinnedModel(registry.address(3), registry, 3)) == "s3://other"
    assert training_manifest(PinnedModel(registry.address(1), registry, 1)) == "s3://data"
    folder = pin_model("s3://models/mine/")
    assert (folder, training_manifest(folder)) == (PinnedModel("s3://models/mine"), "")


def test_an_alias_goes_back_the_way_it_came(registry: Registry) -> None:
    moves = [move_alias(registry, "champion", version) for version in (1, 3, 2)]
    assert moves == [Move("champion", None, 1), Move("champion", 1, 3), Move("champion", 3, 2)]
    registry.client.set_registered_model_alias("meteor", "champion", "1")  # by other means
    assert alias_history(registry.registered_model(), "champion") == [1, 3, 2, 1]
    back = [roll_back(registry, "champion").after for _ in range(3)]
    assert back == [2, 3, 1]
    with pytest.raises(TrackingError, match="points to version 1 and there is no version before"):
        roll_back(registry, "champion")
    assert "to version 1" in registry.version(3).tags["rolled_back.champion"]


def test_the_outbox_and_the_logger_store_a_step_once(run: MlflowRun, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    write_points(folder.outbox_points, [MetricPoint("loss", 1.0, 5, 1), MetricPoint("bad?name", 1.0, 5, 1)])
    write_points(folder.outbox_points, [MetricPoint("loss", 9.0, 9, 1), MetricPoint("loss", 2.0, 9, 2)])
    refused = (MetricPoint("bad?name", 1.0, 5, 1),)
    assert deliver_outbox(run.uri, run.run_id, folder.url) == Sent(2, 1, refused)
    assert deliver_outbox(run.uri, run.run_id, folder.url) == Sent(0, 0, ())
    assert [name.split("/")[0] for name in storage.list_files(folder.outbox)] == ["refused-points"]

    logger = MetricLogger(run.run_id, run.uri, folder.url)
    for step in (2, 3):
        logger.log({"loss": 7.0}, step)
    report = logger.close(30)
    assert (report.delivered, report.repeated, report.undelivered) == (1, 1, 0)
    history = MlflowClient(run.uri).get_metric_history(run.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 2.0), (3, 7.0)]
