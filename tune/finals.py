"""From the trials of a search to its finalists, and from these to the values that the choice is made on."""

from __future__ import annotations

from optuna.trial import FixedTrial

from meteor_model.configuration_meteor import DecodePruning, EncodePruning, FusePruning, PruningConfig
from pipelines.config.settings import SettingsError
from pipelines.evaluation.scores import Score
from pipelines.io import storage
from tune.choice import Answers, nearest_to_front, with_budgets
from tune.defaults import paper_line
from tune.folder import SweepFolder, sweep_folder
from tune.prepare import Prepared
from tune.records import DENSE, TrialRecord
from tune.settings import FINAL, SEARCH, BudgetUnit, SweepSettings
from tune.space import Space
from tune.study import Given, as_plain, configuration_key, cost_of

UNPRUNED = PruningConfig(EncodePruning(enabled=False), FusePruning(enabled=False), DecodePruning(enabled=False))


def searched(prepared: Prepared) -> list[TrialRecord]:
    """Every completed trial of the search, those of earlier sweeps too; of equal configurations the first."""
    by_key: dict[str, TrialRecord] = {}
    for record in [*prepared.earlier, *prepared.records.of(SEARCH)]:
        if record.status == "completed":
            by_key.setdefault(configuration_key(record.pruning, record.ranks, record.towers), record)
    return list(by_key.values())


def paper_trial(settings: SweepSettings, prepared: Prepared) -> TrialRecord:
    """The trial with the paper's settings, the reference of all comparisons; the best one where lambda is chosen.

    Raises:
        SettingsError: where none of the line was completed.
    """
    space = Space(prepared.config, prepared.ranks, settings.decode_by, settings.criteria, settings.tower_knobs)
    completed = searched(prepared)
    line = paper_line(space)
    if not line:
        return max(completed, key=lambda record: record.objective or 0.0)
    by_key = {configuration_key(record.pruning, record.ranks, record.towers): record for record in completed}
    config = space.sample(FixedTrial(line[0]))
    found = by_key.get(configuration_key(as_plain(config.pruning), config.ranks))
    if found is None:
        raise SettingsError(
            f"the trial with the paper's settings ({SEARCH}-000) was not completed, and all is compared with it; its "
            f"error: {prepared.records.get(f'{SEARCH}-000').error}"
        )
    return found


def choose_finalists(settings: SweepSettings, prepared: Prepared) -> list[Given]:
    """The paper's settings, the trials nearest to the front, and the model without pruning."""
    paper = paper_trial(settings, prepared)
    records = {record.id: record for record in searched(prepared)}
    scores = {name: score_of(settings, prepared, name) for name in records}
    groups = [record.group for record in scores[paper.id].records]
    trials = {name: answers(settings, records[name], scores[name]) for name in records}
    chosen = nearest_to_front(list(trials.values()), trials[paper.id], groups, settings.finalists, settings.margin)
    chosen = with_budgets([trials[paper.id], *chosen], list(trials.values()), settings.budgets)
    given = [_given(records[trial.id]) for trial in chosen]
    if settings.kind == "evaluate":  # without pruning nothing was trained
        given.append(Given(DENSE, {}, UNPRUNED, None))
    return given


def _given(record: TrialRecord) -> Given:
    return Given(record.id, record.choices, record.pruning_config, record.ranks, record.towers)


def score_of(settings: SweepSettings, prepared: Prepared, trial: str) -> Score:
    """The score of a completed trial with all its questions, by TRIAL or SWEEP/TRIAL. Raises StorageError."""
    sweep, _, own = trial.rpartition("/")
    return load_score(sweep_folder(settings.storage, sweep) if sweep else prepared.folder, own)


def load_score(folder: SweepFolder, trial: str) -> Score:
    """The score of a completed trial with all its questions. Raises StorageError."""
    url = folder.score(trial)
    return Score.from_dict(storage.read_json(url), url)


def answers(settings: SweepSettings, record: TrialRecord, score: Score) -> Answers:
    """What the choice is made on."""
    budgeted = _budgeted(record, settings.budget_unit)
    return Answers(record.id, cost_of(record, settings.cost), budgeted, tuple(item.nll for item in score.records))


def _budgeted(record: TrialRecord, unit: BudgetUnit) -> float:
    return record.scored.kept_per_image if unit == "tokens" else cost_of(record, unit)


def finalists(settings: SweepSettings, prepared: Prepared) -> tuple[list[Answers], list[str], str]:
    """Every completed finalist on the final questions, the groups of these, and the name of the paper's settings."""
    records = [record for record in prepared.records.of(FINAL) if record.status == "completed"]
    scores = [load_score(prepared.folder, record.id) for record in records]
    paper = paper_trial(settings, prepared).id
    reference = next((record.id for record in records if record.of == paper), None)
    if reference is None:
        raise SettingsError("the paper's settings were not completed on the final questions: nothing to compare with")
    groups = [item.group for item in scores[0].records]
    return [answers(settings, r, s) for r, s in zip(records, scores, strict=True)], groups, reference
