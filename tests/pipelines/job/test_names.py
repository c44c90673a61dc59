"""Which run a job begins or goes on with, and how often storage is asked for that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.recipe import Recipe, RunSettings
from pipelines.config.settings import SettingsError
from pipelines.io import storage
from pipelines.job.names import RunFacts, choose_run, last_number, load_facts, numbered, store_facts


def recipe(root: Path, name: str | None = None) -> Recipe:
    return Recipe(run=RunSettings(str(root), name))


def stem(root: Path) -> str:
    return f"pretrain-tiny-{recipe(root).digest()[:6]}"


def store(root: Path, number: int, *, finished: bool) -> None:
    facts = RunFacts.begun(recipe(root), "pretrain", ())
    store_facts(str(root), numbered(stem(root), number), replace(facts, finished=finished))


def test_numbers_count_up_from_the_highest() -> None:
    assert last_number([], "a") == 0
    assert last_number(["a-001", "a-010", "a-9", "a-x", "a-b-099", "b-100"], "a") == 10
    assert numbered("a", 11) == "a-011"
    assert last_number(["a-1000"], "a") == 1000, "more digits than are written at least"


def test_the_last_run_goes_on_until_it_is_finished(tmp_path: Path) -> None:
    first = choose_run(recipe(tmp_path), "pretrain", ())
    assert (first.name, first.continued) == (f"{stem(tmp_path)}-001", False)
    store(tmp_path, 1, finished=False)
    again = choose_run(recipe(tmp_path), "pretrain", ())
    stored = load_facts(str(tmp_path), first.name)
    assert stored is not None
    assert (again.name, again.continued) == (first.name, True)
    assert again.facts == replace(stored, commit=again.facts.commit)
    store(tmp_path, 1, finished=True)
    second = choose_run(recipe(tmp_path), "pretrain", ())
    assert (second.name, second.continued) == (f"{stem(tmp_path)}-002", False)
    assert second.facts.training_id != stored.training_id
    assert choose_run(recipe(tmp_path), "finetune", ()).name.startswith("finetune-tiny")


def test_what_is_no_run_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "runs" / f"{stem(tmp_path)}-004").mkdir(parents=True)
    (tmp_path / "runs" / f"{stem(tmp_path)}-004" / "notes.txt").write_text("left behind")
    assert choose_run(recipe(tmp_path), "pretrain", ()).name == f"{stem(tmp_path)}-005"
    (tmp_path / "runs" / f"{stem(tmp_path)}-004" / "run.json").write_text('{"job": "pretrain"}')
    with pytest.raises(SettingsError, match=r"run\.json holds no run facts: settings is missing"):
        choose_run(recipe(tmp_path), "pretrain", ())


def test_a_name_that_is_given_is_kept(tmp_path: Path) -> None:
    store(tmp_path, 7, finished=True)
    given = choose_run(recipe(tmp_path, numbered(stem(tmp_path), 7)), "pretrain", ())
    assert given.continued
    assert given.facts.finished
    assert not choose_run(recipe(tmp_path, "new"), "pretrain", ()).continued


def test_the_calls_do_not_grow_with_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One listing, and the file of one run: for 1 run and for 400."""
    calls: list[str] = []
    real = storage.retried

    def counted(url: str, action: Callable[[], Any], *rest: Any) -> Any:
        calls.append(url)
        return real(url, action, *rest)

    monkeypatch.setattr(storage, "retried", counted)
    for runs in (1, 400):
        for number in range(1, runs + 1):
            store(tmp_path, number, finished=True)
        calls.clear()
        assert choose_run(recipe(tmp_path), "pretrain", ()).name == numbered(stem(tmp_path), runs + 1)
        assert calls == [f"{tmp_path}/runs", f"{tmp_path}/runs/{numbered(stem(tmp_path), runs)}/run.json"]
