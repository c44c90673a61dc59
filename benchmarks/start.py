"""How long a training takes to its first step, and from a lost worker to its next one: `make bench-start`.

On a warm local stack of its own, with the shards already there, the README's command trains `tiny` on few samples; one
of its workers is ended by SIGKILL after a checkpoint. Writes benchmarks/results/start.json: the median of several such
runs, each part of the first start, and the CPU seconds of every kind of process up to the first step.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from benchmarks.environment import end_on_sigterm
from benchmarks.results_file import RESULTS, hardware, write_results
from infra.local import Stack, down, up
from infra.services import full_env
from infra.stack import service_processes

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = (
    *("--recipe", "tiny", "--source.code-points", "64", "--source.heldout-code-points", "16"),
    *("--data.heldout-samples", "32", "--calibration.samples", "16", "--calibration.decode-samples", "16"),
    *("--run.pictures", "1", "--training.checkpoint-every-steps", "4", "--training.log-every-steps", "1"),
    *("--training.micro-batch", "8", "--training.global-batch", "16", "--training.epochs", "4"),
)
KILLED_AFTER = 6
"""The step after which a worker is ended; the checkpoint of step 4 is there."""
LIMIT_S = 300.0
POLL_S = 0.05
SHOWN = 3000
"""Characters of a log that an error shows."""
WORKER = "ray::RayTrainWorker"
_STEP = re.compile(r"\[meteor (\d+)/\d+\] step ")
_PHASE = re.compile(r"\[meteor\] \[(\w+)\] ")


class Log:
    """The job's log as it grows: when each phase was said, and when each step."""

    def __init__(self, path: Path, printed: Path) -> None:
        self.path, self.printed, self.read = path, printed, 0
        self.phases: dict[str, float] = {}
        self.steps: list[tuple[int, float]] = []

    def look(self) -> None:
        """Take in what is new."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.read)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]
        self.read += len(text)
        for line in text.decode(errors="replace").splitlines():
            if found := _STEP.search(line):
                self.steps.append((int(found[1]), time.monotonic()))
            elif (found := _PHASE.search(line)) and found[1] not in self.phases:
                self.phases[found[1]] = time.monotonic()

    def until_step(self, step: int, job: subprocess.Popen[bytes], after: int = 0) -> float:
        """When a step of at least this number was said, among those after the first `after` lines.

        Raises RuntimeError where the job ends before, or it takes too long.
        """
        deadline = time.monotonic() + LIMIT_S
        while True:
            self.look()
            for number, at in self.steps[after:]:
                if number >= step:
                    return at
            if job.poll() is not None or time.monotonic() > deadline:
                said = self.printed.read_text(errors="replace")[-SHOWN:]
                raise RuntimeError(f"the job did not come to step {step}; it printed:\n{said}")
            time.sleep(POLL_S)


def workers(stack: Stack) -> list[psutil.Process]:
    """The workers of the training on this stack."""
    return [process for process in service_processes(stack.state_dir, "ray") if _title(process).startswith(WORKER)]


def _title(process: psutil.Process) -> str:
    try:
        words = process.cmdline()
    except psutil.Error:
        return ""
    return words[0] if words else ""


def cpu_seconds(stack: Stack) -> dict[str, float]:
    """CPU seconds so far of the stack's processes by their kind."""
    found: Counter[str] = Counter()
    for process in service_processes(stack.state_dir, "ray"):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        title = _title(process)
        kind = re.split(r"[.(\[ ]", title.removeprefix("ray::"))[0] if title.startswith("ray::") else process.name()
        found[kind] += times.user + times.system
    return {kind: round(seconds, 1) for kind, seconds in found.most_common() if seconds >= 0.5}


def one_run(stack: Stack, folder: Path, name: str) -> dict[str, Any]:
    """Submit a training, end a worker of it, and take the times."""
    output = folder / name
    ray = str(Path(sys.executable).with_name("ray"))
    words = ["python", "jobs/pretrain.py", *SETTINGS, "--run.name", name, "--run.output", str(output)]
    printed = folder / f"{name}.out"
    log, before = Log(output / "pretrain.log", printed), cpu_seconds(stack)
    began = time.monotonic()
    with printed.open("wb") as out:
        job = subprocess.Popen(
            [ray, "job", "submit", "--working-dir", ".", "--", *words],
            cwd=ROOT,
            env={**full_env(stack), "RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES": ""},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            first = log.until_step(1, job)
            spent = cpu_seconds(stack)
            log.until_step(KILLED_AFTER, job)
            said = len(log.steps)
            os.kill(workers(stack)[-1].pid, signal.SIGKILL)
            killed = time.monotonic()
            again = log.until_step(KILLED_AFTER + 1, job, after=said)
            job.wait(LIMIT_S)
        finally:
            if job.poll() is None:
                job.kill()
                job.wait()
    if job.returncode:
        raise RuntimeError(f"the job failed:\n{printed.read_text(errors='replace')[-SHOWN:]}")
    return {
        "submit_to_first_step_s": round(first - began, 2),
        "train_phase_to_first_step_s": round(first - log.phases["train"], 2),
        "worker_killed_to_next_step_s": round(again - killed, 2),
        "phases_begin_s": {phase: round(at - began, 2) for phase, at in log.phases.items()},
        "cpu_s_to_first_step": {
            kind: round(seconds - before.get(kind, 0.0), 1)
            for kind, seconds in spent.items()
            if seconds - before.get(kind, 0.0) >= 0.5
        },
    }


def main(argv: list[str] | None = None) -> int:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start", description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="runs that are measured (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "start.json", help="the results (%(default)s)")
    arguments = parser.parse_args(argv)
    end_on_sigterm()
    machine = hardware()
    with tempfile.TemporaryDirectory(prefix="meteor-start-") as name:
        folder = Path(name)
        stack = up(folder / "stack")
        try:
            one_run(stack, folder, "shards")  # makes the shards, and warms the disk
            runs = []
            for number in range(arguments.runs):
                runs.append(one_run(stack, folder, f"run-{number}"))
                print(runs[-1], flush=True)
        finally:
            down(folder / "stack", purge=True)
    medians = {
        key: statistics.median(run[key] for run in runs)
        for key in ("submit_to_first_step_s", "train_phase_to_first_step_s", "worker_killed_to_next_step_s")
    }
    write_results(arguments.output, {"machine": machine, "median": medians, "trainings": runs})
    return 0


if __name__ == "__main__":
    sys.exit(main())
