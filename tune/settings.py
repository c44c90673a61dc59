"""Settings of one sweep, and the studies that they ask for."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from pipelines.config.recipe import Recipe, TrackingSettings
from pipelines.config.settings import SettingsError
from pipelines.io.names import Name
from pipelines.io.redact import redact
from pipelines.io.validation import settings_class
from tune.space import DecodeBy

Kind = Literal["evaluate", "finetune"]
Sampler = Literal["tpe", "nsga2", "random", "given"]


@settings_class(error=SettingsError)
class SweepSettings:
    """What is searched, on what, and with what."""

    model: str = "models:/meteor@latest-pretrain"
    """Registered model whose pruning is searched: models:/NAME@ALIAS or models:/NAME/VERSION."""
    kind: Kind = "evaluate"
    """evaluate: score the model as it is under another pruning. finetune: first train it under that pruning, a short
    run through Ray Train (settings under --train)."""
    budgets: tuple[PositiveFloat, ...] = ()
    """Find the best pruning within each of these budgets, each per image (one study each)."""
    budget_unit: Literal["tokens", "tflops"] = "tokens"
    """What budgets count: visual tokens per image after stage 3 (mean), or TFLOPs of one image and a short prompt."""
    pareto: bool = False
    """Search the front of score against TFLOPs and visual tokens at once, too."""
    trials: PositiveInt = 16
    """Trials of each study."""
    pareto_sampler: Literal["tpe", "nsga2"] = "tpe"
    """Optuna's sampler of the front. NSGA-II needs a few generations of trials before it is more than random."""
    compare_random: bool = False
    """Beside the front, as many trials of random search, for the comparison of hypervolumes."""
    objective: Literal["answer_nll", "accuracy"] = "answer_nll"
    """The score: likelihood of the expected answers (lower is better), or the share of right answers."""
    decode_by: DecodeBy = "target"
    """Choose stage 3 by a target mean, for which lambda is solved, or by lambda itself (not with token budgets)."""
    encode_criteria: tuple[str, ...] = ()
    """Criteria of stage 1 that are searched (docs/pruners.md); none: the model's own."""
    fuse_criteria: tuple[str, ...] = ()
    """Criteria of stage 2 that are searched."""
    decode_criteria: tuple[str, ...] = ()
    """Criteria of stage 3 that are searched."""
    questions: PositiveInt = 256
    """Questions of the suite, from the part `search` of the held-out split."""
    portions: PositiveInt = 4
    """Portions in which a trial of `evaluate` is scored; after each, ASHA may stop it."""
    early_stopping: bool = True
    """Stop the weaker half of a budget's trials early (ASHA). Studies of the front always run to the end."""
    batch: PositiveInt = 16
    """Questions at a time."""
    calibration_samples: PositiveInt = 64
    """Prompts of the training split on which lambda is solved."""
    manifest: str = ""
    """Address of the shards; by default those that the model was trained on."""
    train_split: str = "train"
    """Split of the prompts on which lambda is solved."""
    heldout_split: str = "heldout"
    """Split of the questions."""
    max_concurrent: PositiveInt | None = None
    """Trials at a time at most; by default as many as the cluster holds."""
    cpus_per_trial: NonNegativeFloat = 1.0
    """Ray CPUs that a trial reserves for itself (a finetune trial's workers come on top)."""
    gpus_per_trial: NonNegativeFloat = 0.0
    """Ray GPUs that a trial reserves for itself, fractions of one too."""
    pictures: NonNegativeInt = 1
    """Questions of each finished trial for which the kept tokens are drawn."""
    seed: int = 0
    """Seed of the samplers."""
    name: Name | None = None
    """Name of the sweep. A name that exists goes on where it stopped; None continues the last unfinished sweep of these
    settings, or begins a new one."""
    storage: str = field(default_factory=lambda: Recipe().run.storage)
    """Root of all data, runs and sweeps; by default METEOR_STORAGE."""
    output: str | None = None
    """JSON file on the machine that runs the job where the results are written as well; pictures beside it."""
    register: bool = False
    """Register the best of each budget as a version of the model, under the alias budget-NUMBER (12_5 for 12.5)."""
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    """MLflow."""
    train: Recipe = field(default_factory=Recipe)
    """Training of a finetune trial; its model, pruning, name and places are the sweep's."""

    def __post_init__(self) -> None:
        if len(set(self.budgets)) < len(self.budgets):
            raise SettingsError(f"budgets are {self.budgets}; they must differ")
        if self.portions > self.questions:
            raise SettingsError(f"portions is {self.portions}, but there are only {self.questions} questions")
        if self.cpus_per_trial + self.gpus_per_trial == 0:
            raise SettingsError(
                f"a trial reserves {self.cpus_per_trial:g} CPUs and {self.gpus_per_trial:g} GPUs: reserve some of one, "
                "or trials would run without bound"
            )
        if self.budgets and self.budget_unit == "tflops" and self.decode_by == "lambda":
            raise SettingsError("a budget in TFLOPs needs decode_by 'target': a lambda does not tell the cost")
        if self.compare_random and not self.pareto:
            raise SettingsError("compare_random compares fronts: it needs --pareto")
        if self.train_split == self.heldout_split:
            raise SettingsError(f"lambda would be solved on the questions: both splits are {self.train_split!r}")

    @property
    def criteria(self) -> dict[str, tuple[str, ...]]:
        """By stage, those that are searched."""
        named = {"encode": self.encode_criteria, "fuse": self.fuse_criteria, "decode": self.decode_criteria}
        return {stage: names for stage, names in named.items() if names}

    def identity(self) -> dict[str, Any]:
        """The settings that decide the results: two starts of one sweep must agree in it."""
        plain: dict[str, Any] = redact(json.loads(json.dumps(asdict(self))))
        for key in ("name", "storage", "output", "register", "tracking", "max_concurrent", "pictures"):
            plain.pop(key)
        for key in ("encode_criteria", "fuse_criteria", "decode_criteria"):
            if not plain[key]:  # younger than sweeps that are stored
                plain.pop(key)
        plain["train"] = self.train.identity() if self.kind == "finetune" else None
        return plain

    @property
    def trial_recipe(self) -> Recipe:
        """The training of a finetune trial, but for its start, its pruning and its name.

        Nothing is validated on the way: the trial is scored at its end.
        """
        return replace(
            self.train,
            training=replace(self.train.training, validate_every_checkpoints=0),
            run=replace(self.train.run, storage=self.storage, output=None),
            tracking=self.tracking,
        )

    @staticmethod
    def alias_of(budget: float) -> str:
        """Alias of the version that is best within a budget: budget-64, budget-12_5 (MLflow takes no full stop)."""
        return f"budget-{budget:g}".replace(".", "_").replace("+", "")

    def studies(self) -> tuple[StudyPlan, ...]:
        """One for each budget; for the front one that searches, one that draws at random, and the paper's defaults.

        Raises:
            SettingsError: neither is asked for.
        """
        if not self.budgets and not self.pareto:
            raise SettingsError("there is nothing to search: give --budgets NUMBER ... or --pareto")
        plans = [
            StudyPlan(f"budget-{budget:g}", self.trials, "tpe", budget, early_stopping=self.early_stopping)
            for budget in self.budgets
        ]
        if self.pareto:
            plans.append(StudyPlan("front", self.trials, self.pareto_sampler))
            if self.compare_random:
                plans.append(StudyPlan("random", self.trials, "random"))
            plans.append(StudyPlan("defaults", 0, "given"))
        return tuple(plans)


@dataclass(frozen=True)
class StudyPlan:
    """One study.

    Attributes:
        name: the first part of its trials' names.
        trials: how many; of "given" configurations, as many as there are.
        sampler: what chooses.
        budget: the bound of its trials, or None where score and costs are searched together.
        early_stopping: whether ASHA stops trials.
    """

    name: str
    trials: int
    sampler: Sampler
    budget: float | None = None
    early_stopping: bool = False
