"""Make the decision of a sweep again from its records: `python -m tune.redo benchmarks/results/sweep.json`.

Every interval, p-value and choice comes from the numbers of the questions that the file holds. The exit status is 1
where one of them is not the file's.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pipelines.io.console import say
from tune.choice import Answers, nearest_to_front
from tune.results import decide
from tune.settings import FINAL, SEARCH


def answers_of(phase: dict[str, Any]) -> list[Answers]:
    """The trials of one phase of a sweep's records."""
    return [
        Answers(name, trial["cost"], trial["budgeted"], tuple(trial["nll"])) for name, trial in phase["trials"].items()
    ]


def redo(result: dict[str, Any]) -> dict[str, Any]:
    """The decision of a sweep's result, made again.

    Raises:
        ValueError: where its finalists are not those that its search says.
    """
    settings, records = result["settings"], result["records"]
    searched, final = records[SEARCH], records[FINAL]
    trials = {trial.id: trial for trial in answers_of(searched)}
    nearest = nearest_to_front(
        list(trials.values()), trials[result["paper"]], searched["groups"], settings["finalists"], settings["margin"]
    )
    asked = {trial["of"] for trial in final["trials"].values()}
    if missing := [trial.id for trial in nearest if trial.id not in asked]:
        raise ValueError(f"{', '.join(missing)} should have been finalists by the search's records, and were not")
    paper = next(name for name, trial in final["trials"].items() if trial["of"] == result["paper"])
    return decide(answers_of(final), final["groups"], paper, settings["budgets"], settings["margin"])


def main(arguments: list[str]) -> int:
    """Say the decision, and whether it is the file's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="sweep.json")
    result = json.loads(parser.parse_args(arguments).result.read_text())
    decision = json.loads(json.dumps(redo(result)))
    say(decision["text"])
    same = decision == result["decision"]
    say("equal to the stored decision" if same else "NOT the stored decision")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
