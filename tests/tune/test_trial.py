"""An evaluate trial in this process: portions, lambda, faults, and a model that is kept for the next trial."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from ray.tune.result import DONE

from meteor_model.configuration_meteor import EncodePruning, MeteorConfig, PruningConfig
from meteor_model.flops import FlopReport, count_flops
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from pipelines.evaluation import evaluate as evaluate_module
from pipelines.evaluation import tower_store
from pipelines.evaluation.evaluate import score_model
from pipelines.evaluation.suite import Suite
from pipelines.io import storage
from pipelines.io.storage import TransientStorageError
from pipelines.registry.folder import export_model
from pipelines.registry.variants import apply_pruning
from tests.meteor_model.builders import PRUNED
from tests.tune.conftest import Bench
from tune import trial as trial_module
from tune.finals import load_score
from tune.folder import SweepFolder
from tune.settings import SweepSettings
from tune.stopping import REPORT, Report
from tune.trial import EvaluateTrial, FinalTrial, TrialContext, expected_cost

OF_TWO = replace(PRUNED, encode=EncodePruning(totals=(60, 44, 40)))
UNSOLVED = replace(PRUNED, decode=replace(PRUNED.decode, lam=None, target_mean=10.0))


def config(trial: str, pruning: PruningConfig, towers: dict[str, int] | None = None) -> dict[str, Any]:
    return {
        "trial": trial,
        "change": json.dumps({"pruning": asdict(pruning), "ranks": None, "towers": towers, "of": ""}),
    }


@pytest.fixture
def context(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrialContext:
    monkeypatch.setattr(tower_store, "default_folder", lambda: tmp_path / "maps")
    settings = SweepSettings(questions=8, portions=2, batch=4, calibration_samples=16, storage=str(tmp_path))
    search, final = (Suite.of(bench.manifest, "heldout", 8, part=part) for part in ("search", "final"))
    folder = SweepFolder(str(tmp_path / "sweep"))
    shutil.copytree(bench.base, folder.base)
    return TrialContext("sweep", folder, search, final, bench.manifest.url, settings)


def trial(context: TrialContext, first: dict[str, Any], kind: type[EvaluateTrial] = EvaluateTrial) -> EvaluateTrial:
    class InThisProcess(kind):  # type: ignore[misc, valid-type]
        def setup(self, config: dict[str, Any], _: Any = None) -> None:
            super().setup(config, context)

    return cast(EvaluateTrial, InThisProcess(first))


def ended(running: EvaluateTrial) -> dict[str, Any]:
    """The last report."""
    while not (result := running.step()).get(DONE):
        pass
    return result


def test_a_trial_reports_in_portions_and_keeps_its_score(context: TrialContext, bench: Bench) -> None:
    running = trial(context, config("search-000", UNSOLVED))
    half, whole = running.step(), running.step()
    assert DONE not in half
    assert half["progress"] == 50
    assert whole[DONE]
    told = json.loads(whole["score"])
    solved = PruningConfig.from_dict(told["pruning"])
    assert solved.decode.lam is not None, "solved for the target on the training split"
    assert solved.decode.target_mean == 10.0
    kept = load_score(context.folder, "search-000")
    assert len(kept.records) == 8
    assert (kept.accuracy, kept.records[0].answer, told["ms"]) == (None, None, None), "by likelihood alone, untimed"
    assert kept.to_dict() == told["score"]
    asked = context.search.load(running.processor, 512)
    assert [record.key for record in kept.records] == [question.key for question in asked.asked], (
        "in the suite's order, whatever the order of asking"
    )
    assert sorted(running.order) == list(range(8)) != running.order
    report = Report.from_json(half[REPORT])
    assert report.values == [kept.records[place].nll for place in running.order[:4]]
    assert report.groups == [kept.records[place].group for place in running.order[:4]]
    assert report.cost == pytest.approx(expected_cost(running.model.config))
    assert whole["objective"] == pytest.approx(-kept.answer_nll)
    assert not (Path(context.folder.url) / "trials" / "search-000" / "pictures").exists()
    # The same by hand, at once.
    built = MeteorForConditionalGeneration.from_pretrained(bench.base).eval()
    made = MeteorProcessor.from_pretrained(bench.base)
    apply_pruning(built, made, solved, None)
    by_hand = score_model(built, made, context.search.load(made, 512), context.search, answers=False)
    assert by_hand.answer_nll == pytest.approx(kept.answer_nll, rel=1e-4)
    assert by_hand.kept_per_image == kept.kept_per_image


def test_a_finalist_answers_the_final_questions_under_its_solved_lambda(context: TrialContext) -> None:
    solved = replace(UNSOLVED, decode=replace(UNSOLVED.decode, lam=3.0))
    told = json.loads(ended(trial(context, config("final-000", solved), FinalTrial))["score"])
    kept = load_score(context.folder, "final-000")
    assert kept.suite == context.final.digest != context.search.digest
    assert kept.accuracy is not None
    assert told["pruning"]["decode"]["lam"] == 3.0
    assert told["ms"] > 0
    assert len(list((Path(context.folder.url) / "trials" / "final-000" / "pictures").iterdir())) >= 2


def test_a_finalist_that_was_trained_is_the_model_of_its_trial(context: TrialContext, bench: Bench) -> None:
    trained = replace(context, settings=replace(context.settings, kind="finetune"))
    solved = replace(UNSOLVED, decode=replace(UNSOLVED.decode, lam=3.0))
    built = MeteorForConditionalGeneration.from_pretrained(bench.base).eval()
    made = MeteorProcessor.from_pretrained(bench.base)
    apply_pruning(built, made, solved, None)
    with torch.no_grad():
        built.lm_head.weight.mul_(0.5)
    export_model(built, made, Path(context.folder.export("search-003")))
    asked = {**config("final-000", solved)}
    asked["change"] = json.dumps({**json.loads(asked["change"]), "of": "search-003"})
    found = ended(trial(trained, asked, FinalTrial))
    expected = score_model(built, made, context.final.load(made, 512), context.final, answers=False).answer_nll
    assert found["objective"] == pytest.approx(-expected, rel=1e-4)


def test_the_next_trial_of_an_actor_is_as_on_a_fresh_one(context: TrialContext) -> None:
    other = replace(UNSOLVED, fuse=replace(UNSOLVED.fuse, keep=12), decode=replace(UNSOLVED.decode, target_mean=4.0))
    used = trial(context, config("search-000", UNSOLVED))
    used.step()  # and is stopped
    assert used.reset_config(config("search-001", other))
    loaded = used.whole
    after = ended(used)
    assert used.whole is loaded is used.model
    alone = ended(trial(context, config("search-002", other)))
    assert after["objective"] == pytest.approx(alone["objective"], rel=1e-6)
    assert json.loads(after["score"])["score"]["tokens_per_image"] == 12


@pytest.mark.parametrize("towers", [None, {"clip": 64, "pix2struct": 40}])
def test_kept_maps_change_no_bit_of_a_trial(context: TrialContext, towers: dict[str, int] | None) -> None:
    encode = OF_TWO.encode if towers else UNSOLVED.encode
    asked: dict[str, Any] = {"pruning": replace(UNSOLVED, encode=encode), "towers": towers}
    without = replace(context, settings=replace(context.settings, tower_maps_gib=0.0))
    expected = ended(trial(without, config("search-000", **asked)))
    told = json.loads(expected["score"])
    assert told["maps"] is None
    first = json.loads(ended(trial(context, config("search-001", **asked)))["score"])
    used = trial(context, config("search-002", UNSOLVED))
    ended(used)  # another setting, all towers
    assert used.reset_config(config("search-003", **asked))
    second = json.loads(ended(used)["score"])
    assert first["maps"]["computed"] > 0 == first["maps"].get("read", 0)
    assert second["maps"]["read"] == first["maps"]["computed"]
    assert "computed" not in second["maps"], "all were there"
    for found in (first, second):
        assert found["pruning"] == told["pruning"], "lambda, to the bit"
    scores = [load_score(context.folder, f"search-{number:03d}") for number in (0, 1, 3)]
    assert scores[0].records == scores[1].records == scores[2].records
    assert scores[0].tokens_per_image == scores[2].tokens_per_image


def test_a_fault_of_the_configuration_is_a_failed_trial(context: TrialContext) -> None:
    """Nothing else comes of it: the actor takes the next trial."""
    impossible = replace(UNSOLVED, decode=replace(UNSOLVED.decode, layer=9))
    running = trial(context, config("search-000", impossible))
    failed = running.step()
    assert failed[DONE]
    assert "pruning.decode.layer 9" in failed["failed"]
    assert running.reset_config(config("search-001", UNSOLVED))
    assert "failed" not in running.step()


def test_what_may_pass_is_left_to_tune(context: TrialContext, monkeypatch: pytest.MonkeyPatch) -> None:
    running = trial(context, config("search-000", UNSOLVED))

    def away(*arguments: Any) -> None:
        raise TransientStorageError("the store is away")

    monkeypatch.setattr(storage, "write_json", away)
    running.step()
    with pytest.raises(TransientStorageError):
        running.step()


def test_flops_are_counted_twice_a_trial(context: TrialContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once before it is asked, once at the measured mean; not for every portion."""
    counted: list[MeteorConfig] = []

    def count(config: MeteorConfig) -> FlopReport:
        counted.append(config)
        return count_flops(config)

    monkeypatch.setattr(trial_module, "count_flops", count)
    monkeypatch.setattr(evaluate_module, "count_flops", count)
    ended(trial(replace(context, settings=replace(context.settings, portions=4)), config("search-000", UNSOLVED)))
    assert len(counted) == 2
