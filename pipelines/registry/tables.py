"""The registry as text for people: its versions, two of them compared, an alias that moved."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from pipelines.evaluation.scores import MARGINS, Comparison, Measure, Score
from pipelines.registry.aliases import Move, alias_history
from pipelines.registry.promotion import Promotion, missing_evidence
from pipelines.registry.scores import VersionComparison, compare_versions
from pipelines.registry.tags import BASE_TAG, HISTORY_TAG, PARITY_TAG
from pipelines.registry.versions import Registry


def show_versions(registry: Registry) -> str:
    """All versions, newest first, and the history of each alias that moved."""
    registered = registry.registered_model()
    rows: list[tuple[str, ...]] = []
    rows += [("version", "aliases", "made by", "parity", "accuracy", "answer NLL", "tokens", "TFLOPs", "promotable")]
    for version in reversed(registry.versions()):
        tags = version.tags
        aliases = sorted(name for name, number in registered.aliases.items() if int(number) == int(version.version))
        made_by = tags.get(BASE_TAG) or tags.get("run_name") or tags.get("job") or "-"
        numbers = [tags.get(key, "-") for key in (PARITY_TAG, "accuracy", "answer_nll", "kept_per_image", "tflops")]
        ready = "no" if missing_evidence(version) else "yes"
        rows.append((str(version.version), ", ".join(aliases) or "-", made_by, *numbers, ready))
    lines = [_table(rows)]
    for tag in sorted(registered.tags):
        if tag.startswith(HISTORY_TAG):
            alias = tag.removeprefix(HISTORY_TAG)
            lines.append(f"{alias}: {' -> '.join(map(str, alias_history(registered, alias)))}")
    return "\n".join(lines)


def compare(
    registry: Registry,
    versions: tuple[str, str],
    suite: str | None,
    output: Path | None,
    margins: Mapping[Measure, float] = MARGINS,
) -> str:
    """The table of two versions on one suite; written as JSON to `output` as well."""
    numbers = [registry.resolve(which) for which in versions]
    first, second = (registry.version(number) for number in numbers)
    compared = compare_versions(registry, first, second, suite)
    if output is not None:
        document = {
            "model": registry.name,
            "suite": compared.suite,
            "first": {"asked": versions[0], "version": numbers[0], **compared.first.to_dict()},
            "second": {"asked": versions[1], "version": numbers[1], **compared.second.to_dict()},
            "second_minus_first": asdict(compared.difference),
            "margins": dict(margins),
            "verdicts": {
                measure: compared.difference.verdict(measure, margins[measure]) for measure in _there(compared)
            },
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(document, indent=2) + "\n")
    titles = [f"{which} (version {number})" for which, number in zip(versions, numbers, strict=True)]
    return comparison_table(titles, compared, margins)


def _there(compared: VersionComparison) -> list[Measure]:
    """The measures that both versions have."""
    return ["answer_nll", "accuracy"] if compared.difference.accuracy is not None else ["answer_nll"]


def comparison_table(titles: list[str], compared: VersionComparison, margins: Mapping[Measure, float] = MARGINS) -> str:
    """Scores side by side with 95 % intervals, the paired difference, and a verdict at the margins."""
    there = _there(compared)
    first, second, difference = compared.first, compared.second, compared.difference

    def row(name: str, measure: Callable[[Score], str], change: str) -> tuple[str, str, str, str]:
        return name, measure(first), measure(second), change

    rows = [
        ("", *titles, "difference, paired"),
        row("questions", lambda score: score.coverage, f"in {difference.groups} groups{_prompts(difference)}"),
        row(
            "accuracy",
            lambda score: score.accuracy_text,
            difference.text("accuracy", margins["accuracy"]) if "accuracy" in there else "not asked for",
        ),
        row(
            "answer NLL",
            lambda score: score.answer_nll_interval.beside(score.answer_nll),
            difference.text("answer_nll", margins["answer_nll"]),
        ),
        row(
            "tokens per image",
            lambda score: f"{score.tokens_per_image} > {score.kept_per_image:.1f}",
            f"{difference.kept_per_image:+.1f} after stage 3",
        ),
        row("TFLOPs", lambda score: f"{score.tflops:.4g}", f"{difference.tflops:+.4g}"),
    ]
    return f"suite {difference.suite}: {compared.suite}\n" + _table(rows)


def _prompts(difference: Comparison) -> str:
    """Where two models were asked in other words (another template or tokenizer), how often."""
    return f", {difference.other_prompts} prompts differ" if difference.other_prompts else ""


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def show_promotion(registry: Registry, promoted: Promotion) -> str:
    """Where an alias points now, and on what evidence."""
    return f"{show_move(registry, promoted.move)}\n  {promoted.why}"


def show_move(registry: Registry, move: Move) -> str:
    """Where an alias pointed, and points."""
    if move.before == move.after:
        return f"{move.alias} of {registry.name} points to version {move.after} already"
    return f"{move.alias} of {registry.name}: version {move.before or 'none'} -> {move.after}"
