"""Samplers, starts and rules of a search, compared over many seeds in a minute, on a surrogate of a real sweep.

1. table      the completed trials of a stored sweep of `tiny` (`results/search-table.json`): choices, NLL, TFLOPs
2. surrogate  kernel regression of NLL and of log TFLOPs on the choices, its scales by leaving one out
3. sweeps     for each way of searching and each seed: the trials, with noise in their NLL as questions make it; then
              the rule that chooses, as `tune` has it
4. said       TFLOPs saved by the choice, its true NLL against the paper's settings, how often the choice is wrong

The truth is the surrogate's, so all that is compared is how well a way finds and chooses in one and the same landscape.
The noise is assumed: differences of two settings vary by NOISE nats from question to question, independently.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results_file import RESULTS, hardware, write_results
from meteor_model.architectures import build_config
from meteor_model.configuration_meteor import DecodePruning, EncodePruning, FusePruning, MeteorConfig, PruningConfig
from pipelines.evaluation.scores import MARGINS
from tune.choice import Answers, cheapest, judged, nearest_to_front
from tune.defaults import paper_line
from tune.pareto import Point, hypervolume
from tune.settings import Sampler
from tune.space import Space
from tune.study import new_study

TABLE = RESULTS / "search-table.json"
NOISE = 0.3
"""Standard deviation over questions of the difference of two settings' NLL: 0.02 for a mean of 256."""
QUESTIONS, FINAL, FINALISTS, TRIALS = 256, 1024, 6, 24
MARGIN = MARGINS["answer_nll"]
PAPER = PruningConfig(
    EncodePruning(totals=(96, 64, 64)), FusePruning(keep=32), DecodePruning(layer=2, target_mean=16.0)
)


# ------------------------------------------------------------------------------------------------------------ surrogate


def features(choices: Mapping[str, Any]) -> np.ndarray:
    """A setting as numbers: tokens after every stage as logarithms of shares, and the rest scaled to about 1."""
    on = bool(choices["decode.enabled"])
    shares = [np.log(choices[f"encode.share.{boundary}"]) for boundary in range(3)]
    fused = np.log(choices["fuse.share"])
    stage3 = np.log(choices["decode.target_share"]) if on else 0.0
    return np.array(
        [
            *np.cumsum([*shares, fused, stage3]),
            choices["encode.rank_exponent"] / 2,
            choices["encode.rank_estimator"] == "effective",
            choices["encode.rank_estimator"] == "numerical",
            on,
            choices["decode.layer"] / 2 if on else 0.0,
            choices["decode.num_heads"] / 4 if on else 0.0,
            choices["decode.query"] == "last" if on else 0.5,
        ],
        dtype=np.float64,
    )


@dataclass(frozen=True)
class Regression:
    """Kernel ridge regression with a Gaussian kernel (C. Saunders et al., ICML 1998).

    Attributes:
        points: [n, f] that it was made from.
        weights: [n].
        mean: of the values.
        scale: of the kernel, in the unit of the features.
        error: root mean square of what each point is missed by when it is left out.
    """

    points: np.ndarray
    weights: np.ndarray
    mean: float
    scale: float
    error: float

    @classmethod
    def fit(cls, points: np.ndarray, values: np.ndarray) -> Regression:
        """The scale and the ridge with the least error of leaving one out, in closed form."""
        best: Regression | None = None
        centred = values - values.mean()
        for scale in (0.5, 1.0, 2.0, 4.0):
            kernel = _kernel(points, points, scale)
            for ridge in (1e-3, 1e-2, 1e-1, 1.0):
                inverse = np.linalg.inv(kernel + ridge * np.eye(len(points)))
                weights = inverse @ centred
                error = float(np.sqrt(np.mean(np.square(weights / np.diag(inverse)))))
                if best is None or error < best.error:
                    best = cls(points, weights, float(values.mean()), scale, error)
        assert best is not None
        return best

    def at(self, point: np.ndarray) -> float:
        """The value at a point."""
        return self.mean + float((_kernel(point[None], self.points, self.scale) @ self.weights)[0])


