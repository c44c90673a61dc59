"""What worked on a run is kept for every start, and what a name pointed to is kept from the first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.recipes import recipe
from pipelines.data.shards import Manifest
from pipelines.io import storage
from pipelines.io.git import COMMIT_VARIABLE
from pipelines.io.run_folder import RunFolder, run_folder
from pipelines.job import run as run_module
from pipelines.job.names import ChosenRun, RunFacts, store_facts
from pipelines.job.starts import TAG_LENGTH, Start, add_start, list_starts, shown_starts, starts_tag, versions_tag
from pipelines.recovery.lease import RunInUseError
from pipelines.registry import provenance
from pipelines.registry.tags import LIBRARIES_TAG, LICENCE_TAG, STARTS_TAG, VERSION_TAGS
from pipelines.registry.versions import PinnedModel

NOBODY = "http://127.0.0.1:9"
MANIFEST = Manifest("s3://bucket/data/manifest.parquet", (), {})


def start(number: int = 0, commit: str = "c0ffee", workers: int = 2, torch: str = "2.14.1") -> Start:
    return Start(f"2026-01-01T00:00:{number:02d}Z", commit, False, workers, "d", {"a": workers}, {"torch": torch})


def test_a_resume_under_other_code_does_not_forget_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, settings = RunFolder(str(tmp_path)), recipe("pretrain", "tiny")
    monkeypatch.setenv(COMMIT_VARIABLE, "aaaa")
    add_start(folder, Start.now(settings))
    first = (tmp_path / "starts" / "0001.json").read_bytes()
    monkeypatch.setenv(COMMIT_VARIABLE, "bbbb-dirty")
    more = replace(settings, training=replace(settings.training, workers=1))
    starts = add_start(folder, Start.now(more))
    assert (tmp_path / "starts" / "0001.json").read_bytes() == first
    assert list_starts(folder) == starts
    assert [(s.commit, s.dirty, s.workers) for s in starts] == [("aaaa", False, 2), ("bbbb", True, 1)]
    assert starts[0].recipe == settings.to_dict()
    assert starts[0].versions["torch"] == starts[1].versions["torch"] != "not installed"
    assert starts[1].changes(starts[0]) == ["commit: aaaa -> bbbb-dirty", "training.workers: 2 -> 1"]
    shown = shown_starts(starts)
    assert "recipe" in shown[0]
    assert "recipe" not in shown[1]
    assert shown[1]["changed"] == starts[1].changes(starts[0])
    assert "aaaa, 2 workers; " in starts_tag(starts)
    assert starts_tag(starts).endswith("bbbb-dirty, 1 workers")


def test_a_commit_that_is_not_known_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a cluster, after a submission that left it behind."""
    monkeypatch.delenv(COMMIT_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    starts = add_start(RunFolder(str(tmp_path)), Start.now(recipe("pretrain", "tiny")))
    assert starts[0].commit == "unknown"
    (line,) = capsys.readouterr().out.splitlines()
    assert "the commit of this code is not known here" in line
    assert "jobs/submit.py" in line


def test_a_start_holds_no_secret(tmp_path: Path) -> None:
    settings = recipe("pretrain", "tiny")
    settings = replace(settings, tracking=replace(settings.tracking, uri="http://me:Xq7-pw@host:5000"))
    add_start(RunFolder(str(tmp_path)), Start.now(settings))
    assert b"Xq7-pw" not in (tmp_path / "starts" / "0001.json").read_bytes()


def test_a_start_that_is_no_start_is_named(tmp_path: Path) -> None:
    storage.write_json(str(tmp_path / "starts" / "0001.json"), {"commit": "a"})
    with pytest.raises(ValueError, match=r"starts/0001\.json holds no start"):
        list_starts(RunFolder(str(tmp_path)))


def test_equal_starts_are_counted_together() -> None:
    starts = [start(1), start(2), start(3), start(4, commit="beef"), start(5, commit="beef", torch="2.15")]
    assert starts_tag(starts) == (
        "2026-01-01T00:00:01Z c0ffee, 2 workers (3 starts); 2026-01-01T00:00:04Z beef, 2 workers; "
        "2026-01-01T00:00:05Z beef, 2 workers"
    )
    assert versions_tag(starts) == "torch 2.14.1 -> 2.15"


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), min_size=1, max_size=300))
def test_the_tag_shows_the_first_and_the_last_and_fits(given: list[tuple[int, int]]) -> None:
    starts = [start(0, f"{commit:040x}", workers) for commit, workers in given]
    tag = starts_tag(starts)
    assert len(tag) <= TAG_LENGTH
    assert tag.startswith(f"{starts[0].when} {starts[0].code}, {starts[0].workers} workers")
    assert f"{starts[-1].code}, {starts[-1].workers} workers" in tag.split("; ")[-1]


def test_the_tags_are_known() -> None:
    assert {STARTS_TAG, LIBRARIES_TAG} <= VERSION_TAGS.keys()


