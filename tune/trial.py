"""What a trial does, in an actor of its own on the cluster: the model under one pruning, scored.

A trial of the search is asked the search questions by their likelihood alone, in portions, and reports after each, so
that the scheduler may stop it. The actor keeps model and questions when Tune hands it the next trial. A `finetune`
trial trains first: a run of its own (`runs/SWEEP-TRIAL`) that a killed sweep goes on with; it reports the losses of the
last steps at every checkpoint, then its score. A finalist is asked the final questions, and answers them.

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

from meteor_model.configuration_meteor import MeteorConfig, PruningConfig
from meteor_model.flops import count_flops
from meteor_model.loading import load_model_and_processor
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from pipelines.checkpoint.committed import CheckpointRef, latest_checkpoint
from pipelines.checkpoint.local import local_copy
from pipelines.config.recipe import Recipe
from pipelines.data import shards
from pipelines.evaluation.embedded import Embed, embed_questions
from pipelines.evaluation.evaluate import ask_records, longest_answer, score_of_records
from pipelines.evaluation.pictures import draw_questions
from pipelines.evaluation.questions import Question, Questions, read_prompts
from pipelines.evaluation.scores import Record
from pipelines.evaluation.suite import Suite
from pipelines.evaluation.target_mean import solve_for_target
from pipelines.evaluation.tower_store import GIB, TowerStore
from pipelines.io import storage
from pipelines.io.errors import TransientError
from pipelines.io.run_folder import run_folder
from pipelines.io.upload import upload_folder
from pipelines.job.datasets import ensure_shards
from pipelines.job.export import export_checkpoint
from pipelines.job.start import prepare_start
from pipelines.job.train import train
from pipelines.registry.open import device_for
from pipelines.registry.variants import under_settings
from tune.folder import SweepFolder, sweep_folder
from tune.records import training_name
from tune.settings import FINAL, SweepSettings
from tune.stopping import PROGRESS, REPORT, Report
from tune.timing import ms_per_image


@dataclass(frozen=True)
class TrialContext:
    """What all trials of a sweep share.

    Attributes:
        sweep: name of the sweep.
        folder: in storage, with the exported base model.
        search: the questions of its trials.
        final: the questions of its finalists.
        manifest: address of the shards that lambda is solved on.
        settings: of the sweep.
    """

    sweep: str
    folder: SweepFolder
    search: Suite
    final: Suite
    manifest: str
    settings: SweepSettings


def expected_cost(config: MeteorConfig) -> float:
    """TFLOPs of one image and prompt, stage 3 at its target."""
    decode = config.pruning.decode
    if decode.enabled and decode.target_mean is None:  # lambda itself is chosen: what it keeps is not known yet
        config = config.with_pruning(replace(config.pruning, decode=replace(decode, enabled=False)))
    return count_flops(config).total / 1e12


class Trial(tune.Trainable):
    """What all kinds share: a pruning to score, faults of the configuration as results, actors that are kept."""

    context: TrialContext

    def setup(self, config: dict[str, Any], context: TrialContext) -> None:
        """A new actor with its first trial."""
        torch.set_num_threads(max(1, int(context.settings.cpus_per_trial)))
        self.context = context
        self.store: TowerStore | None = None
        self._questions: Questions | None = None
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
        self.towers: dict[str, int] | None = change["towers"]
        self.of: str = change["of"]
        self.answers: list[Record] = []
        self.ready = False

    def step(self) -> dict[str, Any]:
        """One report."""
        try:
            return self.advance()
        except TransientError:
            raise
        except ValueError as error:
            # Tune wants the objective in every result.
            return {"objective": math.nan, "failed": f"{type(error).__name__}: {error}", PROGRESS: 100, DONE: True}

    def advance(self) -> dict[str, Any]:
        """The next part of the trial's work, and what it comes to."""
        raise NotImplementedError

    # --------------------------------------------------------------------------------------------------- shared pieces

    @property
    def device(self) -> str:
        """Where the trial computes."""
        return device_for(self.context.settings.gpus_per_trial)

    @property
    def embed(self) -> Embed:
        """How questions reach the language model."""
        return embed_questions if self.store is None else self.store.embed

    @property
    def is_final(self) -> bool:
        """Whether this is a finalist: it answers."""
        return self.id.startswith(f"{FINAL}-")

    @property
    def suite(self) -> Suite:
        """The questions of the trial."""
        return self.context.final if self.is_final else self.context.search

    def prompts(self, model: MeteorForConditionalGeneration, processor: MeteorProcessor) -> Sequence[Question]:
        """The questions that lambda is solved on, read once an actor and encoded for the trial's pruning."""
        if not self._prompts:
            manifest, settings = shards.load_manifest(self.context.manifest), self.context.settings
            count, positions = settings.calibration_samples, model.config.text_config.max_position_embeddings
            self._prompts = read_prompts(manifest, settings.train_split, processor, count, positions=positions).asked
        return [question.encoded_by(processor) for question in self._prompts]

    def questions(self, model: MeteorForConditionalGeneration, processor: MeteorProcessor) -> Questions:
        """The suite, read once an actor: all trials of one are of one phase."""
        if self._questions is None:
            positions = model.config.text_config.max_position_embeddings
            self._questions = self.suite.load(processor, positions)
        return self._questions

    @property
    def order(self) -> list[int]:
        """The suite's places in the order in which they are asked, the same in every trial.

        Shuffled, or the first portions would hold what lies together in the shards, and trials be compared on that.
        """
        assert self._questions is not None, "they are read before the first one is asked"
        places = list(range(len(self._questions.asked)))
        random.Random(self.context.settings.seed).shuffle(places)
        return places

    def ask(self, model: MeteorForConditionalGeneration, processor: MeteorProcessor, count: int) -> None:
        """Score the next `count` questions."""
        done, suite = len(self.answers), self.questions(model, processor)
        places = self.order[done : done + count]
        self.answers += ask_records(
            model,
            processor,
            Questions(tuple(suite.asked[place].encoded_by(processor) for place in places)),
            self.suite,
            self.context.settings.batch,
            longest=longest_answer(suite.asked) if self.is_final else None,
            embed=self.embed,
        )

    def end(self, model: MeteorForConditionalGeneration, processor: MeteorProcessor) -> dict[str, Any]:
        """Keep the score with all questions, and of a finalist the pictures, in storage; the last report."""
        context, settings = self.context, self.context.settings
        by_place = dict(zip(self.order, self.answers, strict=True))
        suite = self.questions(model, processor)
        records = [by_place[place] for place in sorted(by_place)]
        score = score_of_records(model.config, records, self.suite, suite.left_out)
        if self.is_final and settings.pictures:
            with tempfile.TemporaryDirectory(prefix="meteor-trial-") as name:
                for file, picture in draw_questions(model, processor, suite.asked, settings.pictures):
                    picture.save(Path(name) / file)
                upload_folder(Path(name), context.folder.trial_pictures(self.id))
        storage.write_json(context.folder.score(self.id), score.to_dict(records=True))
        timed = self.is_final or "ms" in (settings.cost, settings.budget_unit)
        ended = {
            "score": score.to_dict(),
            "pruning": asdict(model.config.pruning),  # with the lambda that was solved
            "ms": self.timed(model, processor, suite.asked[: settings.batch]) if timed else None,
            "maps": None if self.store is None else dict(self.store.counts),
        }
        return {"objective": -score.answer_nll, PROGRESS: 100, "score": json.dumps(ended), DONE: True}

    def timed(
        self, model: MeteorForConditionalGeneration, processor: MeteorProcessor, questions: Sequence[Question]
    ) -> float:
        """Milliseconds per image, beside the base model's settings."""
        with local_copy(self.context.folder.base, weights=False) as folder:
            own = MeteorConfig.from_pretrained(folder)
        return ms_per_image(model, processor, (self.full(model), own), questions, self.context.folder.latency)

    def full(self, model: MeteorForConditionalGeneration) -> MeteorForConditionalGeneration:
        """A model with all towers that computes what the base model does."""
        return model


