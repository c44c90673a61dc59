"""The registry of models: `python jobs/register.py {list,compare,promote,rollback,parity} ...`.

Versions are made by training and by the search; here they are compared, promoted to an alias under evidence, and rolled
back. `--help` after a command shows its settings. Needs MLFLOW_TRACKING_URI.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from jobs.command_line import run_command
from pipelines.evaluation.scores import Score
from pipelines.registry.aliases import Move, alias_history, roll_back
from pipelines.registry.folder import PARITY_TOLERANCE
from pipelines.registry.promotion import promote, what_is_lacking
from pipelines.registry.scores import VersionComparison, compare_versions
from pipelines.registry.tags import BASE_TAG, HISTORY_TAG, PARITY_TAG
from pipelines.registry.versions import Registry
from pipelines.tracking.mlflow_run import require_tracking


@dataclass(frozen=True)
class ListCommand:
    """Show versions, aliases, proofs and scores."""

    model: str = "meteor"
    """Registered model."""


@dataclass(frozen=True)
class CompareCommand:
    """Show two versions on one suite, and the paired difference with its 95 % interval."""

    versions: tyro.conf.Positional[tuple[str, str]]
    """Two aliases or version numbers; the difference is the second minus the first."""
    model: str = "meteor"
    """Registered model."""
    suite: str | None = None
    """Digest of the suite where both have several scores in common."""
    output: Path | None = None
    """JSON file for the result."""


@dataclass(frozen=True)
class PromoteCommand:
    """Let an alias point to a version that has its parity and a score on a suite."""

    model: str = "meteor"
    """Registered model."""
    version: int | None = None
    """Number of the version."""
    alias: str | None = None
    """Instead of a number: the version that this alias points to, e.g. budget-128."""
    to: str = "champion"
    """The alias that moves."""
    parity_tolerance: float = PARITY_TOLERANCE
    """Largest difference of a logit between the registered files and the model that they were made of."""


@dataclass(frozen=True)
class RollbackCommand:
    """Let an alias point to the version before; twice is two moves back."""

    model: str = "meteor"
    """Registered model."""
    alias: str = "champion"
    """The alias."""


@dataclass(frozen=True)
class ParityCommand:
    """Measure the parity of a registered version anew, and file it."""

    version: int
    """Number of the version."""
    model: str = "meteor"
    """Registered model."""
    parity_tolerance: float = PARITY_TOLERANCE
    """Largest difference of a logit that is allowed."""


Command = (
    Annotated[ListCommand, tyro.conf.subcommand("list")]
    | Annotated[CompareCommand, tyro.conf.subcommand("compare")]
    | Annotated[PromoteCommand, tyro.conf.subcommand("promote")]
    | Annotated[RollbackCommand, tyro.conf.subcommand("rollback")]
    | Annotated[ParityCommand, tyro.conf.subcommand("parity")]
)


def execute(command: Command, uri: str) -> str:
    """Do what the command says; the text to print. Raises ValueError (of several kinds) with a message for the user."""
    registry = Registry(uri, command.model)
    match command:
        case ListCommand():
            return show_versions(registry)
        case CompareCommand():
            return compare(command, registry)
        case PromoteCommand():
            if (command.version is None) == (command.alias is None):
                raise ValueError("give either --version NUMBER or --alias ALIAS: the version to promote")
            version = (
                registry.resolve(str(command.version)) if command.alias is None else registry.target(command.alias)
            )
            return _moved(registry, promote(registry, version, command.to, command.parity_tolerance))
        case RollbackCommand():
            return _moved(registry, roll_back(registry, command.alias))
        case ParityCommand():
            # Here: reading checkpoints loads Ray, which the other commands do not need.
            from pipelines.registry.variants import measure_parity

            parity = measure_parity(registry, registry.resolve(str(command.version)), command.parity_tolerance)
            return f"version {command.version} of {command.model}: largest difference of a logit {parity:.3g}"


def _moved(registry: Registry, move: Move) -> str:
    if move.before == move.after:
        return f"{move.alias} of {registry.name} points to version {move.after} already"
    return f"{move.alias} of {registry.name}: version {move.before or 'none'} -> {move.after}"


def show_versions(registry: Registry) -> str:
    """All versions, newest first, and the history of each alias that moved."""
    registered = registry.registered_model()
    rows: list[tuple[str, ...]] = []
    rows += [("version", "aliases", "made by", "parity", "accuracy", "answer NLL", "tokens", "TFLOPs", "promotable")]
    for version in reversed(registry.versions()):
        tags = version.tags
        aliases = sorted(name for name, number in registered.aliases.items() if int(number) == int(version.version))
        made_by = tags.get(BASE_TAG) or tags.get("run_name") or tags.get("job") or "-"
        numbers = [tags.get(key, "-") for key in (PARITY_TAG, "accuracy", "answer_nll", "visual_tokens_mean", "tflops")]
        ready = "no" if what_is_lacking(version) else "yes"
        rows.append((str(version.version), ", ".join(aliases) or "-", made_by, *numbers, ready))
    lines = [_table(rows)]
    for tag in sorted(registered.tags):
        if tag.startswith(HISTORY_TAG):
            alias = tag.removeprefix(HISTORY_TAG)
            lines.append(f"{alias}: {' -> '.join(map(str, alias_history(registered, alias)))}")
    return "\n".join(lines)


def compare(command: CompareCommand, registry: Registry) -> str:
    """The table of two versions on one suite; written to `output` as well."""
    numbers = [registry.resolve(which) for which in command.versions]
    first, second = (registry.version(number) for number in numbers)
    compared = compare_versions(registry, first, second, command.suite)
    if command.output is not None:
        document = {
            "model": command.model,
            "suite": compared.suite,
            "first": {"asked": command.versions[0], "version": numbers[0], **compared.first.to_dict()},
            "second": {"asked": command.versions[1], "version": numbers[1], **compared.second.to_dict()},
            "second_minus_first": asdict(compared.difference),
        }
        command.output.parent.mkdir(parents=True, exist_ok=True)
        command.output.write_text(json.dumps(document, indent=2) + "\n")
    titles = [f"{which} (version {number})" for which, number in zip(command.versions, numbers, strict=True)]
    return comparison_table(titles, compared)


def comparison_table(titles: list[str], compared: VersionComparison) -> str:
    """Scores side by side with 95 % intervals, and the paired difference."""
    first, second, difference = compared.first, compared.second, compared.difference

    def row(name: str, measure: Callable[[Score], str], change: str) -> tuple[str, str, str, str]:
        return name, measure(first), measure(second), change

    rows = [
        ("", *titles, "difference, paired"),
        row(
            "accuracy",
            lambda score: score.accuracy_interval.beside(score.accuracy),
            difference.accuracy_interval.beside(difference.accuracy, "+"),
        ),
        row(
            "answer NLL",
            lambda score: score.answer_nll_interval.beside(score.answer_nll),
            difference.answer_nll_interval.beside(difference.answer_nll, "+"),
        ),
        row(
            "visual tokens",
            lambda score: f"{score.visual_tokens} > {score.visual_tokens_mean:.1f}",
            f"{difference.visual_tokens_mean:+.1f} after stage 3",
        ),
        row("TFLOPs", lambda score: f"{score.tflops:.4g}", f"{difference.tflops:+.4g}"),
    ]
    return f"suite {difference.suite}: {compared.suite}\n" + _table(rows)


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def main() -> int:
    """Command line; a fault of the input is said on stderr, with exit code 2."""
    command = tyro.cli(Command, description=__doc__)
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")

    def ask() -> None:
        require_tracking(uri)
        print(execute(command, uri))

    return run_command(ask)


if __name__ == "__main__":
    sys.exit(main())