# ----------------------------------------------------------------------------------------- the same command given twice


def test_the_same_command_changes_nothing_of_a_run_that_another_job_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe("pretrain", "tiny")
    settings = replace(settings, run=replace(settings.run, storage=str(tmp_path), name="r"))
    folder = run_folder(str(tmp_path), "r")
    store_facts(str(tmp_path), "r", RunFacts.begun(settings, "pretrain", [MANIFEST]))
    storage.write_json(folder.recipe, {"of": "the living run"})
    add_start(folder, start())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def held(url: str, subject: str) -> None:
        raise RunInUseError(f"{subject} is held")

    monkeypatch.setattr(run_module, "hold_run", held)
    monkeypatch.setattr(run_module, "check_places", lambda recipe: None)
    monkeypatch.setattr(run_module, "ensure_shards", lambda recipe: (MANIFEST,))
    monkeypatch.setattr(run_module, "_check_fit", lambda recipe, manifests: None)  # it asks a cluster
    monkeypatch.setattr(run_module, "RunTracker", lambda *_, **__: pytest.fail("MLflow was told"))
    monkeypatch.setenv(COMMIT_VARIABLE, "other")
    with pytest.raises(RunInUseError):
        run_module.run_job(settings, "pretrain")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_happened_before_the_claim_is_seen(tmp_path: Path) -> None:
    settings = recipe("pretrain", "tiny")
    settings = replace(settings, run=replace(settings.run, storage=str(tmp_path), name="r"))
    chosen = ChosenRun("r", facts(), continued=False)
    assert run_module._as_claimed(settings, chosen) == chosen
    store_facts(str(tmp_path), "r", replace(facts("models:/meteor/7"), mlflow_run_id="m", commit="first"))
    claimed = run_module._as_claimed(settings, chosen)
    assert (claimed.continued, claimed.facts.mlflow_run_id, claimed.facts.commit) == (True, "m", "abc")
    assert claimed.facts.started_from == "models:/meteor/7"
    store_facts(str(tmp_path), "r", replace(facts(), finished=True))
    with pytest.raises(ValueError, match="was finished by another job"):
        run_module._as_claimed(settings, chosen)


# ------------------------------------------------------------------------------------------------- what an alias names


def facts(started_from: str | None = None) -> RunFacts:
    return RunFacts("finetune", {}, {}, "abc", "id", 1, started_from=started_from)


@pytest.fixture
def alias(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Moves the alias that `model.start` names."""
    points_to = [7]

    def pin(model: str, uri: str | None = None) -> PinnedModel:
        assert model == "models:/meteor@latest-pretrain"
        return PinnedModel(f"models:/meteor/{points_to[0]}")

    monkeypatch.setattr(run_module, "pin_model", pin)
    return lambda version: points_to.__setitem__(0, version)


def test_a_start_model_is_pinned_when_the_run_begins(tmp_path: Path, alias: Callable[[int], None]) -> None:
    settings, folder = recipe("finetune", "tiny"), RunFolder(str(tmp_path))
    begun = run_module._pin_start(settings, ChosenRun("r", facts(), continued=False), folder)
    assert begun.started_from == "models:/meteor/7"
    alias(8)
    again = run_module._pin_start(settings, ChosenRun("r", begun, continued=True), folder)
    assert again.started_from == "models:/meteor/7", "the alias moved between a start and its resume"


def test_a_run_from_before_is_not_given_a_version_that_it_did_not_start_from(
    tmp_path: Path, alias: Callable[[int], None]
) -> None:
    settings, folder = recipe("finetune", "tiny"), RunFolder(str(tmp_path))
    storage.write_json(folder.init_ready, {})
    assert run_module._pin_start(settings, ChosenRun("r", facts(), continued=True), folder).started_from is None


def test_licences_are_those_of_the_pinned_version(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = recipe("finetune", "tiny")
    settings = replace(settings, tracking=replace(settings.tracking, uri=NOBODY))
    asked: list[str] = []

    class OneVersion:
        def __init__(self) -> None:
            self.tags = {f"{LICENCE_TAG}weights.clip": "MIT", "accuracy": "0.5"}

        def version(self, number: int) -> OneVersion:
            asked.append(f"version {number}")
            return self

    def find(model: str, uri: str) -> tuple[OneVersion, int]:
        asked.append(model)
        return OneVersion(), 7

    monkeypatch.setattr(provenance, "find_version", find)
    tags = provenance.training_tags(settings, [MANIFEST], "models:/meteor/7")
    assert asked == ["models:/meteor/7", "version 7"]
    assert tags["start"] == "models:/meteor/7"
    assert tags[f"{LICENCE_TAG}weights.clip"] == "MIT"
    asked.clear()
    tags = provenance.training_tags(settings, [MANIFEST])
    assert asked == [], "an alias may have moved"
    assert tags[f"{LICENCE_TAG}weights"] == "not recorded: those of models:/meteor@latest-pretrain"
