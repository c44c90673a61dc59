"""After a sweep's last trial: best per budget, fronts, importances, pictures, and the versions that are registered."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pipelines.checkpoint.local import local_copy
from pipelines.io import storage
from pipelines.io.console import say
from pipelines.io.git import git_commit
from pipelines.io.upload import upload_folder
from pipelines.registry.provenance import training_tags
from pipelines.registry.tags import COMMIT_TAG
from pipelines.registry.variants import register_variant
from pipelines.registry.versions import RegisteredVersion, Registry
from tune.figures import draw_budgets, draw_fronts, draw_importances, draw_trials
from tune.prepare import Prepared
from tune.records import TrialRecord, training_name
from tune.results import best_within, fronts, importances, row, table
from tune.settings import SweepSettings
from tune.study import StudySearch
from tune.trial import load_score

COMPARED = ("front", "random", "defaults")
"""Studies whose fronts are drawn and compared."""


def collect_results(settings: SweepSettings, prepared: Prepared, studies: Mapping[str, StudySearch]) -> dict[str, Any]:
    """All results as one JSON, with the pictures, in storage and in MLflow."""
    records = prepared.records
    prepared.tracker.deliver()
    everything = records.all()
    best = {budget: best_within(settings, everything, budget) for budget in settings.budgets}
    drawn: dict[str, Sequence[TrialRecord]] = {name: records.of(name) for name in COMPARED if name in studies}
    found = fronts(drawn)
    mattered = {
        name: values
        for name, search in studies.items()
        if search.plan.sampler in ("tpe", "nsga2") and (values := importances(search.study, search.plan.budget is None))
    }
    result = {
        "sweep": prepared.name,
        "model": prepared.model,
        "mlflow_run_id": prepared.tracker.run_id,
        "commit": git_commit(Path.cwd()),
        "suite": {**asdict(prepared.context.suite), "digest": prepared.context.suite.digest},
        "settings": settings.identity(),
        "objective": settings.objective,
        "concurrent_trials": prepared.concurrent,
        "trials": [row(record) for record in everything],
        "best_per_budget": {f"{budget:g}": None if r is None else row(r) for budget, r in best.items()},
        "fronts": found,
        "importances": mattered,
    }
    with tempfile.TemporaryDirectory(prefix="meteor-sweep-") as name:
        folder = Path(name)
        draw_trials(everything, settings.objective, folder / "sweep-trials.png")
        if found:
            draw_fronts(drawn, settings.objective, folder / "sweep-front.png")
            on_front = [records.get(trial) for trial in found["tflops"]["front"]]
            (folder / "sweep-front.md").write_text(table(on_front) + "\n")
        if any(best.values()):
            draw_budgets(best, settings.objective, settings.budget_unit, folder / "sweep-budgets.png")
        if mattered:
            draw_importances(mattered, folder / "sweep-importances.png")
        metrics = {
            f"hypervolume_{cost}_{study}": area
            for cost, values in found.items()
            for study, area in values["hypervolume"].items()
        }
        metrics |= {f"best_objective_{b:g}": r.objective for b, r in best.items() if r and r.objective is not None}
        prepared.tracker.log({"sweep.json": result}, metrics, folder)
        upload_folder(folder, prepared.folder.pictures)
    return result


def write_output(settings: SweepSettings, prepared: Prepared, result: dict[str, Any]) -> None:
    """The JSON at `output`, and the pictures beside it, where that is set."""
    if settings.output is None:
        return
    storage.write_json(settings.output, result)
    with local_copy(prepared.folder.pictures) as pictures:
        for path in sorted(pictures.iterdir()):
            shutil.copy(path, Path(settings.output).parent / path.name)


def register_winners(settings: SweepSettings, prepared: Prepared) -> dict[str, Any]:
    """The best of each budget as versions; budgets with one winner share a version."""
    winners: dict[str, list[str]] = {}
    for budget in settings.budgets:
        record = best_within(settings, prepared.records.all(), budget)
        if record is None:
            say(f"  budget {budget:g}: no trial is within it, nothing is registered")
        else:
            winners.setdefault(record.id, []).append(settings.alias_of(budget))
    registered: dict[str, Any] = {}
    for trial, aliases in winners.items():
        version = _register_winner(settings, prepared, prepared.records.get(trial), aliases)
        registered[version.uri] = {"trial": trial, "aliases": aliases}
        say(f"  {trial} is {version.uri} ({', '.join(aliases)})")
    return registered


def _register_winner(
    settings: SweepSettings, prepared: Prepared, record: TrialRecord, aliases: Sequence[str]
) -> RegisteredVersion:
    base, ranks = prepared.model, record.ranks
    tags = {"sweep": prepared.name, "trial": record.id, COMMIT_TAG: git_commit(Path.cwd())}
    if settings.kind == "finetune":
        base, ranks = prepared.folder.export(record.id), None  # those of the export were measured anew
        recipe = settings.trial_recipe
        recipe = replace(recipe, model=replace(recipe.model, start=prepared.model))
        tags |= {"run_name": training_name(prepared.name, record.id), **training_tags(recipe, prepared.trained)}
    return register_variant(
        base,
        record.pruning_config,
        load_score(prepared.folder, record.id),
        ranks=ranks,
        registry=Registry(settings.tracking.uri, settings.tracking.registered_model),
        aliases=aliases,
        run_id=record.run_id or prepared.tracker.run_id,
        tags=tags,
        suite=prepared.context.suite,
    )


def sweep_text(settings: SweepSettings, prepared: Prepared, result: dict[str, Any]) -> str:
    """The results for people."""
    statuses = [record.status for record in prepared.records.all()]
    counts = ", ".join(f"{statuses.count(s)} {s}" for s in ("completed", "stopped", "failed"))
    lines = [f"  {len(statuses)} trials: {counts}; {result['wall_s']:.0f} s"]
    winners: list[TrialRecord] = []
    for budget in settings.budgets:
        record = best_within(settings, prepared.records.all(), budget)
        lines.append(f"  budget {budget:g} {settings.budget_unit}: {record.id if record else 'no trial is within it'}")
        winners += [record] if record and record not in winners else []
    for cost, found in result["fronts"].items():
        areas = ", ".join(f"{study} {share:.1%}" for study, share in found["hypervolume_share"].items() if share)
        lines.append(f"  front against {cost}: {len(found['front'])} trials; hypervolume of all reached: {areas}")
    shown: Sequence[TrialRecord] = winners or [
        prepared.records.get(t) for t in result["fronts"].get("tflops", {}).get("front", [])
    ]
    return "\n".join([*lines, "", table(shown)])
