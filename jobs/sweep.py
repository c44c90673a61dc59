"""Search the pruning of a registered model: `ray job submit -- python jobs/sweep.py --budgets 64 128 256`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ray
import tyro

from jobs.recipes import RECIPES, recipe
from pipelines.recovery.failures import TrainingError
from pipelines.tracking.redact import hide_passwords
from tune.settings import SweepSettings
from tune.sweep import run_sweep

DESCRIPTION = "Search the best pruning of a registered model within budgets, or its front of score against cost."


def parse(arguments: Sequence[str]) -> SweepSettings:
    """The sweep that a command line asks for. Prints what is wrong and exits with 2."""
    front = argparse.ArgumentParser(add_help=False)
    front.add_argument("--train-recipe", default="tiny")
    chosen, rest = front.parse_known_args(arguments)
    names = ", ".join(sorted(RECIPES["finetune"]))
    try:
        train = recipe("finetune", chosen.train_recipe)
        return tyro.cli(
            SweepSettings,
            # Neither budgets nor a front is chosen yet: the defaults must not look like a choice.
            default=SweepSettings(pareto=True, train=train),
            args=_with_mode(rest),
            prog="python jobs/sweep.py",
            description=f"{DESCRIPTION}\n\n--train-recipe NAME chooses the defaults of --train ({names}).",
            config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _with_mode(arguments: list[str]) -> list[str]:
    """`--pareto` alone is True; without it there is no front."""
    given = list(arguments)
    if "--pareto" in given:
        place = given.index("--pareto") + 1
        if place == len(given) or given[place].startswith("-"):
            given.insert(place, "True")
    else:
        given += ["--pareto", "False"]
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed with a message, 2 wrong arguments."""
    settings = parse(list(sys.argv[1:] if arguments is None else arguments))
    ray.init(ignore_reinit_error=True, logging_level="WARNING")
    try:
        run_sweep(settings)
    except (ValueError, TrainingError) as error:
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
        return 1
    print(f"  MLflow  {hide_passwords(settings.tracking.uri)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
