"""Settings of one sweep: one study, the finalists that it sends to the final questions, and the rule that chooses."""

from __future__ import annotations

import json
from dataclasses import asdict, field, replace
from typing import Any, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from pipelines.config.recipe import Recipe, TrackingSettings
from pipelines.config.settings import SettingsError
from pipelines.evaluation.scorers import Scorer
from pipelines.evaluation.scores import MARGINS
from pipelines.io.names import Name
from pipelines.io.redact import redact
from pipelines.io.validation import settings_class
from tune.space import DecodeBy, TowerKnob

Kind = Literal["evaluate", "finetune"]
Sampler = Literal["tpe", "nsga2", "random"]
BudgetUnit = Literal["tokens", "tflops", "ms"]
CostUnit = Literal["tflops", "ms"]

SEARCH = "search"
"""The study: the first part of its trials' names."""
FINAL = "final"
"""The finalists on the final questions."""


@settings_class(error=SettingsError)
class SweepSettings:
    """What is searched, on what, and with what."""

    model: str = "models:/meteor@latest-pretrain"
    """Registered model whose pruning is searched: models:/NAME@ALIAS or models:/NAME/VERSION."""
    kind: Kind = "evaluate"
    """evaluate: score the model as it is under another pruning. finetune: first train it under that pruning, a short
    run through Ray Train (settings under --train)."""
    budgets: tuple[PositiveFloat, ...] = ()
    """Choose the best finalist within each of these budgets, each per image; with none, the cheapest that is no worse
    than the paper's settings alone."""
    budget_unit: BudgetUnit = "tokens"
    """What budgets count: visual tokens per image after stage 3 (mean), TFLOPs of one image and a short prompt, or
    milliseconds per image as measured."""
    cost: CostUnit = "tflops"
    """What the search lowers beside the NLL: TFLOPs of one image and a short prompt, or milliseconds per image: the
    median of several turns side by side with the model's own settings. Take machines of one kind."""
    trials: PositiveInt = 24
    """Trials of the search, those that it begins with among them."""
    sampler: Sampler = "tpe"
    """Optuna's sampler, after the paper's settings at falling budgets: TPE, NSGA-II, or random."""
    early_stopping: bool = True
    """Stop a trial where one that costs no more is better for certain on the questions that both were asked."""
    warm_start: tuple[Name, ...] = ()
    """Earlier sweeps of the same model and questions whose trials the search begins with."""
    decode_by: DecodeBy = "target"
    """Choose stage 3 by a target mean per image, for which lambda is solved, or by lambda itself."""
    encode_criteria: tuple[str, ...] = ()
    """Criteria of stage 1 that are searched (docs/pruners.md); none: the model's own."""
    fuse_criteria: tuple[str, ...] = ()
    """Criteria of stage 2 that are searched."""
    decode_criteria: tuple[str, ...] = ()
    """Criteria of stage 3 that are searched."""
    tower_knobs: tuple[TowerKnob, ...] = ()
    """What is searched of the towers of an evaluate sweep, too: keep (whether each stays in the model), side (of the
    image that a tower sees, where its weights run at any size)."""
    tower_maps_gib: NonNegativeFloat = 16.0
    """GiB of each machine's disk for the towers' maps before pruning, which the trials of an evaluate sweep share; at
    most half of what is free. 0 computes them in every trial."""
    questions: PositiveInt = 256
    """Questions of a trial, from the part `search` of the held-out split, by likelihood alone; all there are where the
    part has fewer."""
    portions: PositiveInt = 2
    """Portions in which they are asked; after each a trial may be stopped."""
    finalists: PositiveInt = 6
    """Trials that are asked the final questions, beside the paper's settings and the model without pruning."""
    final_questions: PositiveInt = 1024
    """Questions of a finalist, from the part `final`, answered as well; all there are where the part has fewer."""
    scorer: Scorer = "exact"
    """How answers to the final questions are held against the expected ones (`jobs/evaluate.py`)."""
    margin: PositiveFloat = MARGINS["answer_nll"]
    """Nats per token by which a setting may be worse than the paper's and still counts as no worse."""
    batch: PositiveInt = 16
    """Questions at a time."""
    calibration_samples: PositiveInt = 256
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
    """Questions of each finalist for which the kept tokens are drawn."""
    seed: int = 0
    """Seed of the sampler."""
    name: Name | None = None
    """Name of the sweep. A name that exists goes on where it stopped; None continues the last unfinished sweep of these
    settings, or begins a new one."""
    storage: str = field(default_factory=lambda: Recipe().run.storage)
    """Root of all data, runs and sweeps; by default METEOR_STORAGE."""
    output: str | None = None
    """JSON file on the machine that runs the job where the results are written as well; pictures beside it."""
    register: bool = False
    """Register the best of each budget as a version of the model, under the alias budget-NUMBER (12_5 for 12.5), and
    the cheapest that is no worse than the paper's settings under `cheapest`."""
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
        if len(set(self.tower_knobs)) < len(self.tower_knobs):
            raise SettingsError(f"tower_knobs are {self.tower_knobs}; they must differ")
        if self.tower_knobs and self.kind == "finetune":
            raise SettingsError("tower_knobs are of evaluate sweeps: a finetune trial trains all towers of the model")
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
        for key in (
            "name",
            "storage",
            "output",
            "register",
            "tracking",
            "max_concurrent",
            "pictures",
            "tower_maps_gib",
        ):
            plain.pop(key)
        for key in ("encode_criteria", "fuse_criteria", "decode_criteria", "tower_knobs"):
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
