"""What does not fit a cluster is refused with both numbers and a setting to change; what may not is a warning."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from jobs.recipes import recipe
from meteor_model.flops import PassFlops
from pipelines.config.recipe import Recipe
from pipelines.config.settings import SettingsError
from pipelines.sizing import cluster, fit
from pipelines.sizing.activations import Activations
from pipelines.sizing.cluster import Node
from pipelines.sizing.estimate import estimate
from pipelines.sizing.fit import check_fit, findings, summary
from pipelines.sizing.layout import Layout
from pipelines.sizing.limits import VALIDATION_FLOOR_S, validation_limit_s
from pipelines.sizing.model_size import model_size
from pipelines.sizing.terms import Estimate, Place
from pipelines.sizing.work import Work

GB = 1e9
GPU: tuple[Place, ...] = ("gpu",)
LIVE = Activations(kept=8 * 10**9, forward=11 * 10**9, block=2 * 10**9, logits=6 * 10**9, no_grad=6 * 10**9)
WORK = Work(PassFlops(17_760 * 10**9, 8_420 * 10**9, 8_300 * 10**9), 17e12, 0.0134e12, 12.6e12, 40)


def node(name: str = "a", head: bool = True, **changes: Any) -> Node:
    large = Node(name, 64.0, 8.0, 512 * GB, "/tmp", 1000 * GB, 80 * GB, head)
    return replace(large, **changes)


LARGE = (node("a"), node("b", head=False))


@cache
def at_size(job: str = "pretrain", **training: Any) -> Recipe:
    made = recipe(job, "meteor_x4_7b")
    return replace(made, training=replace(made.training, **{"workers": 8, **training}))


@cache
def sized(job: str = "pretrain") -> Estimate:
    made = at_size(job)
    return estimate(made, Layout(2, 8.0, 558_000), model_size(made), LIVE, WORK)


def judged(made: Recipe, found: Estimate, nodes: Sequence[Node], level: str = "refused") -> list[str]:
    return [one.text for one in findings(made, found, nodes) if one.level == level]


def test_a_large_cluster_takes_it() -> None:
    assert list(findings(at_size(), sized(), LARGE)) == []
    assert "2 nodes: memory " in summary(sized(), LARGE)


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        (
            (node(ram=30 * GB), LARGE[1]),
            r"^a has 30 GB of memory, \w+ takes about [\d.]+ GB there: .*training\.workers",
        ),
        (
            (LARGE[0], node("b", False, temp_free=20 * GB)),
            r"^b has 20 GB free in /tmp, \w+ takes 3\d[\d.]* GB there: .*TMPDIR",
        ),
        (
            (LARGE[0], node("b", False, gpu_memory=16 * GB)),
            r"^a GPU of b has 16 GB, \w+ takes about 3\d[\d.]* GB: .*micro_batch",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_both_numbers(nodes: Sequence[Node], expected: str) -> None:
    (text,) = judged(at_size(), sized(), nodes)
    assert re.search(expected, text), text


def test_memory_within_the_uncertainty_is_doubted_and_not_refused() -> None:
    phase, need = sized().peak_of(("head", "node"), "ram")
    nodes = (node(ram=0.95 * need), LARGE[1])
    assert judged(at_size(), sized(), nodes) == []
    (text,) = judged(at_size(), sized(), nodes, "doubtful")
    assert f"{phase} takes about" in text


def test_what_only_the_longest_samples_take_is_doubted_and_not_refused() -> None:
    sure = sized().peak_of(GPU, "gpu", bounds=False)[1]
    made = replace(sized(), uses=tuple(one for one in sized().uses if one.phase == "train"))
    nodes = (node(gpu_memory=0.5 * made.peak("gpu", "gpu")[1]), LARGE[1])
    assert sure > made.peak_of(GPU, "gpu", bounds=False)[1]
    assert judged(at_size(), made, nodes) == []
    assert any("train takes about" in text for text in judged(at_size(), made, nodes, "doubtful"))


def test_workers_that_leave_no_cpu_for_the_data_would_wait_for_ever() -> None:
    made = recipe("pretrain", "tiny")
    found = estimate(made, Layout(), model_size(made))
    two = (node(cpus=2.0, gpus=0.0, gpu_memory=None),)
    (text,) = judged(made, found, two)
    assert text.startswith("the workers reserve 2 of the cluster's 2 CPUs, which leaves no data task its 0.5")
    assert judged(made, found, (replace(two[0], cpus=2.5),)) == []


def test_a_validation_needs_a_gpu_beside_those_of_the_workers_and_time() -> None:
    every_gpu = at_size(workers=16)
    (text,) = judged(every_gpu, sized(), LARGE, "doubtful")
    assert "a validation wants 1 GPU beside those of 16 workers, the cluster has 16 in all" in text
    on_cpu = at_size(workers=16, validation_gpus=0.0)
    found = estimate(on_cpu, Layout(2, 8.0, 558_000), model_size(on_cpu), LIVE, WORK)
    (text,) = judged(on_cpu, found, LARGE, "doubtful")
    assert "a validation takes about " in text
    assert "training.validate_every_checkpoints" in text


def test_a_model_of_any_size_has_time_for_its_validation() -> None:
    tiny, large = recipe("pretrain", "tiny"), at_size()
    assert VALIDATION_FLOOR_S < validation_limit_s(tiny) < 1.1 * VALIDATION_FLOOR_S
    on_gpu = validation_limit_s(large)
    assert VALIDATION_FLOOR_S + 3600 < on_gpu < 24 * 3600
    on_cpu = validation_limit_s(at_size(validation_gpus=0.0))
    assert on_cpu > 48 * 3600, "48 hours of one core are what it takes"


def test_one_line_where_it_fits_and_an_error_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    made, said = recipe("pretrain", "tiny"), list[str]()
    here = node(cpus=8.0, gpus=0.0, ram=16 * GB, temp_free=5 * GB, gpu_memory=None)
    monkeypatch.setattr(fit, "look_at_nodes", lambda: [here])
    check_fit(made, 8192, 10**7, said.append)
    (line,) = said
    assert line.startswith("  fits      1 node: memory ")
    monkeypatch.setattr(fit, "look_at_nodes", lambda: [replace(here, temp_free=10**6)])
    with pytest.raises(SettingsError, match=r"does not fit the cluster: a has 1 MB free in /tmp"):
        check_fit(made, 8192, 10**7, said.append)


def test_this_machine_is_looked_at() -> None:
    seen = cluster._look(gpus=False)
    assert seen.ram > GB / 4
    assert seen.temp_free > 0
    assert seen.gpu_memory is None
