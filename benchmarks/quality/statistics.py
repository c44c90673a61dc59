"""All statistics of the table, from stored answers alone: `python -m benchmarks.quality statistics`.

Intervals are 95 % and clustered by image; differences are paired with the dense model's answers to the same questions;
p-values are adjusted by Holm within one budget; verdicts are non-inferiority at margins that were stated before anyone
looked (MARGINS).

Legend: n questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.quality.rows import TRAINED
from pipelines.evaluation.intervals import difference, holm, level, non_inferiority

MARGINS = {"all": 0.01, "group": 0.02}
"""Loss that is still accepted: of the mean over groups, and of a group. Stated 2026-11-30, before the final part was
asked. The paper's own drop is 0.3 points on average."""
DENSE = "none"
SMALLER = "smaller_image"


def is_right(questions: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> np.ndarray:
    """Exact match, [n] of 0 and 1."""
    return np.array([float(text == item["answer"]) for item, text in zip(questions, answers, strict=True)])


def summarise(results: Mapping[str, Any]) -> dict[str, Any]:
    """Scores, differences and verdicts of every row of every dense model and of those that were made from it.

    Args:
        results: `questions`, and `models` with `rows` that hold `answers`; see benchmarks/quality/__main__.py.

    Returns:
        Rows by name, by the dense model that they are held against. A row of a model that was trained from it with
        pruning on has that model's name before its own.

    Raises:
        ValueError: where a model has no dense row to compare with.
    """
    questions, families = results["questions"], dict[str, dict[str, Mapping[str, Any]]]()
    for name, model in results["models"].items():
        start = model["card"].get("start", name)
        shown = {row["name"] if start == name else f"{name}: {row['name']}": row for row in model["rows"]}
        families.setdefault(start, {}).update(shown)
    found = {}
    for start, rows in families.items():
        dense = next((row for row in rows.values() if row["pruner"] == DENSE), None)
        if dense is None:
            raise ValueError(f"models made from {start!r} have no dense row to compare with: ask it under 'none' first")
        found[start] = _of_family(rows, is_right(questions, dense["answers"]), questions)
    return found


def _of_family(
    rows: Mapping[str, Mapping[str, Any]], dense: np.ndarray, questions: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    right = {name: is_right(questions, row["answers"]) for name, row in rows.items()}
    groups = np.array([item["group"] for item in questions])
    images = [item["image"] for item in questions]
    found: dict[str, Any] = {}
    for name, row in rows.items():
        found[name] = {
            **{key: row[key] for key in ("pruner", "keep", "equal", "budget", "costs")},
            "trained": is_trained(row),
            "kept": round(float(np.mean(row["kept"])), 2),
            "scores": _scores(right[name], groups, images),
            "kinds": _by(right[name], [f"{item['group']}/{item['kind']}" for item in questions]),
            "tags": _by(right[name], [_tags(item) for item in questions]),
            "against_dense": _against(dense, right[name], groups, images),
        }
    _adjust(found)
    _hard_items(found, rows, right)
    return found


def is_trained(row: Mapping[str, Any]) -> bool:
    """Whether the row's model was trained with its pruning on."""
    return bool(row["pruner"].startswith(TRAINED))


def _tags(item: Mapping[str, Any]) -> str:
    """As `ocr font=unseen`."""
    tags = item["tags"]
    return " ".join([item["group"], *(f"{key}={tags[key]}" for key in sorted(tags) if key in ("font", "drawing"))])


def _scores(right: np.ndarray, groups: np.ndarray, images: Sequence[int]) -> dict[str, list[float]]:
    """Score with the ends of its interval, of all questions and of each group."""
    found = {}
    for name, chosen in _selections(groups):
        own = right[chosen]
        interval = level(own, [images[place] for place in chosen])
        found[name] = [round(value, 4) for value in (float(own.mean()), interval.low, interval.high)]
    return found


def _selections(groups: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Places of all questions, and of each group's; groups have equally many, so all is the mean over groups."""
    names = sorted(set(groups.tolist()))
    return [("all", np.arange(len(groups))), *((name, np.flatnonzero(groups == name)) for name in names)]


def _by(right: np.ndarray, labels: Sequence[str]) -> dict[str, list[float]]:
    """Share right and number of questions by label."""
    found = {}
    for label in sorted(set(labels)):
        own = right[[place for place, item in enumerate(labels) if item == label]]
        found[label] = [round(float(own.mean()), 4), len(own)]
    return found


def _against(
    dense: np.ndarray, pruned: np.ndarray, groups: np.ndarray, images: Sequence[int]
) -> dict[str, dict[str, Any]]:
    found = {}
    for name, chosen in _selections(groups):
        paired = difference(dense[chosen], pruned[chosen], [images[place] for place in chosen])
        margin = MARGINS["all" if name == "all" else "group"]
        found[name] = {
            "mean": round(paired.mean, 4),
            "interval": [round(paired.interval.low, 4), round(paired.interval.high, 4)],
            "p": paired.p_value,
            "visible": round(paired.visible, 4),
            "verdict": str(non_inferiority(paired.interval, margin, larger_is_better=True)),
        }
    return found


def _adjust(found: dict[str, Any]) -> None:
    """Holm's adjustment over the rows of one budget and one measure of cost, selection by selection."""
    families: dict[tuple[int, str], list[str]] = {}
    for name, row in found.items():
        if row["pruner"] != DENSE:
            families.setdefault((row["budget"], row["equal"]), []).append(name)
    for names in families.values():
        for selection in found[names[0]]["against_dense"]:
            own = [found[name]["against_dense"][selection] for name in names]
            for item, adjusted in zip(own, holm([item["p"] for item in own]), strict=True):
                item["p_holm"] = round(adjusted, 5)


def _hard_items(found: dict[str, Any], rows: Mapping[str, Mapping[str, Any]], right: Mapping[str, np.ndarray]) -> None:
    """Score on the questions that the smaller image of the same budget gets wrong: what a pruner is for.

    What was trained with its pruning on is asked what the smaller image gets wrong that was trained, too.
    """

    def rival(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return row["budget"], row["equal"], is_trained(row)

    smaller = {rival(row): name for name, row in rows.items() if row["pruner"] in (SMALLER, TRAINED + SMALLER)}
    for name, row in rows.items():
        other = smaller.get(rival(row), name)
        wrong = right[other] == 0
        if other != name and wrong.any():
            found[name]["where_smaller_image_fails"] = [round(float(right[name][wrong].mean()), 4), int(wrong.sum())]


def table(summary: Mapping[str, Any], model: str) -> str:
    """A model's rows as Markdown: score by group with intervals, difference to dense, verdict."""
    rows = summary[model]
    groups = [name for name in next(iter(rows.values()))["scores"] if name != "all"]
    lines = [
        f"| pruner | tokens | TFLOPs | {' | '.join(groups)} | mean | against dense | verdict |",
        "|---|---|---|" + "---|" * (len(groups) + 3),
    ]
    for name, row in rows.items():
        against = row["against_dense"]["all"]
        worst = min(row["against_dense"][group]["mean"] for group in groups)
        cells = [f"{100 * row['scores'][group][0]:.1f}" for group in groups]
        mean, low, high = (100 * value for value in row["scores"]["all"])
        shown = "-" if row["pruner"] == DENSE else f"{100 * against['mean']:+.1f} (worst group {100 * worst:+.1f})"
        verdict = "-" if row["pruner"] == DENSE else against["verdict"]
        lines.append(
            f"| {name} | {row['kept']:g} | {row['costs']['tflops']:.4f} | {' | '.join(cells)} | "
            f"{mean:.1f} [{low:.1f}, {high:.1f}] | {shown} | {verdict} |"
        )
    return "\n".join(lines)
