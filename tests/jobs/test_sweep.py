"""A sweep on a real Ray and a real MLflow: to its end, with faults in it, gone on with, and registered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import ray
from mlflow import MlflowClient
from PIL import Image
from ray.tune.result import DONE

from jobs.sweep import JOB
from pipelines.checkpoint.committed import latest_checkpoint
from pipelines.config.recipe import CalibrationSettings, ModelSettings, Recipe, TrackingSettings
from pipelines.config.settings import DataSettings, SettingsError, TrainingSettings
from pipelines.evaluation.evaluate import score_model
from pipelines.evaluation.suite import Suite
from pipelines.io import storage
from pipelines.registry.open import load_registered
from pipelines.registry.promotion import Terms, missing_evidence
from pipelines.registry.publish import register_model
from pipelines.registry.variants import measure_parity
from pipelines.registry.versions import Registry
from pipelines.tracking.mlflow_run import RunRequest, open_run
from tests.jobs.killing import ROOT, kill_when, own_environment
from tests.pipelines.mlflow_fixture import Server, free_port
from tests.tune.conftest import Bench, bench
from tune import redo
from tune import sweep as sweep_module
from tune.folder import sweep_folder
from tune.records import Records, TrialRecord, training_name
from tune.settings import SweepSettings
from tune.stopping import REPORT, Report
from tune.sweep import run_sweep
from tune.trial import EvaluateTrial, FinetuneTrial

__all__ = ["bench"]

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]
ESTIMATORS = ("effective", "energy")
LENIENT = Terms(max_unanswered=1.0, least_questions=1)


@dataclass(frozen=True)
class Place:
    """Where the sweeps of this module run."""

    settings: SweepSettings
    client: MlflowClient


@pytest.fixture(scope="module")
def place(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("sweep")
    server, dashboard = Server(folder, free_port()), free_port()
    patched = pytest.MonkeyPatch()
    # Ray frees what a training reserved whose driver is gone, and asks the dashboard whether it is.
    patched.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{dashboard}")
    ray.init(
        address="local", num_cpus=3, include_dashboard=True, dashboard_host="127.0.0.1", dashboard_port=dashboard,
        log_to_driver=False, logging_level="ERROR",
    )  # fmt: skip
    try:
        server.start()
        ranks = {
            estimator: {name: [{"mean": 4.0 + i, "std": 0.1} for i in range(3)] for name in bench.encoders}
            for estimator in ESTIMATORS
        }
        request = RunRequest(
            "meteor",
            "base",
            tags={"manifest": bench.manifest.url},
            documents={"ranks.json": {"images": 4, "ranks": ranks}},
        )
        run_id = open_run(server.uri, request).run_id
        register_model(bench.base, Registry(server.uri, "meteor"), aliases=("base",), run_id=run_id, tags={})
        settings = SweepSettings(
            model="models:/meteor@base",
            budgets=(8.0,),
            trials=4,
            questions=8,
            final_questions=8,
            finalists=1,
            portions=2,
            batch=4,
            calibration_samples=8,
            max_concurrent=1,  # Tune hands its actor the next trial: most of what one takes here is the actor's start
            storage=str(folder / "storage"),
            tracking=TrackingSettings(uri=server.uri),
        )
        yield Place(settings, MlflowClient(server.uri))
    finally:
        ray.shutdown()
        server.kill()
        patched.undo()


@pytest.fixture(scope="module")
def swept(place: Place) -> tuple[SweepSettings, dict[str, Any]]:
    """One trial raises, one ends its process, and the winners are registered."""

    class Faulty(EvaluateTrial):
        def advance(self) -> dict[str, Any]:
            if self.id == "search-001":
                raise ValueError("no such luck")
            if self.id == "search-002":
                os._exit(3)
            return super().advance()

    output = Path(place.settings.storage) / "out" / "sweep.json"
    # A margin that everything is within: a winner there is.
    settings = replace(place.settings, output=str(output), register=True, early_stopping=False, margin=9.0, name="both")
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sweep_module.TRIALS, "evaluate", Faulty)
        patched.setattr(sweep_module, "TRIAL_RETRIES", 0)
        result = run_sweep(settings)
    return settings, result


def test_every_trial_has_an_end_and_faults_stop_nothing(swept: tuple[SweepSettings, dict[str, Any]]) -> None:
    _, result = swept
    by_id = {trial["trial"]: trial for trial in result["trials"]}
    assert sorted(by_id) == [*(f"final-{i:03d}" for i in range(3)), *(f"search-{i:03d}" for i in range(4))]
    assert by_id["search-001"]["error"] == "ValueError: no such luck"
    assert by_id["search-002"]["status"] == by_id["search-001"]["status"] == "failed"
    assert {by_id[name]["status"] for name in by_id if name not in ("search-001", "search-002")} == {"completed"}
    assert [by_id[f"final-{i:03d}"]["of"] for i in range(3)] == ["search-000", "search-003", "dense"]
    assert result["paper"] == "search-000"


def test_nothing_is_left_running(swept: tuple[SweepSettings, dict[str, Any]]) -> None:
    require_all_free()


def require_all_free() -> None:
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != 3.0:
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.5)


def test_what_is_found(swept: tuple[SweepSettings, dict[str, Any]]) -> None:
    settings, result = swept
    trials = {trial["trial"]: trial for trial in result["trials"]}
    found = result["decision"]["budgets"]["8"]
    assert trials[found["trial"]]["kept_per_image"] <= 8
    assert result["suite"]["part"] == "search"
    assert result["final"]["part"] == "final"
    assert result["decision"]["cheapest"] == "final-001", "the one that costs less than the paper's settings"
    assert 0 < result["decision"]["saved"] < 1
    dense = next(one for one in result["decision"]["finalists"] if one["id"] == "final-002")
    assert dense["saved"] < 0
    assert trials["final-000"]["accuracy"] is not None
    assert trials["search-000"]["accuracy"] is None
    assert settings.output is not None
    written = Path(settings.output)
    assert json.loads(written.read_text()) == json.loads(json.dumps(result))
    assert redo.main([str(written)]) == 0, "every number of the decision comes from the records"
    for name in ("sweep-trials.png", "sweep-search.png", "sweep-finalists.png"):
        with Image.open(written.parent / name) as picture:
            assert picture.width > 500


def test_mlflow_holds_a_run_for_the_sweep_and_one_for_each_trial(
    place: Place, swept: tuple[SweepSettings, dict[str, Any]]
) -> None:
    _, result = swept
    parent = place.client.get_run(result["mlflow_run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["saved_share"] == pytest.approx(result["decision"]["saved"])
    names = {item.path for item in place.client.list_artifacts(parent.info.run_id, "pictures")}
    assert {"pictures/sweep-search.png", "pictures/sweep-finalists.md", "pictures/sweep-finalists.png"} <= names
    children = place.client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    by_name = {run.info.run_name: run for run in children}
    assert sorted(by_name) == sorted(trial["trial"] for trial in result["trials"])
    assert by_name["search-001"].info.status == "FAILED"
    assert by_name["search-001"].data.tags["error"] == "ValueError: no such luck"
    done = by_name["search-003"]
    assert done.info.status == "FINISHED"
    assert float(done.data.params["choices.fuse.share"]) <= 1
    assert done.data.params["choices.encode.rank_estimator"] in ESTIMATORS
    assert done.data.metrics["tflops"] > 0
    final = by_name["final-001"]
    assert final.data.tags["of"] == "search-003"
    assert final.data.metrics["ms_per_image"] > 0
    assert place.client.list_artifacts(final.info.run_id, "pictures")


def test_winners_are_versions_of_the_model_with_their_final_score(
    place: Place, swept: tuple[SweepSettings, dict[str, Any]]
) -> None:
    _, result = swept
    version = place.client.get_model_version_by_alias("meteor", "cheapest")
    told = result["registered"][f"models:/meteor/{version.version}"]
    assert (told["trial"], told["of"]) == ("final-001", "search-003")
    assert "cheapest" in told["aliases"]
    assert version.tags["trial"] == "search-003"
    assert version.tags["suite"] == result["final"]["digest"]
    assert version.tags["selected_on"].startswith(result["suite"]["digest"])
    assert missing_evidence(version, LENIENT) == []
    assert place.client.get_model_version_by_alias("meteor", "budget-8")


def test_a_sweep_that_was_cut_goes_on_and_another_begins_with_it(
    place: Place, swept: tuple[SweepSettings, dict[str, Any]]
) -> None:
    """As a kill leaves it: not marked as finished, a trial of each phase begun, one not yet told to MLflow."""
    settings, first = swept
    folder = sweep_folder(settings.storage, "both")
    storage.write_json(folder.facts, {**storage.read_json(folder.facts), "finished": False})
    records = Records(folder)
    cut = {
        name: records.update(name, status="started", score=None, objective=None, run_id=None)
        for name in ("search-003", "final-001")
    }
    records.update("search-000", run_id=None)
    again = run_sweep(replace(settings, register=False))
    assert again["mlflow_run_id"] == first["mlflow_run_id"]
    before, after = ({t["trial"]: t for t in r["trials"]} for r in (first, again))
    for name, record in cut.items():
        assert after[name]["choices"] == record.choices
        assert after[name]["objective"] == pytest.approx(before[name]["objective"], rel=1e-5)
    for name in set(before) - set(cut):
        assert after[name] == before[name], "what had ended is not run again"
    runs = place.client.search_runs(
        [place.client.get_run(again["mlflow_run_id"]).info.experiment_id],
        f"tags.`mlflow.parentRunId` = '{again['mlflow_run_id']}'",
    )
    assert len(runs) == len(after), "no run is made twice"

    warm = replace(settings, register=False, output=None, trials=1, name="warm", warm_start=("both",))
    begun = run_sweep(warm)
    searched = [trial["trial"] for trial in begun["trials"] if trial["trial"].startswith("search")]
    assert (searched, begun["paper"]) == (["search-000"], "both/search-000"), "what is known is not run again"
    assert set(begun["records"]["search"]["trials"]) == {"both/search-000", "both/search-003", "search-000"}
    assert {t["of"] for t in begun["trials"]} - {""} > {"both/search-000", "dense"}


def test_a_killed_sweep_goes_on_by_the_same_command(place: Place, tmp_path: Path) -> None:
    """SIGKILL of the driver and of its Ray, while trials are under way."""
    settings = {
        "model": "models:/meteor@base", "budgets": 8, "trials": 3, "questions": 8, "final-questions": 8,
        "finalists": 1, "portions": 2, "batch": 4, "calibration-samples": 8, "pictures": 0, "max-concurrent": 1,
        "name": "killed", "storage": tmp_path,
    }  # fmt: skip
    command = [
        sys.executable,
        "jobs/sweep.py",
        "--no-early-stopping",
        *(str(w) for name, value in settings.items() for w in (f"--{name}", value)),
    ]
    environment = {**own_environment(), "MLFLOW_TRACKING_URI": place.settings.tracking.uri}

    def trials(*statuses: str) -> dict[str, TrialRecord]:
        return {r.id: r for r in Records(sweep_folder(str(tmp_path), "killed")).all() if r.status in statuses}

    kill_when(lambda: bool(trials("completed") and trials("started")), command, environment, tmp_path / "log")
    ended, cut = trials("completed"), trials("started")
    assert ended
    assert cut
    second = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stdout[-3000:] + second.stderr[-1000:]
    assert "sweep killed (continued)" in second.stdout

    after = trials("completed")
    assert sorted(after) == [*(f"final-{i:03d}" for i in range(3)), *(f"search-{i:03d}" for i in range(3))]
    for name, record in ended.items():
        assert replace(after[name], run_id=None) == replace(record, run_id=None), "what had ended was run again"
    for name, record in cut.items():
        assert after[name].choices == record.choices
    (experiment,) = place.client.search_experiments(filter_string="name = 'meteor'")
    runs = place.client.search_runs([experiment.experiment_id], "attributes.run_name = 'killed'")
    (parent,) = runs
    children = place.client.search_runs(
        [experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    assert sorted(run.info.run_name for run in children) == sorted(after), "no run is made twice"
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}


def test_trials_that_train_side_by_side(place: Place, bench: Bench) -> None:
    """One is stopped at a checkpoint; the other is scored, and becomes a version with the weights that it trained."""

    class Held(FinetuneTrial):
        """The second is the worse, and reports after the first."""

        poll_s = 0.1

        def advance(self) -> dict[str, Any]:
            result = super().advance()
            if self.id == "search-001" and not result.get(DONE):
                other = training_name(self.context.sweep, "search-000")
                while (reached := latest_checkpoint(self.context.settings.storage, other)) is None or (
                    reached.state.step < 40
                ):
                    time.sleep(0.2)
                report = Report.from_json(result[REPORT])
                worse = Report(1e9, [value + 100 for value in report.values], report.groups)
                result[REPORT] = worse.to_json()
            return result

    train = Recipe(
        name="toy",
        model=ModelSettings(template="short"),
        data=DataSettings(manifest=bench.manifest.url, heldout_samples=8, data_tasks=1, data_task_cpus=0.25),
        training=TrainingSettings(
            workers=1, cpus_per_worker=0.5, micro_batch=4, global_batch=8, epochs=30, checkpoint_every_steps=20
        ),
        calibration=CalibrationSettings(samples=8, batch=8, decode_samples=8),
    )
    settings = replace(
        place.settings, kind="finetune", budgets=(64.0,), trials=2, max_concurrent=2, cpus_per_trial=0.5,
        name="trained", train=train, register=True,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sweep_module.TRIALS, "finetune", Held)
        result = run_sweep(settings)
    assert result["concurrent_trials"] == 2
    assert {trial["trial"]: trial["status"] for trial in result["trials"]} == {
        "search-000": "completed",
        "search-001": "stopped",
        "final-000": "completed",
    }
    require_all_free()

    uri = settings.tracking.uri
    (scored,) = (trial for trial in result["trials"] if trial["trial"] == "final-000")
    version = place.client.get_model_version_by_alias("meteor", "budget-64")
    assert missing_evidence(version, LENIENT) == []
    base = place.client.get_model_version_by_alias("meteor", "base").version
    assert {name: version.tags[name] for name in ("trial", "run_name", "recipe", "manifest", "start")} == {
        "trial": "search-000",
        "run_name": "trained-search-000",
        "recipe": "toy",
        "manifest": bench.manifest.url,
        "start": f"models:/meteor/{base}",
    }
    assert measure_parity(Registry(uri, "meteor"), int(version.version)).difference < 1e-3
    model, processor = load_registered("models:/meteor@budget-64", uri)
    suite = Suite.of(bench.manifest, "heldout", settings.final_questions)
    assert score_model(model, processor, suite.load(processor, 512), suite).answer_nll == pytest.approx(
        scored["answer_nll"], rel=1e-4
    )
    before, _ = load_registered("models:/meteor@base", uri)
    assert score_model(before, processor, suite.load(processor, 512), suite).answer_nll > scored["answer_nll"]


def test_what_cannot_be_swept(place: Place, swept: tuple[SweepSettings, dict[str, Any]]) -> None:
    settings, _ = swept
    with pytest.raises(SettingsError, match=r"(?s)begun with other settings.*trials: 4 -> 5"):
        run_sweep(replace(settings, trials=5))
    with pytest.raises(SettingsError, match="cannot hold one trial: it needs 64 CPUs"):
        run_sweep(replace(place.settings, cpus_per_trial=64.0))
    with pytest.raises(ValueError, match=r"has no alias 'latest-pretrain'; it has: base.*make pretrain"):
        run_sweep(replace(place.settings, model="models:/meteor@latest-pretrain"))

    class Hopeless(EvaluateTrial):
        def advance(self) -> dict[str, Any]:
            raise ValueError("no such luck")

    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sweep_module.TRIALS, "evaluate", Hopeless)
        with pytest.raises(SettingsError, match=r"(?s)none of 1 trials of sweep hopeless .*no such luck"):
            run_sweep(replace(place.settings, trials=1, name="hopeless"))


def test_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(*arguments: str) -> SweepSettings:
        return JOB.parse(arguments).settings

    assert parse("--budgets", "64", "128").budgets == (64.0, 128.0)
    assert parse().budgets == ()
    both = parse("--budgets", "8", "--trials", "3", "--train.training.workers", "1", "--warm-start", "first", "second")
    assert (both.budgets, both.trials, both.train.training.workers) == ((8.0,), 3, 1)
    assert both.warm_start == ("first", "second")
    with pytest.raises(ValueError, match=r"budgets"):
        parse("--budgets", "0")
