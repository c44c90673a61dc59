"""Registries, and configurations that name their criteria: new ones, stored ones, and those that contradict."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from meteor_model.configuration_meteor import DecodePruning, EncodePruning, FusePruning, MeteorConfig, PruningConfig
from meteor_model.pruners.builtin import DECODE_CRITERIA, ENCODE_BUDGETS, ENCODE_CRITERIA, FUSE_CRITERIA
from meteor_model.pruners.fuse_criteria import Pool
from meteor_model.pruners.registry import Registry
from meteor_model.pruning_config import LATER_SETTINGS
from tests.meteor_model.builders import DENSE, PRUNED, config, model, pixels
from tests.meteor_model.pruners.build import dense_model


@pytest.fixture
def own_criterion() -> Iterator[str]:
    """A user's: nine lines."""

    @FUSE_CRITERIA.register("test_norm")
    def longest(pool: Pool, *, power: float = 1.0) -> Tensor:
        """The tokens with the largest norm."""
        return pool.tokens_MNC.norm(dim=-1) ** power

    yield "test_norm"
    FUSE_CRITERIA._entries.pop("test_norm")


@torch.no_grad()
def test_a_criterion_of_one_s_own_is_a_function_and_a_line(own_criterion: str) -> None:
    fuse = FusePruning(keep=5, criterion=own_criterion, options={"power": 2})
    net = model(replace(DENSE, fuse=fuse))
    pool_MNC = torch.cat(net._project(net._encode(pixels(2), None)[0]), dim=1)
    visual_MKC, stats = net.encode_images(pixels(2))
    best = [sorted(sorted(range(192), key=lambda i: -row[i])[:5]) for row in pool_MNC.norm(dim=-1).tolist()]
    assert stats.fuse.tolist() == best
    assert visual_MKC.shape == (2, 5, 128)
    assert MeteorConfig(**net.config.to_dict()).pruning.fuse == fuse


def test_a_registry_refuses_what_it_does_not_know() -> None:
    registry: Registry[Any] = Registry("where.criterion", text=False)
    registry.register("one")(lambda pool, *, weight=1.0: None)
    with pytest.raises(ValueError, match="registered already"):
        registry.register("one")
    with pytest.raises(ValueError, match=r"unknown keys \['txet'\]"):
        registry.register("two", txet=True)
    with pytest.raises(ValueError, match=r"where.criterion 'noe' is unknown; known: one; did you mean 'one'"):
        _ = registry["noe"]
    entry = registry["one"]
    assert (entry.defaults, entry.facts) == ({"weight": 1.0}, {"text": False})
    assert entry.checked("where.options", {"weight": 3}) == {"weight": 3.0}
    with pytest.raises(ValueError, match=r"where.options of criterion 'one' has unknown keys \['wieght'\]"):
        entry.checked("where.options", {"wieght": 3})
    with pytest.raises(ValueError, match=r"where.options.weight must be finite"):
        entry.checked("where.options", {"weight": "3"})


@pytest.mark.parametrize("registry", [ENCODE_CRITERIA, ENCODE_BUDGETS, FUSE_CRITERIA, DECODE_CRITERIA])
def test_every_entry_says_what_it_is_and_its_numbers_have_defaults(registry: Registry[Any]) -> None:
    for name in registry:
        assert registry[name].about.endswith((".", ":")), name
        assert all(isinstance(value, int | float) for value in registry[name].defaults.values())


def test_a_stored_configuration_without_names_is_what_it_was() -> None:
    """What the version before wrote, and what it meant."""
    stored = json.loads(json.dumps(asdict(PRUNED)))
    for stage in stored.values():
        for name in LATER_SETTINGS:
            stage.pop(name, None)
    assert PruningConfig.from_dict(stored) == PRUNED
    assert json.loads(json.dumps(PRUNED.as_stored())) == stored
    names = PRUNED.encode.criterion, PRUNED.encode.budget, PRUNED.fuse.criterion, PRUNED.decode.criterion
    assert (*names, PRUNED.decode.budget) == ("meteor", "rank", "mutual_redundancy", "top_heads", "attention_mass")


def test_what_is_not_at_its_default_is_stored() -> None:
    other = replace(PRUNED, fuse=replace(PRUNED.fuse, criterion="random", options={"seed": 3.0}))
    assert other.as_stored()["fuse"]["criterion"] == "random"
    assert PruningConfig.from_dict(json.loads(json.dumps(other.as_stored()))) == other


def fixed(**changes: Any) -> DecodePruning:
    return DecodePruning(**{"layer": 2, "target_mean": 4.0, "budget": "fixed", **changes})


