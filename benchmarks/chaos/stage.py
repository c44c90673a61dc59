"""One scenario while it plays: its run, its commands, its faults; and the verdict over it."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.chaos.audit import (
    Audit,
    Expectation,
    Line,
    audit,
    ledger_violations,
    loss_difference,
    read_lines,
    seconds_to_resume,
    violations,
)
from benchmarks.chaos.cluster import POLL_S, Cluster, Command
from benchmarks.chaos.data import FAULTY, Dataset, key_of, make_dataset, stored_shards
from benchmarks.chaos.recorder import Action, StepFault
from benchmarks.chaos.workload import SETTINGS, Config
from pipelines.checkpoint.committed import latest_checkpoint
from pipelines.checkpoint.losses import read_losses
from pipelines.checkpoint.state import LEDGER_FILE
from pipelines.io import storage
from pipelines.io.run_folder import run_folder

STORAGE = "s3://meteor/chaos"
TOTAL_STEPS = 15
FAULTY_KEYS = frozenset(map(key_of, FAULTY))
WAIT_S = 180.0
COMMIT_POLL_S = 0.25


@dataclass
class Stage:
    """What a scenario plays on. It reports its faults here, and what it found to be wrong."""

    cluster: Cluster
    name: str
    folder: Path
    random: random.Random
    """Seeded by the bench's seed and the scenario's name."""
    dataset: Dataset
    tolerance: float
    fault_times: list[float] = field(default_factory=list)
    faults: int = 0
    commands: int = 0
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    replayed: int | None = None
    worlds: tuple[int, ...] | None = None
    given_up: dict[str, str] = field(default_factory=dict)

    # ---------------------------------------------------------------------------------------------------- the run

    @property
    def log(self) -> Path:
        """The lines of the workers."""
        return self.folder / "steps.jsonl"

    def config(self, **changes: Any) -> Config:
        """The run of this scenario.

        `settings` are fields of TrainingSettings; without `max_failures` among them a failure of a worker ends the
        command.
        """
        settings = {"max_failures": 0, **changes.pop("settings", {})}
        base = Config(
            storage=STORAGE,
            run_name=self.name,
            manifest=self.dataset.url,
            ray_address=self.cluster.ray.ray_gcs_address,
            log=str(self.log),
        )
        return replace(base, settings=settings, **changes)

    def own_dataset(self, claims: dict[str, bytes] | None = None) -> Dataset:
        """A copy of the data that this scenario may damage; the run reads it from here on."""
        self.dataset = replace(make_dataset(f"{STORAGE}/data-{self.name}"), claims=claims or {})
        self.dataset.write()
        return self.dataset

    def marker(self, name: str = "fault") -> str:
        """Path of a marker file of this scenario."""
        return str(self.folder / name)

    def step_fault(self, step: int, action: Action, rank: int = 1, name: str = "fault") -> StepFault:
        """A fault inside a worker."""
        return StepFault(step, rank, action, self.marker(name))

    # ----------------------------------------------------------------------------------------------- the commands

    def start(self, config: Config) -> Command:
        """Start the command."""
        self.commands += 1
        return self.cluster.command(config, self.folder)

    def finish(self, config: Config, commands: int = 1) -> None:
        """Run the command until it succeeds, at most `commands` times; wrong where it does not."""
        for _ in range(commands):
            command = self.start(config)
            if command.wait() == 0:
                return
            self.notes.append(f"command {self.commands} ended: {_error_of(command)[:300]}")
        self.wrong.append(f"the training did not finish in {commands} more commands: {_error_of(command)[-1000:]}")

    def ends_well(self, command: Command) -> None:
        """The command, which runs, must succeed."""
        if command.wait() != 0:
            self.wrong.append(f"the command ended: {command.tail(500)}")

    def fails(self, config: Config, *parts: str) -> None:
        """Run the command, which must end in an error that names all `parts`."""
        self.ends_in_error(self.start(config), *parts)

    def ends_in_error(self, command: Command, *parts: str) -> None:
        """The command, which runs, must end in an error that names all `parts`."""
        status, error = command.wait(), _error_of(command)
        if status == 0:
            self.wrong.append("the command ended well where an error was due")
        self.wrong += [f"the error does not name {part!r}: {error[:500]}" for part in parts if part not in error]
        self.notes.append(f"error: {error[:300]}")

    def wait_for(self, what: str, ready: Callable[[], bool], command: Command, poll_s: float = POLL_S) -> None:
        """Wait until `ready`, while the command runs. Raises TimeoutError, also when it ends before."""
        deadline = time.monotonic() + WAIT_S
        while not ready():
            if command.process.poll() is not None and not ready():
                raise TimeoutError(f"the command ended before {what}: {_error_of(command)[:1000]}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what} did not happen within {WAIT_S:.0f} s; {command.tail(500)}")
            time.sleep(poll_s)

    def wait_marker(self, command: Command, name: str = "fault") -> None:
        """Wait until a worker has come to its fault."""
        self.wait_for(f"marker {name}", lambda: Path(self.marker(name)).exists(), command)

    def wait_checkpoint(self, command: Command, before: int) -> int:
        """Wait until the newest checkpoint of a step below `before` is committed; its step.

        Commits lag behind quick steps by seconds, and a fault right after a save falls back to the one before.
        """
        every = SETTINGS.checkpoint_every_steps
        step = (before - 1) // every * every

        def committed() -> bool:
            checkpoint = latest_checkpoint(STORAGE, self.name)
            return checkpoint is not None and checkpoint.state.step >= step

        self.wait_for(f"the checkpoint of step {step}", committed, command, COMMIT_POLL_S)
        return step

    def hold(self, config: Config, step: int, name: str = "fault") -> tuple[Command, int]:
        """Start the command and wait until a worker holds after `step`, with the checkpoint before it committed.

        Returns:
            The command, and the steps that a fault now rolls back.
        """
        command = self.start(config)
        self.wait_marker(command, name)
        return command, step - self.wait_checkpoint(command, before=step)

    def release(self, name: str = "fault") -> None:
        """Let the worker go on that holds at a marker."""
        Path(self.marker(name) + ".go").touch()

    def lines(self) -> list[Line]:
        """What the workers have written so far."""
        return read_lines(self.log)

    def pid_of(self, rank: int) -> int:
        """The process of the worker that last wrote as `rank`."""
        return [line.pid for line in self.lines() if line.rank == rank][-1]

    # ------------------------------------------------------------------------------------------------- the faults

    def injected(self, count: int = 1, at: float | None = None) -> None:
        """Count faults that have happened; `at` is when (default: at this moment)."""
        self.faults += count
        self.fault_times.append(time.time() if at is None else at)

    def injected_by_marker(self, name: str = "fault") -> None:
        """Count the fault of a marker, if it has happened; its file says when."""
        path = Path(self.marker(name))
        if path.exists():
            self.injected(1, float(path.read_text()))

    # ------------------------------------------------------------------------------------------------ the verdict

    def verdict(self, reference: Audit | None) -> tuple[Audit, dict[str, Any]]:
        """The audit of the finished run, and its numbers as plain values. Without a `reference` it is its own."""
        shards = stored_shards(self.dataset.url)
        found = audit(self.lines(), shards, FAULTY_KEYS, SETTINGS.epochs, TOTAL_STEPS)
        reference = found if reference is None else reference
        expected = Expectation(FAULTY_KEYS, SETTINGS.epochs, self.tolerance, self.replayed, self.worlds, self.given_up)
        checkpoint = latest_checkpoint(STORAGE, self.name)
        wrong = list(self.wrong)
        if not self.faults:
            wrong.append("void: no fault was injected")
        if checkpoint is None or not checkpoint.state.done:
            wrong.append("there is no committed last checkpoint")
            wrong += found.faults
        else:
            losses = read_losses(run_folder(STORAGE, self.name), checkpoint.state)
            wrong += violations(found, reference, checkpoint.state, losses.tolist(), expected)
            ledger = storage.read_bytes(storage.join(checkpoint.url, LEDGER_FILE))
            wrong += ledger_violations(found, ledger, shards, expected)
        resumed = [seconds_to_resume(self.lines(), moment) for moment in self.fault_times]
        return found, {
            "faults_injected": self.faults,
            "samples_lost": found.lost_samples - len(self.given_up) * SETTINGS.epochs,
            "samples_repeated": {str(epoch): len(keys) for epoch, keys in found.repeated.items()},
            "samples_dropped": 0 if checkpoint is None else sum(checkpoint.state.dropped.values()),
            # What trains on fewer samples has no undisturbed training to be compared with.
            "max_loss_difference": None if self.given_up else loss_difference(found, reference),
            "tolerance": self.tolerance,
            "seconds_to_resume": max((seconds for seconds in resumed if seconds is not None), default=None),
            "replayed_steps": found.replayed,
            "worker_starts": found.attempts,
            "commands": self.commands,
            "workers": sorted(set(found.worlds.values())),
            "losses": list(found.losses.values()),
            "passed": not wrong,
            "wrong": wrong,
            "note": "; ".join(self.notes),
        }


def _error_of(command: Command) -> str:
    if command.result_file is not None and command.result_file.exists():
        result = json.loads(command.result_file.read_text())
        if result.get("ok") is False:
            return f"{result['error_type']}: {result['error']}"
    return command.tail(1000)
