"""The folder of a run: its tree in the docs, no name spelt elsewhere, and one listing for the names of runs."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.io import storage
from pipelines.io.run_folder import RunFolder, list_runs, run_folder, split_run_url

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "run-folder.md").read_text()
PATHS = {name: getattr(RunFolder("run"), name) for name, kind in vars(RunFolder).items() if isinstance(kind, property)}


def tree() -> Iterator[str]:
    """The paths of the tree in the docs; a folder's without its slash."""
    (block,) = re.findall(r"```\nSTORAGE/runs/NAME/\n(.*?)```", PAGE, re.DOTALL)
    above: list[str] = []
    for line in block.splitlines():
        indent, name = re.fullmatch(r"((?:│   |    )*)[├└]── (\S+)", line).groups()  # type: ignore[union-attr]
        above = [*above[: len(indent) // 4], name.rstrip("/")]
        yield "/".join(above)


def test_the_tree_in_the_docs_is_the_class() -> None:
    assert sorted(f"run/{path}" for path in tree()) == sorted(PATHS.values())


def test_the_table_in_the_docs_says_something_of_every_path() -> None:
    rows = re.findall(r"^\| `([^`]+?)/?` \|", PAGE, re.MULTILINE)
    assert sorted(rows) == sorted(tree())


def test_no_other_module_spells_a_name_of_the_folder() -> None:
    """`"init"`, `"runs"` and the like; names that other things have, too, are not asked for."""
    other_meaning = {"train", "processor", "best", "export", "pictures", "points", "artifacts", "ranks.json"}
    other_meaning |= {"recipe.json", "config.json", "parts.json", "outbox"}
    names = {part for path in PATHS.values() for part in path.split("/")[1:]} - other_meaning | {"runs"}
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.value!r}"
        for room in ("pipelines", "jobs", "tune", "benchmarks")
        for path in sorted((ROOT / room).rglob("*.py"))
        if path.name != "run_folder.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in names
    ]
    assert {"init", "run.json", "READY.json"} <= names
    assert found == []


def test_a_run_has_its_place_and_the_place_its_run() -> None:
    folder = run_folder("s3://bucket/prefix/", "first")
    assert folder == RunFolder("s3://bucket/prefix/runs/first")
    assert folder.checkpoint("step-1") == "s3://bucket/prefix/runs/first/train/step-1"
    assert split_run_url(folder.url) == ("s3://bucket/prefix", "first")
    for wrong in ("", "s3://bucket/first", "/runs/first", "s3://bucket/runs/first/export"):
        with pytest.raises(storage.StorageError, match="is no run's folder"):
            split_run_url(wrong)


def test_runs_are_found_by_one_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list_runs(str(tmp_path)) == []
    for name in ("tiny-002", "tiny-001", "small-001"):
        storage.write_json(run_folder(str(tmp_path), name).record, {})
    calls: list[str] = []
    listed = storage.list_folders

    def noted(url: str) -> list[str]:
        calls.append(url)
        return listed(url)

    monkeypatch.setattr(storage, "list_folders", noted)
    monkeypatch.delattr(storage, "list_sizes")  # of every file of every run
    assert list_runs(str(tmp_path), "tiny-") == ["tiny-001", "tiny-002"]
    assert calls == [f"{tmp_path}/runs"]
