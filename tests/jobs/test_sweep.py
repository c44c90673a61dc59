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

from jobs.sweep import JOB, Sweep, check
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
from tune import sweep as sweep_module
from tune.folder import sweep_folder
from tune.records import Records, TrialRecord, training_name
from tune.settings import SweepSettings
from tune.sweep import run_sweep
from tune.trial import POLL_S, EvaluateTrial, FinetuneTrial

__all__ = ["bench"]

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]
ESTIMATORS = ("effective", "energy")


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
            trials=3,
            questions=8,
            portions=2,
            batch=4,
            calibration_samples=8,
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
    """Both modes, one trial of the budget raises, one ends its process, and the winner is registered."""

    class Faulty(EvaluateTrial):
        def advance(self) -> dict[str, Any]:
            if self.id == "budget-8-001":
                raise ValueError("no such luck")
            if self.id == "budget-8-002":
                os._exit(3)
            return super().advance()

    output = Path(place.settings.storage) / "out" / "sweep.json"
    settings = replace(place.settings, pareto=True, trials=3, output=str(output), register=True, name="both")
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sweep_module.TRIALS, "evaluate", Faulty)
        patched.setattr(sweep_module, "TRIAL_RETRIES", 0)
        result = run_sweep(settings)
    return settings, result


def test_every_trial_has_an_end_and_faults_stop_nothing(swept: tuple[SweepSettings, dict[str, Any]]) -> None:
    _, result = swept
    by_id = {trial["trial"]: trial for trial in result["trials"]}
    assert sorted(by_id) == sorted(
        [f"budget-8-{i:03d}" for i in range(3)]
        + [f"front-{i:03d}" for i in range(3)]
        + [f"defaults-{i:03d}" for i in range(5)]
    )
    assert by_id["budget-8-001"]["error"] == "ValueError: no such luck"
    assert by_id["budget-8-002"]["status"] == by_id["budget-8-001"]["status"] == "failed"
    assert all(by_id[name]["status"] == "completed" for name in by_id if not name.startswith("budget"))
    assert all(by_id[f"budget-8-{i:03d}"]["status"] in ("completed", "stopped") for i in (0,))


def test_nothing_is_left_running(swept: tuple[SweepSettings, dict[str, Any]]) -> None:
    require_all_free()


def require_all_free() -> None:
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != 3.0:
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.5)


def test_what_is_found(swept: tuple[SweepSettings, dict[str, Any]]) -> None:
    settings, result = swept
    best = result["best_per_budget"]["8"]
    assert best["kept_per_image"] <= 8
    assert best["answer_nll_interval"]["low"] <= best["answer_nll"] <= best["answer_nll_interval"]["high"]
    within = [t for t in result["trials"] if t["status"] == "completed" and t["kept_per_image"] <= 8]
    assert best["objective"] == max(t["objective"] for t in within)
    front = result["fronts"]["tflops"]
    assert set(front["hypervolume"]) == {"front", "defaults"}
    assert all(0 <= share <= 1 for share in front["hypervolume_share"].values())
    costs = {t["trial"]: t["tflops"] for t in result["trials"]}
    assert [costs[name] for name in front["front"]] == sorted(costs[name] for name in front["front"])
    assert settings.output is not None
    written = Path(settings.output)
    assert json.loads(written.read_text()) == json.loads(json.dumps(result))
    for name in ("sweep-trials.png", "sweep-front.png", "sweep-budgets.png"):
        with Image.open(written.parent / name) as picture:
            assert picture.width > 500


