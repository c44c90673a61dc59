"""The rehearsals: jobs as a person gives them, one after the other, on one stack."""

from __future__ import annotations

from dataclasses import dataclass

from infra.throttle import Link

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
        cpus: that each Ray node is given.
        store: the network between the jobs and the store, either way; None: as fast as the machine.
        nodes: Ray nodes.
        shared_temp: whether they share one temporary folder.
        nginx: whether MLflow is behind a proxy with a path prefix, a login and a limit on bodies.
    """

    name: str
    what: str
    commands: tuple[Command, ...]
    cpus: int = 4
    store: Link | None = None
    nodes: int = 1
    shared_temp: bool = False
    nginx: bool = False


def _train(job: str, recipe: str, *words: str) -> Command:
    return Command(job, (f"jobs/{job}.py", "--recipe", recipe, *words))


def _pull(alias: str) -> Command:
    words = ("--model", f"models:/meteor@{alias}", "--prompt", "What is on the image?", "--image", "IMAGE")
    return Command("pull", (PULLED, *words, "--max-new-tokens", "4", "--device", "cpu"))


BF16 = ("--training.precision", "bf16", "--training.gradient-checkpointing")
FEW = ("--source.code-points", "64", "--data.heldout-samples", "16", "--calibration.samples", "16")

SHORT = ("--source.code-points", "128", "--data.heldout-samples", "16")
ON_TWO = ("--training.placement", "STRICT_SPREAD", "--training.cpus-per-worker", "1")

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
    Play(
        "slow-store",
        "16 MB/s to and from the store, and nothing for 3 of every 6 seconds",
        (_train("pretrain", "tiny", *SHORT), _pull("latest-pretrain")),
        store=Link(16e6, open_s=3.0, pause_s=3.0),
    ),
    Play(
        "behind-nginx",
        "MLflow behind nginx: a path prefix, a login, bodies of at most 64 MB",
        (_train("pretrain", "tiny", *SHORT), _pull("latest-pretrain")),
        nginx=True,
    ),
    Play(
        "two-nodes",
        "a worker on each of two Ray nodes with temporary folders of their own",
        (_train("pretrain", "tiny", *SHORT, *ON_TWO),),
        cpus=3,
        nodes=2,
    ),
    Play(
        "two-nodes-shared-temp",
        "the same with one temporary folder",
        (_train("pretrain", "tiny", *SHORT, *ON_TWO),),
        cpus=3,
        nodes=2,
        shared_temp=True,
    ),
    Play(
        "offload",
        "optimizer and parameters offloaded (training.zero3.offload all)",
        (_train("pretrain", "tiny", *SHORT, "--training.zero3.offload", "all"),),
    ),
)

BY_NAME = {play.name: play for play in PLAYS}
