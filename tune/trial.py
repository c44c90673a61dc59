"""What a trial does, in an actor of its own on the cluster: the model under one pruning, scored.

An `evaluate` trial is scored in portions of the suite, and reports after each, so that the scheduler may stop it. The
actor keeps model and questions when Tune hands it the next trial. A `finetune` trial trains first: a run of its own
(`runs/SWEEP-TRIAL`) that a killed sweep goes on with; it reports the training loss at every checkpoint, then its score.

A fault of the configuration (a target that no lambda reaches) is reported as a failed trial. Any other error is Tune's
to repeat.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.tune.result import DONE

from meteor_model.configuration_meteor import PruningConfig
from meteor_model.loading import load_model_and_processor
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from pipelines.checkpoint.committed import CheckpointRef, latest_checkpoint
from pipelines.checkpoint.local import local_copy
from pipelines.config.recipe import Recipe
from pipelines.data import shards
from pipelines.evaluation.evaluate import longest_answer, score_model, score_of_records
from pipelines.evaluation.pictures import draw_questions
from pipelines.evaluation.questions import Question, Questions, read_prompts
from pipelines.evaluation.scores import Record, Score
from pipelines.evaluation.suite import Suite
from pipelines.evaluation.target_mean import solve_for_target
from pipelines.io import storage
from pipelines.io.errors import TransientError
from pipelines.io.run_folder import run_folder
from pipelines.io.upload import upload_folder
from pipelines.job.datasets import ensure_shards
from pipelines.job.export import export_checkpoint
from pipelines.job.start import prepare_start
from pipelines.job.train import train
from pipelines.registry.open import device_for
from pipelines.registry.variants import apply_pruning
from tune.folder import SweepFolder
from tune.records import training_name
from tune.settings import SweepSettings

PROGRESS = "progress"
"""Per cent of a trial that is done: what the scheduler compares trials at."""
POLL_S = 2.0


@dataclass(frozen=True)
class TrialContext:
    """What all trials of a sweep share.

    Attributes:
        sweep: name of the sweep.
        folder: in storage, with the exported base model.
        suite: the questions.
        manifest: address of the shards that lambda is solved on.
        settings: of the sweep.
    """

    sweep: str
    folder: SweepFolder
    suite: Suite
    manifest: str
    settings: SweepSettings


def objective_of(settings: SweepSettings, records: Sequence[Record]) -> float:
    """The objective of these answers; higher is better."""
    if settings.objective == "accuracy":
        return sum(record.credit or 0.0 for record in records) / len(records)
    return -sum(record.nll for record in records) / len(records)


class Trial(tune.Trainable):
    """What both kinds share: a pruning to score, faults of the configuration as results, actors that are kept."""

    context: TrialContext

    def setup(self, config: dict[str, Any], context: TrialContext) -> None:
        """A new actor with its first trial."""
        torch.set_num_threads(max(1, int(context.settings.cpus_per_trial)))
        self.context = context
        self._questions: Questions | None = None
        self._longest = 0
        self._prompts: tuple[Question, ...] = ()
        self.begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial on an actor that is kept."""
        self.begin(new_config)
        return True

    def begin(self, config: dict[str, Any]) -> None:
        """Take a trial; its work starts with the first step."""
        self.id: str = config["trial"]
        change = json.loads(config["change"])
        self.pruning = PruningConfig.from_dict(change["pruning"])
        self.ranks: dict[str, list[float]] | None = change["ranks"]
        self.answers: list[Record] = []
        self.ready = False

    def step(self) -> dict[str, Any]:
        """One report."""
        try:
            return self.advance()
        except TransientError:
            raise
        except ValueError as error:
            # Tune wants the objective in every result; its scheduler passes over what is not a number.
            return {"objective": math.nan, "failed": f"{type(error).__name__}: {error}", PROGRESS: 100, DONE: True}

    def advance(self) -> dict[str, Any]:
        """The next part of the trial's work, and what it comes to."""
        raise NotImplementedError

    # --------------------------------------------------------------------------------------------------- shared pieces

    @property
    def device(self) -> str:
        """Where the trial computes."""
        return device_for(self.context.settings.gpus_per_trial)

    def prompts(self, model: MeteorForConditionalGeneration, processor: MeteorProcessor) -> Sequence[Question]:
        """The questions that lambda is solved on, read once an actor and encoded for the trial's pruning."""
        if not self._prompts:
            manifest, settings = shards.load_manifest(self.context.manifest), self.context.settings
            count, positions = settings.calibration_samples, model.config.text_config.max_position_embeddings
            self._prompts = read_prompts(manifest, settings.train_split, processor, count, positions=positions).asked
        return [question.encoded_by(processor) for question in self._prompts]

    def questions(self, model: MeteorForConditionalGeneration, processor: MeteorProcessor) -> Questions:
        """The suite, read once an actor."""
        if self._questions is None:
            positions = model.config.text_config.max_position_embeddings
            self._questions = self.context.suite.load(processor, positions)
            self._longest = longest_answer(self._questions.asked)
        return self._questions

    @property
    def order(self) -> list[int]:
        """The suite's places in the order in which they are asked, the same in every trial.

        Shuffled, or the first portions would hold what lies together in the shards, and the scheduler compare trials on
        that.
        """
        assert self._questions is not None, "they are read before the first one is asked"
        places = list(range(len(self._questions.asked)))
        random.Random(self.context.settings.seed).shuffle(places)
        return places

    def ask(self, model: MeteorForConditionalGeneration, processor: MeteorProcessor, count: int) -> None:
        """Score the next `count` questions."""
        done, suite = len(self.answers), self.questions(model, processor)
        places = self.order[done : done + count]
        score = score_model(
            model,
            processor,
            Questions(tuple(suite.asked[place].encoded_by(processor) for place in places)),
            self.context.suite,
            self.context.settings.batch,
            longest=self._longest,
        )
        self.answers += score.records

    def end(self, model: MeteorForConditionalGeneration, processor: MeteorProcessor) -> dict[str, Any]:
        """Keep the score with all questions and the pictures in storage; the last report."""
        context = self.context
        by_place = dict(zip(self.order, self.answers, strict=True))
        suite = self.questions(model, processor)
        records = [by_place[place] for place in sorted(by_place)]
        score = score_of_records(model.config, records, context.suite, suite.left_out)
        if context.settings.pictures:
            with tempfile.TemporaryDirectory(prefix="meteor-trial-") as name:
                for file, picture in draw_questions(model, processor, suite.asked, context.settings.pictures):
                    picture.save(Path(name) / file)
                upload_folder(Path(name), context.folder.trial_pictures(self.id))
        storage.write_json(context.folder.score(self.id), score.to_dict(records=True))
        ended = {"score": score.to_dict(), "pruning": asdict(model.config.pruning)}  # with the lambda that was solved
        return {
            "objective": objective_of(context.settings, self.answers),
            PROGRESS: 100,
            "score": json.dumps(ended),
            DONE: True,
        }


