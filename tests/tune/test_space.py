"""The space: whatever is chosen, on whatever model, the configuration is valid."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, get_args

import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.trial import FixedTrial

from meteor_model.architectures import build_config
from meteor_model.configuration_meteor import DecodePruning, EncodePruning, FusePruning, MeteorConfig, PruningConfig
from meteor_model.encoders import encoder_class
from meteor_model.pruners.spectra import RANK_ESTIMATORS
from meteor_model.towers import towers_of
from tune.defaults import TARGET_SHARE, paper_line
from tune.space import DecodeBy, Ranks, Space, SpaceError, ranks_of_config, ranks_of_report

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DENSE = PruningConfig(EncodePruning(enabled=False), FusePruning(enabled=False), DecodePruning(enabled=False))
PRUNINGS = {
    "tiny": PruningConfig(EncodePruning(totals=(96, 64, 64)), FusePruning(keep=32), DecodePruning(target_mean=16.0)),
    "small": PruningConfig(
        EncodePruning(totals=(400, 280, 192)), FusePruning(keep=96), DecodePruning(target_mean=48.0)
    ),
    "meteor_x4_7b": PruningConfig(
        EncodePruning(totals=(2600, 1300, 1193)), FusePruning(keep=576), DecodePruning(target_mean=242.0)
    ),
    "eagle_x5_7b": DENSE,
}


@cache
def model_config(name: str, dense: bool = False) -> MeteorConfig:
    return build_config(name, DENSE if dense else PRUNINGS[name], 512, IDS, 3)


class Drawn:
    """Choices that hypothesis makes, with the ends of every range among them."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.names: list[str] = []

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        self.names.append(name)
        return self.data.draw(st.floats(low, high), label=name)

    def suggest_int(self, name: str, low: int, high: int) -> int:
        self.names.append(name)
        return self.data.draw(st.integers(low, high), label=name)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        self.names.append(name)
        return self.data.draw(st.sampled_from(list(choices)), label=name)


@st.composite
def ranks_for(draw: st.DrawFn, config: MeteorConfig, segments: int) -> Ranks:
    estimators = draw(st.lists(st.sampled_from(sorted(RANK_ESTIMATORS)), unique=True))
    rank = st.floats(1e-3, 4096.0)
    boundaries = draw(st.sampled_from([1, segments]))
    return {
        estimator: {e.name: draw(st.lists(rank, min_size=boundaries, max_size=boundaries)) for e in config.encoders}
        for estimator in estimators
    }


@pytest.mark.parametrize(
    ("name", "dense"),
    [("tiny", False), ("tiny", True), ("small", False), ("meteor_x4_7b", False), ("eagle_x5_7b", True)],
)
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_choice_is_a_valid_configuration(name: str, dense: bool, data: st.DataObject) -> None:
    """MeteorConfig itself raises where anything contradicts; what it does not know of is looked at here."""
    base = model_config(name, dense)
    decode_by: DecodeBy = data.draw(st.sampled_from(get_args(DecodeBy)))
    ranks = data.draw(ranks_for(base, len(base.pruning.encode.totals) or 3))
    all_knobs = [[]] if name == "eagle_x5_7b" else [[], ["keep"], ["side"], ["keep", "side"]]
    space = Space(base, ranks, decode_by, knobs=data.draw(st.sampled_from(all_knobs)))
    chooser = Drawn(data)
    config = space.sample(chooser)
    pruning = config.pruning
    assert len(set(chooser.names)) == len(chooser.names), "a choice is made once"
    if pruning.decode.enabled and decode_by == "target":
        assert pruning.decode.target_mean is not None
        assert pruning.decode.lam is None, "a lambda of another configuration would be wrong"
        assert pruning.decode.target_mean <= config.tokens_per_image
    if pruning.encode.enabled and ranks:
        kept, last = towers_of(config), len(pruning.encode.totals)
        assert config.ranks == {
            k: list(v)[-last:] for k, v in ranks[pruning.encode.rank_estimator].items() if k in kept
        }
    if not pruning.decode.enabled:
        assert not any(n.startswith("decode.") and n != "decode.enabled" for n in chooser.names), "conditional"
    assert MeteorConfig(**config.to_dict()).pruning == pruning, "it survives being stored"


