"""The whole path on real servers: shards, Ray Data, ZeRO-3 on two workers, MLflow, registry, and an answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from infra.services import Stack, full_env
from pipelines.io import sealed, storage
from pipelines.registry.promotion import Terms, missing_evidence
from pipelines.registry.scores import stored_scores
from tests.stack_fixture import applied

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--source.code-points", "64", "--source.heldout-code-points", "16", "--data.heldout-samples", "32",
    "--calibration.samples", "16", "--calibration.decode-samples", "16", "--run.pictures", "1",
    "--training.checkpoint-every-steps", "8", "--training.micro-batch", "8", "--training.global-batch", "16",
)  # fmt: skip

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]


def submit(stack: Stack, job: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit --working-dir . -- python jobs/JOB.py ...`, as a user types it."""
    ray = str(Path(sys.executable).parent / "ray")
    command = [ray, "job", "submit", "--working-dir", ".", "--", "python", f"jobs/{job}.py", *arguments]
    environment = {**full_env(stack), "RAY_LOGGER_LEVEL": "warning", "RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def pretrained(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("latest")
    done = submit(stack, "pretrain", "--run.name", "first", "--run.output", str(output), *SMALL)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return {**summary, "output": output, "printed": done.stdout, "errors": done.stderr}


def test_the_summary_says_what_happened(pretrained: dict[str, Any]) -> None:
    assert pretrained["world_size"] == 2
    assert pretrained["samples_expected"] == pretrained["samples_seen"] == 256
    assert pretrained["steps"] == 16
    assert pretrained["dropped"] == {} or not any(pretrained["dropped"].values())
    assert pretrained["loss_last"] < pretrained["loss_first"]
    assert pretrained["parity_max_abs_diff"] < 1e-3
    tokens = pretrained["visual_tokens"]
    assert {name: part["in"] for name, part in tokens["encode"].items()} == dict.fromkeys(
        ("clip", "pix2struct", "convnext"), 64
    )
    assert sum(part["kept_per_boundary"][-1] for part in tokens["encode"].values()) == tokens["fuse"]["in"] == 64
    assert tokens["fuse"]["kept"] == 32
    assert 1 <= tokens["decode_kept_per_image"] <= 32
    for phase in ("prepare", "calibrate", "train", "export", "answer", "register", "total"):
        assert pretrained["wall_s"][phase] > 0
    assert pretrained["heldout_loss"] > 0
    assert pretrained["heldout_loss_shuffled_images"] > 0
    assert "Ray dashboard" in pretrained["printed"]
    assert "step 16/16" in pretrained["printed"]


LENIENT = Terms(max_unanswered=1.0, least_questions=1)
NOISE = ("Loading weights", "Progress bars disabled", "View run", "warnings.warn", "INFO mlflow", "accelerator", "pid=")
"""What Ray, transformers, MLflow and DeepSpeed print; `pid=` stands before every line that Ray forwards."""


def test_a_bf16_training_is_exported_and_registered(stack: Stack, tmp_path: Path) -> None:
    from pipelines.registry.variants import measure_parity
    from pipelines.registry.versions import Registry

    done = submit(
        stack, "pretrain", "--run.name", "halved", "--training.precision", "bf16", "--run.output", str(tmp_path),
        "--tracking.registered-model", "halved", *SMALL,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["parity_precision"] == "bf16"
    assert "bf16" in done.stdout
    with applied(stack):
        exported = sealed.read_document("s3://meteor/runs/halved/exported.json")["parity"]
        assert exported["exported"] == "bf16"
        assert exported["weights"] > 100
        assert exported["agreement"] > 0.99
        assert exported["difference"] <= exported["allowed"]
        registry = Registry(stack.mlflow_uri, "halved")
        assert measure_parity(registry, 1).precision == "bf16"
        assert not [fault for fault in missing_evidence(registry.version(1)) if "parity" in fault]


def test_what_is_printed_concerns_the_user(stack: Stack, pretrained: dict[str, Any]) -> None:
    printed = [*pretrained["printed"].splitlines(), *pretrained["errors"].splitlines()]
    assert len(printed) <= 80, "\n".join(printed)
    assert [line for line in printed if any(noise in line for noise in NOISE)] == []
    assert "[meteor" not in pretrained["printed"]
    log = pretrained["output"] / "pretrain.log"
    assert f"log            {log}" in pretrained["printed"]
    logged = log.read_text()
    assert "pid=" in logged
    assert "Loading weights" in logged
    own = [line for line in pretrained["printed"].splitlines() if line.startswith(("[", "  ", "step "))]
    assert [line for line in own if line not in logged and "ray job" not in line] == []
    with applied(stack):
        (kept,) = storage.list_files("s3://meteor/runs/first/logs")
        assert "step 16/16" in storage.read_bytes(f"s3://meteor/runs/first/logs/{kept}").decode()


def test_a_failing_job_shows_its_cause(stack: Stack) -> None:
    done = submit(stack, "pretrain", "--data.manifest", "s3://meteor/nothing-here", *SMALL)
    assert done.returncode == 1
    printed = [*done.stdout.splitlines(), *done.stderr.splitlines()]
    (first, *_) = (number for number, line in enumerate(printed) if line.startswith("error: "))
    assert "nothing-here" in printed[first]
    assert "log: " in printed[first + 1]
    assert not [line for line in printed if "Traceback" in line]
    (start, *_) = (number for number, line in enumerate(printed) if line.startswith("Running entrypoint"))
    assert len(printed[start:]) <= 40, "\n".join(printed)  # Ray's command shows what the job printed a second time


def test_pictures_are_there_for_every_stage(pretrained: dict[str, Any]) -> None:
    names = sorted(path.name for path in (pretrained["output"] / "pictures").iterdir())
    assert [name.rsplit("-", 1)[-1] for name in names] == [
        "decode.png",
        "encode.png",
        "fuse.png",
        "overview.png",
        "loss.png",
        "ranks.png",
    ]
    for path in (pretrained["output"] / "pictures").iterdir():
        assert min(Image.open(path).size) > 200


def test_mlflow_holds_parameters_metrics_and_documents(stack: Stack, pretrained: dict[str, Any]) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(stack.mlflow_uri)
    run = client.get_run(pretrained["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["training.global_batch"] == "16"
    assert len(run.data.tags["manifest_sha256"]) == 64
    history = client.get_metric_history(pretrained["run_id"], "loss")
    assert [point.step for point in history][-1] == 16
    assert any(name.startswith("system/") for name in run.data.metrics)
    found = {item.path for item in client.list_artifacts(pretrained["run_id"])}
    assert {"recipe.json", "ranks.json", "pictures", "heldout_answers.json"} <= found
    version = client.get_model_version_by_alias("meteor", "latest-pretrain")
    assert f"models:/meteor/{version.version}" == pretrained["model_uri"]
    assert version.tags["visual_tokens.fuse"] == "64 > 32"
    assert missing_evidence(version, LENIENT) == [], "in 16 steps it may learn to say nothing"
    (stored,) = stored_scores(version).values()
    asked = stored.score.questions
    assert asked == pretrained["heldout_answers"] > 8
    assert stored.suite is not None
    assert stored.suite.part == "final"
    assert round((stored.score.accuracy or 0) * asked) == pretrained["heldout_answers_right"]
    for expected in (
        version.tags["manifest_sha256"],
        "CC BY-SA 4.0",
        f"| {asked} x heldout of {version.tags['manifest']}",
    ):
        assert expected in version.description


def test_a_fresh_process_with_the_registry_s_address_alone_answers(
    stack: Stack, pretrained: dict[str, Any], tmp_path: Path
) -> None:
    picture = tmp_path / "red.png"
    Image.new("RGB", (64, 64), (220, 30, 30)).save(picture)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MLFLOW_", "METEOR_"))}
    env["MLFLOW_TRACKING_URI"] = stack.mlflow_uri
    command = [
        sys.executable, str(ROOT / "jobs" / "predict.py"), "--model", pretrained["model_alias_uri"],
        "--image", str(picture), "--prompt", "What color is the background?",
    ]  # fmt: skip
    asked = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.strip()


def test_a_finished_run_is_not_trained_again(in_stack: Stack, pretrained: dict[str, Any]) -> None:
    from jobs.pretrain import JOB
    from pipelines.job.datasets import ensure_shards
    from pipelines.job.names import choose_run

    same = JOB.parse(["--run.name", "first", *SMALL]).settings
    manifests = ensure_shards(same)
    chosen = choose_run(same, "pretrain", manifests)
    assert (chosen.name, chosen.facts.finished) == ("first", True)
    other = JOB.parse(["--run.name", "first", *SMALL, "--training.seed", "5"]).settings
    with pytest.raises(ValueError, match=r"training\.seed: 0 -> 5"):
        choose_run(other, "pretrain", manifests)
    with pytest.raises(ValueError, match="job: 'pretrain' -> 'finetune'"):
        choose_run(same, "finetune", manifests)


def test_finetune_goes_on_from_the_registered_model(stack: Stack, pretrained: dict[str, Any], tmp_path: Path) -> None:
    done = submit(stack, "finetune", "--run.output", str(tmp_path), *SMALL)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["model_alias_uri"] == "models:/meteor@latest-finetune"
    assert summary["loss_first"] < pretrained["loss_first"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tracking.uri", "http://127.0.0.1:9"), "127.0.0.1:9"),
        (("--run.storage", "s3://no-such-bucket"), "no-such-bucket"),
        (("--data.manifest", "s3://meteor/nothing-here"), "nothing-here"),
        (("--data.train-split", "training"), "has no split 'training'; it has: heldout, train"),
    ],
)
def test_wrong_places_fail_at_once_and_are_named(in_stack: Stack, arguments: tuple[str, ...], message: str) -> None:
    """Before anything is started, on the driver: no need to go through a submitted job."""
    from jobs.pretrain import JOB
    from pipelines.config.recipe import Recipe
    from pipelines.job.datasets import ensure_shards
    from pipelines.job.run import check_places

    def prepare(recipe: Recipe) -> None:
        check_places(recipe)
        ensure_shards(recipe)

    with pytest.raises(ValueError, match=message):
        prepare(JOB.parse([*SMALL, *arguments]).settings)


def test_the_best_checkpoint_of_a_finished_run_is_exported_answers_and_is_registered(
    in_stack: Stack, pretrained: dict[str, Any], tmp_path: Path
) -> None:
    """The run's only validated checkpoint is made the best by its record: in 16 steps the last one always is."""
    from mlflow import MlflowClient

    from pipelines.io import storage
    from pipelines.io.run_folder import run_folder
    from pipelines.registry.variants import measure_parity
    from pipelines.registry.versions import Registry

    record = run_folder(os.environ["METEOR_STORAGE"], "first").best_record
    best = storage.read_json(record)
    assert best["step"] == 8
    assert best["metrics"]["heldout_loss"] == best["loss"] > pretrained["heldout_loss"]
    sealed.write_document(record, {**best, "loss": 0.5, "metrics": {**best["metrics"], "heldout_loss": 0.5}})
    done = submit(
        in_stack, "pretrain", "--run.name", "first", "--run.export", "best", "--run.output", str(tmp_path), *SMALL
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["exported_step"], summary["steps"], summary["heldout_loss"]) == (8, 16, 0.5)
    assert summary["parity_max_abs_diff"] < 1e-3
    assert summary["loss_last"] == pretrained["loss_last"]
    assert summary["model_uri"] != pretrained["model_uri"]
    client = MlflowClient(in_stack.mlflow_uri)
    versions = {
        uri: client.get_model_version("meteor", uri.rpartition("/")[2])
        for uri in (summary["model_uri"], pretrained["model_uri"])
    }
    assert [version.tags["checkpoint_step"] for version in versions.values()] == ["8", "16"]
    assert missing_evidence(versions[summary["model_uri"]], LENIENT) == []
    registry = Registry(in_stack.mlflow_uri, "meteor")
    assert measure_parity(registry, int(versions[summary["model_uri"]].version)).difference < 1e-3