def test_mlflow_holds_a_run_for_the_sweep_and_one_for_each_trial(
    place: Place, swept: tuple[SweepSettings, dict[str, Any]]
) -> None:
    _, result = swept
    parent = place.client.get_run(result["mlflow_run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["hypervolume_tflops_front"] >= 0
    names = {item.path for item in place.client.list_artifacts(parent.info.run_id, "pictures")}
    assert {"pictures/sweep-front.png", "pictures/sweep-front.md", "pictures/sweep-budgets.png"} <= names
    children = place.client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    by_name = {run.info.run_name: run for run in children}
    assert sorted(by_name) == sorted(trial["trial"] for trial in result["trials"])
    assert by_name["budget-8-001"].info.status == "FAILED"
    assert by_name["budget-8-001"].data.tags["error"] == "ValueError: no such luck"
    done = by_name["front-000"]
    assert done.info.status == "FINISHED"
    assert float(done.data.params["choices.fuse.share"]) <= 1
    assert done.data.params["choices.encode.rank_estimator"] in ESTIMATORS
    assert done.data.metrics["tflops"] > 0
    assert place.client.list_artifacts(done.info.run_id, "pictures")


def test_the_winner_is_a_version_of_the_model(place: Place, swept: tuple[SweepSettings, dict[str, Any]]) -> None:
    _, result = swept
    version = place.client.get_model_version_by_alias("meteor", "budget-8")
    (told,) = result["registered"].items()
    assert told[0] == f"models:/meteor/{version.version}"
    assert told[1] == {"trial": result["best_per_budget"]["8"]["trial"], "aliases": ["budget-8"]}
    assert version.tags["trial"] == told[1]["trial"]


def test_a_sweep_that_was_cut_goes_on(place: Place, swept: tuple[SweepSettings, dict[str, Any]]) -> None:
    """As a kill leaves it: not marked as finished, one trial begun, one not yet told to MLflow."""
    settings, first = swept
    folder = sweep_folder(settings.storage, "both")
    storage.write_json(folder.facts, {**storage.read_json(folder.facts), "finished": False})
    records = Records(folder)
    cut = records.update("front-002", status="started", score=None, objective=None, run_id=None)
    records.update("front-001", run_id=None)
    again = run_sweep(replace(settings, register=False))
    assert again["mlflow_run_id"] == first["mlflow_run_id"]
    before, after = ({t["trial"]: t for t in r["trials"]} for r in (first, again))
    assert after["front-002"]["choices"] == cut.choices
    assert after["front-002"]["objective"] == pytest.approx(before["front-002"]["objective"], rel=1e-5)
    for name in set(before) - {"front-002"}:
        assert after[name] == before[name], "what had ended is not run again"
    runs = place.client.search_runs(
        [place.client.get_run(again["mlflow_run_id"]).info.experiment_id],
        f"tags.`mlflow.parentRunId` = '{again['mlflow_run_id']}'",
    )
    assert len(runs) == len(after), "no run is made twice"


def test_a_killed_sweep_goes_on_by_the_same_command(place: Place, tmp_path: Path) -> None:
    """SIGKILL of the driver and of its Ray, while trials are under way."""
    settings = {
        "model": "models:/meteor@base", "budgets": 8, "trials": 4, "questions": 8, "portions": 2, "batch": 4,
        "calibration-samples": 8, "pictures": 0, "max-concurrent": 2, "name": "killed",
        "storage": tmp_path,
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
    assert sorted(after) == [f"budget-8-{number:03d}" for number in range(4)]
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

        def advance(self) -> dict[str, Any]:
            result = super().advance()
            if self.id == "budget-64-001" and not result.get(DONE):
                other = training_name(self.context.sweep, "budget-64-000")
                while (reached := latest_checkpoint(self.context.settings.storage, other)) is None or (
                    reached.state.step < 60
                ):
                    time.sleep(0.5)
                time.sleep(3 * POLL_S)
                result["objective"] -= 100
            return result

    train = Recipe(
        name="toy",
        model=ModelSettings(template="short"),
        data=DataSettings(manifest=bench.manifest.url, heldout_samples=8, data_tasks=1, data_task_cpus=0.25),
        training=TrainingSettings(
            workers=1, cpus_per_worker=0.5, micro_batch=4, global_batch=8, epochs=60, checkpoint_every_steps=30
        ),
        calibration=CalibrationSettings(samples=8, batch=8, decode_samples=8),
    )
    settings = replace(
        place.settings, kind="finetune", budgets=(64.0,), trials=2, cpus_per_trial=0.5, name="trained", train=train,
        register=True,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sweep_module.TRIALS, "finetune", Held)
        result = run_sweep(settings)
    assert result["concurrent_trials"] == 2
    assert {trial["trial"]: trial["status"] for trial in result["trials"]} == {
        "budget-64-000": "completed",
        "budget-64-001": "stopped",
    }
    require_all_free()

    uri, scored = settings.tracking.uri, result["best_per_budget"]["64"]
    version = place.client.get_model_version_by_alias("meteor", "budget-64")
    lacking = missing_evidence(version, Terms(max_unanswered=1.0, least_questions=1))
    assert ["part 'search'" in text for text in lacking] == [True], "nothing else is missing"
    base = place.client.get_model_version_by_alias("meteor", "base").version
    assert {name: version.tags[name] for name in ("trial", "run_name", "recipe", "manifest", "start")} == {
        "trial": "budget-64-000",
        "run_name": "trained-budget-64-000",
        "recipe": "toy",
        "manifest": bench.manifest.url,
        "start": f"models:/meteor/{base}",
    }
    assert measure_parity(Registry(uri, "meteor"), int(version.version)).difference < 1e-3
    model, processor = load_registered("models:/meteor@budget-64", uri)
    suite = Suite.of(bench.manifest, "heldout", settings.questions, part="search")
    assert score_model(model, processor, suite.load(processor, 512), suite).answer_nll == pytest.approx(
        scored["answer_nll"], rel=1e-4
    )
    before, _ = load_registered("models:/meteor@base", uri)
    assert score_model(before, processor, suite.load(processor, 512), suite).answer_nll > scored["answer_nll"]


def test_what_cannot_be_swept(place: Place, swept: tuple[SweepSettings, dict[str, Any]]) -> None:
    settings, _ = swept
    with pytest.raises(SettingsError, match=r"(?s)begun with other settings.*trials: 3 -> 5"):
        run_sweep(replace(settings, trials=5))
    with pytest.raises(SettingsError, match="cannot hold one trial: it needs 64 CPUs"):
        run_sweep(replace(place.settings, cpus_per_trial=64.0))
    with pytest.raises(ValueError, match=r"has no alias 'latest-pretrain'; it has: base.*make pretrain"):
        run_sweep(replace(place.settings, model="models:/meteor@latest-pretrain"))
    with pytest.raises(ValueError, match="the suite asks 99"):
        run_sweep(replace(place.settings, questions=99))

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
    assert not parse("--budgets", "64", "128").pareto
    assert parse("--pareto").pareto
    both = parse("--budgets", "8", "--pareto", "--trials", "3", "--train.training.workers", "1")
    assert (both.budgets, both.pareto, both.trials, both.train.training.workers) == ((8.0,), True, 3, 1)
    with pytest.raises(ValueError, match=r"budgets"):
        parse("--budgets", "0")
    with pytest.raises(SettingsError, match="nothing to search"):
        check(Sweep(parse()))