def _kernel(first: np.ndarray, second: np.ndarray, scale: float) -> np.ndarray:
    distances = np.square(first[:, None, :] - second[None, :, :]).sum(axis=-1)
    return np.exp(-distances / (2 * scale**2))


@dataclass(frozen=True)
class Surrogate:
    """NLL and cost of any setting."""

    nll: Regression
    cost: Regression

    @classmethod
    def load(cls, path: Path) -> Surrogate:
        """From a table of trials."""
        trials = json.loads(path.read_text())["trials"]
        points = np.stack([features(trial["choices"]) for trial in trials])
        nll = Regression.fit(points, np.array([trial["nll"] for trial in trials]))
        return cls(nll, Regression.fit(points, np.log([trial["tflops"] for trial in trials])))

    def truth(self, choices: Mapping[str, Any]) -> tuple[float, float]:
        """Cost in TFLOPs and NLL."""
        point = features(choices)
        return float(np.exp(self.cost.at(point))), self.nll.at(point)


# --------------------------------------------------------------------------------------------------------------- sweeps


@dataclass(frozen=True)
class Way:
    """A way of searching: its sampler, whether it begins with the paper's settings at falling budgets, its trials."""

    name: str
    sampler: Sampler
    line: bool
    trials: int = TRIALS


WAYS = (
    Way("the line alone", "random", True, 6),
    Way("random", "random", False),
    Way("random from the line", "random", True),
    Way("TPE", "tpe", False),
    Way("TPE from the line", "tpe", True),
    Way("NSGA-II from the line", "nsga2", True),
)


