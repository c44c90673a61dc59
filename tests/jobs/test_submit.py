"""What goes with a job to a cluster, what is said before it goes, and how it ends."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infra.services import Stack, full_env
from jobs.environment import CARRIED, OF_THE_NODE, carried, is_secret
from jobs.submit import JOB, Submit, _status, follow

ROOT = Path(__file__).resolve().parents[2]
AT = ("--address", "http://127.0.0.1:9")
PRETRAIN = ("--", "python", "jobs/pretrain.py")
SET_BY_THE_CODE = {
    "MLFLOW_DEFAULT_PREDICTION_DEVICE",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES",
    "MLFLOW_HTTP_REQUEST_TIMEOUT",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT",
}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*CARRIED, "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


# ---------------------------------------------------------------------------------------------------- the environment


def test_every_variable_that_the_code_reads_is_chosen() -> None:
    """One that a new reader asks for is carried, or known to be the node's own."""
    found: dict[str, str] = {}
    for folder in ("pipelines", "jobs", "tune", "meteor_model"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                text = node.value if isinstance(node, ast.Constant) else None
                if isinstance(text, str) and re.fullmatch(
                    r"(?:METEOR|AWS|MLFLOW|SSL|REQUESTS|CURL)_[A-Z0-9_]*[A-Z0-9]", text
                ):
                    found[text] = str(path.relative_to(ROOT))
    assert {"METEOR_STORAGE", "AWS_REGION", "MLFLOW_TRACKING_URI"} <= set(found)
    left = {name: path for name, path in found.items() if name not in {*CARRIED, *OF_THE_NODE, *SET_BY_THE_CODE}}
    assert not left, f"neither in CARRIED nor in OF_THE_NODE of jobs/environment.py: {left}"


def test_secrets_stay_unless_they_are_asked_for() -> None:
    environment = {
        "METEOR_STORAGE": "s3://bucket/x",
        "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIbPxRfiCY",
        "HTTPS_PROXY": "http://proxy:3128",
        "HTTP_PROXY": "http://me:Xq7-pw@proxy:3128",
        "MLFLOW_TRACKING_TOKEN": "tok-en-tok-en",
        "AWS_SHARED_CREDENTIALS_FILE": "/secrets/credentials",
        "AWS_REGION": "",
        "HOME": "/root",
    }
    goes = carried(environment)
    assert dict(goes.variables) == {
        "METEOR_STORAGE": "s3://bucket/x",
        "HTTPS_PROXY": "http://proxy:3128",
        "AWS_SHARED_CREDENTIALS_FILE": "/secrets/credentials",
    }
    secret = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HTTP_PROXY", "MLFLOW_TRACKING_TOKEN"}
    assert set(goes.withheld) == secret
    everything = carried(environment, send_secrets=True)
    assert set(everything.secrets) == secret
    assert set(everything.variables) == secret | set(goes.variables)


def test_further_variables_go_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert carried({"NCCL_DEBUG": "INFO"}, ["NCCL_DEBUG"]).variables == {"NCCL_DEBUG": "INFO"}
    assert carried({"HF_TOKEN": "hf_abc"}, ["HF_TOKEN"]).withheld == ["HF_TOKEN"]
    with pytest.raises(ValueError, match="env names NCCL_DEBUG, which is not set here"):
        carried({}, ["NCCL_DEBUG"])


@pytest.mark.parametrize("name", CARRIED)
def test_a_plain_address_or_path_is_no_secret(name: str) -> None:
    named_so = any(word in name for word in ("PASSWORD", "ACCESS_KEY", "SESSION_TOKEN", "TRACKING_TOKEN"))
    assert is_secret(name, "https://host:8443/path") == named_so


# ------------------------------------------------------------------------------------------------- before it is sent

WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "no_command": (AT, "there is no command to submit"),
    "no_address": (PRETRAIN, "address is not set: .*RAY_API_SERVER_ADDRESS"),
    "no_storage": ((*AT, *PRETRAIN), r"needs .*METEOR_STORAGE \(or --run.storage\).*--nodes-have-the-rest"),
    "no_mlflow": ((*AT, *PRETRAIN, "--run.storage", "s3://x"), r"not set here: MLFLOW_TRACKING_URI \(or --tr"),
    "a_model": ((*AT, "--", "python", "jobs/serve.py", "--model", "models:/m@a"), "MLFLOW_TRACKING_URI"),
    "misspelt": ((*AT, *PRETRAIN, "--recip", "tiny"), "--recip"),
    "out_of_range": ((*AT, *PRETRAIN, "--training.workers", "5"), "workers is 5"),
    "a_secret": ((*AT, *PRETRAIN, "--tracking.uri", "http://u:Xq7-pw@host"), "the command holds a secret"),
    "no_such_variable": ((*AT, "--env", "NO_SUCH", "--", "true"), "env names NO_SUCH"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_before_anything_is_sent(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    arguments, message = WRONG[name]
    assert JOB.main(arguments) == 2
    said = " ".join(capfd.readouterr().err.split())
    assert re.search(message, said), said
    assert "Xq7-pw" not in said


def test_a_cluster_that_does_not_answer_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    assert JOB.main((*AT, "--", "true")) == 1
    assert "error: no dashboard of Ray answers at http://127.0.0.1:9" in capfd.readouterr().err


class NewCluster:
    """Its dashboard answers, and its nodes cannot take a job yet."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)

    def get_address(self) -> str:
        return "http://head:8265"

    def submit_job(self, **_: Any) -> str:
        answer = self.answers.pop(0)
        if answer.startswith("job"):
            return answer
        raise RuntimeError(f"Request failed with status code 500: {answer}.")


def test_a_cluster_whose_nodes_cannot_take_a_job_yet_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    no_agent = "No available agent to submit job, please try again later."
    cluster = NewCluster(no_agent, no_agent, "job-1", "the entrypoint is bad", "job-2")
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", lambda _: cluster)
    assert JOB.main((*AT, "--no-wait", "--", "true")) == 0
    assert "job-1 at http://head:8265" in capfd.readouterr().out
    assert JOB.main((*AT, "--no-wait", "--", "true")) == 1
    assert "the entrypoint is bad" in capfd.readouterr().err
    assert cluster.answers == ["job-2"]  # any other refusal is final


# --------------------------------------------------------------------------------------------------- while it runs


class Cluster:
    """A job's log as a dashboard gives it that goes away in the middle of it."""

    def __init__(self, texts: list[list[str]], final: Any) -> None:
        self.texts, self.final = texts, final

    def get_address(self) -> str:
        return "http://head:8265"

    async def tail_job_logs(self, _: str) -> Any:
        for text in self.texts[0]:
            yield text
        if len(self.texts) > 1:
            self.texts.pop(0)
            raise RuntimeError("WebSocket connection closed unexpectedly")

    def get_job_info(self, _: str) -> Any:
        return self.final


def ended(status: str, code: int | None, message: str = "") -> Any:
    from ray.job_submission import JobStatus

    return SimpleNamespace(status=JobStatus(status), driver_exit_code=code, message=message, submission_id="j")


def test_a_dashboard_that_goes_away_repeats_and_loses_no_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.submit.POLL_S", 0.01)
    cluster = Cluster([["a\nb"], ["a\n", "b\nc\n"], ["a\nb\nc\nd\n"]], ended("SUCCEEDED", 0))
    assert follow(cluster, "j") == 0
    assert capfd.readouterr().out == "a\nb\nc\nd\n"


def test_a_cluster_that_stays_away_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.submit.POLL_S", 0.01)
    monkeypatch.setattr("jobs.submit.AWAY_S", 0.05)
    cluster = Cluster([[] for _ in range(1000)], ended("SUCCEEDED", 0))
    with pytest.raises(ValueError, match=r"http://head:8265 is away for 0 s, and job j may go on"):
        follow(cluster, "j")


def test_the_exit_status_is_the_jobs_own(capfd: pytest.CaptureFixture[str]) -> None:
    assert [_status(ended("FAILED", code)) for code in (1, 2, 130, -9)] == [1, 2, 130, 137]
    assert _status(ended("SUCCEEDED", 0)) == 0
    assert _status(ended("FAILED", None, "no runtime env: AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI")) == 1
    said = capfd.readouterr().out
    assert said.startswith("error: job j failed: no runtime env")
    assert "wJalr" not in said


def test_defaults_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://head:8265")
    assert JOB.parse(["--", "true"]) == Submit(command=("true",), address="http://head:8265")


# ------------------------------------------------------------------------------------------------------ on real Ray

SHOW = (
    "import json, os, sys; print('SEEN', json.dumps({'files': sorted(os.listdir('.')), 'env': dict(os.environ)})); "
    "sys.exit(7)"
)


@pytest.mark.stack
def test_a_job_gets_files_variables_and_commit_and_ends_as_it_ends(stack: Stack) -> None:
    environment = {
        **full_env(stack),
        "METEOR_STORAGE": "s3://meteor/submitted",
        "NCCL_SOCKET_IFNAME": "eth7",
        "MLFLOW_TRACKING_TOKEN": "tok-en-tok-en-tok",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    command = [sys.executable, "jobs/submit.py", "--env", "NCCL_SOCKET_IFNAME", "--", "python", "-c", SHOW]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 7, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    seen = json.loads(next(line for line in lines if line.startswith("SEEN "))[5:])
    assert {"jobs", "pipelines", "pyproject.toml"} <= set(seen["files"])
    assert not {".venv", ".git", ".meteor", "runs", "tests"} & set(seen["files"])
    assert seen["env"]["METEOR_STORAGE"] == "s3://meteor/submitted"
    assert seen["env"]["NCCL_SOCKET_IFNAME"] == "eth7"
    assert re.match(r"[0-9a-f]{40}", seen["env"]["METEOR_GIT_COMMIT"])
    assert "MLFLOW_TRACKING_TOKEN" not in seen["env"]
    warning = next(line for line in lines if "MLFLOW_TRACKING_TOKEN" in line)
    assert "stays here" in warning
    assert "tok-en" not in done.stdout + done.stderr


@pytest.mark.stack
def test_plain_submission_says_in_a_line_what_it_leaves_behind(stack: Stack, tmp_path: Path) -> None:
    """The nodes of this cluster do not have the submitter's storage; this job's own environment has none either."""
    environment = {name: value for name, value in full_env(stack).items() if name != "METEOR_STORAGE"}
    command = ["env", "-u", "METEOR_STORAGE", "python", "jobs/pretrain.py", "--recipe", "tiny"]
    ray = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--working-dir", str(ROOT), "--"]
    done = subprocess.run([*ray, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    line = next(line for line in done.stdout.splitlines() if line.startswith("error: run.storage is not set"))
    assert "python jobs/submit.py takes them along" in line
