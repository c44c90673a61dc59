"""The rehearsals: jobs as a person gives them, one after the other, on one stack."""

from __future__ import annotations

from dataclasses import dataclass

PULLED = "jobs/predict.py"
"""A new process pulls the registered model from MLflow and asks it."""


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: of its row in the results.
        words: after `python`.
    """

    name: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Play:
    """One rehearsal.

    Attributes:
        name: for `--only`.
        what: it rehearses.
        commands: in their order.
        cpus: that Ray is given.
    """

    name: str
    what: str
    commands: tuple[Command, ...]
    cpus: int = 4


def _train(job: str, recipe: str, *words: str) -> Command:
    return Command(job, (f"jobs/{job}.py", "--recipe", recipe, *words))


def _pull(alias: str) -> Command:
    words = ("--model", f"models:/meteor@{alias}", "--prompt", "What is on the image?", "--image", "IMAGE")
    return Command("pull", (PULLED, *words, "--max-new-tokens", "4", "--device", "cpu"))


BF16 = ("--training.precision", "bf16", "--training.gradient-checkpointing")
FEW = ("--source.code-points", "64", "--data.heldout-samples", "16", "--calibration.samples", "16")

PLAYS: tuple[Play, ...] = (
    Play(
        "small",
        "bf16, towers and LLM frozen, gradient checkpointing; then everything trained; then LoRA on the LLM",
        (
            _train("pretrain", "small", *BF16, *FEW),
            _train("finetune", "small", *BF16, *FEW),
            Command(
                "finetune-lora",
                (
                    *("jobs/finetune.py", "--recipe", "small", *BF16, *FEW, "--run.name", "lora"),
                    *("--training.lora.rank", "8", "--training.optimizer.learning-rates.towers", "None"),
                ),
            ),
            _pull("latest-finetune"),
        ),
    ),
    Play(
        "meteor_x4_1b",
        "a 1 B layout of the published family, bf16: files of gigabytes through every phase",
        (_train("pretrain", "meteor_x4_1b"), _pull("latest-pretrain")),
    ),
)

BY_NAME = {play.name: play for play in PLAYS}
