"""One sweep from a registered model to the best pruning of each budget, with the evidence.

1. prepare   the model is pulled and stored for the trials; its ranks, its data and the suite; the sweep has a name
2. search    study by study: Tune runs the trials, Optuna chooses, ASHA stops the weaker ones of a budget early
3. collect   best per budget, fronts and hypervolumes, importances; pictures; MLflow; the JSON
4. register  where it is asked for, the best of each budget becomes a version of the model

Killed anywhere and started again, a sweep goes on: trials that ended are read from storage, those under way run again.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from dataclasses import replace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.flops import count_flops
from pipelines.config.settings import SettingsError
from pipelines.io import storage
from pipelines.io.arrow import arrow_filesystem
from pipelines.io.console import say
from tune.defaults import BELOW_BUDGET, TARGET_SHARES, paper_choices, paper_settings
from tune.outcome import collect_results, register_winners, sweep_text, write_output
from tune.prepare import Prepared, prepare, store_facts
from tune.records import TrialRecord
from tune.results import cost_of
from tune.settings import StudyPlan, SweepSettings
from tune.space import Space
from tune.study import StudySearch
from tune.trial import PROGRESS, TRIALS

TRIAL_RETRIES = 2
"""How often a trial whose process ended is run again. A fault of its configuration is not tried twice."""


def run_sweep(settings: SweepSettings) -> dict[str, Any]:
    """Run, or continue, one sweep; its results. Ray must be reachable.

    Raises:
        ValueError: naming the setting, model or address that is wrong, and what to do.
    """
    begun = time.monotonic()
    prepared = prepare(settings)
    try:
        studies = {plan.name: _search(settings, prepared, plan) for plan in settings.studies()}
        _require_completed(prepared)
        result = collect_results(settings, prepared, studies)
        if settings.register:
            result["registered"] = register_winners(settings, prepared)
        result["wall_s"] = round(time.monotonic() - begun, 1)
        storage.write_json(prepared.folder.result, result)
        write_output(settings, prepared, result)
    except BaseException:
        prepared.tracker.fail()
        say(f"\n  kept: the trials of sweep {prepared.name}; the same command goes on (--name {prepared.name})")
        raise
    prepared.tracker.finish()
    store_facts(prepared.folder, replace(prepared.facts, finished=True))
    say(f"\n{sweep_text(settings, prepared, result)}")
    return result


# -------------------------------------------------------------------------------------------------------------- search


def _search(settings: SweepSettings, prepared: Prepared, plan: StudyPlan) -> StudySearch:
    """Run what is left of one study."""
    in_tokens = plan.budget is not None and settings.budget_unit == "tokens"
    space = Space(
        prepared.config, prepared.ranks, plan.budget if in_tokens else None, settings.decode_by, settings.criteria
    )
    search = StudySearch(
        plan,
        space,
        prepared.records,
        given=paper_settings(prepared.config) if plan.sampler == "given" else (),
        begin=_begin(plan, space),
        seed=settings.seed + 1000 * settings.studies().index(plan),  # a study that goes on counts its seed up
        expected_cost=None if in_tokens else _tflops,
        measured_cost=lambda score: cost_of(settings, score),
        ended=lambda record: _ended(prepared, record),
    )
    if search.left == 0:
        say(f"[{plan.name}] complete")
        return search
    say(f"[{plan.name}] {search.left} trials to run")
    trainable = tune.with_parameters(TRIALS[settings.kind], context=prepared.context)
    reserved = {"CPU": settings.cpus_per_trial, "GPU": settings.gpus_per_trial}
    filesystem, path = arrow_filesystem(prepared.folder.tune)
    # No log of each trial on disk, no tables on the screen, no address of each run: the sweep says what happens itself.
    quiet = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)  # misses those logs
    tuner = tune.Tuner(
        tune.with_resources(trainable, {name: amount for name, amount in reserved.items() if amount}),
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=_scheduler(settings, plan),
            num_samples=search.left,
            max_concurrent_trials=prepared.concurrent,
            # A model that is loaded serves the next trial; a training that is stopped ends with its process.
            reuse_actors=settings.kind == "evaluate",
            trial_dirname_creator=lambda trial: str(trial.trial_id),
        ),
        run_config=tune.RunConfig(
            name=f"{plan.name}-{uuid.uuid4().hex[:8]}",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=tune.FailureConfig(max_failures=TRIAL_RETRIES),
            # Trials keep what they have in the sweep's own folder.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )
    tuner.fit()
    if search.left:
        raise SettingsError(f"study {plan.name} ended with {search.left} trials that did not run: see Ray's log")
    return search


def _require_completed(prepared: Prepared) -> None:
    """Raise SettingsError where every trial failed: there are no results."""
    everything = prepared.records.all()
    if not any(record.status == "completed" for record in everything):
        prepared.tracker.deliver()
        errors = [f"  {record.id}: {record.error}" for record in everything if record.error]
        raise SettingsError(
            f"none of {len(everything)} trials of sweep {prepared.name} was completed; search again under another "
            "--name when what they failed with is mended:\n" + "\n".join(errors[:5])
        )


def _begin(plan: StudyPlan, space: Space) -> list[dict[str, Any]]:
    """What a study that searches tries first: the paper's settings, at the knob that its budget suggests."""
    if plan.sampler not in ("tpe", "nsga2"):
        return []
    if space.cap is not None:
        return paper_choices(space, (BELOW_BUDGET,))
    return paper_choices(space, TARGET_SHARES[-1:] if plan.budget is not None else TARGET_SHARES[1::2])


def _tflops(config: MeteorConfig) -> float:
    return count_flops(config).total / 1e12


def _scheduler(settings: SweepSettings, plan: StudyPlan) -> TrialScheduler:
    if not plan.early_stopping:
        return FIFOScheduler()
    first = 50 if settings.kind == "evaluate" else 25  # on fewer questions a weak trial may look like the best
    return ASHAScheduler(
        time_attr=PROGRESS,
        metric="objective",
        mode="max",
        max_t=100,
        grace_period=first,
        reduction_factor=2,
    )


def _ended(prepared: Prepared, record: TrialRecord) -> None:
    what = f"{record.objective:.4f}" if record.objective is not None else record.error or ""
    say(f"  {record.id}: {record.status} {what}")
    prepared.tracker.ended(record)
