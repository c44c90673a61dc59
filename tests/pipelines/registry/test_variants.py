"""Variants in a real registry: registered with their proofs, compared, promoted, rolled back, refused, pulled."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from jobs import register
from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from pipelines.checkpoint.state import TrainState
from pipelines.config.recipe import ModelSettings, Recipe, TrackingSettings
from pipelines.data import shards
from pipelines.data.schema import build_members
from pipelines.evaluation.scores import Score, ScoringError
from pipelines.evaluation.suite import Suite
from pipelines.io import storage
from pipelines.registry.aliases import alias_history, move_alias, roll_back
from pipelines.registry.evaluate import Wanted, evaluate
from pipelines.registry.folder import ExportError
from pipelines.registry.open import load_registered
from pipelines.registry.parity import ParityError
from pipelines.registry.promotion import promote
from pipelines.registry.provenance import training_tags
from pipelines.registry.publish import pull_model, register_model
from pipelines.registry.scores import load_score, store_score
from pipelines.registry.tags import is_known
from pipelines.registry.variants import measure_parity, register_variant
from pipelines.registry.versions import RegisteredVersion, Registry, pin_model
from pipelines.tracking.mlflow_run import MlflowRun, RunRequest, open_run
from pipelines.tracking.server import TrackingError
from tests.pipelines.mlflow_fixture import SUITE, Server, record, score_of, tiny_pruning
from tests.pipelines.registry.test_versions import png

pytestmark = pytest.mark.stack

NAME = "meteor-variants"
GOOD = [record(number, nll=0.4) for number in range(4)]
POORER = [record(0, right=False, nll=0.9, kept=6), *[record(number, kept=6) for number in range(1, 4)]]


@pytest.fixture(scope="module")
def run_id(server: Server) -> str:
    """A run for this module's versions."""
    return open_run(server.uri, RunRequest("registry", "variants")).run_id


@pytest.fixture(scope="module")
def registry(server: Server) -> Registry:
    """The registered model of this module."""
    return Registry(server.uri, NAME)


@pytest.fixture(scope="module")
def base(registry: Registry, exported: Path, run_id: str) -> RegisteredVersion:
    """A version without parity and without a score."""
    tags = {"git_commit": "abc", "recipe": "tiny", "manifest": "s3://data", "licence.code": "Apache-2.0"}
    return register_model(exported, registry, aliases=("latest-pretrain",), run_id=run_id, tags=tags)


@pytest.fixture(scope="module")
def variants(registry: Registry, base: RegisteredVersion, run_id: str) -> dict[int, RegisteredVersion]:
    """Two variants by the tokens that enter their LLM, under aliases."""
    return {
        keep: register_variant(
            f"models:/{NAME}@latest-pretrain", tiny_pruning(keep), score_of(records, tiny_pruning(keep)), ranks=None,
            registry=registry, aliases=(f"budget-{keep}",), run_id=run_id, tags={"git_commit": "def"},
            suite=SUITE,
        )
        for keep, records in ((32, GOOD), (20, POORER))
    }  # fmt: skip


