"""summary.json: what a run came to, for machines and, printed, for people."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from meteor_model.configuration_meteor import MeteorConfig
from pipelines.checkpoint.throughput import speed_text
from pipelines.config.recipe import Recipe
from pipelines.data.survey import report_lines
from pipelines.evaluation.scores import counted
from pipelines.io import sealed, storage
from pipelines.io.run_folder import RunFolder
from pipelines.job.answers import HeldoutAnswer, HeldoutAnswers
from pipelines.job.register import TrainedRun
from pipelines.registry.versions import RegisteredVersion
from pipelines.training.pace import slowest, spread


def visual_tokens(config: MeteorConfig, answers: HeldoutAnswers) -> dict[str, Any]:
    """Visual tokens per image by stage.

    Each encoder's in and kept per boundary, fusion in and kept, and the mean number kept per image after stage 3 on the
    held-out questions.
    """
    budgets = config.encode_budgets
    return {
        "encode": {
            name: {"in": config.encoder_tokens[name], "kept_per_boundary": list(budget)}
            for name, budget in budgets.items()
        },
        "fuse": {"in": sum(budget[-1] for budget in budgets.values()), "kept": config.tokens_per_image},
        "decode_kept_per_image": None if answers.score is None else answers.score.kept_per_image,
    }


def build_summary(
    trained: TrainedRun,
    answers: HeldoutAnswers,
    version: RegisteredVersion,
    *,
    ranks: Mapping[str, Any],
    config: MeteorConfig,
    wall_s: Mapping[str, float],
) -> dict[str, Any]:
    """The content of summary.json; numbers as they were measured.

    Args:
        trained: the run.
        answers: to held-out questions.
        version: in the registry.
        ranks: content of `ranks.json`.
        config: of the exported model.
        wall_s: seconds of each phase.
    """
    training, given = trained.training, answers.answers
    state, exported = training.last.state, training.exported.state
    right = sum(answer.credit == 1 for answer in given)
    return {
        "run_name": trained.run_name,
        "run_id": trained.run_id,
        "model_uri": version.uri,
        "model_alias_uri": f"models:/{version.name}@{version.alias}",
        "world_size": state.world_size,
        "steps": state.step,
        "samples_expected": training.planned_samples,
        "samples_seen": state.samples_seen,
        "dropped": dict(state.dropped),
        "truncated": state.truncated,
        "data": {manifest.url: manifest.report for manifest in trained.manifests},
        "padding_share": state.padding_share,
        "restarts": state.restarts,
        "loss_first": state.loss_first,
        "loss_last": state.loss_last,
        "exported_step": exported.step,
        **exported.final,
        "heldout_answers": len(given),
        "heldout_answers_right": right,
        "heldout_left_out": answers.left_out,
        "visual_tokens": visual_tokens(config, answers),
        "ranks": {"estimator": ranks["estimator"], "images": ranks["images"]},
        "lambda": config.pruning.decode.lam,
        "parity_max_abs_diff": trained.parity.difference,
        "parity_precision": trained.parity.precision,
        "workers": {"data_seconds": list(state.data_seconds), "own_seconds": list(state.own_seconds)},
        "samples_per_s": state.samples_seen / state.step_seconds,
        "speed": state.measured.metrics(),
        "wall_s": {**wall_s, "total": round(sum(wall_s.values()), 2)},
    }


def store_summary(recipe: Recipe, run: RunFolder, summary: Mapping[str, Any], pictures: Path) -> None:
    """Beside the run in storage, and with the pictures in `run.output` where that is set."""
    sealed.write_document(run.summary, summary)
    if recipe.run.output is not None:
        output = RunFolder(recipe.run.output)  # these two alone, under the same names
        shutil.rmtree(output.pictures, ignore_errors=True)
        shutil.copytree(pictures, output.pictures)
        storage.write_json(output.summary, summary)


def load_summary(recipe: Recipe, run: RunFolder) -> dict[str, Any]:
    """The summary of a finished run; also written to `run.output` where that is set."""
    summary = sealed.read_document(run.summary)
    if recipe.run.output is not None:
        storage.write_json(RunFolder(recipe.run.output).summary, summary)
    return summary


def summary_text(summary: Mapping[str, Any], answers: Sequence[HeldoutAnswer] = ()) -> str:
    """The summary for people."""
    tokens = summary["visual_tokens"]
    encoders = "; ".join(
        f"{name} {part['in']} -> {' -> '.join(map(str, part['kept_per_boundary']))}"
        for name, part in tokens["encode"].items()
    )
    dropped = ", ".join(f"{count} {reason}" for reason, count in summary["dropped"].items()) or "none"
    truncated = summary.get("truncated", 0)  # none in a summary of before
    cut = f" ({truncated} of them truncated)" if truncated else ""
    gain = 1 - summary["heldout_loss"] / summary["heldout_loss_shuffled_images"]
    bf16 = ", in bf16" if summary.get("parity_precision") == "bf16" else ""
    lines = [
        ("run", f"{summary['run_name']} (MLflow run {summary['run_id']})"),
        ("samples", f"{summary['samples_seen']} of {summary['samples_expected']} trained{cut}, dropped: {dropped}"),
        (
            "training",
            f"{summary['steps']} steps, {summary['world_size']} workers, {summary['samples_per_s']:.1f} samples/s, "
            f"{summary['padding_share']:.0%} padding, {summary['restarts']} restarts",
        ),
        ("loss", f"{summary['loss_first']:.3f} -> {summary['loss_last']:.3f}"),
        (
            "held out",
            f"{summary['heldout_loss']:.3f}; with shuffled images "
            f"{summary['heldout_loss_shuffled_images']:.3f} ({gain:.0%} lower with the true ones)",
        ),
        (
            "answers",
            f"{summary['heldout_answers_right']} of {summary['heldout_answers']} held-out questions right, left out: "
            # Summaries made before 2026-11-30 do not say.
            + (counted(summary["heldout_left_out"]) if "heldout_left_out" in summary else "not counted"),
        ),
        ("encode", encoders),
        ("fuse", f"{tokens['fuse']['in']} -> {tokens['fuse']['kept']} visual tokens into the LLM"),
        ("decode", _decode_text(tokens, summary["lambda"])),
        ("parity", f"largest logit difference to the training model {summary['parity_max_abs_diff']:.2g}" + bf16),
        ("model", f"{summary['model_uri']} = {summary['model_alias_uri']}"),
        ("seconds", ", ".join(f"{name} {seconds:.0f}" for name, seconds in summary["wall_s"].items())),
    ]
    if pace := pace_text(summary):
        lines.insert(3, ("workers", pace))
    if speed := speed_text(summary.get("speed", {})):  # none in a summary of before 2026-12-01, or of so few steps
        lines.insert(3, ("speed", speed))
    if summary["exported_step"] != summary["steps"]:
        lines.insert(
            3, ("exported", f"the checkpoint of step {summary['exported_step']}, the best on held-out samples")
        )
    reports = summary.get("data", {})  # none in a summary of before
    lines += [("data", f"{url}: {line}") for url, report in reports.items() for line in report_lines(report)]
    text = "\n".join(f"  {name:<9} {value}" for name, value in lines)
    for answer in list(answers)[:4]:
        text += f"\n  {'asked':<9} {answer.question!r}: {answer.answer!r} (expected {answer.expected!r})"
    return text + "\n" + what_next(summary)


def _decode_text(tokens: Mapping[str, Any], lam: float | None) -> str:
    """What stage 3 keeps."""
    kept, unit = tokens.get("decode_kept_per_image"), "image"
    if "decode_kept_mean" in tokens:  # a summary made before 2026-11-30
        kept, unit = tokens["decode_kept_mean"], "prompt"
    if kept is None:
        return "off"
    return f"{kept:.1f} kept per {unit} on average" + ("" if lam is None else f", lambda {lam:.4g}")


def pace_text(summary: Mapping[str, Any]) -> str:
    """Which worker was slowest and which waited longest for data; "" for one alone, and in summaries of before."""
    workers = summary.get("workers", {"own_seconds": []})
    own = tuple(workers["own_seconds"])
    if len(own) < 2:
        return ""
    waits = workers["data_seconds"]
    longest = max(range(len(own)), key=lambda rank: waits[rank])
    return (
        f"slowest worker {slowest(own)} of {len(own)}, {spread(own):.0%} behind the quickest; "
        f"longest wait for data {waits[longest]:.1f} s (worker {longest})"
    )


def what_next(summary: Mapping[str, Any]) -> str:
    """Two commands that go on from a finished run: ask the model, search a cheaper pruning of it."""
    model = summary["model_alias_uri"]
    half = max(1, summary["visual_tokens"]["fuse"]["kept"] // 2)
    return (
        f'  ask it    python jobs/predict.py --model {model} --image FILE --prompt "What is this?"\n'
        f"  sweep it  python jobs/sweep.py --model {model} --budgets {half}"
    )
