"""The model card: what a version is, how well it answers, what it costs, where it comes from, and under which licences.

It is the README.md of the exported folder, sealed with it, and the description of the version in MLflow. Scores that
are measured later reach the description alone (`with_scores`): the registered folder never changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipelines.evaluation.scores import Score
from pipelines.io.redact import redact
from pipelines.registry.folder import USE, introduction
from pipelines.registry.proof import PARITY_TOLERANCE
from pipelines.registry.tags import (
    BASE_TAG,
    COMMIT_TAG,
    LIBRARIES_TAG,
    LICENCE_TAG,
    MANIFEST_TAG,
    PARITY_TAG,
    PARITY_TOLERANCE_TAG,
    STARTS_TAG,
    STEP_TAG,
    TRAINING_COMMIT_TAG,
    WEIGHTS_TAG,
)

if TYPE_CHECKING:
    from meteor_model.configuration_meteor import MeteorConfig

SCORES_HEADING = "## Scores"

_ORIGIN = {
    BASE_TAG: "variant of",
    "start": "training started from",
    "job": "job",
    "recipe": "recipe",
    "run_name": "run",
    "run_id": "MLflow run",
    MANIFEST_TAG: "data manifest",
    "manifest_sha256": "sha256 of the manifest",
    "mixture": "further manifests",
    COMMIT_TAG: "commit",
    TRAINING_COMMIT_TAG: "commit of the training",
    STARTS_TAG: "starts of the training",
    LIBRARIES_TAG: "libraries of the training",
    STEP_TAG: "optimizer steps of the exported checkpoint",
    "heldout_loss": "held-out loss of the exported checkpoint",
    WEIGHTS_TAG: "number format of the weights",
}
"""Tags that say where a version comes from, and what the card calls them."""


def card(config: MeteorConfig, tags: Mapping[str, str], scores: Mapping[str, Score]) -> str:
    """The model card of a version.

    Args:
        config: of the model.
        tags: of the version: where it comes from (`_ORIGIN`), its parity, the licences of its parts.
        scores: name of the suite -> score; empty where it is not scored yet.
    """
    tags = redact(tags)
    parts = [introduction(config), scores_section(scores), _cost(config, scores), _calibration(config), _origin(tags)]
    return "\n".join([*parts, _licences(tags), USE])


def with_scores(description: str, scores: Mapping[str, Score]) -> str:
    """A description with these scores in place of those it had."""
    before, heading, after = description.partition(SCORES_HEADING + "\n")
    if not heading:
        return f"{description.rstrip()}\n\n{scores_section(scores)}".lstrip()
    _, following, rest = after.partition("\n## ")
    return before + scores_section(scores) + following + rest


def scores_section(scores: Mapping[str, Score]) -> str:
    """The table of scores with their 95 % intervals."""
    if not scores:
        return f"{SCORES_HEADING}\n\nNot scored on a suite yet (`jobs/evaluate.py`).\n"
    rows = "\n".join(
        f"| {name} ({score.suite}) | {score.coverage} | {score.accuracy_text} | "
        f"{score.answer_nll_interval.beside(score.answer_nll)} | {score.tokens_per_image} > "
        f"{score.kept_per_image:.1f} | {score.tflops:.4g} |"
        for name, score in scores.items()
    )
    return (
        f"{SCORES_HEADING}\n\nWith 95 % intervals over groups of questions about the same thing: Wilson's for the "
        "accuracy (studentised where an answer earns a part), a studentised bootstrap for the negative log-likelihood "
        "of the expected answers (nats per token).\n\n"
        "| suite | questions | accuracy | answer NLL | visual tokens per image, after stage 3 | TFLOPs |\n"
        f"|---|---|---|---|---|---|\n{rows}\n"
    )


def _cost(config: MeteorConfig, scores: Mapping[str, Score]) -> str:
    # Here: counting runs the model's modules, and whoever writes scores into a description loads none.
    from meteor_model.flops import TEXT_TOKENS, count_flops
    from pipelines.evaluation.evaluate import measured_cost

    decode = config.pruning.decode
    if scores:
        kept = [score.kept_per_image for score in scores.values()][-1]
        report, where = measured_cost(config, kept), f"stage 3 at its measured mean of {kept:.1f} tokens per image"
    elif decode.enabled and decode.target_mean is None:
        return "## Cost\n\nNot counted: stage 3 has no target mean, and no suite has measured its mean yet.\n"
    else:
        report = count_flops(config)
        where = f"stage 3 at its target of {decode.target_mean:g} tokens per image" if decode.enabled else "stage 3 off"
    rows = "\n".join(
        f"| {name} | {flops / 1e12:.4g} |"
        for name, flops in (
            ("encoders", report.encoding),
            ("projectors", report.projection),
            ("fusion scores", report.fusion),
            ("language model, prefill", report.llm),
            ("total", report.total),
        )
    )
    return (
        f"## Cost\n\nOne image and {TEXT_TOKENS} text tokens up to the first answer token, {where}.\n\n"
        f"| part | TFLOPs |\n|---|---|\n{rows}\n"
    )


def _calibration(config: MeteorConfig) -> str:
    encode, decode = config.pruning.encode, config.pruning.decode
    lines = []
    if encode.enabled:
        lines.append(f"- rank estimator {encode.rank_estimator}, exponent {encode.rank_exponent:g}")
        if config.ranks is None:
            lines.append("- ranks not measured: encoders share by token count alone")
        else:
            for name, ranks in config.ranks.items():
                lines.append(f"- expected ranks of {name}: {', '.join(f'{rank:.4g}' for rank in ranks)}")
    if decode.enabled:
        lam = "not solved" if decode.lam is None else f"{decode.lam:.6g}"
        goal = "none" if decode.target_mean is None else f"{decode.target_mean:g} tokens per image"
        if decode.needs_lambda:
            lines.append(f"- lambda {lam} for a target mean of {goal}")
        else:
            lines.append(f"- budget {decode.budget}: {goal}")
        lines.append(f"- scores of LLM layer {decode.layer}, {config.decode_heads} heads, query {decode.query}")
    return "## Calibration\n\n" + ("\n".join(lines) or "Nothing is pruned.") + "\n"


def _origin(tags: Mapping[str, str]) -> str:
    rows = [f"| {label} | {tags[tag]} |" for tag, label in _ORIGIN.items() if tags.get(tag)]
    parity = tags.get(PARITY_TAG)
    proven = (
        "not checked" if parity is None else f"{parity} (allowed: {tags.get(PARITY_TOLERANCE_TAG, PARITY_TOLERANCE)})"
    )
    rows.append(f"| largest logit difference of this folder, loaded again, to the model it was made of | {proven} |")
    return "## Where it comes from\n\n| | |\n|---|---|\n" + "\n".join(rows) + "\n"


def _licences(tags: Mapping[str, str]) -> str:
    found = {key.removeprefix(LICENCE_TAG): text for key, text in tags.items() if key.startswith(LICENCE_TAG)}
    if not found:
        return "## Licences of the parts\n\nNot recorded.\n"
    rows = "\n".join(f"| {part} | {text} |" for part, text in sorted(found.items()))
    return f"## Licences of the parts\n\n| part | licence |\n|---|---|\n{rows}\n"
