"""The rule against every setting there is, what binds by hand, and settings that the jobs take."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache, partial

import pytest

from jobs.plan_cluster import JOB, scales
from jobs.pretrain import JOB as PRETRAIN
from jobs.recipes import recipe
from meteor_model.flops import PassFlops
from pipelines.config.recipe import Recipe
from pipelines.sizing.activations import Activations
from pipelines.sizing.at_scale import OFFLOADS, Scale, at_scale
from pipelines.sizing.estimate import estimate
from pipelines.sizing.inputs import Inputs
from pipelines.sizing.layout import GB, Layout, Speeds
from pipelines.sizing.machines import Machines
from pipelines.sizing.model_size import ModelSize, model_size
from pipelines.sizing.scale_table import arguments, scale_table
from pipelines.sizing.terms import Estimate
from pipelines.sizing.times import gathered_between_nodes
from pipelines.sizing.work import Work

DATA = Layout(samples=558_000, data_bytes=558_000 * 200_000)
FORWARD = 17_760 * 10**9
WORK = Work(PassFlops(FORWARD, 2 * FORWARD, FORWARD), 17e12, 0.0134e12, 12.6e12, 40)


@cache
def of_job(job: str) -> tuple[Recipe, ModelSize]:
    made = recipe(job, "meteor_x4_7b")
    return made, model_size(made)


def estimated(job: str, made: Recipe, layout: Layout) -> Estimate:
    """A GB of activations for each sample, in place of the count."""
    bytes_ = int(made.training.micro_batch * GB)
    return estimate(made, layout, of_job(job)[1], Activations(bytes_, bytes_, 0, 0, 0), WORK)


def on(job: str, gpus: int, machines: Machines | None = None, data: Layout = DATA) -> Scale:
    return at_scale(of_job(job)[0], gpus, data, machines or Machines(), partial(estimated, job))


def every(job: str, gpus: int, machines: Machines) -> list[Scale]:
    """All batches, partitions and places to rest, without a rule."""
    base, nodes = of_job(job)[0], machines.nodes(gpus)[0]
    layout, batch = (
        replace(DATA, nodes=nodes, gpus_per_node=float(gpus // nodes)),
        max(base.training.global_batch, gpus),
    )
    found = []
    for offload in OFFLOADS:
        for partition in {1, gpus // nodes} if nodes > 1 else {1}:
            for micro in range(1, batch // gpus + 1):
                if batch % (gpus * micro):
                    continue
                zero3 = replace(base.training.zero3, offload=offload, secondary_partition=partition)
                training = replace(
                    base.training, workers=gpus, micro_batch=micro, global_batch=batch, zero3=zero3, gpus_per_worker=1.0
                )
                made = replace(base, training=training)
                found.append(Scale(made, layout, estimated(job, made, layout), machines, True))
    return found


@pytest.mark.parametrize("gpu_gb", [30.0, 45.0, 80.0, 180.0])
@pytest.mark.parametrize("gpus", [1, 8, 16, 64, 512])
@pytest.mark.parametrize("job", ["pretrain", "finetune"])
def test_nothing_that_fits_is_faster(job: str, gpus: int, gpu_gb: float) -> None:
    machines = Machines(gpu_gb=gpu_gb)
    chosen = on(job, gpus, machines)
    fitting = [
        one
        for one in every(job, gpus, machines)
        if one.peak["gpu"] <= 0.9 * gpu_gb * GB and one.peak["ram"] <= 0.9 * machines.node_gb * GB
    ]
    assert chosen.fits == bool(fitting)
    if not fitting:
        assert chosen.binds == "memory: does not fit"
        return
    least = min(OFFLOADS.index(one.recipe.training.zero3.offload) for one in fitting)
    rivals = [one for one in fitting if one.recipe.training.zero3.offload == OFFLOADS[least]]
    assert OFFLOADS.index(chosen.recipe.training.zero3.offload) == least
    assert chosen.step_s == pytest.approx(min(one.step_s for one in rivals), rel=1e-6)
    equal = [one for one in rivals if one.step_s == pytest.approx(chosen.step_s, rel=1e-6)]
    same = [one for one in equal if one.recipe.training.zero3 == chosen.recipe.training.zero3]
    assert chosen.recipe.training.micro_batch == max(one.recipe.training.micro_batch for one in same)


def test_a_batch_smaller_than_the_gpus_grows_and_its_rates_with_the_root() -> None:
    few, many = on("finetune", 64).recipe.training, on("finetune", 512).recipe.training
    assert (few.global_batch, few.optimizer.learning_rates.llm) == (128, 2e-5)
    assert (many.global_batch, many.micro_batch, many.accumulation) == (512, 1, 1)
    assert many.optimizer.learning_rates.llm == pytest.approx(2 * 2e-5)
    assert on("pretrain", 512).recipe.training.optimizer.learning_rates.towers is None


def test_one_gpu_keeps_the_optimizer_in_host_memory() -> None:
    """16 bytes for each of 8.8 G parameters are 141 GB."""
    alone = on("finetune", 1)
    assert alone.recipe.training.zero3.offload == "optimizer"
    assert alone.peak["ram"] > 140 * GB
    assert on("finetune", 8).recipe.training.zero3.offload == "none"


def test_frozen_weights_cross_between_nodes_once_where_a_node_holds_them() -> None:
    base, size = of_job("pretrain")
    zero3 = replace(base.training.zero3, secondary_partition=8)
    training = replace(base.training, workers=16, zero3=zero3)
    made = Inputs(replace(base, training=training), Layout(2, 8.0), size, None, None)
    assert training.accumulation == 2
    assert gathered_between_nodes(made) == 2 * (size.learning + 2 * size.learning) / 2, "bf16, half is there already"
    across = replace(
        made, recipe=replace(base, training=replace(training, zero3=replace(zero3, secondary_partition=16)))
    )
    assert gathered_between_nodes(across) > 40 * gathered_between_nodes(made), "a partition over nodes spares nothing"
    assert on("pretrain", 64).recipe.training.zero3.secondary_partition == 8


def test_what_binds() -> None:
    slow = replace(DATA, speeds=Speeds(network_gbit=1.0))
    assert on("finetune", 8).binds == "computing"
    assert on("finetune", 64, data=slow).binds == "network"
    assert on("pretrain", 64, Machines(store_gb=0.001)).binds == "store"
    assert on("finetune", 1, Machines(node_gb=100.0)).binds == "memory: does not fit"


def test_a_step_in_numbers() -> None:
    """512 GPUs, fine-tuning: FLOPs of a sample 4 times forward, a tenth of it to be read."""
    found = on("finetune", 512)
    computing = 4 * FORWARD / 125e12
    assert found.waits["computing"] == pytest.approx(computing, rel=1e-6)
    assert found.step_s == pytest.approx(computing + found.waits["network"])
    assert found.read_bytes == 512 * 200_000
    assert found.store_rate == 12.5e9, "64 nodes could take 32 GB/s"
    assert found.start_s == pytest.approx(4 * 8.8e9 * 64 / 12.5e9, rel=0.01)
    assert found.written_bytes == pytest.approx(12 * 8.8e9 * 11 / 1089, rel=0.01), "11 checkpoints in 1,089 steps"
    assert found.recipe.data.data_tasks == -(-1.5 * found.samples_per_s // 100)


def test_gpus_that_fill_no_node_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gpus is 12; above machines.gpus-per-node, 8, it must be a multiple"):
        on("pretrain", 12)


def test_the_settings_are_those_that_a_job_takes() -> None:
    found = on("pretrain", 512)
    line = ["--recipe", "meteor_x4_7b", *" ".join(arguments(found)).split()]
    taken = PRETRAIN.parse(line)
    assert taken.settings.training == found.recipe.training
    assert taken.settings.data == found.recipe.data


def test_the_command_prints_a_column_for_each() -> None:
    asked = JOB.parse(["--recipe", "tiny", "--gpus", "1", "16", "--samples", "8192"])
    text = scale_table(scales(asked))
    cells = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    rows = {first: rest for first, *rest in cells}
    assert rows["GPUs"] == ["1", "16"]
    assert rows["nodes"] == ["1", "2"]
    assert rows["global batch"] == ["32", "32"]
    assert "16 GPUs: --training.workers 16 --training.gpus-per-worker 1 --training.micro-batch" in text
