"""The Slurm script for real: Ray starts, the job runs and ends, notices come; Slurm's own commands are stand-ins."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from infra.processes import choose_port

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "infra/slurm/meteor.sbatch"
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
[[ $1 == hostname ]] && exec echo 127.0.0.1
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
[[ $1 == show ]] && exec echo localhost
echo "$*" >> "$CALLS"
"""
LIMIT_S = 240.0

pytestmark = pytest.mark.stack


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """That of a job on one node: its Slurm, this Python, ports of its own, and nothing beyond loopback."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    taken: set[int] = set()
    for _ in range(3):
        taken.add(choose_port(taken))
    port, dashboard, agent = sorted(taken)
    kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
    return kept | {
        "PATH": os.pathsep.join([str(tools), str(Path(sys.executable).parent), "/usr/bin", "/bin"]),
        "CALLS": str(tmp_path / "calls"),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_CPUS_PER_TASK": "2",
        "METEOR_RAY_PORT": str(port),
        "METEOR_DASHBOARD_PORT": str(dashboard),
        "METEOR_AGENT_PORT": str(agent),
        "METEOR_GRACE_S": "3",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # keeps Ray on 127.0.0.1
    }


@pytest.fixture
def run(environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the script with a command; whatever it left is ended."""
    started: list[subprocess.Popen[str]] = []

    def start(*command: str) -> subprocess.Popen[str]:
        log = (tmp_path / "log").open("w")
        process = subprocess.Popen(
            [str(SCRIPT), *command],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    for left in of_the_job(environment):
        left.kill()


def of_the_job(environment: dict[str, str]) -> list[psutil.Process]:
    """Processes of Ray that the script has started."""
    folder = f"/tmp/ray-{environment['SLURM_JOB_ID']}"
    found = []
    for process in psutil.process_iter():
        try:
            if any(folder in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_job_ends_with_its_own_status_and_leaves_nothing(
    run: Callable[..., subprocess.Popen[str]], environment: dict[str, str], tmp_path: Path
) -> None:
    code = (
        "import ray, sys; ray.init(logging_level='ERROR'); print('CPUS', ray.cluster_resources()['CPU']); sys.exit(3)"
    )
    process = run("python", "-c", code)
    assert process.wait(LIMIT_S) == 3, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    assert "CPUS 2.0" in said
    assert not Path(f"/tmp/ray-{environment['SLURM_JOB_ID']}").exists()
    assert of_the_job(environment) == []
    assert not Path(environment["CALLS"]).exists(), "a job that failed by itself is not started again"
    assert "RAY_AUTH_TOKEN" not in said


def test_before_its_time_is_over_the_node_is_drained_and_the_job_is_queued_again(
    run: Callable[..., subprocess.Popen[str]], environment: dict[str, str], tmp_path: Path
) -> None:
    process = run("python", "-c", "import time; print('BEGUN', flush=True); time.sleep(600)")
    deadline = time.monotonic() + LIMIT_S
    while "BEGUN" not in (tmp_path / "log").read_text():
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.5)
    os.kill(process.pid, signal.SIGUSR1)  # as `--signal=B:` does: to the script alone
    process.wait(LIMIT_S)
    said = (tmp_path / "log").read_text()
    assert "USR1: the training has 3 s for a last checkpoint" in said
    assert "is drained: 3 s are left" in said, said
    assert Path(environment["CALLS"]).read_text() == f"requeue {environment['SLURM_JOB_ID']}\n"
    assert of_the_job(environment) == []
