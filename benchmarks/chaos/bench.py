"""Plays scenarios one after the other on one stack."""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.chaos.audit import Audit
from benchmarks.chaos.cluster import Cluster
from benchmarks.chaos.data import make_dataset
from benchmarks.chaos.scenarios import BY_NAME, UNDISTURBED, Scenario
from benchmarks.chaos.stage import STORAGE, Stage

Row = dict[str, Any]


class Bench:
    """A running stack, the undisturbed training on it, and the seed of all scenarios."""

    def __init__(self, cluster: Cluster, folder: Path, seed: int) -> None:
        self.cluster = cluster
        self.folder = folder
        self.seed = seed
        self.dataset = make_dataset(f"{STORAGE}/data")
        self.dataset.write()
        self.reference: Audit | None = None

    def play(self, scenario: Scenario) -> Row:
        """Play one scenario; its row of the results. The undisturbed training must have been the first."""
        if self.reference is None and scenario.name != UNDISTURBED:
            raise ValueError(f"{scenario.name}: play {UNDISTURBED!r} first, it is what all others are compared with")
        folder = self.folder / scenario.name
        folder.mkdir()
        stage = Stage(
            self.cluster,
            scenario.name,
            folder,
            random.Random(f"{self.seed} {scenario.name}"),
            self.dataset,
            scenario.tolerance,
        )
        started = time.monotonic()
        row: Row = {
            "name": scenario.name,
            "injects": scenario.injects,
            "expects": scenario.expects,
        }
        try:
            scenario.play(stage)
            found, numbers = stage.verdict(self.reference)
            if self.reference is None:
                self.reference = found
            row |= numbers
        except Exception as error:  # a scenario that breaks is a failed one; the others still play
            text = "".join(traceback.format_exception(error))[-3000:]
            row |= {"passed": False, "wrong": [f"{type(error).__name__}: {error}"], "note": text}
        finally:
            self.cluster.settle()
        return {**row, "seconds": time.monotonic() - started}


@contextmanager
def open_bench(scenarios: Sequence[Scenario], seed: int) -> Iterator[Bench]:
    """A stack with what `scenarios` need; all of it is stopped and removed at the end."""
    needed = {service for scenario in scenarios for service in scenario.services}
    folder = Path(tempfile.mkdtemp(prefix="meteor-chaos-"))
    try:
        with Cluster(folder, mlflow="mlflow" in needed) as cluster:
            yield Bench(cluster, folder, seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def choose(names: Sequence[str]) -> list[Scenario]:
    """The scenarios of these names (if none, all but those that want to be named), the undisturbed one first.

    Raises:
        ValueError: for an unknown name; it lists the known ones.
    """
    unknown = [name for name in names if name not in BY_NAME]
    if unknown:
        raise ValueError(f"unknown scenario {unknown[0]!r}; there are: {', '.join(BY_NAME)}")
    wanted = set(names) or {scenario.name for scenario in BY_NAME.values() if not scenario.by_name_only}
    return [scenario for name, scenario in BY_NAME.items() if name in wanted or name == UNDISTURBED]


def show(row: Row) -> None:
    """One line about a scenario that has ended."""
    sys.stdout.write(line_of(row) + "\n")
    for text in row["wrong"]:
        sys.stdout.write(f"    {text}\n")
    if not row["passed"]:
        sys.stdout.write(f"    {row['note']}\n")
    sys.stdout.flush()


def line_of(row: Row) -> str:
    """The numbers of a row, aligned."""
    verdict = "passed" if row["passed"] else "FAILED"
    if "faults_injected" not in row:
        return f"{row['name']:<24} {verdict}  {row['seconds']:6.1f} s"
    resume, difference = row["seconds_to_resume"], row["max_loss_difference"]
    return (
        f"{row['name']:<24} {verdict}  {row['seconds']:6.1f} s  faults {row['faults_injected']:>3}  "
        f"lost {row['samples_lost']}  repeated {sum(row['samples_repeated'].values())}  "
        f"loss difference {'-' if difference is None else f'{difference:.2g}'} (<= {row['tolerance']:g})  "
        f"resumed in {'-' if resume is None else f'{resume:.1f} s'}  replayed {row['replayed_steps']}"
    )