class EvaluateTrial(Trial):
    """The registered model, as it is, under another pruning."""

    def setup(self, config: dict[str, Any], context: TrialContext) -> None:
        """Load the base model, once an actor."""
        super().setup(config, context)
        with local_copy(context.folder.base) as folder:
            self.model, self.processor = load_model_and_processor(folder)
        self.model.to(self.device)

    def advance(self) -> dict[str, Any]:
        """A portion of the suite."""
        settings = self.context.settings
        if not self.ready:
            apply_pruning(self.model, self.processor, self.pruning, self.ranks)
            solve_for_target(self.model, self.processor, lambda: self.prompts(self.model, self.processor))
            self.ready = True
        total = len(self.questions(self.model, self.processor).asked)
        self.ask(self.model, self.processor, -(-total // settings.portions))
        if len(self.answers) >= total:
            return self.end(self.model, self.processor)
        progress = 100 * len(self.answers) / total
        return {"objective": objective_of(settings, self.answers), PROGRESS: progress}


class FinetuneTrial(Trial):
    """A short training under the pruning, from the registered model on; then the score.

    Until it is scored, its objective is the mean loss of the last steps before a checkpoint (`TrainState.last_losses`).
    """

    def begin(self, config: dict[str, Any]) -> None:
        """The training starts with the first step, in a thread: every checkpoint is a report."""
        super().begin(config)
        self.thread: threading.Thread | None = None
        self.outcome: CheckpointRef | Exception | None = None
        self.reported = -1

    def advance(self) -> dict[str, Any]:
        """Until the next checkpoint; after the last one, the whole suite."""
        if self.thread is None:
            self.thread = threading.Thread(target=self._train, name="training", daemon=True)
            self.thread.start()
        while self.outcome is None:
            time.sleep(POLL_S)
            reached = latest_checkpoint(self.recipe.run.storage, self.run_name)
            if reached is not None and not reached.state.done and reached.state.step > self.reported:
                self.reported = reached.state.step
                progress = 90 * reached.state.step / reached.state.total_steps
                recent = reached.state.last_losses
                return {"objective": -sum(recent) / len(recent), PROGRESS: progress}
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self._score(self.outcome)

    @property
    def run_name(self) -> str:
        """Of the trial's own run."""
        return training_name(self.context.sweep, self.id)

    @property
    def recipe(self) -> Recipe:
        """The sweep's training, of this trial."""
        shared = self.context.settings.trial_recipe
        return replace(
            shared,
            model=replace(shared.model, start=self.context.folder.base),
            pruning=self.pruning,
            run=replace(shared.run, name=self.run_name),
        )

    def _train(self) -> None:
        """The thread."""
        try:
            recipe = self.recipe
            manifests = ensure_shards(recipe)
            prepare_start(recipe, manifests[0], run_folder(recipe.run.storage, self.run_name))
            # What MLflow is told of a trial, the sweep tells it.
            self.outcome = train(recipe, manifests, self.run_name, metrics_run=None).exported
        except Exception as error:  # the step raises it
            self.outcome = error

    def _score(self, checkpoint: CheckpointRef) -> dict[str, Any]:
        recipe = self.recipe
        with tempfile.TemporaryDirectory(prefix="meteor-trial-") as scratch:
            export_checkpoint(
                run_folder(recipe.run.storage, self.run_name),
                checkpoint.url,
                self.prompts,
                Path(scratch) / "model",
                self.context.folder.export(self.id),
                precision=recipe.export_precision,
                tolerance=recipe.tracking.parity_tolerance,
                device=self.device,
            )
            model, processor = load_model_and_processor(Path(scratch) / "model")
        model.to(self.device)
        self.ask(model, processor, self.context.settings.questions)
        return self.end(model, processor)


TRIALS: dict[str, type[Trial]] = {"evaluate": EvaluateTrial, "finetune": FinetuneTrial}


def load_score(folder: SweepFolder, trial_id: str) -> Score:
    """The score of a completed trial with all its questions. Raises StorageError."""
    url = folder.score(trial_id)
    return Score.from_dict(storage.read_json(url), url)
