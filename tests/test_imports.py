"""Imports run one way: meteor_model <- pipelines <- tune <- jobs; infra stands apart; the model needs no cluster."""

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
NEVER_IN_THE_MODEL = {"ray", "deepspeed", "mlflow", "pyarrow", "s3fs", "fsspec", "tyro", "webdataset"}


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
