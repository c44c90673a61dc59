"""What `make plan` says of a rehearsal's command, phase by phase, in the units of the meter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.rehearsal.meter import MIB
from benchmarks.rehearsal.plays import Command
from jobs.finetune import JOB as FINETUNE
from jobs.pretrain import JOB as PRETRAIN
from pipelines.config.recipe import Recipe
from pipelines.data.sources.openmoji import OpenMoji
from pipelines.sizing.layout import Layout
from pipelines.sizing.plan import plan_run
from pipelines.sizing.terms import BESIDE, ONCE, Estimate, Phase, Place

OF_A_JOB: dict[str, tuple[Phase, ...]] = {
    "prepare": ("prepare",),
    "calibrate": ("calibrate",),
    "train": BESIDE,
    "export": ("export", "parity"),
    "answer": ("answer",),
    "register": ("register",),
}
"""Phases as a job says them, and those of the estimate."""
HERE: tuple[Place, ...] = ("head", "task", "node")
"""Everything runs on this machine."""


def expected(command: Command) -> dict[str, dict[str, float]]:
    """Phase -> `memory_mib`, `temp_mib`, `up_mib`, `down_mib`; nothing for a command that is no training.

    Memory is that of the training's own processes without the libraries' pages, which the meter leaves out.
    """
    jobs = {"jobs/pretrain.py": PRETRAIN, "jobs/finetune.py": FINETUNE}
    if command.words[0] not in jobs:
        return {}
    recipe = jobs[command.words[0]].parse(command.words[1:]).settings
    found = plan_run(recipe, Layout(nodes=1, samples=samples_of(recipe)))
    return {name: _of(found, phases) for name, phases in OF_A_JOB.items()}


def samples_of(recipe: Recipe) -> int:
    """Samples of the training split of the recipe's own drawings."""
    return len(OpenMoji(recipe.source).drawings(recipe.data.train_split)) * recipe.source.variants


def _of(found: Estimate, phases: tuple[Phase, ...]) -> dict[str, float]:
    """One phase of a job: those that go on side by side add up, of others the larger counts."""
    together = phases == BESIDE

    def size(resource: str, places: tuple[Place, ...]) -> float:
        by_phase = [
            sum(
                term.amount
                for use in found.uses
                if use.phase == phase and use.place in places and use.resource == resource
                for term in use.terms
                if term.formula != ONCE
            )
            for phase in phases
        ]
        return sum(by_phase) if together or places == ("store",) else max(by_phase)

    return {
        "memory_mib": round(size("ram", HERE) / MIB, 1),
        "temp_mib": round(size("temp", HERE) / MIB, 1),
        "up_mib": round(size("up", ("store",)) / MIB, 1),
        "down_mib": round(size("down", ("store",)) / MIB, 1),
    }


def compared(phases: Mapping[str, Mapping[str, Any]], estimate: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Measured over estimated, for memory and temporary files of every phase that has both."""
    found: dict[str, Any] = {}
    for name, taken in phases.items():
        if name not in estimate:
            continue
        pairs = {
            "memory": (taken["peak_memory_mib"], estimate[name]["memory_mib"]),
            "temp": (taken["peak_temp_mib"], estimate[name]["temp_mib"]),
        }
        found[name] = {key: round(measured / planned, 3) for key, (measured, planned) in pairs.items() if planned}
    return found
