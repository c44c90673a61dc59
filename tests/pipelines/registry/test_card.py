"""Model card, what keeps a version from promotion, histories and pruning in place: all that needs no server."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mlflow.entities.model_registry import ModelVersion, ModelVersionTag, RegisteredModel, RegisteredModelTag
from mlflow.entities.model_registry import RegisteredModelAlias as Alias

from jobs.recipes import recipe
from meteor_model.configuration_meteor import EncodePruning
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from pipelines.data import shards
from pipelines.evaluation.evaluate import score_of_records
from pipelines.evaluation.scores import Score
from pipelines.evaluation.suite import Suite
from pipelines.registry.aliases import alias_history
from pipelines.registry.card import card, scores_section, with_scores
from pipelines.registry.folder import ExportError, export_model, verify_checksums, write_card
from pipelines.registry.parity import check_parity, write_parity_batch
from pipelines.registry.promotion import Terms, missing_evidence
from pipelines.registry.provenance import licence_tags
from pipelines.registry.scores import StoredScore, score_tags, stored_scores
from pipelines.registry.tags import is_known
from pipelines.registry.variants import apply_pruning
from pipelines.registry.versions import DESCRIPTION_LENGTH, shortened
from pipelines.tracking.server import TrackingError
from tests.pipelines.mlflow_fixture import SUITE, record, score_of, tiny_config, tiny_pruning

RECORDS = [record(0), record(1), record(2, right=False, nll=1.5), record(3, kept=20)]


def test_the_card_says_score_cost_calibration_origin_and_licences() -> None:
    pruning = tiny_pruning()
    config = tiny_config(replace(pruning, decode=replace(pruning.decode, lam=None)))
    config.ranks = {"clip": [20.0, 15.0, 10.5], "pix2struct": [9.0, 8.0, 7.0], "convnext": [5.0, 4.0, 3.0]}
    config.pruning = pruning  # solved last
    tags = {
        "base": "models:/meteor/3",
        "recipe": "tiny",
        "manifest": "s3://user:secret@bucket/manifest.parquet",
        "manifest_sha256": "ab" * 32,
        "git_commit": "c" * 40,
        "parity_max_abs_diff": "2e-06",
        "licence.data.openmoji": "CC BY-SA 4.0",
        "accuracy": "not the card's business",
    }
    score = score_of_records(config, RECORDS, SUITE, {"bad_json": 1})
    text = card(config, tags, {"4 x heldout of data": score})
    assert score.accuracy_interval is not None
    low, high = score.accuracy_interval.low, score.accuracy_interval.high
    for expected in (
        f"| 4 x heldout of data ({SUITE.digest}) | 4 asked, 4 answered, left out: 1 bad_json | "
        f"0.7500 [{low:.4f}, {high:.4f}] | 0.7500 [",
        f"| 32 > 14.0 | {score.tflops:.4g} |",
        f"| total | {score.tflops:.4g} |",
        "| visual_tokens.fuse | 64 > 32 |",
        "- expected ranks of clip: 20, 15, 10.5",
        "- lambda 20 for a target mean of 16 tokens per image",
        "| variant of | models:/meteor/3 |",
        f"| sha256 of the manifest | {'ab' * 32} |",
        f"| commit | {'c' * 40} |",
        "2e-06 (allowed: 0.001)",
        "| data.openmoji | CC BY-SA 4.0 |",
    ):
        assert expected in text
    assert "secret" not in text
    assert "not the card's business" not in text
    unsolved = replace(pruning, decode=replace(pruning.decode, lam=None))
    unscored = card(tiny_config(unsolved), {}, {})
    assert "Not scored on a suite yet" in unscored
    assert "lambda not solved" in unscored
    assert "| not checked |" in unscored


def test_later_scores_replace_the_scores_of_a_description_alone() -> None:
    text = card(tiny_config(), {"recipe": "tiny"}, {})
    first = with_scores(text, {"a": score_of(RECORDS)})
    second = with_scores(first, {"a": score_of(RECORDS), "b": score_of(RECORDS[:2])})
    assert second.count("## Scores") == 1
    assert "| a (" in second
    assert "| b (" in second
    assert second.replace(scores_section({"a": score_of(RECORDS), "b": score_of(RECORDS[:2])}), "") == text.replace(
        scores_section({}), ""
    )
    assert with_scores("", {"a": score_of(RECORDS)}) == scores_section({"a": score_of(RECORDS)})
    assert len(shortened(text * 9)) == DESCRIPTION_LENGTH
    assert shortened(text * 9).endswith("README.md)")


def test_licences_of_data_parts_and_code() -> None:
    manifest = shards.Manifest("m", (), {"source": {"name": "openmoji", "license": "CC BY-SA 4.0"}})
    unknown = shards.Manifest("other", (), {"source": {"name": "webdataset"}})
    tags = licence_tags(recipe("pretrain", "small"), [manifest, unknown], {})
    assert tags["licence.data.openmoji"] == "CC BY-SA 4.0"
    assert tags["licence.data.webdataset"] == "not recorded in other"
    assert tags["licence.weights.llm"] == "Apache-2.0: SmolLM2-135M-Instruct"
    assert tags["licence.code"] == "Apache-2.0"
    assert "random weights" in licence_tags(recipe("pretrain", "tiny"), [manifest], {})["licence.weights"]
    inherited = {"licence.weights.llm": "theirs", "recipe": "tiny"}
    tags = licence_tags(recipe("finetune", "tiny"), [manifest], inherited)
    assert tags["licence.weights.llm"] == "theirs"
    assert "recipe" not in tags


def version(tags: dict[str, str], status: str = "READY") -> ModelVersion:
    return ModelVersion(
        "meteor", "7", 0, status=status, tags=[ModelVersionTag(key, value) for key, value in tags.items()]
    )


def tags_of(score: Score, suite: Suite | None = SUITE) -> dict[str, str]:
    """Tags of a version that has this score."""
    return score_tags(StoredScore(suite, replace(score, records=()), "scores/a.json"))


FEW = Terms(least_questions=4)
SCORED = tags_of(score_of(RECORDS))
LOSING, TEXT = (
    tags_of(score_of(RECORDS, left_out=left_out))
    for left_out in ({"bad_json": 3, "text_only": 5, "too_long": 1}, {"text_only": 100})
)
SPEECHLESS = [*RECORDS[:3], replace(RECORDS[3], answer=" ")]
SILENT = tags_of(score_of(SPEECHLESS))
SCORED_ELSEWHERE = {"score.other": StoredScore(SUITE, score_of(RECORDS), "scores/b.json").to_json()}
SEARCHED = tags_of(score_of(RECORDS), replace(SUITE, part="search"))
UNKNOWN_PART = tags_of(score_of(RECORDS), None)
UNANSWERED = tags_of(score_of([replace(one, answer=None, credit=None) for one in RECORDS]))
PARITY = {"parity_max_abs_diff": "1e-6"}
VOID = {
    "score.0123": re.sub(r', "asked_as": \d+', "", SCORED[f"score.{SUITE.digest}"]),
}
EVALUATE = "python jobs/evaluate.py --model models:/meteor/7 --manifest s3://m"


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"parity_max_abs_diff": "1e-6", **SCORED}, []),
        (
            {**SCORED},
            ["parity is missing", "python jobs/register.py parity --tracking.registered-model meteor --version 7"],
        ),
        ({"parity_max_abs_diff": "0.002", **SCORED}, ["parity 0.002 exceeds 0.001", "jobs/register.py parity"]),
        ({"parity_max_abs_diff": "nan", **SCORED}, ["parity nan exceeds 0.001"]),
        ({"parity_max_abs_diff": "small", **SCORED}, ["parity small exceeds"]),
        ({"parity_max_abs_diff": "1e-6", "manifest": "s3://m"}, ["no suite result", EVALUATE]),
        (
            {**PARITY, **LOSING},
            ["50.0% of the questions without an answer", "4 asked, 4 answered"],
        ),
        ({**PARITY, **SILENT}, ["25.0% of the questions", "4 asked, 3 answered, left out: none"]),
        ({**PARITY, **TEXT}, []),
        ({**PARITY, **LOSING, **SCORED_ELSEWHERE}, []),
        (
            {**PARITY, **VOID},
            ["suite 0123 is void", "drew or asked its questions otherwise", EVALUATE[:40]],
        ),
        ({**PARITY, **SEARCHED}, ["part 'search' of its split", "--part final"]),
        ({**PARITY, **UNKNOWN_PART}, ["is of an unknown part"]),
        ({**PARITY, **UNANSWERED}, ["100.0% of the questions without an answer", "answers not asked for"]),
        ({"accuracy": "0.9"}, ["parity is missing", "no suite result", "--manifest MANIFEST"]),
    ],
)
def test_what_keeps_a_version_from_promotion(tags: dict[str, str], expected: list[str]) -> None:
    lacking = "\n".join(missing_evidence(version(tags), FEW))
    assert bool(lacking) == bool(expected)
    for text in expected:
        assert text in lacking


def test_a_larger_loss_is_allowed_by_name() -> None:
    losing = version({"parity_max_abs_diff": "1e-6", **LOSING})
    assert len(missing_evidence(losing, replace(FEW, max_unanswered=0.499))) == 1
    assert missing_evidence(losing, replace(FEW, max_unanswered=0.5)) == []
    (few,) = missing_evidence(version({**PARITY, **SCORED}))
    assert "has 4 questions, 256 are the least" in few
    assert (LOSING["asked"], LOSING["answered"], LOSING["left_out"]) == (
        "4",
        "4",
        "3 bad_json, 5 text_only, 1 too_long",
    )


def test_a_score_of_other_prompts_is_void_and_may_be_replaced() -> None:
    assert stored_scores(version(VOID)) == {}
    assert list(stored_scores(version({**VOID, **SCORED}))) == [SUITE.digest]


def test_a_version_without_files_and_a_wider_tolerance() -> None:
    whole = {"parity_max_abs_diff": "0.002", **SCORED}
    wider = replace(FEW, tolerance=0.01)
    assert missing_evidence(version(whole), wider) == []
    assert "status FAILED_REGISTRATION" in missing_evidence(version(whole, "FAILED_REGISTRATION"), wider)[0]


def test_a_score_in_tags_comes_back_without_its_questions() -> None:
    score = score_of([*RECORDS, record(4, nll=1 / 3)])
    tags = tags_of(score)
    found = stored_scores(version(tags))
    assert found == {SUITE.digest: StoredScore(SUITE, replace(score, records=()), "scores/a.json")}
    assert tags["accuracy"] == "0.8000"
    assert [name for name in tags if not is_known(name)] == []
    with pytest.raises(ValueError, match=r"tag score\.x of meteor/7 holds no stored score"):
        stored_scores(version({"score.x": "{}"}))


@pytest.mark.parametrize(
    ("tag", "alias", "expected"),
    [
        (None, None, []),
        (None, 3, [3]),
        ("[1, 3]", 3, [1, 3]),
        ("[1]", 3, [1, 3]),  # a move that died before it wrote its history, or one by other means
        ("[1, 3]", 1, [1, 3, 1]),
        ("[1, 3]", None, [1, 3]),
    ],
)
def test_the_history_of_an_alias_ends_where_it_points(tag: str | None, alias: int | None, expected: list[int]) -> None:
    tags = [] if tag is None else [RegisteredModelTag("alias_history.champion", tag)]
    aliases = [] if alias is None else [Alias("champion", str(alias))]
    assert alias_history(RegisteredModel("meteor", tags=tags, aliases=aliases), "champion") == expected


@pytest.mark.parametrize("tag", ["1, 2", '{"1": 2}', '["a"]', "[true]"])
def test_a_spoilt_history_is_named(tag: str) -> None:
    model = RegisteredModel("meteor", tags=[RegisteredModelTag("alias_history.champion", tag)], aliases=[])
    with pytest.raises(TrackingError, match=r"alias_history\.champion of model 'meteor' is no list of versions"):
        alias_history(model, "champion")


@pytest.fixture
def own_tiny(
    tiny: tuple[MeteorForConditionalGeneration, MeteorProcessor],
) -> tuple[MeteorForConditionalGeneration, MeteorProcessor]:
    """A model that a test may change."""
    return copy.deepcopy(tiny[0]), copy.deepcopy(tiny[1])


def test_another_pruning_in_place_is_exported_with_parity(
    own_tiny: tuple[MeteorForConditionalGeneration, MeteorProcessor], tmp_path: Path
) -> None:
    model, processor = own_tiny
    ranks = {"clip": [2.0], "pix2struct": [1.0], "convnext": [1.0]}
    before = dict(model.config.encode_budgets)
    apply_pruning(model, processor, tiny_pruning(fuse=20), ranks)
    assert processor.tokens_per_image == 20
    assert model.config.encode_budgets["clip"][-1] == 32 > before["clip"][-1]
    apply_pruning(model, processor, tiny_pruning(fuse=24), None)
    assert model.config.ranks == ranks
    folder = export_model(model, processor, tmp_path / "model")
    write_parity_batch(model, processor, tmp_path / "parity")
    assert check_parity(folder, tmp_path / "parity").difference <= 1e-5
    with pytest.raises(ValueError, match=r"fuse\.keep 65 exceeds the 64 tokens"):
        apply_pruning(model, processor, tiny_pruning(fuse=65), None)
    with pytest.raises(ValueError, match="ranks"):
        apply_pruning(model, processor, replace(tiny_pruning(), encode=EncodePruning(totals=(64, 64))), {"clip": [1.0]})
    assert model.config.tokens_per_image == processor.tokens_per_image == 24
    with torch.no_grad():
        model.lm_head.weight[3] += 0.5
    write_parity_batch(model, processor, tmp_path / "other")
    with pytest.raises(ValueError, match="weights are not those of the training model"):
        check_parity(folder, tmp_path / "other")


def test_a_new_card_is_sealed_with_the_folder(
    own_tiny: tuple[MeteorForConditionalGeneration, MeteorProcessor], tmp_path: Path
) -> None:
    folder = export_model(*own_tiny, tmp_path / "model")
    write_card(folder, "# Mine\n")
    verify_checksums(folder)
    assert (folder / "README.md").read_text() == "# Mine\n"
    (folder / "config.json").write_text("{}")
    with pytest.raises(ExportError, match=r"config\.json was changed"):
        write_card(folder, "# Other\n")
    assert (folder / "README.md").read_text() == "# Mine\n"
