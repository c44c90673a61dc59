"""After a sweep's last finalist: what is no worse, the best of each budget, pictures, and the versions made of them."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import optuna

from pipelines.checkpoint.local import local_copy
from pipelines.evaluation.scores import Score
from pipelines.evaluation.tower_store import COMPUTED, DAMAGED, NOT_KEPT, READ
from pipelines.io import storage
from pipelines.io.console import say
from pipelines.io.git import git_commit
from pipelines.io.upload import upload_folder
from pipelines.registry.provenance import training_tags
from pipelines.registry.tags import COMMIT_TAG, SELECTED_TAG
from pipelines.registry.variants import register_variant
from pipelines.registry.versions import RegisteredVersion, Registry
from tune.figures import draw_finalists, draw_importances, draw_search, draw_trials
from tune.finals import answers, finalists, load_score, paper_trial, score_of, searched
from tune.folder import sweep_folder
from tune.prepare import Prepared
from tune.records import DENSE, TrialRecord, training_name
from tune.results import decide, importances, row, table
from tune.settings import FINAL, SEARCH, SweepSettings

CHEAPEST = "cheapest"
"""Alias of the cheapest setting that is no worse than the paper's."""


def collect_results(settings: SweepSettings, prepared: Prepared, study: optuna.Study) -> dict[str, Any]:
    """All results as one JSON, with the pictures, in storage and in MLflow."""
    prepared.tracker.deliver()
    context, everything = prepared.context, prepared.records.all()
    judged_on = finalists(settings, prepared)
    decision = decide(*judged_on, settings.budgets, settings.margin)
    mattered = importances(study)
    result = {
        "sweep": prepared.name,
        "model": prepared.model,
        "mlflow_run_id": prepared.tracker.run_id,
        "commit": git_commit(Path.cwd()),
        "suite": {**asdict(context.search), "digest": context.search.digest},
        "final": {**asdict(context.final), "digest": context.final.digest},
        "settings": settings.identity(),
        "concurrent_trials": prepared.concurrent,
        "paper": paper_trial(settings, prepared).id,
        "trials": [row(record) for record in everything],
        "decision": decision,
        "importances": mattered,
        "records": _records(settings, prepared),
    }
    with tempfile.TemporaryDirectory(prefix="meteor-sweep-") as name:
        folder = Path(name)
        draw_trials(everything, folder / "sweep-trials.png")
        paper = paper_trial(settings, prepared)
        draw_search(
            [answers(settings, r, score_of(settings, prepared, r.id)) for r in searched(prepared)],
            paper.id,
            settings.cost,
            folder / "sweep-search.png",
        )
        names = {record.id: record.of for record in prepared.records.of(FINAL)}
        draw_finalists(judged_on[0], decision, names, settings.cost, folder / "sweep-finalists.png")
        (folder / "sweep-finalists.md").write_text(table(_final_rows(prepared), decision) + "\n")
        if mattered:
            draw_importances({SEARCH: mattered}, folder / "sweep-importances.png")
        metrics = {"saved_share": decision["saved"] or 0.0}
        metrics |= {f"final_nll_{budget}": one["nll"] for budget, one in decision["budgets"].items() if one}
        prepared.tracker.log({"sweep.json": result}, metrics, folder)
        upload_folder(folder, prepared.folder.pictures)
    return result


def _records(settings: SweepSettings, prepared: Prepared) -> dict[str, Any]:
    """Every number that the decision stands on, question by question (`python -m tune.redo`)."""
    found: dict[str, Any] = {}
    for phase in (SEARCH, FINAL):
        completed = searched(prepared) if phase == SEARCH else prepared.records.of(FINAL)
        records = [record for record in completed if record.status == "completed"]
        scores = {record.id: score_of(settings, prepared, record.id) for record in records}
        questions = next(iter(scores.values())).records
        by_trial = {
            record.id: {
                "of": record.of,
                "cost": (values := answers(settings, record, scores[record.id])).cost,
                "budgeted": values.budgeted,
                "nll": list(values.nll),
                "credit": [item.credit for item in scores[record.id].records],
                "kept": [item.kept_tokens for item in scores[record.id].records],
            }
            for record in records
        }
        found[phase] = {
            "keys": [item.key for item in questions],
            "groups": [item.group for item in questions],
            "images": [item.images for item in questions],
            "trials": by_trial,
        }
    return found


