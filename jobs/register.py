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
from pipelines.evaluation.scores import MARGINS, Measure
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
    margin_nll: float = MARGINS["answer_nll"]
    """Nats per token that the second may lose and is still called non-inferior."""
    margin_accuracy: float = MARGINS["accuracy"]
    """Share of right answers that the second may lose and is still called non-inferior."""
    tracking: RegistryAddress = field(default_factory=RegistryAddress)
    """MLflow."""


@dataclass(frozen=True)
class PromoteCommand:
    """Let an alias point to a version that has its parity and a score, and is no worse than the one before.

    The score is on the final part of a split; it is compared question by question, at a margin stated beforehand.
    """

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
    least_questions: int = 256
    """Fewest questions of a suite that counts as evidence."""
    measure: Measure = "answer_nll"
    """What is compared with the version that the alias points to: likelihood of the expected answers, or right ones."""
    margin: float | None = None
    """Loss of the measure that is accepted; None takes 0.02 (nats per token, or share of right answers)."""
    force: str = ""
    """A reason to promote although evidence is missing; who, when and why stay in the version's tags."""
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
            _check_margins(margin=command.margin)
        case CompareCommand():
            _check_margins(margin_nll=command.margin_nll, margin_accuracy=command.margin_accuracy)
        case RollbackCommand():
            require_alias(command.alias)
    if isinstance(command, PromoteCommand) and not 0 <= command.max_unanswered <= 1:
        raise ValueError(f"max_unanswered is {command.max_unanswered}; it is a share, in 0..1")
    if isinstance(command, PromoteCommand) and (command.version is None) == (command.alias is None):
        raise ValueError("give either --version NUMBER or --alias ALIAS: the version to promote")


def _check_margins(**margins: float | None) -> None:
    for name, margin in margins.items():
        if margin is not None and not margin > 0:
            raise ValueError(f"{name} is {margin}; it must be positive: what may be lost is stated beforehand")


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
            margins: dict[Measure, float] = {"answer_nll": command.margin_nll, "accuracy": command.margin_accuracy}
            return tables.compare(registry, command.versions, command.suite, command.output, margins)
        case PromoteCommand():
            version = (
                registry.resolve(str(command.version)) if command.alias is None else registry.target(command.alias)
            )
            terms = promotion.Terms(
                command.parity_tolerance,
                command.max_unanswered,
                command.least_questions,
                command.measure,
                command.margin,
            )
            return tables.show_promotion(
                registry, promotion.promote(registry, version, command.to, terms, command.force)
            )
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
