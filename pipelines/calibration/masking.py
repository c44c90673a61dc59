"""Usefulness of every encoder, by masking: how much worse a model answers a suite without it.

A map's rank says how rich it is, not what answers need of it. Source of the measure: masking one encoder at a time in
EAGLE, Eagle 2 and Cambrian-1 (arXiv 2507.03262), u_i = (accuracy of all - accuracy without i) / accuracy of all. An
encoder that is masked is not run, and the others keep their budgets; stage 3 is off, so that nothing else changes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from meteor_model.configuration_meteor import MeteorConfig, PruningConfig
from meteor_model.loading import load_model_and_processor
from pipelines.calibration.image_plan import CalibrationError
from pipelines.data import shards
from pipelines.evaluation.evaluate import score_model
from pipelines.evaluation.intervals import Interval
from pipelines.evaluation.scores import Score
from pipelines.evaluation.suite import Suite
from pipelines.io.console import say
from pipelines.registry.variants import apply_pruning


@dataclass(frozen=True)
class Masked:
    """A model without one encoder.

    Attributes:
        accuracy: of its answers.
        interval: of the accuracy.
        usefulness: share of the whole model's accuracy that is lost; negative where the model answers better without.
    """

    accuracy: float
    interval: Interval
    usefulness: float


@dataclass(frozen=True)
class MaskingReport:
    """What masking one encoder at a time did.

    Attributes:
        suite: digest of the questions.
        questions: how many were asked each time.
        accuracy: with all encoders.
        interval: of it.
        without: by encoder.
    """

    suite: str
    questions: int
    accuracy: float
    interval: Interval
    without: dict[str, Masked]

    @property
    def usefulness(self) -> dict[str, float]:
        """By encoder: `pruning.encode.usefulness`."""
        return {name: item.usefulness for name, item in self.without.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        found = [f"masking   with all encoders {self.interval.beside(self.accuracy)} on {self.questions} questions"]
        for name, item in self.without.items():
            found.append(
                f"          without {name} {item.interval.beside(item.accuracy)}: usefulness {item.usefulness:+.3f}"
            )
        table = " ".join(f"{name} {max(value, 0.0):.4g}" for name, value in self.usefulness.items())
        return [*found, f"          --pruning.encode.budget rank_usefulness --pruning.encode.usefulness {table}"]


def masked_pruning(config: MeteorConfig, name: str | None) -> PruningConfig:
    """The model's pruning without stage 3 and without this encoder; None masks none.

    Stage 2 keeps as many tokens as the others give, where these are fewer.
    """
    pruning = config.pruning
    decode, encode = replace(pruning.decode, enabled=False, lam=None), pruning.encode
    if name is None:
        return replace(pruning, decode=decode)
    fuse = pruning.fuse
    if config.fusion == "post_projection" and fuse.enabled:
        left = sum(budgets[-1] for other, budgets in config.encode_budgets.items() if other != name)
        fuse = replace(fuse, keep=min(fuse.keep, left))
    return replace(pruning, encode=replace(encode, masked=(*encode.masked, name)), fuse=fuse, decode=decode)


def measure_masking(
    folder: Path, manifest: shards.Manifest, split: str, questions: int, device: str = "cpu"
) -> MaskingReport:
    """Mask each encoder of a saved model in turn.

    Args:
        folder: the model with its processor.
        manifest: the shards.
        split: held back from training.
        questions: to ask; fewer where the split has fewer.
        device: where the model runs.

    Raises:
        CalibrationError: a model of one encoder, or one that answers nothing right.
        ScoringError: without a question.
        ShardError: a shard that is missing or damaged.
    """
    model, processor = load_model_and_processor(folder)
    model.to(device)
    config = model.config
    names = [item.name for item in config.encoders if config.runs(item.name)]
    if len(names) < 2:
        raise CalibrationError(f"masking compares encoders, and this model runs {names} alone: leave --masking out")
    suite = Suite.of(manifest, split, questions, part="all").fitted(manifest)

    def ask(name: str | None) -> Score:
        apply_pruning(model, processor, masked_pruning(config, name), None)
        asked = suite.read(processor, config.text_config.max_position_embeddings)
        score = score_model(model, processor, asked, suite)
        say(f"{'with all encoders' if name is None else f'without {name}'}: accuracy {score.accuracy_text}")
        return score

    return masking_report(suite.digest, ask(None), {name: ask(name) for name in names})


def masking_report(suite: str, whole: Score, without: dict[str, Score]) -> MaskingReport:
    """The table of these scores. Raises CalibrationError where the whole model answers nothing right."""
    if not whole.accuracy or whole.accuracy_interval is None:
        raise CalibrationError(
            f"with all encoders the model answers none of {whole.questions} questions right: usefulness is a share of "
            "its accuracy; ask questions that it can answer"
        )
    found = {}
    for name, score in without.items():
        assert score.accuracy is not None, "answers are asked for"
        assert score.accuracy_interval is not None, "answers are asked for"
        lost = (whole.accuracy - score.accuracy) / whole.accuracy
        found[name] = Masked(score.accuracy, score.accuracy_interval, lost)
    return MaskingReport(suite, whole.questions, whole.accuracy, whole.accuracy_interval, found)