@functools.cache
def space() -> Space:
    """That of `tiny`, with ranks by every estimator."""
    config = build_config("tiny", PAPER, 512, {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, 3)
    ranks = {name: [3.0, 2.0, 1.0] for name in (item.name for item in config.encoders)}
    own = MeteorConfig(**{**config.to_dict(), "ranks": ranks})
    return Space(own, dict.fromkeys(("effective", "energy", "numerical"), ranks))


def searched(way: Way, surrogate: Surrogate, seed: int) -> list[dict[str, Any]]:
    """The settings that a way tries, the paper's first; it learns from noisy NLLs."""
    random = np.random.default_rng(seed)
    line = paper_line(space())
    begin = line if way.line else []
    study = new_study(way.sampler, way.trials, seed)
    tried: list[dict[str, Any]] = [dict(line[0])] if not way.line else []
    for number in range(way.trials):
        if number < len(begin):
            study.enqueue_trial(begin[number])
        trial = study.ask()
        space().sample(trial)
        cost, nll = surrogate.truth(trial.params)
        study.tell(trial, [-(nll + random.normal(0, NOISE / np.sqrt(QUESTIONS))), cost])
        tried.append(dict(trial.params))
    return tried


def asked(truths: Sequence[tuple[float, float]], questions: int, random: np.random.Generator) -> list[Answers]:
    """Settings with an NLL for each question."""
    found = []
    for number, (cost, nll) in enumerate(truths):
        noise = random.normal(0, NOISE / np.sqrt(2), size=questions)  # of a difference: NOISE
        found.append(Answers(str(number), cost, cost, tuple(nll + noise)))
    return found


def chosen(truths: Sequence[tuple[float, float]], seed: int) -> dict[str, int]:
    """Place of the choice among the settings tried, by each rule; the paper's settings are the first.

    as before: the cheapest whose mean on the search questions is within the margin of the paper's. final: finalists on
    the final questions, the cheapest that is no worse after Holm.
    """
    random = np.random.default_rng(10_000 + seed)
    groups = [str(number) for number in range(QUESTIONS)]
    trials = asked(truths, QUESTIONS, random)
    fitting = [place for place, one in enumerate(trials) if one.mean <= trials[0].mean + MARGIN]
    naive = min(fitting, key=lambda place: trials[place].cost)
    nearest = nearest_to_front(trials, trials[0], groups, FINALISTS, MARGIN)
    places = [0, *(int(one.id) for one in nearest)]
    final = asked([truths[place] for place in places], FINAL, random)
    found = cheapest(judged(final, final[0], [str(number) for number in range(FINAL)], MARGIN))
    return {"as before": naive, "final": 0 if found is None else places[int(found.id)]}


def compare(surrogate: Surrogate, seeds: int) -> list[dict[str, Any]]:
    """Every way over all seeds, with both rules."""
    paper = surrogate.truth(paper_line(space())[0])
    dearest = float(np.exp(max(surrogate.cost.at(point) for point in surrogate.cost.points)))
    rows = []
    for way in WAYS:
        begun = time.perf_counter()
        tried = [[surrogate.truth(choices) for choices in searched(way, surrogate, seed)] for seed in range(seeds)]
        seconds = time.perf_counter() - begun
        places = [chosen(truths, seed) for seed, truths in enumerate(tried)]
        corner = (dearest, -(paper[1] + MARGIN))
        areas = [hypervolume([Point("", cost, -nll) for cost, nll in truths], corner) for truths in tried]
        possible = [_best_possible(truths, paper) for truths in tried]
        row = {
            "way": way.name,
            "trials": way.trials,
            "possible_saving": _spread(possible),
            "hypervolume": _spread([area / (dearest * MARGIN) for area in areas]),
            "search_s_each": round(seconds / seeds, 2),
        }
        for rule in ("as before", "final"):
            picked = [truths[place[rule]] for truths, place in zip(tried, places, strict=True)]
            row[rule] = {
                "saving": _spread([1 - cost / paper[0] for cost, _ in picked]),
                "nll_against_paper": _spread([nll - paper[1] for _, nll in picked]),
                "worse_than_the_margin": float(np.mean([nll > paper[1] + MARGIN for _, nll in picked])),
            }
        rows.append(row)
    return rows


def _best_possible(truths: Sequence[tuple[float, float]], paper: tuple[float, float]) -> float:
    """Share of the paper's cost that the cheapest setting tried saves whose true NLL is within the margin."""
    return max(1 - cost / paper[0] for cost, nll in [*truths, paper] if nll <= paper[1] + MARGIN)


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "mean": round(float(np.mean(values)), 4),
        "std": round(float(np.std(values, ddof=1)), 4),
        "least": round(float(np.min(values)), 4),
    }


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The comparison for people."""
    lines = [
        f"{'way':<32}{'trials':>7}{'could save':>12}{'saves: before':>15}{'wrong':>7}{'saves: final':>14}{'wrong':>7}"
    ]
    for row in rows:
        before, final = row["as before"], row["final"]
        lines.append(
            f"{row['way']:<32}{row['trials']:>7}{row['possible_saving']['mean']:>12.1%}{before['saving']['mean']:>15.1%}"
            f"{before['worse_than_the_margin']:>7.0%}{final['saving']['mean']:>14.1%}"
            f"{final['worse_than_the_margin']:>7.0%}"
        )
    return "\n".join(lines)


def main() -> None:
    """Compare, say, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="sweeps of each way")
    parser.add_argument("--output", type=Path, default=RESULTS / "search.json", help="JSON file")
    options = parser.parse_args()
    surrogate = Surrogate.load(TABLE)
    rows = compare(surrogate, options.seeds)
    print(text(rows))
    found = {
        "seeds": options.seeds,
        "assumed": {"noise": NOISE, "margin": MARGIN, "questions": QUESTIONS, "final_questions": FINAL},
        "surrogate": {
            "trials": len(surrogate.nll.points),
            "nll_error_left_out": round(surrogate.nll.error, 4),
            "log_cost_error_left_out": round(surrogate.cost.error, 4),
        },
        "ways": rows,
        "hardware": hardware(),
    }
    write_results(options.output, found)


if __name__ == "__main__":
    main()