def test_towers_may_go_and_see_smaller_images(monkeypatch: pytest.MonkeyPatch) -> None:
    base = model_config("tiny")
    ranks = {"effective": {e.name: [3.0] if e.name == "convnext" else [3.0, 2.0, 1.0] for e in base.encoders}}
    space = Space(base, ranks, knobs=("keep", "side"))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = [towers_of(space.sample(study.ask())) for _ in range(60)]
    assert {tuple(towers) for towers in seen} == {
        kept for count in (1, 2, 3) for kept in itertools.combinations(("clip", "pix2struct", "convnext"), count)
    }, "every choice of towers but none of them"
    assert {towers["pix2struct"] for towers in seen if "pix2struct" in towers} == {32, 40, 48, 56, 64}
    first = paper_line(space)[0]
    assert space.towers_of(space.sample(FixedTrial(first))) is None
    plain = Space(base, ranks)
    assert space.sample(FixedTrial(first)).to_dict() == plain.sample(FixedTrial(paper_line(plain)[0])).to_dict()
    monkeypatch.setattr(encoder_class("clip"), "any_size", False)
    assert "towers.clip.cells" in first
    assert "towers.clip.cells" not in space.all_towers, "its weights are of one size now"
    with pytest.raises(SpaceError, match="joined on the channels"):
        Space(model_config("eagle_x5_7b", dense=True), {}, knobs=("keep",))


def test_choices_cover_what_the_paper_sets_by_hand() -> None:
    base = model_config("tiny")
    ranks = {estimator: {e.name: [3.0, 2.0, 1.0] for e in base.encoders} for estimator in RANK_ESTIMATORS}
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    space = Space(base, ranks)
    seen = [space.sample(study.ask()).pruning for _ in range(60)]
    assert {p.encode.rank_estimator for p in seen} == set(RANK_ESTIMATORS)
    assert {p.decode.enabled for p in seen} == {True, False}
    assert {p.decode.query for p in seen if p.decode.enabled} == {"last", "all_text"}
    assert {p.decode.layer for p in seen if p.decode.enabled} == {1, 2}
    assert {p.decode.num_heads for p in seen if p.decode.enabled} == {1, 2, 3, 4}
    assert len({p.encode.totals for p in seen}) > 50
    assert len({p.fuse.keep for p in seen}) > 10
    assert min(p.encode.rank_exponent for p in seen) < 0 < 1 < max(p.encode.rank_exponent for p in seen)


def test_criteria_are_searched_where_their_stage_is_on_and_the_paper_s_come_first() -> None:
    base = model_config("tiny")
    criteria = {"encode": ("random",), "fuse": ("mutual_redundancy", "divprune"), "decode": ("all_heads", "top_heads")}
    space = Space(base, {}, criteria=criteria)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = [space.sample(study.ask()).pruning for _ in range(30)]
    assert {p.encode.criterion for p in seen} == {"random"}
    assert {p.fuse.criterion for p in seen} == {"mutual_redundancy", "divprune"}
    assert {p.decode.criterion for p in seen if p.decode.enabled} == {"all_heads", "top_heads"}
    begin = paper_line(space)[0]
    assert begin["fuse.criterion"] == "mutual_redundancy"
    assert begin["decode.criterion"] == "top_heads"
    assert "encode.criterion" not in begin, "there is one"


