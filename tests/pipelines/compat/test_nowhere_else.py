"""Private parts of Ray and DeepSpeed are imported in pipelines/compat alone; infra/, which starts Ray, stands apart."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def private_imports(path: Path) -> Iterator[str]:
    """Imports of a name or a module of Ray or DeepSpeed that begins with an underscore."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (
            f"{path}:{node.lineno} {name}"
            for name in names
            if name.split(".")[0] in ("ray", "deepspeed") and "._" in name
        )


def test_private_parts_are_imported_in_compat_alone() -> None:
    files = [path for room in ("pipelines", "tune", "jobs") for path in sorted((ROOT / room).rglob("*.py"))]
    found = [line for path in files for line in private_imports(path)]
    assert any("pipelines/compat/ray.py" in line for line in found), "the search finds them where they are"
    assert [line for line in found if "pipelines/compat/" not in line] == []