def write_output(settings: SweepSettings, prepared: Prepared, result: dict[str, Any]) -> None:
    """The JSON at `output`, and the pictures beside it, where that is set."""
    if settings.output is None:
        return
    storage.write_json(settings.output, result)
    with local_copy(prepared.folder.pictures) as pictures:
        for path in sorted(pictures.iterdir()):
            shutil.copy(path, Path(settings.output).parent / path.name)


def register_winners(settings: SweepSettings, prepared: Prepared, result: dict[str, Any]) -> dict[str, Any]:
    """The best of each budget, and the cheapest that is no worse, as versions; one that wins twice is one version."""
    decision, winners = result["decision"], dict[str, list[str]]()
    for budget in settings.budgets:
        found = decision["budgets"][f"{budget:g}"]
        if found is None:
            say(f"  budget {budget:g}: no finalist is within it, nothing is registered")
        else:
            winners.setdefault(found["trial"], []).append(settings.alias_of(budget))
    if decision["cheapest"] is not None:
        winners.setdefault(decision["cheapest"], []).append(CHEAPEST)
    registered: dict[str, Any] = {}
    for trial, aliases in winners.items():
        version = _register_winner(settings, prepared, prepared.records.get(trial), aliases)
        registered[version.uri] = {"trial": trial, "of": prepared.records.get(trial).of, "aliases": aliases}
        say(f"  {trial} is {version.uri} ({', '.join(aliases)})")
    return registered


def _register_winner(
    settings: SweepSettings, prepared: Prepared, record: TrialRecord, aliases: Sequence[str]
) -> RegisteredVersion:
    base, ranks = prepared.model, record.ranks
    tags = {
        "sweep": prepared.name,
        "trial": record.of,
        SELECTED_TAG: f"{prepared.context.search.digest}, and among finalists by {prepared.context.final.digest}",
        COMMIT_TAG: git_commit(Path.cwd()),
    }
    if settings.kind == "finetune":
        sweep, _, own = record.of.rpartition("/")
        folder = sweep_folder(settings.storage, sweep) if sweep else prepared.folder
        base, ranks = folder.export(own), None  # those of the export were measured anew
        recipe = settings.trial_recipe
        recipe = replace(recipe, model=replace(recipe.model, start=prepared.model))
        tags |= {"run_name": training_name(sweep or prepared.name, own), **training_tags(recipe, prepared.trained)}
    score: Score = load_score(prepared.folder, record.id)
    return register_variant(
        base,
        record.pruning_config,
        score,
        ranks=ranks,
        towers=record.towers,
        registry=Registry(settings.tracking.uri, settings.tracking.registered_model),
        aliases=aliases,
        run_id=record.run_id or prepared.tracker.run_id,
        tags=tags,
        suite=prepared.context.final,
    )


def sweep_text(prepared: Prepared, result: dict[str, Any]) -> str:
    """The results for people."""
    statuses = [record.status for record in prepared.records.all()]
    counts = ", ".join(f"{statuses.count(s)} {s}" for s in ("completed", "stopped", "failed"))
    decision, names = result["decision"], {record.id: record.of for record in prepared.records.of(FINAL)}
    lines = [f"  {len(statuses)} trials: {counts}; {result['wall_s']:.0f} s", f"  {decision['text']}"]
    if told_maps := _maps_text(prepared):
        lines.append(f"  {told_maps}")
    for budget, found in decision["budgets"].items():
        told = "no finalist is within it" if found is None else f"{names[found['trial']]}, {found['text']}"
        lines.append(f"  budget {budget}: {told}")
    dense = next((trial for trial, of in names.items() if of == DENSE), None)
    if dense is not None and (found := next((j for j in decision["finalists"] if j["id"] == dense), None)):
        lines.append(f"  without pruning: NLL {found['nll']['mean']:+.4f} against the paper's settings")
    return "\n".join([*lines, "", table(_final_rows(prepared), decision)])


def _maps_text(prepared: Prepared) -> str:
    """What became of the towers' maps in all trials; nothing where none were kept."""
    counts = Counter[str]()
    for record in prepared.records.all():
        counts.update(record.maps or {})
    told = [
        f"{counts[what]:,} {what.replace('_', ' ')}" for what in (READ, COMPUTED, DAMAGED, NOT_KEPT) if counts[what]
    ]
    return f"maps of towers: {', '.join(told)}" if told else ""


def _final_rows(prepared: Prepared) -> list[dict[str, Any]]:
    return [row(record) for record in prepared.records.of(FINAL)]
