"""The surrogate knows what it was made of, and the rules choose what was planted."""

from __future__ import annotations

import json

import numpy as np

from benchmarks.search import MARGIN, TABLE, WAYS, Regression, Surrogate, chosen, searched, space
from tune.defaults import paper_line


def test_the_surrogate_is_near_what_it_was_made_of() -> None:
    surrogate = Surrogate.load(TABLE)
    trials = json.loads(TABLE.read_text())["trials"]
    told = np.array([surrogate.truth(trial["choices"]) for trial in trials])
    measured = np.array([(trial["tflops"], trial["nll"]) for trial in trials])
    assert np.corrcoef(told[:, 0], measured[:, 0])[0, 1] > 0.95
    assert np.corrcoef(told[:, 1], measured[:, 1])[0, 1] > 0.8
    costs = [surrogate.truth(choices)[0] for choices in paper_line(space())]
    assert costs[0] > costs[-1]


def test_a_point_that_is_left_out_is_missed_as_the_closed_form_says() -> None:
    random = np.random.default_rng(0)
    points = random.normal(size=(20, 2))
    values = points[:, 0] + 0.1 * random.normal(size=20)
    whole = Regression.fit(points, values)
    assert whole.error < values.std()
    assert abs(whole.at(points[3]) - values[3]) < 3 * whole.error


def test_every_way_begins_with_the_papers_settings_or_knows_them() -> None:
    surrogate = Surrogate.load(TABLE)
    for way in WAYS[:3]:
        tried = searched(way, surrogate, seed=0)
        assert tried[0] == paper_line(space())[0]
        assert len(tried) == way.trials + (not way.line)


def test_a_planted_saving_is_found_and_a_planted_loss_is_not_taken() -> None:
    paper, equal, worse = (1.0, 0.5), (0.4, 0.49), (0.2, 0.5 + 4 * MARGIN)
    assert chosen([paper, equal, worse], seed=0)["final"] == 1
    assert chosen([paper, worse], seed=0)["final"] == 0