@pytest.mark.parametrize(
    ("stage", "name", "model", "message"),
    [
        ("fuse", "divprun", "tiny", "pruning.fuse.criterion 'divprun' is unknown"),
        ("fuse", "scope", "tiny", "'scope' needs all tokens of the towers"),
        ("decode", "feather", "tiny", "'feather' needs all tokens of the towers"),
        ("fuse", "mutual_redundancy", "eagle_x5_7b", "'mutual_redundancy' compares encoders"),
    ],
)
def test_criteria_that_no_configuration_takes_are_refused(stage: str, name: str, model: str, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        Space(model_config(model, dense=model != "tiny"), {}, criteria={stage: (name,)})


@pytest.mark.parametrize("name", ["tiny", "small", "meteor_x4_7b", "eagle_x5_7b"])
def test_a_search_begins_with_the_papers_settings_at_falling_budgets(name: str) -> None:
    base = model_config(name, dense=name == "eagle_x5_7b")
    ranks = {e.name: [3.0, 2.0, 1.0] for e in base.encoders}
    own = base if name == "eagle_x5_7b" else MeteorConfig(**{**base.to_dict(), "ranks": ranks})
    space = Space(own, ranks_of_config(own))
    line = [space.sample(FixedTrial(choices)).pruning for choices in paper_line(space)]
    paper, decode = line[0], own.pruning.decode
    if own.ranks:
        assert (paper.encode, paper.fuse) == (own.pruning.encode, own.pruning.fuse)
        assert paper.decode.target_mean == pytest.approx(decode.target_mean)
        sizes = [(*p.encode.totals, p.fuse.keep, p.decode.target_mean or 0) for p in line]
    else:
        sizes = [(p.decode.target_mean or 0,) for p in line]
        assert sizes[0][0] == pytest.approx(TARGET_SHARE * own.tokens_per_image)
    assert {(p.decode.layer, p.decode.query, p.decode.num_heads) for p in line} == {
        (min(2, own.text_config.num_hidden_layers // 2), "last", own.decode_heads)
    }
    for larger, smaller in itertools.pairwise(sizes):
        assert all(a >= b for a, b in zip(larger, smaller, strict=True))
        assert larger[-1] > smaller[-1]
    assert len(line) >= 5
    assert paper_line(replace(space, decode_by="lambda")) == []


def test_without_ranks_estimators_and_exponents_are_not_searched() -> None:
    study = optuna.create_study()
    trial = study.ask()
    Space(model_config("tiny"), {}).sample(trial)
    assert not [name for name in trial.params if "rank" in name]


def test_ranks_come_from_a_report_or_from_the_model() -> None:
    report = {"ranks": {"energy": {"clip": [{"mean": 3.0, "std": 1.0}, {"mean": 2.0, "std": 0.1}]}}}
    assert ranks_of_report(report) == {"energy": {"clip": [3.0, 2.0]}}
    with pytest.raises(SpaceError, match="calibrate the model anew"):
        ranks_of_report({"images": 3})
    base = model_config("tiny")
    assert ranks_of_config(base) == {}
    ranked = MeteorConfig(**{**base.to_dict(), "ranks": {e.name: [1.0, 2.0, 3.0] for e in base.encoders}})
    assert ranks_of_config(ranked) == {"effective": {e.name: [1.0, 2.0, 3.0] for e in base.encoders}}


def test_what_leaves_nothing_to_choose_is_refused() -> None:
    base = model_config("tiny")
    names = [e.name for e in base.encoders]
    with pytest.raises(SpaceError, match="ranks are of encoders"):
        Space(base, {"energy": {"clip": [1.0]}})
    with pytest.raises(SpaceError, match="a map of rank 0"):
        Space(base, {"energy": {name: [0.0] for name in names}})
    with pytest.raises(SpaceError, match="for 2 boundaries, the model's stage 1 has 3"):
        Space(base, {"energy": {name: [1.0, 2.0] for name in names}})
    one_layer = MeteorConfig(
        **{
            **model_config("eagle_x5_7b").to_dict(),
            "text_config": {**model_config("eagle_x5_7b").text_config.to_dict(), "num_hidden_layers": 1},
        }
    )
    with pytest.raises(SpaceError, match="1024 visual tokens enter the LLM whatever is chosen"):
        Space(one_layer, {})
