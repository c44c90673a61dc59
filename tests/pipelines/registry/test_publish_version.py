"""A proven folder becomes a version with its evidence, on MLflow's own store in this process: no server is started."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipelines.registry import publish
from pipelines.registry.open import load_model
from pipelines.registry.scores import load_score, stored_scores
from pipelines.registry.tags import PARITY_TAG
from pipelines.registry.variants import register_variant
from pipelines.registry.versions import PinnedModel, Registry
from pipelines.tracking.server import TrackingError
from tests.pipelines.mlflow_fixture import SUITE, record, score_of, tiny_pruning

RECORDS = [record(number) for number in range(4)]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return Registry(f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}", "meteor")


@pytest.fixture(scope="module")
def run_id(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> str:
    client = MlflowClient(registry.uri)
    artifacts = f"file://{tmp_path_factory.mktemp('artifacts')}"
    return str(client.create_run(client.create_experiment("plain", artifact_location=artifacts)).info.run_id)


def test_a_folder_under_another_pruning_becomes_a_version(registry: Registry, exported: Path, run_id: str) -> None:
    score = score_of(RECORDS, tiny_pruning(20))
    made = register_variant(
        str(exported), tiny_pruning(20), score, ranks=None, registry=registry, aliases=("budget-20", "champion"),
        run_id=run_id, tags={"git_commit": "abc"}, suite=SUITE,
    )  # fmt: skip
    assert made.aliases == ("budget-20", "champion")
    assert {registry.target(alias) for alias in made.aliases} == {made.version}
    version = registry.version(made.version)
    assert float(version.tags[PARITY_TAG]) <= 1e-5
    assert list(stored_scores(version)) == [SUITE.digest]
    assert load_score(registry, version, SUITE.digest) == score


def test_no_alias_moves_to_a_version_without_its_score(
    registry: Registry, exported: Path, run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(exported, tmp_path / "model")

    def away(*arguments: object) -> None:
        raise TrackingError("the store is full")

    monkeypatch.setattr(publish, "store_score", away)
    with pytest.raises(TrackingError, match="full"):
        publish.publish_version(
            folder, registry, run_id=run_id, tags={}, score=score_of(RECORDS), suite=SUITE, aliases=("half",)
        )
    with pytest.raises(TrackingError, match="no alias 'half'"):
        registry.target("half")


def test_a_model_is_loaded_wherever_it_lies(exported: Path) -> None:
    model, processor = load_model(PinnedModel(str(exported)))
    assert not model.training
    assert processor.tokens_per_image == model.config.tokens_per_image
