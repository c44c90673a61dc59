"""Imports run one way: meteor_model <- pipelines <- tune <- jobs; infra stands apart; the model needs no cluster.

Inside pipelines/ they run down a table of levels: a room may import the rooms named beside it, which all stand lower.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {"meteor_model", "pipelines", "tune", "jobs", "infra", "tests", "benchmarks"}
ALLOWED = {
    "meteor_model": {"meteor_model"},
    "pipelines": {"meteor_model", "pipelines"},
    "tune": {"meteor_model", "pipelines", "tune"},
    "jobs": {"meteor_model", "pipelines", "tune", "jobs"},
    "infra": {"infra"},
}
LEVELS: tuple[dict[str, set[str]], ...] = (
    {"compat": set(), "io": set()},
    {"data": {"io"}, "recovery": {"compat", "io"}, "tracking": {"io"}},
    {"config": {"data", "io"}, "evaluation": {"data", "io"}, "parts": {"data", "io"}},
    {"checkpoint": {"compat", "config", "data", "io"}},
    {
        "training": {"checkpoint", "compat", "config", "data", "io", "recovery", "tracking"},
        "registry": {"checkpoint", "config", "data", "evaluation", "io", "parts", "tracking"},
        "sizing": {"checkpoint", "compat", "config", "data", "io"},
    },
    {
        "calibration": {"config", "data", "evaluation", "io", "recovery", "registry", "tracking"},
        "inference": {"config", "data", "io", "recovery", "registry"},
    },
    {
        "job": {
            "calibration",
            "checkpoint",
            "config",
            "data",
            "evaluation",
            "io",
            "parts",
            "recovery",
            "registry",
            "sizing",
            "tracking",
            "training",
        }
    },
)
"""The rooms of pipelines/, lowest first, and what each may import; docs/composability.md draws it."""
NEVER_IN_THE_MODEL = {
    "ray",
    "deepspeed",
    "mlflow",
    "pyarrow",
    "fsspec",
    "tyro",
    "webdataset",
    "pydantic",
}


def imported(path: Path) -> set[str]:
    """Top-level names that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_run_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        wrong = (imported(path) & OURS) - ALLOWED[package]
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def rooms_imported(path: Path, root: Path) -> set[str]:
    """Rooms of `root` (a folder pipelines/) that a file imports, anywhere in it, its own apart."""
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom) and node.module == "pipelines":
            modules = [f"pipelines.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        rooms |= {module.split(".")[1] for module in modules if module.startswith("pipelines.")}
    return rooms - {path.relative_to(root).parts[0]}


def wrong_imports(root: Path) -> list[str]:
    """Imports of a folder pipelines/ that the table of levels does not allow."""
    allowed = {room: uses for level in LEVELS for room, uses in level.items()}
    return [
        f"{path.relative_to(root)} imports {room}"
        for path in sorted(root.rglob("*.py"))
        if path.parent != root
        for room in sorted(rooms_imported(path, root) - allowed[path.relative_to(root).parts[0]])
    ]


def test_rooms_import_downwards_only() -> None:
    assert wrong_imports(ROOT / "pipelines") == []


def test_pipelines_holds_rooms_only_and_every_room_is_in_the_table() -> None:
    entries = {path.name for path in (ROOT / "pipelines").iterdir() if path.name != "__pycache__"}
    assert entries == {"__init__.py"} | {room for level in LEVELS for room in level}


def test_the_table_has_no_way_up() -> None:
    lower: set[str] = set()
    for level in LEVELS:
        for room, uses in level.items():
            assert uses <= lower, f"{room} may import {sorted(uses - lower)}, which stand no lower"
        lower |= set(level)


@pytest.mark.parametrize(
    "line", ["from pipelines.job.run import run_job", "import pipelines.job.run", "from pipelines import job"]
)
def test_a_planted_upward_import_is_found(tmp_path: Path, line: str) -> None:
    planted = tmp_path / "pipelines" / "io" / "storage.py"
    planted.parent.mkdir(parents=True)
    planted.write_text(f"def later():\n    {line}\n")
    assert wrong_imports(tmp_path / "pipelines") == ["io/storage.py imports job"]


def test_the_model_imports_no_cluster_library() -> None:
    for path in sorted((ROOT / "meteor_model").rglob("*.py")):
        wrong = imported(path) & NEVER_IN_THE_MODEL
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_the_core_install_pulls_no_cluster_library() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    core = {re.split(r"[^a-z0-9_-]", requirement.lower())[0] for requirement in project["dependencies"]}
    assert "torch" in core
    assert not core & NEVER_IN_THE_MODEL


def test_importing_the_model_loads_no_cluster_library() -> None:
    code = (
        "import sys, meteor_model.modeling_meteor, meteor_model.processing_meteor, meteor_model.visualize;"
        f"print(sorted({NEVER_IN_THE_MODEL!r} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.strip().splitlines()[-1] == "[]"
