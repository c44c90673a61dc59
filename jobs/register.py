#!/usr/bin/env python
"""The registry of models: `python jobs/register.py {list,compare,promote,rollback,parity} ...`.

Versions are made by training and by the search; here they are compared, promoted to an alias under evidence, and rolled
back. `--help` after a command shows its settings.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from jobs.command_line import Job
from jobs.settings import RegistryAddress
from pipelines.io.console import say
from pipelines.io.names import require_alias, require_name


@dataclass(frozen=True)
class ListCommand:
    """Show versions, aliases, proofs and scores."""

    tracking: RegistryAddress = field(default_factory=RegistryAddress)
    """MLflow."""


@dataclass(frozen=True)
class CompareCommand:
    """Show two versions on one suite, and the paired difference with its 95 % interval."""

    versions: tyro.conf.Positional[tuple[str, str]]
    """Two aliases or version numbers; the difference is the second minus the first."""
    suite: str | None = None
    """Digest of the suite where both have several scores in common."""
    output: Path | None = None
    """JSON file for the result."""
    tracking: RegistryAddress = field(default_factory=RegistryAddress)
    """MLflow."""


@dataclass(frozen=True)
class PromoteCommand:
    """Let an alias point to a version that has its parity and a score on a suite."""

    version: int | None = None
    """Number of the version."""
    alias: str | None = None
    """Instead of a number: the version that this alias points to, e.g. budget-128."""
    to: str = "champion"
    """The alias that moves."""
    parity_tolerance: float | None = None
    """Largest difference of a logit between the registered files and the model that they were made of; None allows
    1e-3 where both were compared in fp32, and 1/16 of the largest logit where it was bf16."""
    max_unanswered: float = 0.01
    """Largest share of a suite's questions that was left out (text alone apart) or answered without a word."""
    tracking: RegistryAddress = field(default_factory=RegistryAddress)
    """MLflow."""


@dataclass(frozen=True)
class RollbackCommand:
    """Let an alias point to the version before; twice is two moves back."""

    alias: str = "champion"
    """The alias."""
    tracking: RegistryAddress = field(default_factory=RegistryAddress)
    """MLflow."""


@dataclass(frozen=True)
class ParityCommand:
    """Measure the parity of a registered version anew, and file it."""

    version: int
    """Number of the version."""
    parity_tolerance: float | None = None
    """Largest difference of a logit that is allowed; None allows 1e-3 in fp32, 1/16 of the largest logit in bf16."""
    tracking: RegistryAddress = field(default_factory=RegistryAddress)
    """MLflow."""


Command = (
    Annotated[ListCommand, tyro.conf.subcommand("list")]
    | Annotated[CompareCommand, tyro.conf.subcommand("compare")]
    | Annotated[PromoteCommand, tyro.conf.subcommand("promote")]
    | Annotated[RollbackCommand, tyro.conf.subcommand("rollback")]
    | Annotated[ParityCommand, tyro.conf.subcommand("parity")]
)


def check(command: Command) -> None:
    """What can be wrong before anything is asked. Raises ValueError."""
    command.tracking.require()
    require_name(command.tracking.registered_model, "tracking.registered_model")
    match command:
        case PromoteCommand():
            require_alias(command.to, "to")
        case RollbackCommand():
            require_alias(command.alias)
    if isinstance(command, PromoteCommand) and not 0 <= command.max_unanswered <= 1:
        raise ValueError(f"max_unanswered is {command.max_unanswered}; it is a share, in 0..1")
    if isinstance(command, PromoteCommand) and (command.version is None) == (command.alias is None):
        raise ValueError("give either --version NUMBER or --alias ALIAS: the version to promote")


def run(command: Command) -> None:
    """Do what the command says, and show the result."""
    say(execute(command))


def execute(command: Command) -> str:
    """Do what the command says; the text to show."""
    # Here, and each with what it needs: --help takes no MLflow, and only to measure a parity takes torch and Ray.
    from pipelines.registry import aliases, promotion, tables
    from pipelines.registry.versions import Registry
    from pipelines.tracking.server import require_tracking

    require_tracking(command.tracking.uri)
    registry = Registry(command.tracking.uri, command.tracking.registered_model)
    match command:
        case ListCommand():
            return tables.show_versions(registry)
        case CompareCommand():
            return tables.compare(registry, command.versions, command.suite, command.output)
        case PromoteCommand():
            version = (
                registry.resolve(str(command.version)) if command.alias is None else registry.target(command.alias)
            )
            move = promotion.promote(registry, version, command.to, command.parity_tolerance, command.max_unanswered)
            return tables.show_move(registry, move)
        case RollbackCommand():
            return tables.show_move(registry, aliases.roll_back(registry, command.alias))
        case ParityCommand():
            from pipelines.registry.variants import measure_parity

            parity = measure_parity(registry, registry.resolve(str(command.version)), command.parity_tolerance)
            difference = f"largest difference of a logit {parity.difference:.3g} in {parity.precision}"
            return f"version {command.version} of {registry.name}: {difference}"


JOB = Job("register", Command, run, __doc__, check=check)

if __name__ == "__main__":
    sys.exit(JOB.main())