CONTRADICTIONS: list[tuple[Any, str]] = [
    (lambda: EncodePruning(False, criterion="attentoin"), "pruning.encode.criterion 'attentoin' is unknown"),
    (lambda: EncodePruning(False, budget="ranks"), "pruning.encode.budget 'ranks' is unknown"),
    (lambda: FusePruning(criterion="x"), "pruning.fuse.criterion 'x' is unknown; known: mutual_redundancy"),
    (lambda: FusePruning(options={"seed": 1}), "pruning.fuse.options of criterion 'mutual_redundancy' has unknown"),
    (lambda: fixed(criterion="x"), "pruning.decode.criterion 'x' is unknown"),
    (lambda: fixed(budget="x"), "pruning.decode.budget 'x' is unknown"),
    (lambda: fixed(target_mean=None), "pruning.decode.budget 'fixed' needs pruning.decode.target_mean"),
    (lambda: fixed(later_layers=(3,)), "later_layers has 1 entries and pruning.decode.later_keep 0"),
    (lambda: fixed(later_layers=(2,), later_keep=(1,)), "must grow from pruning.decode.layer on"),
    (lambda: fixed(later_layers=(3, 4), later_keep=(1, 2)), "later_keep must not grow"),
    (lambda: fixed(later_layers=(3,), later_keep=(1,), equal_layers=True), "equal_layers goes with one pruning"),
    (lambda: fixed(later_layers="3"), "later_layers must be a list of whole numbers"),
    (
        lambda: config(replace(PRUNED, fuse=FusePruning(keep=24, criterion="scope"))),
        "'scope' ranks all tokens of the towers .*pruning.encode.enabled to false",
    ),
    (
        lambda: config(replace(DENSE, fuse=FusePruning(keep=4)), fusion="channel_concat", concat_grid=4),
        "'mutual_redundancy' compares the tokens of different encoders",
    ),
    (
        lambda: config(replace(DENSE, fuse=FusePruning(keep=24), decode=fixed(criterion="feather"))),
        "'feather' looks at rows and columns of whole grids",
    ),
    (
        lambda: config(replace(DENSE, decode=fixed(later_layers=(4,), later_keep=(1,)))),
        "pruning.decode.later_layers 4 must be below the LLM's 4 layers",
    ),
]


@pytest.mark.parametrize(("make", "message"), CONTRADICTIONS)
def test_contradictions_name_their_settings(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("criterion", [name for name in FUSE_CRITERIA if FUSE_CRITERIA[name].facts["joint"]])
@torch.no_grad()
def test_eagle_s_joint_map_is_pruned_by_every_criterion_that_can(criterion: str) -> None:
    net = model(DENSE)
    settings = replace(DENSE, fuse=FusePruning(keep=5, criterion=criterion))
    joint = type(net)(config(settings, fusion="channel_concat", concat_grid=4)).eval()
    visual_MKC, stats = joint.encode_images(pixels(2), text_MC=torch.ones(2, 128))
    assert visual_MKC.shape == (2, 5, 128)
    assert stats.fuse.shape == (2, 5)


@pytest.mark.parametrize("criterion", list(ENCODE_CRITERIA))
@torch.no_grad()
def test_every_criterion_of_stage_1_keeps_the_budgets(criterion: str) -> None:
    settings = replace(PRUNED, encode=replace(PRUNED.encode, criterion=criterion, budget="tokens"))
    net = model(settings)
    assert net.config.encode_budgets == {"clip": (48, 32, 15), "pix2struct": (48, 32, 15), "convnext": (30,)}
    _, stats = net.encode_images(pixels(2))
    for name, kept in stats.encode.items():
        assert tuple(item.shape[1] for item in kept) == net.config.encode_budgets[name]


def test_a_criterion_that_reads_the_prompt_says_where_there_is_none() -> None:
    net = model(replace(DENSE, fuse=FusePruning(keep=5, criterion="cdpruner")))
    with pytest.raises(ValueError, match="'cdpruner' looks at the text of the prompt"):
        net.encode_images(pixels(1))


def test_a_model_follows_a_configuration_of_its_own_modules_alone() -> None:
    net = dense_model()
    plain = {**net.config.to_dict(), "calibrated": None}
    plain["encoders"][0]["tower"]["hidden_size"] = 64
    with pytest.raises(ValueError, match="is built already and cannot become"):
        net.follow(MeteorConfig(**plain))
    with pytest.raises(ValueError, match="other encoders or another fusion"):
        net.follow(MeteorConfig(**{**plain, "encoders": plain["encoders"][:1]}))
