"""The formulas: the published 7B layout in numbers worked out by hand, and what must hold for any size."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.recipes import recipe
from meteor_model.flops import PassFlops
from pipelines.config.recipe import Recipe
from pipelines.config.settings import PARTS, LoraSettings, Part
from pipelines.sizing.estimate import estimate
from pipelines.sizing.inputs import Inputs
from pipelines.sizing.layout import Layout, Speeds
from pipelines.sizing.model_size import ModelSize, model_config, model_size
from pipelines.sizing.table import size_text, table, terms_text, time_text
from pipelines.sizing.terms import BESIDE, ONCE, PHASES, Estimate, Place, Resource
from pipelines.sizing.times import gathered_between_nodes
from pipelines.sizing.work import Work

GB = 1e9
DATA = 558_000
WORK = Work(PassFlops(17_760 * 10**9, 8_420 * 10**9, 8_300 * 10**9), 17e12, 0.0134e12, 12.6e12, 40)


@cache
def at_size(job: str = "pretrain", workers: int = 16) -> Recipe:
    made = recipe(job, "meteor_x4_7b")
    return replace(made, training=replace(made.training, workers=workers))


@pytest.fixture(scope="module")
def sizes() -> dict[str, ModelSize]:
    return {job: model_size(at_size(job)) for job in ("pretrain", "finetune")}


def on_two_nodes(job: str, sizes: dict[str, ModelSize]) -> Estimate:
    return estimate(at_size(job), Layout(2, 8.0, DATA), sizes[job], None, WORK)


def test_parameters_are_the_published_ones(sizes: dict[str, ModelSize]) -> None:
    size = sizes["pretrain"]
    published = {"clip": 0.30, "convnext": 0.84, "eva02": 0.30, "pix2struct": 0.51, "projector": 0.094, "llm": 6.74}
    assert {name: count / GB for name, count in size.modules.items()} == pytest.approx(published, rel=0.02)
    assert size.total == sum(size.modules.values()) == pytest.approx(8.80 * GB, rel=0.005)
    assert size.learning == size.parts["projector"]
    assert sizes["finetune"].learning == size.total
    assert size.largest == 32_000 * 4_096


def test_a_pretraining_of_seven_billion(sizes: dict[str, ModelSize]) -> None:
    found = on_two_nodes("pretrain", sizes)
    assert found.total("calibrate", "store", "up") == pytest.approx(35.2 * GB, rel=0.005)
    assert found.total("train", "node", "temp") == pytest.approx(35.2 * GB, rel=0.005), "one copy a node"
    assert found.total("train", "store", "down") == pytest.approx(70.4 * GB, rel=0.005)
    checkpoints = found.total("checkpoint", "store", "up")
    assert checkpoints == pytest.approx(22 * (18.5 - 17.4) * GB, rel=0.05), "21 and the last, without what is frozen"
    assert found.largest_object.amount == pytest.approx(2.0 * GB, rel=0.005)


def test_a_finetuning_of_seven_billion(sizes: dict[str, ModelSize]) -> None:
    found = on_two_nodes("finetune", sizes)
    steps = DATA // 128
    uploaded = found.total("checkpoint", "store", "up")
    assert uploaded == pytest.approx(-(-steps // 100) * 106 * GB, rel=0.01)
    gpu = {
        term.what: term.amount for one in found.uses if (one.phase, one.place) == ("train", "gpu") for term in one.terms
    }
    # 2 + 2 + 12 bytes for each of 8.8 G parameters, over 16 GPUs.
    shares = ("weights, its share", "gradients, its share", "optimizer, its share")
    assert [gpu[name] / GB for name in shares] == pytest.approx([1.1, 1.1, 6.6], rel=0.005)


def test_traffic_between_nodes(sizes: dict[str, ModelSize]) -> None:
    """The towers once, all behind them three times, in bf16; half of it is on the node already."""
    made = Inputs(at_size(), Layout(2, 8.0, DATA), sizes["pretrain"], None, None)
    parts = sizes["pretrain"].parts
    elements = parts["towers"] + 3 * (parts["projector"] + parts["llm"]) + parts["projector"]
    assert gathered_between_nodes(made) == pytest.approx(2 * elements * 2 / 2, rel=1e-9), "two micro-batches a step"
    assert gathered_between_nodes(replace(made, layout=Layout(1, 16.0, DATA))) == 0


def test_gathers_by_what_learns() -> None:
    size = ModelSize(dict.fromkeys(PARTS, 1), {}, 1, frozenset[Part]({"llm"}))
    assert size.gathers == {"towers": 1, "projector": 1, "llm": 2}


RESOURCES: tuple[tuple[Place, Resource], ...] = (
    *(("head", "ram"), ("head", "temp"), ("node", "ram"), ("node", "temp"), ("gpu", "gpu"), ("store", "up")),
    ("store", "down"),
)
PARAMETERS = st.integers(10**6, 10**11)


def a_size(towers: int, projector: int, llm: int, trained: frozenset[Part]) -> ModelSize:
    return ModelSize({"towers": towers, "projector": projector, "llm": llm}, {"all": 1}, llm, trained)


def all_of(found: Estimate) -> dict[tuple[str, Place, Resource], float]:
    return {(phase, *where): found.total(phase, *where) for phase in PHASES for where in RESOURCES}


TRAINED = st.sets(st.sampled_from(PARTS), min_size=1).map(frozenset[Part])


@settings(deadline=None)
@given(PARAMETERS, PARAMETERS, PARAMETERS, TRAINED, st.sampled_from(PARTS), st.integers(1, 10**9))
def test_more_parameters_take_no_less(
    towers: int, projector: int, llm: int, trained: frozenset[Part], part: Part, more: int
) -> None:
    size = a_size(towers, projector, llm, trained)
    larger = replace(size, parts={**size.parts, part: size.parts[part] + more})
    layout = Layout(2, 8.0, DATA)
    before, after = (all_of(estimate(at_size(), layout, one)) for one in (size, larger))
    assert all(after[place] >= amount for place, amount in before.items())


@settings(deadline=None)
@given(PARAMETERS, PARAMETERS, PARAMETERS, TRAINED, st.sampled_from([1, 2, 4, 8, 16]))
def test_more_gpus_hold_less_each(
    towers: int, projector: int, llm: int, trained: frozenset[Part], workers: int
) -> None:
    size = a_size(towers, projector, llm, trained)
    few, many = (
        estimate(at_size(workers=count), Layout(2, 8.0, DATA), size).total("train", "gpu", "gpu")
        for count in (workers, 2 * workers)
    )
    assert many <= few


@settings(deadline=None)
@given(PARAMETERS, PARAMETERS, PARAMETERS, TRAINED)
def test_a_peak_is_no_less_than_any_phase_and_training_goes_beside_its_checkpoints(
    towers: int, projector: int, llm: int, trained: frozenset[Part]
) -> None:
    found = estimate(at_size(), Layout(2, 8.0, DATA), a_size(towers, projector, llm, trained))
    for place, resource in RESOURCES[:5]:
        phase, peak = found.peak(place, resource)
        assert peak >= max(found.total(one, place, resource) for one in PHASES)
        together = [one for one in found.uses if one.phase in BESIDE and (one.place, one.resource) == (place, resource)]
        libraries = [term.amount for one in together for term in one.terms if term.formula == ONCE]
        beside = sum(one.total for one in together) - sum(libraries[1:])
        assert peak == pytest.approx(beside if phase == "train" else found.total(phase, place, resource))
        assert peak >= beside - 1


def test_offloading_moves_the_optimizer_to_the_host(sizes: dict[str, ModelSize]) -> None:
    layout, size = Layout(2, 8.0, DATA), sizes["finetune"]
    made = at_size("finetune")
    moved = replace(made, training=replace(made.training, zero3=replace(made.training.zero3, offload="optimizer")))
    before, after = (estimate(one, layout, size) for one in (made, moved))
    shares = 12 * size.learning / 16
    assert before.total("train", "gpu", "gpu") - after.total("train", "gpu", "gpu") == pytest.approx(shares)
    assert after.total("train", "node", "ram") - before.total("train", "node", "ram") == pytest.approx(
        8 * shares * 4 / 3
    )


def test_slower_things_take_longer(sizes: dict[str, ModelSize]) -> None:
    fast, slow = (
        estimate(at_size(), Layout(2, 8.0, DATA, speeds=speeds), sizes["pretrain"], None, WORK)
        for speeds in (Speeds(), Speeds(gpu_tflops=62.5, network_gbit=50.0, store_mb=250.0, cpu_gflops=39.5))
    )
    for one, other in zip(fast.uses, slow.uses, strict=True):
        factor = 2 if one.resource == "time" else 1
        assert other.total == pytest.approx(factor * one.total)


def test_a_line_a_phase(sizes: dict[str, ModelSize]) -> None:
    found = on_two_nodes("pretrain", sizes)
    lines = table(found).splitlines()
    assert [line.split()[0] for line in lines if line.split() and line.split()[0] in PHASES] == list(PHASES)
    assert any(line.startswith("largest object  2 GB") for line in lines)
    assert max(map(len, lines)) <= 160
    assert "  w (12 + 4)" not in terms_text(found)
    assert "12 L / W" in terms_text(found)
    assert found.to_dict()["peaks"]["gpu gpu"]["amount"] == found.peak("gpu", "gpu")[1]


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, ""),
        (12, "12 B"),
        (999, "999 B"),
        (999_600, "1 MB"),
        (35.21e9, "35.2 GB"),
        (999.4e9, "999 GB"),
        (1.5e12, "1.5 TB"),
    ],
)
def test_bytes_in_words(amount: float, text: str) -> None:
    assert size_text(amount) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, ""), (1.13, "1.1 s"), (119, "119 s"), (180, "3 min"), (9000, "2.5 h")]
)
def test_seconds_in_words(seconds: float, text: str) -> None:
    assert time_text(seconds) == text


def test_adapters_learn_in_place_of_the_language_model(sizes: dict[str, ModelSize]) -> None:
    made = at_size("finetune")
    adapted = replace(made, training=replace(made.training, lora=LoraSettings(rank=16)))
    size, plain = model_size(adapted), sizes["finetune"]
    width, inner, layers = 4096, 11008, 32  # four square layers and three to or from the inner width
    assert size.adapters == 16 * layers * (4 * (width + width) + 3 * (width + inner))
    assert size.total == plain.total + size.adapters
    assert size.learning == plain.parts["towers"] + plain.parts["projector"] + size.adapters


def test_a_pretrained_vocabulary_is_counted_and_a_trained_one_is_the_setting() -> None:
    assert model_config(recipe("pretrain", "meteor_x4_7b")).text_config.vocab_size == 32_000
    assert model_config(recipe("pretrain", "small")).text_config.vocab_size == 49_152
    assert model_config(recipe("pretrain", "tiny")).text_config.vocab_size == 512
