"""Write docs/settings.md from the classes that the command lines are made of: `python -m docs.tools.settings`.

Name, type, default and text of every setting stand in the code once. A test fails where the page is not what this
module writes.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pipelines.io.validation import bounds

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "settings.md"
FROM_ENVIRONMENT = ("METEOR_STORAGE", "METEOR_STATE_DIR", "METEOR_PARTS_DIR", "MLFLOW_TRACKING_URI")
"""Variables that some defaults come from; the page is written without them."""
HEAD = """\
# Settings

Written from the code by `make docs`; do not edit.

Every setting of a job can be given on its command line by its dotted name, with `-` for `_`:
`make pretrain ARGS="--training.epochs 2 --pruning.fuse.keep 16"`. Lists take several values, mappings pairs, a flag is
`--name` or `--no-name`, and `None` is a value ([the command line](command-line.md)); `python jobs/pretrain.py --help`
shows them as well. What is out of its range, contradicts another setting or is misspelt stops the job before anything
starts, with an error that names it.
"""


@dataclass(frozen=True)
class Setting:
    """One line of the page."""

    name: str
    type: str
    default: str
    text: str


def main() -> None:
    """Write the page."""
    PAGE.write_text(page())


def page() -> str:
    """The whole page."""
    kept = {name: os.environ.pop(name) for name in FROM_ENVIRONMENT if name in os.environ}
    try:
        parts = [HEAD, *_training(), *_jobs()]
    finally:
        os.environ.update(kept)
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def _training() -> Iterator[str]:
    from jobs.recipes import RECIPES
    from pipelines.config.recipe import Recipe

    yield "## pretrain, finetune"
    yield (
        "A recipe is a value of `pipelines.config.recipe.Recipe`; `--recipe NAME` chooses a named one, whose settings "
        "are the defaults of all others. The defaults below are those of the class."
    )
    settings = list(settings_of(Recipe, Recipe(), ""))
    for section in dict.fromkeys(item.name.partition(".")[0] for item in settings):
        yield f"### {section}"
        yield table([item for item in settings if item.name.partition(".")[0] == section])
    yield "### What the named recipes set"
    for job, recipes in RECIPES.items():
        yield f"`{job}`:"
        yield _differences(Recipe(), {name: make() for name, make in sorted(recipes.items())})


def _differences(base: Any, recipes: dict[str, Any]) -> str:
    """A column a recipe; the rows are the settings in which one of them is not like the class."""
    flat = {name: _flat(recipe) for name, recipe in recipes.items()}
    plain = _flat(base)
    changed = [key for key in plain if key != "name" and any(values[key] != plain[key] for values in flat.values())]
    rows = [
        [f"`{key}`", *(_value(values[key]) if values[key] != plain[key] else "" for values in flat.values())]
        for key in changed
    ]
    return _rows(["setting", *(f"`{name}`" for name in recipes)], rows)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not is_dataclass(value):
        return {name: value}
    return {
        key: inner
        for item in fields(value)
        for key, inner in _flat(getattr(value, item.name), f"{name}.{item.name}".strip(".")).items()
    }


def _jobs() -> Iterator[str]:
    for path in sorted((ROOT / "jobs").glob("*.py")):
        job = getattr(importlib.import_module(f"jobs.{path.stem}"), "JOB", None)
        if job is None or job.name in ("pretrain", "finetune"):
            continue
        yield f"## {job.name}"
        for command in _commands(job.settings):
            name, cls = _subcommand(command)
            if name:
                yield f"### {job.name} {name}"
            yield (inspect.getdoc(cls) or "").split("\n\n")[0]
            yield table(settings_of(cls, None, ""))


def _commands(settings: Any) -> tuple[Any, ...]:
    return get_args(settings) if get_origin(settings) not in (None, Annotated) else (settings,)


def _subcommand(command: Any) -> tuple[str, type]:
    """Name of a subcommand, or nothing, and its class."""
    if get_origin(command) is not Annotated:
        return "", command
    return str(command.__metadata__[0].name), get_args(command)[0]


def settings_of(cls: type, value: Any, prefix: str) -> Iterator[Setting]:
    """Every setting of a dataclass, those of its parts by their dotted names.

    Args:
        cls: the dataclass.
        value: an object that has the defaults, or None where some setting has none.
        prefix: dotted name that goes before.
    """
    hints, texts = get_type_hints(cls, include_extras=True), field_texts(cls)
    for item in fields(cls):
        default = getattr(value, item.name) if value is not None else _default(item)
        name = "" if _unnamed(hints[item.name]) else item.name
        dotted = f"{prefix}.{name}".strip(".")
        part = _bare(hints[item.name])
        is_part = is_dataclass(part)
        if is_part and part.__name__ == "Recipe":
            yield Setting(
                f"{dotted}.*".lstrip("."), "a recipe", "", f"{texts[item.name]} Every setting of finetune, above."
            )
        elif is_part:
            yield from settings_of(part, None if default is MISSING else default, dotted)
        else:
            shown = "required" if default is MISSING else _value(default)
            yield Setting(dotted, type_in_words(hints[item.name]), shown, texts.get(item.name, ""))


def field_texts(cls: type) -> dict[str, str]:
    """The text under each field of a class and of those that it derives from."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        tree = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for line, below in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(below, ast.Expr):
                text = ast.literal_eval(below.value) if isinstance(below.value, ast.Constant) else ""
                texts[line.target.id] = " ".join(str(text).split())
    return texts


def type_in_words(hint: Any) -> str:
    """A type for people, with its range."""
    parts = [hint]
    if optional := type(None) in get_args(hint):
        parts = [part for part in get_args(hint) if part is not type(None)]
    words = " or ".join([*(_words(part) for part in parts), *(["None"] if optional else [])])
    allowed = bounds(parts[0])
    return f"{words}, {allowed}" if allowed else words


def _words(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _words(inner[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (tuple, dict):
        each = f", each {allowed}" if (allowed := bounds(inner[-1 if origin is dict else 0])) else ""
        if origin is dict:
            return f"mapping of {_words(inner[0])} to {_words(inner[1])}{each}"
        many = "list" if inner[-1] is Ellipsis else str(len(inner))
        return f"{many} of {_words(inner[0])}{each}"
    return {"str": "text", "int": "whole number", "float": "number", "bool": "flag", "Path": "file"}.get(
        getattr(hint, "__name__", ""), str(hint)
    )


def _unnamed(hint: Any) -> bool:
    """Whether the settings of a part stand on the command line without its name."""
    return any(getattr(item, "name", None) == "" for item in getattr(hint, "__metadata__", ()))


def _bare(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _default(item: Any) -> Any:
    if item.default_factory is not MISSING:
        return item.default_factory()
    return item.default


def _value(value: Any) -> str:
    if value in ("", (), {}):
        return "empty"
    if isinstance(value, tuple):
        return f"`{' '.join(str(part) for part in value)}`"
    if isinstance(value, Path) and value.is_relative_to(ROOT):
        value = value.relative_to(ROOT)  # the page is the same wherever the checkout lies
    return f"`{value}`"


def table(settings: Iterable[Setting]) -> str:
    """The settings as a table."""
    rows = [[f"`{item.name}`", item.type, item.default, item.text] for item in settings]
    return _rows(["setting", "type", "default", "what it is"], rows)


def _rows(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    main()