class EvaluateTrial(Trial):
    """The registered model, as it is, under another pruning."""

    def setup(self, config: dict[str, Any], context: TrialContext) -> None:
        """Load the base model, once an actor."""
        super().setup(config, context)
        self.load(self.context.folder.base)

    def full(self, model: MeteorForConditionalGeneration) -> MeteorForConditionalGeneration:
        """The model whose towers the trial's has."""
        return self.whole

    def load(self, url: str) -> None:
        """Take the model of a folder."""
        with local_copy(url) as folder:
            self.whole, self.processor = load_model_and_processor(folder)
        self.whole.to(self.device)
        self.own = self.whole.config
        gib = self.context.settings.tower_maps_gib
        if gib and self.context.settings.kind == "evaluate":  # else every model has weights of its own
            self.store = TowerStore(self.whole, int(gib * GIB))

    def advance(self) -> dict[str, Any]:
        """A portion of the suite."""
        settings = self.context.settings
        if not self.ready:
            self.whole.follow(self.own)  # the trial before may have left other ranks, or smaller towers
            self.model = under_settings(self.whole, self.processor, self.pruning, self.ranks, self.towers)
            if self.store is not None:
                self.store.counts.clear()
            if self.pruning.decode.lam is None:
                solve_for_target(
                    self.model, self.processor, lambda: self.prompts(self.model, self.processor), self.embed
                )
            self.cost = expected_cost(self.model.config)
            self.ready = True
        total = len(self.questions(self.model, self.processor).asked)
        self.ask(self.model, self.processor, -(-total // settings.portions))
        if len(self.answers) >= total:
            return self.end(self.model, self.processor)
        values = [record.nll for record in self.answers]
        report = Report(self.cost, values, [record.group for record in self.answers])
        progress = 100 * len(self.answers) / total
        return {"objective": -sum(values) / len(values), PROGRESS: progress, REPORT: report.to_json()}


class FinalTrial(EvaluateTrial):
    """A finalist: the model that its trial trained, or the registered one, under its pruning."""

    def setup(self, config: dict[str, Any], context: TrialContext) -> None:
        """As of the kind: of `finetune` every finalist brings a model of its own."""
        Trial.setup(self, config, context)
        if self.context.settings.kind == "evaluate":
            self.load(self.context.folder.base)

    def advance(self) -> dict[str, Any]:
        """A portion of the final questions."""
        if not self.ready and self.context.settings.kind == "finetune":
            sweep, _, trial = self.of.rpartition("/")
            folder = sweep_folder(self.context.settings.storage, sweep) if sweep else self.context.folder
            self.load(folder.export(trial))
            self.ranks = None  # those of the export were measured anew
        return super().advance()


class FinetuneTrial(Trial):
    """A short training under the pruning, from the registered model on; then the score.

    Until it is scored, it reports the losses of the last steps before a checkpoint (`TrainState.last_losses`).
    """

    poll_s = 2.0

    def begin(self, config: dict[str, Any]) -> None:
        """The training starts with the first step, in a thread: every checkpoint is a report."""
        super().begin(config)
        self.thread: threading.Thread | None = None
        self.outcome: CheckpointRef | Exception | None = None
        self.reported = -1

    def advance(self) -> dict[str, Any]:
        """Until the next checkpoint; after the last one, the whole suite."""
        if self.thread is None:
            self.cost = self._cost()
            self.thread = threading.Thread(target=self._train, name="training", daemon=True)
            self.thread.start()
        while self.outcome is None:
            time.sleep(self.poll_s)
            reached = latest_checkpoint(self.recipe.run.storage, self.run_name)
            if reached is not None and not reached.state.done and reached.state.step > self.reported:
                self.reported = reached.state.step
                progress = 90 * reached.state.step / reached.state.total_steps
                recent = list(reached.state.last_losses)
                report = Report(self.cost, recent, [str(step) for step in range(len(recent))])
                return {"objective": -sum(recent) / len(recent), PROGRESS: progress, REPORT: report.to_json()}
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self._score(self.outcome)

    def _cost(self) -> float:
        with local_copy(self.context.folder.base, weights=False) as folder:
            config = MeteorConfig.from_pretrained(folder)
        return expected_cost(config.with_pruning(self.pruning, "keep" if self.ranks is None else self.ranks))

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
        self.ask(model, processor, len(self.questions(model, processor).asked))
        return self.end(model, processor)


TRIALS: dict[str, type[Trial]] = {"evaluate": EvaluateTrial, "finetune": FinetuneTrial, FINAL: FinalTrial}
"""By the kind of the sweep, and of its finalists."""