def ask(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], server: Server, *arguments: str
) -> tuple[int, str]:
    """Exit status and output of jobs/register.py."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setattr("sys.argv", ["register.py", *arguments])
    status = register.JOB.main()
    captured = capfd.readouterr()
    return status, captured.out + captured.err


def test_a_variant_has_its_pruning_its_proofs_and_its_card(
    registry: Registry, server: Server, base: RegisteredVersion, variants: dict[int, RegisteredVersion], tmp_path: Path
) -> None:
    registered = variants[20]
    version = registry.version(registered.version)
    expected = {
        "base": base.uri, "training_commit": "abc", "git_commit": "def", "recipe": "tiny", "manifest": "s3://data",
        "licence.code": "Apache-2.0", "visual_tokens.fuse": "64 > 20", "suite": SUITE.digest, "accuracy": "0.7500",
    }  # fmt: skip
    assert {key: version.tags[key] for key in expected} == expected
    assert [name for name in version.tags if not is_known(name)] == []
    assert float(version.tags["parity_max_abs_diff"]) <= 1e-5
    folder = pull_model(pin_model(f"models:/{NAME}@budget-20", server.uri), tmp_path / "model")
    assert MeteorConfig.from_pretrained(folder).pruning == tiny_pruning(20)
    readme = (folder / "README.md").read_text()
    assert version.description == readme
    assert (
        f"| {SUITE.questions} x heldout of {SUITE.manifest}, part final ({SUITE.digest}) | "
        f"{score_of(POORER).coverage} | "
        "0.7500 [" in readme
    )
    assert f"| variant of | {base.uri} |" in readme
    score = score_of(POORER, tiny_pruning(20))
    assert load_score(registry, version, SUITE.digest) == score
    assert alias_history(registry.registered_model(), "budget-20") == [registered.version]


def test_what_does_not_hold_is_not_registered(
    registry: Registry, server: Server, variants: dict[int, RegisteredVersion], run_id: str
) -> None:
    def attempt(pruning_keep: int, score_keep: int, solved: bool = True, tolerance: float = 1e-3) -> None:
        pruning = tiny_pruning(pruning_keep)
        if not solved:
            pruning = replace(pruning, decode=replace(pruning.decode, lam=None))
        register_variant(
            variants[32].uri, pruning, score_of(GOOD, tiny_pruning(score_keep)), ranks=None,
            registry=Registry(server.uri, "refused"), aliases=("champion",), run_id=run_id, tags={},
            tolerance=tolerance,
        )  # fmt: skip

    with pytest.raises(ScoringError, match=r"score is of 32 visual tokens .* this pruning has 24"):
        attempt(24, 32)
    with pytest.raises(ValueError, match="needs its lambda"):
        attempt(24, 24, solved=False)
    with pytest.raises(ParityError, match="by up to"):
        attempt(24, 24, tolerance=-1.0)
    assert "refused" not in [model.name for model in MlflowClient(server.uri).search_registered_models()]
    with pytest.raises(ScoringError, match="with its 4 questions, this one has 0"):
        store_score(registry, variants[32].version, replace(score_of(GOOD), records=()), SUITE)


def test_a_trained_folder_says_where_its_training_started(
    registry: Registry, server: Server, base: RegisteredVersion, exported: Path, run_id: str
) -> None:
    recipe = Recipe(name="mine", model=ModelSettings(start=base.uri), tracking=TrackingSettings(uri=server.uri))
    spec = {"source": {"name": "drawings", "license": "CC BY-SA 4.0"}}
    data = (shards.Manifest("s3://new", (), spec), shards.Manifest("s3://more", (), {}))
    registered = register_variant(
        str(exported), tiny_pruning(24), score_of(GOOD, tiny_pruning(24)), ranks=None,
        registry=registry, aliases=(), run_id=run_id, tags=training_tags(recipe, data),
    )  # fmt: skip
    tags = registry.version(registered.version).tags
    assert tags["start"] == base.uri
    assert not {"base", "training_commit"} & set(tags)
    assert (tags["recipe"], tags["manifest"], tags["licence.code"]) == ("mine", "s3://new", "Apache-2.0")
    assert tags["licence.data.drawings"] == "CC BY-SA 4.0"
    assert tags["manifest_sha256"] == data[0].sha256
    assert tags["mixture"] == f"s3://more ({data[1].sha256[:12]})"


def test_compare_shows_the_paired_difference_and_refuses_other_suites(
    server: Server,
    variants: dict[int, RegisteredVersion],
    base: RegisteredVersion,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "compared.json"
    arguments = (
        "compare",
        "--tracking.registered-model",
        NAME,
        "budget-32",
        str(variants[20].version),
        "--output",
        str(output),
    )
    status, printed = ask(monkeypatch, capfd, server, *arguments)
    assert status == 0
    (accuracy,) = (line for line in printed.splitlines() if line.startswith("accuracy"))
    assert "1.0000 [" in accuracy
    assert "0.7500 [" in accuracy
    assert "-0.2500 [" in accuracy
    assert "1 of 4 differ, p 1 (Holm), visible from " in accuracy
    assert "undecided at a margin of 0.02" in accuracy
    (likelihood,) = (line for line in printed.splitlines() if line.startswith("answer NLL"))
    assert "4 of 4 differ" in likelihood
    assert "undecided at a margin of 0.02" in likelihood, "four questions decide nothing"
    (tokens,) = (line for line in printed.splitlines() if line.startswith("tokens per image"))
    assert "32 > 12.0" in tokens
    assert "-6.0 after stage 3" in tokens
    written = json.loads(output.read_text())
    assert written["second_minus_first"]["accuracy"]["mean"] == -0.25
    assert written["second_minus_first"]["answer_nll"]["mean"] == pytest.approx((0.5 + 3 * 0.1) / 4)
    assert written["verdicts"]["accuracy"] == "undecided"
    assert written["first"]["version"] == variants[32].version

    status, printed = ask(
        monkeypatch, capfd, server, "compare", "--tracking.registered-model", NAME, "budget-32", str(base.version)
    )
    assert status == 1
    assert "no suite in common" in printed
    assert f"jobs/evaluate.py --model {base.uri} --manifest {SUITE.manifest} {SUITE.options}" in printed
    status, printed = ask(monkeypatch, capfd, server, *arguments, "--suite", "0123")
    assert status == 1
    assert "no score of both on suite 0123" in printed


def test_promote_roll_back_and_list(
    registry: Registry,
    server: Server,
    variants: dict[int, RegisteredVersion],
    base: RegisteredVersion,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    wide, narrow = variants[32].version, variants[20].version
    status, printed = ask(
        monkeypatch, capfd, server, "promote", "--tracking.registered-model", NAME, "--version", str(base.version)
    )
    assert status == 1
    assert f"version {base.version} of {NAME} is not promoted to champion" in printed
    assert f"python jobs/register.py parity --tracking.registered-model {NAME} --version {base.version}" in printed
    assert f"python jobs/evaluate.py --model {base.uri} --manifest s3://data" in printed
    assert "champion" not in registry.registered_model().aliases

    promotes = ("promote", "--tracking.registered-model", NAME, "--least-questions", "4")
    status, printed = ask(monkeypatch, capfd, server, *promotes, "--version", str(wide), "--to", "other")
    assert (status, f"version none -> {wide}" in printed) == (0, True), printed
    assert "nothing stood before it" in registry.version(wide).tags["promoted.other"]
    status, printed = ask(monkeypatch, capfd, server, *promotes, "--version", str(narrow), "--to", "other")
    assert status == 1
    assert f"answer_nll against version {wide} on suite {SUITE.digest}: +0.2000 [" in printed
    assert "--force REASON" in printed
    assert registry.target("other") == wide
    status, printed = ask(monkeypatch, capfd, server, *promotes[:3], "--version", str(wide))
    assert (status, "has 4 questions, 256 are the least" in printed) == (1, True), printed

    for arguments, expected in (
        ((*promotes, "--version", str(wide)), f"version none -> {wide}"),
        (
            (*promotes, "--alias", "budget-20", "--to", "champion", "--force", "cheap enough"),
            f"version {wide} -> {narrow}",
        ),
        ((*promotes, "--alias", "budget-20"), f"points to version {narrow} already"),
        (("rollback", "--tracking.registered-model", NAME, "--alias", "champion"), f"version {narrow} -> {wide}"),
    ):
        status, printed = ask(monkeypatch, capfd, server, *arguments)
        assert (status, expected in printed) == (0, True), printed
    trace = registry.version(narrow).tags["forced.champion"]
    assert trace.startswith("20")
    assert "forced: cheap enough; without: whether it is worse than the version before is open: answer_nll against" in (
        trace
    )
    assert "@" in trace
    registered = registry.registered_model()
    assert int(registered.aliases["champion"]) == wide
    assert f"to version {wide}" in registry.version(narrow).tags["rolled_back.champion"]
    status, printed = ask(monkeypatch, capfd, server, "rollback", "--tracking.registered-model", NAME)
    assert status == 1
    assert "there is no version before" in printed
    status, printed = ask(monkeypatch, capfd, server, "promote", "--tracking.registered-model", NAME)
    assert status == 2
    assert "either --version NUMBER or --alias ALIAS" in printed

    status, printed = ask(monkeypatch, capfd, server, "list", "--tracking.registered-model", NAME)
    assert status == 0
    rows = {line.split()[0]: line for line in printed.splitlines()}
    assert "budget-32, champion" in rows[str(wide)]
    assert rows[str(wide)].endswith("no"), "four questions are few"
    assert rows[str(base.version)].endswith("no")
    assert f"champion: {wide}" in printed.splitlines()


def test_a_history_survives_moves_by_other_means_and_deleted_versions(
    registry: Registry,
    server: Server,
    variants: dict[int, RegisteredVersion],
    base: RegisteredVersion,
    exported: Path,
    run_id: str,
) -> None:
    client = MlflowClient(server.uri)
    gone = register_model(exported, registry, aliases=("trial",), run_id=run_id, tags={})
    client.set_registered_model_alias(NAME, "trial", str(variants[32].version))
    assert move_alias(registry, "trial", variants[20].version).before == variants[32].version
    path = [gone.version, variants[32].version, variants[20].version]
    assert alias_history(registry.registered_model(), "trial") == path
    client.delete_model_version(NAME, str(gone.version))
    assert roll_back(registry, "trial").after == variants[32].version
    with pytest.raises(ValueError, match="no version before"):
        roll_back(registry, "trial")
    client.delete_registered_model_alias(NAME, "trial")
    assert roll_back(registry, "trial").after == variants[32].version


def test_parity_of_a_registered_version_is_measured_again(
    registry: Registry,
    server: Server,
    variants: dict[int, RegisteredVersion],
    base: RegisteredVersion,
    parity_file: Path,
    tmp_path: Path,
) -> None:
    """A variant against its base, a trained version against the logits in its training's last checkpoint."""
    version = variants[20].version
    MlflowClient(server.uri).delete_model_version_tag(NAME, str(version), "parity_max_abs_diff")
    with pytest.raises(ValueError, match="parity is missing"):
        promote(registry, version, "champion")
    assert measure_parity(registry, version).difference <= 1e-5
    assert float(registry.version(version).tags["parity_max_abs_diff"]) <= 1e-5
    with pytest.raises(ExportError, match="names neither a base nor a training"):
        measure_parity(registry, base.version)

    run = tmp_path / "runs" / "first"
    MlflowRun(server.uri, base.run_id).set_tags({"run_url": str(run)})
    with pytest.raises(TrackingError, match=r"run first of .* has no checkpoint"):
        measure_parity(registry, base.version)
    result = {"checkpoint_dir_name": "step-4"}
    latest = {"latest_checkpoint_result": result, "checkpoint_results": [result]}
    storage.write_json(str(run / "train" / "checkpoint_manager_snapshot.json"), latest)
    state = TrainState("hash", 2, 4, step=4).to_json()
    storage.write_bytes(str(run / "train" / "step-4" / "train_state.json"), state.encode())
    shutil.copy(parity_file, run / "train" / "step-4" / "parity.safetensors")
    assert measure_parity(registry, base.version).difference <= 1e-5
    assert float(registry.version(base.version).tags["parity_max_abs_diff"]) <= 1e-5


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> shards.Manifest:
    """Six samples with pictures, in one held-out shard."""
    root = str(tmp_path_factory.mktemp("data"))
    turns = [{"from": "human", "value": "<image>\nwhat is this?"}, {"from": "gpt", "value": "a red square"}]
    rows = [
        (f"s{number}", build_members({"id": "s", "conversations": turns}, [("png", png((40 * number, 10, 10)))]))
        for number in range(6)
    ]
    infos = shards.write_shards(rows, root, "heldout", 8)
    return shards.save_manifest(root, infos, {"source": {"name": "squares"}})


