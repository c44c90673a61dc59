"""One sweep from a registered model to a pruning that costs less and is no worse, with the evidence.

1. prepare   the model is pulled and stored for the trials; its ranks, its data and both suites; the sweep has a name
2. search    one study of NLL and cost for all budgets: it begins with the paper's settings at falling budgets and with
             earlier sweeps; Tune runs the trials, what is dominated for certain is stopped
3. finals    the trials nearest to the front, the paper's settings and the dense model, on questions that none has seen
4. collect   what is no worse than the paper's settings, the best of each budget; pictures; MLflow; the JSON
5. register  where it is asked for, these become versions of the model

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
from ray.tune.schedulers import FIFOScheduler

from pipelines.config.settings import SettingsError
from pipelines.io import storage
from pipelines.io.arrow import arrow_filesystem
from pipelines.io.console import say
from tune.defaults import paper_line
from tune.finals import choose_finalists
from tune.outcome import collect_results, register_winners, sweep_text, write_output
from tune.prepare import Prepared, prepare, store_facts
from tune.records import TrialRecord
from tune.settings import FINAL, SEARCH, SweepSettings
from tune.space import Space
from tune.stopping import StopDominated
from tune.study import GivenSearch, Recorded, StudySearch
from tune.trial import TRIALS

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
        search = _search(settings, prepared)
        _require_completed(prepared, SEARCH)
        _finals(settings, prepared)
        _require_completed(prepared, FINAL)
        result = collect_results(settings, prepared, search.study)
        if settings.register:
            result["registered"] = register_winners(settings, prepared, result)
        result["wall_s"] = round(time.monotonic() - begun, 1)
        storage.write_json(prepared.folder.result, result)
        write_output(settings, prepared, result)
    except BaseException:
        prepared.tracker.fail()
        say(f"\n  kept: the trials of sweep {prepared.name}; the same command goes on (--name {prepared.name})")
        raise
    prepared.tracker.finish()
    store_facts(prepared.folder, replace(prepared.facts, finished=True))
    say(f"\n{sweep_text(prepared, result)}")
    return result


# -------------------------------------------------------------------------------------------------------------- search


def _search(settings: SweepSettings, prepared: Prepared) -> StudySearch:
    """Run what is left of the study."""
    space = Space(prepared.config, prepared.ranks, settings.decode_by, settings.criteria, settings.tower_knobs)
    search = StudySearch(
        SEARCH,
        space,
        prepared.records,
        settings.trials,
        sampler=settings.sampler,
        cost=settings.cost,
        begin=paper_line(space),
        earlier=prepared.earlier,
        seed=settings.seed,
        ended=lambda record: _ended(prepared, record),
    )
    _run(settings, prepared, search, settings.kind, early_stopping=settings.early_stopping)
    return search


def _finals(settings: SweepSettings, prepared: Prepared) -> None:
    """Ask the finalists what is left of the final questions."""
    given = choose_finalists(settings, prepared)
    finals = GivenSearch(FINAL, prepared.records, given, ended=lambda record: _ended(prepared, record))
    _run(settings, prepared, finals, FINAL, early_stopping=False)


def _run(settings: SweepSettings, prepared: Prepared, search: Recorded, trial: str, *, early_stopping: bool) -> None:
    """Run what is left of one phase."""
    if search.left == 0:
        say(f"[{search.phase}] complete")
        return
    say(f"[{search.phase}] {search.left} trials to run")
    trainable = tune.with_parameters(TRIALS[trial], context=prepared.context)
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
            scheduler=StopDominated(spared=f"{SEARCH}-000") if early_stopping else FIFOScheduler(),
            num_samples=search.left,
            max_concurrent_trials=prepared.concurrent,
            # A model that is loaded serves the next trial; a training that is stopped ends with its process.
            reuse_actors=settings.kind == "evaluate",
            trial_dirname_creator=lambda trial: str(trial.trial_id),
        ),
        run_config=tune.RunConfig(
            name=f"{search.phase}-{uuid.uuid4().hex[:8]}",
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
        raise SettingsError(f"phase {search.phase} ended with {search.left} trials that did not run: see Ray's log")


def _require_completed(prepared: Prepared, phase: str) -> None:
    """Raise SettingsError where every trial of a phase failed: there are no results."""
    trials = prepared.records.of(phase)
    if not any(record.status == "completed" for record in trials):
        prepared.tracker.deliver()
        errors = [f"  {record.id}: {record.error}" for record in trials if record.error]
        raise SettingsError(
            f"none of {len(trials)} trials of sweep {prepared.name} ({phase}) was completed; search again under "
            "another --name when what they failed with is mended:\n" + "\n".join(errors[:5])
        )


def _ended(prepared: Prepared, record: TrialRecord) -> None:
    what = f"{record.objective:.4f}" if record.objective is not None else record.error or ""
    say(f"  {record.id}: {record.status} {what}" + (f" (was {record.of})" if record.of else ""))
    prepared.tracker.ended(record)
