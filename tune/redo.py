"""Make the decision of a sweep again from its records: `python -m tune.redo benchmarks/results/sweep.json`.

Every interval, p-value and choice comes from the numbers of the questions that the file holds. The exit status is 1
where one of them is not the file's. With `--write` they take the place of the file's, as after a change of a method:
its intervals too, and the picture and the table of the finalists beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.evaluation.intervals import level
from pipelines.io.console import say
from tune.choice import Answers, nearest_to_front
from tune.figures import draw_finalists
from tune.results import decide, table
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


def rewrite(result: dict[str, Any], path: Path) -> None:
    """Put the decision and all intervals that its records give into a sweep's file, and draw its finalists anew."""
    result["decision"] = decision = json.loads(json.dumps(redo(result)))
    for phase in result["records"].values():
        for trial in result["trials"]:
            if (held := phase["trials"].get(trial["trial"])) is not None:
                trial["answer_nll_interval"] = asdict(level(np.array(held["nll"]), phase["groups"]))
    path.write_text(json.dumps(result, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    final = result["records"][FINAL]["trials"]
    names, cost = {name: trial["of"] for name, trial in final.items()}, result["settings"]["cost"]
    draw_finalists(answers_of(result["records"][FINAL]), decision, names, cost, path.with_name("sweep-finalists.png"))
    rows = [trial for trial in result["trials"] if trial["trial"] in final]
    path.with_name("sweep-finalists.md").write_text(table(rows, decision) + "\n")


def main(arguments: list[str]) -> int:
    """Say the decision, and whether it is the file's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="sweep.json")
    parser.add_argument("--write", action="store_true", help="replace the file's decision by what its records give")
    given = parser.parse_args(arguments)
    result = json.loads(given.result.read_text())
    if given.write:
        rewrite(result, given.result)
    decision = json.loads(json.dumps(redo(result)))
    say(decision["text"])
    same = decision == result["decision"]
    say("equal to the stored decision" if same else "NOT the stored decision")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