def test_evaluate_files_the_score_with_the_version(
    registry: Registry,
    server: Server,
    base: RegisteredVersion,
    exported: Path,
    manifest: shards.Manifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    suite = Suite.of(manifest, "heldout", 6, part="all")
    wanted = Wanted(part="all")
    asked: dict[str, Any] = {"model": f"models:/{NAME}@latest-pretrain", "manifest": manifest.url, "wanted": wanted}
    how: dict[str, Any] = {"batch": 4, "device": "cpu"}
    score = evaluate(**asked, **how)
    version = registry.version(base.version)
    assert version.tags["suite"] == suite.digest
    assert version.tags["answer_nll"] == f"{score.answer_nll:.4f}"
    assert load_score(registry, version, suite.digest) == score
    assert f"6 x heldout of {manifest.url} ({suite.digest}) | {score.coverage} |" in (version.description or "")
    shown = capfd.readouterr().out
    assert f"filed with version {base.version} of {NAME}" in shown
    assert f"6 asked, {score.answered} answered, left out: none" in shown
    assert (version.tags["asked"], version.tags["left_out"]) == ("6", "none")

    alone = {**asked, "model": str(exported)}
    again = evaluate(**alone, **how, output=tmp_path / "score.json")
    assert [item.nll for item in again.records] == pytest.approx([item.nll for item in score.records], rel=1e-5)
    assert Score.from_dict(json.loads((tmp_path / "score.json").read_text())["score"]) == again
    with pytest.raises(ValueError, match="manifest is missing"):
        evaluate(**{**alone, "manifest": ""}, **how)
    with pytest.raises(ValueError, match="no split 'test'"):
        evaluate(**{**asked, "wanted": replace(wanted, split="test")}, **how)


def test_a_spoilt_artifact_is_no_score(
    registry: Registry, server: Server, variants: dict[int, RegisteredVersion], run_id: str
) -> None:
    version = registry.version(variants[32].version)
    (path,) = server.artifacts.rglob(f"scores/{NAME}-{version.version}-{SUITE.digest}.json")
    honest = path.read_text()
    try:
        path.write_text(honest.replace('"accuracy": 1.0', '"accuracy": 0.9'))
        with pytest.raises(ScoringError, match="is not the score that version"):
            load_score(registry, version, SUITE.digest)
        path.write_text(honest[:-20])
        with pytest.raises(ScoringError, match="is damaged"):
            load_score(registry, version, SUITE.digest)
    finally:
        path.write_text(honest)


def test_pulled_by_the_helper_and_by_transformers_alone(
    server: Server,
    variants: dict[int, RegisteredVersion],
    tiny: tuple[MeteorForConditionalGeneration, MeteorProcessor],
    tmp_path: Path,
) -> None:
    folder = pull_model(pin_model(f"models:/{NAME}@budget-20", server.uri), tmp_path / "model")
    model, processor = load_registered(f"models:/{NAME}@budget-20", server.uri)
    assert isinstance(AutoConfig.from_pretrained(folder), MeteorConfig)
    plain, plain_processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert not model.training
    answers = []
    for loaded, made in ((model, processor), (plain.eval(), plain_processor)):
        batch = made("what is this?", [png((0, 200, 0))])
        assert int((batch["input_ids"] == made.image_token_id).sum()) == 20
        answers.append(loaded.generate(**batch, max_new_tokens=6, do_sample=False))
    assert torch.equal(*answers)
    trained = tiny[0].state_dict()
    assert all(torch.equal(tensor, trained[key]) for key, tensor in model.state_dict().items())
