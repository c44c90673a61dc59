"""An evaluate trial in this process: portions, lambda, faults, and a model that is kept for the next trial."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from ray.tune.result import DONE

from meteor_model.configuration_meteor import PruningConfig
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from pipelines.evaluation.evaluate import longest_answer, score_model
from pipelines.evaluation.scores import Score
from pipelines.evaluation.suite import Suite
from pipelines.io import storage
from pipelines.io.storage import TransientStorageError
from pipelines.registry.variants import apply_pruning
from tests.meteor_model.builders import PRUNED
from tests.tune.conftest import Bench
from tune import trial as trial_module
from tune.folder import SweepFolder
from tune.settings import SweepSettings
from tune.trial import EvaluateTrial, TrialContext, load_score

UNSOLVED = replace(PRUNED, decode=replace(PRUNED.decode, lam=None, target_mean=10.0))


def config(trial: str, pruning: PruningConfig) -> dict[str, Any]:
    return {"trial": trial, "change": json.dumps({"pruning": asdict(pruning), "ranks": None})}


@pytest.fixture
def context(bench: Bench, tmp_path: Path) -> TrialContext:
    settings = SweepSettings(
        budgets=(8.0,), questions=8, portions=2, batch=4, calibration_samples=16, storage=str(tmp_path)
    )
    suite = Suite.of(bench.manifest, "heldout", 8, part="search")
    folder = SweepFolder(str(tmp_path / "sweep"))
    shutil.copytree(bench.base, folder.base)
    return TrialContext("sweep", folder, suite, bench.manifest.url, settings)


def trial(context: TrialContext, first: dict[str, Any]) -> EvaluateTrial:
    class InThisProcess(EvaluateTrial):
        def setup(self, config: dict[str, Any], _: Any = None) -> None:
            super().setup(config, context)

    return InThisProcess(first)


def test_a_trial_reports_in_portions_and_keeps_its_score(context: TrialContext, bench: Bench) -> None:
    running = trial(context, config("t-0", UNSOLVED))
    half, whole = running.step(), running.step()
    assert DONE not in half
    assert half["progress"] == 50
    assert whole[DONE]
    ended = json.loads(whole["score"])
    solved = PruningConfig.from_dict(ended["pruning"])
    assert solved.decode.lam is not None, "solved for the target on the training split"
    assert solved.decode.target_mean == 10.0
    kept = load_score(context.folder, "t-0")
    assert len(kept.records) == 8
    assert kept.to_dict() == ended["score"]
    keys = [question.key for question in context.suite.load(running.processor, 512).asked]
    assert [record.key for record in kept.records] == keys, "in the suite's order, whatever the order of asking"
    assert sorted(running.order) == list(range(8)) != running.order
    assert whole["objective"] == pytest.approx(-kept.answer_nll)
    assert len(list((Path(context.folder.url) / "trials" / "t-0" / "pictures").iterdir())) >= 2
    # The same by hand, at once.
    built = MeteorForConditionalGeneration.from_pretrained(bench.base).eval()
    made = MeteorProcessor.from_pretrained(bench.base)
    apply_pruning(built, made, solved, None)
    by_hand = score_model(built, made, context.suite.load(made, 512), context.suite)
    assert by_hand.left_out == kept.left_out
    assert by_hand.answer_nll == pytest.approx(kept.answer_nll, rel=1e-4)
    assert by_hand.kept_per_image == kept.kept_per_image


def test_the_next_trial_of_an_actor_is_as_on_a_fresh_one(context: TrialContext) -> None:
    other = replace(UNSOLVED, fuse=replace(UNSOLVED.fuse, keep=12), decode=replace(UNSOLVED.decode, target_mean=4.0))
    used = trial(context, config("t-0", UNSOLVED))
    used.step()  # and is stopped
    assert used.reset_config(config("t-1", other))
    loaded = used.model
    while not (after := used.step()).get(DONE):
        pass
    assert used.model is loaded
    fresh = trial(context, config("t-2", other))
    while not (alone := fresh.step()).get(DONE):
        pass
    assert after["objective"] == pytest.approx(alone["objective"], rel=1e-6)
    assert json.loads(after["score"])["score"]["tokens_per_image"] == 12


def test_a_fault_of_the_configuration_is_a_failed_trial(context: TrialContext) -> None:
    """Nothing else comes of it: the actor takes the next trial."""
    impossible = replace(UNSOLVED, decode=replace(UNSOLVED.decode, layer=9))
    running = trial(context, config("t-0", impossible))
    failed = running.step()
    assert failed[DONE]
    assert "pruning.decode.layer 9" in failed["failed"]
    assert running.reset_config(config("t-1", UNSOLVED))
    assert "failed" not in running.step()


def test_what_may_pass_is_left_to_tune(context: TrialContext, monkeypatch: pytest.MonkeyPatch) -> None:
    running = trial(context, config("t-0", UNSOLVED))

    def away(*arguments: Any) -> None:
        raise TransientStorageError("the store is away")

    monkeypatch.setattr(storage, "write_json", away)
    running.step()
    with pytest.raises(TransientStorageError):
        running.step()


def test_an_answer_is_cut_in_a_portion_as_in_the_whole_suite(
    context: TrialContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int | None] = []

    def noted(*arguments: Any, **settings: Any) -> Score:
        given.append(settings.get("longest"))
        return score_model(*arguments, **settings)

    monkeypatch.setattr(trial_module, "score_model", noted)
    running = trial(context, config("t-0", UNSOLVED))
    running.step()
    running.step()
    whole = longest_answer(context.suite.load(running.processor, 512).asked)
    assert given == [whole, whole]


def test_accuracy_as_objective(context: TrialContext) -> None:
    chosen = replace(context, settings=replace(context.settings, objective="accuracy", portions=1, pictures=0))
    ended = trial(chosen, config("t-0", UNSOLVED)).step()
    assert ended["objective"] == json.loads(ended["score"])["score"]["accuracy"]
