"""Seconds of every phase: FLOPs at a given speed, bytes at a given rate. Letters as in `pipelines.sizing.estimate`."""

from __future__ import annotations

from pipelines.sizing.inputs import Inputs
from pipelines.sizing.terms import Term, Use, use
from pipelines.sizing.training import validates_on_gpu
from pipelines.sizing.work import Work

COMPUTING, BETWEEN_NODES = "computing", "weights and gradients between nodes, at least"
"""Terms of the training."""


def times(given: Inputs) -> list[Use]:
    """The time of every phase; nothing without FLOPs (`Inputs.work`)."""
    if given.work is None:
        return []
    recipe, speeds, work = given.recipe, given.layout.speeds, given.work
    store = speeds.store_mb * 1e6
    one_gpu, one_cpu = speeds.gpu_tflops * 1e12, speeds.cpu_gflops * 1e9
    ranks = (
        recipe.calibration.samples * work.unpruned / (one_gpu if given.on_gpu else one_cpu * recipe.data.data_task_cpus)
    )
    held = recipe.data.heldout_samples
    answering = one_gpu if given.on_gpu else one_cpu * given.task_cpus
    answers = held * (work.answer + given.layout.answer_tokens * work.step) / answering
    return [
        use(
            "calibrate",
            "task",
            "time",
            Term("the start model to the store, and back", "8 P / store", 2 * given.whole / store),
            Term("ranks", "images x FLOPs / speed", ranks),
        ),
        use("train", "node", "time", *_training(given, work)),
        use(
            "checkpoint",
            "node",
            "time",
            Term("upload of one", "12 L / (n store)", given.checkpoint / store / given.layout.nodes),
        ),
        use("validation", "node", "time", *validation_time(given, work)),
        use(
            "export",
            "task",
            "time",
            Term(
                "checkpoint and start model from the store",
                "(12 L + 4 P) / store",
                (given.checkpoint + given.whole) / store,
            ),
            Term("the model to the store", "e P / store", given.exported / store),
        ),
        use("answer", "task", "time", Term("held-out questions", "M FLOPs / speed", answers)),
        use("register", "task", "time", Term("the model to MLflow", "e P / store", given.exported / store)),
    ]


def _training(given: Inputs, work: Work) -> list[Term]:
    if given.steps is None:
        return []
    settings, speeds = given.recipe.training, given.layout.speeds
    one = speeds.gpu_tflops * 1e12 if given.on_gpu else speeds.cpu_gflops * 1e9 * settings.threads_per_worker
    flops = given.steps * settings.global_batch * work.trained.hardware
    terms = [Term(COMPUTING, "samples x FLOPs / (W speed)", flops / (given.workers * one))]
    if given.layout.nodes > 1:
        seconds = gathered_between_nodes(given) * given.steps / (speeds.network_gbit * 1e9 / 8)
        terms.append(Term(BETWEEN_NODES, "see docs/scaling.md", seconds))
    return terms


def gathered_between_nodes(given: Inputs) -> float:
    """Bytes that one node must receive from the others in an optimizer step, at least: its own share is there already.

    Each micro-batch gathers every part forward, once more to recompute it, and once more backward, as far as gradients
    reach; gradients of what is trained are reduced once (Rajbhandari et al., 2020, section 7.2.2, by part). Where the
    workers of a node hold all weights once more, only what an update has changed is gathered from elsewhere, once.
    """
    settings, nodes = given.recipe.training, given.layout.nodes
    if 1 < settings.zero3.secondary_partition <= given.on_node:
        elements_a_step = given.size.learning * (1 + settings.accumulation)
        return given.weight_bytes * elements_a_step * (nodes - 1) / nodes
    elements = 0.0
    for part, gathers in given.size.gathers.items():
        again = settings.gradient_checkpointing and gathers > 1
        elements += given.size.parts[part] * (gathers + again)
    per_batch = given.weight_bytes * (elements + given.size.learning)
    return per_batch * settings.accumulation * (nodes - 1) / nodes


def validation_time(given: Inputs, work: Work) -> list[Term]:
    """Of one: everything it needs, brought, and both losses of every held-out sample."""
    settings, speeds = given.recipe.training, given.layout.speeds
    if not settings.validate_every_checkpoints:
        return []
    one = (
        speeds.gpu_tflops * 1e12
        if validates_on_gpu(given)
        else speeds.cpu_gflops * 1e9 * max(1.0, settings.validation_cpus)
    )
    down = given.checkpoint / (speeds.store_mb * 1e6)
    return [
        Term("the checkpoint from the store", "12 L / store", down),
        Term(
            "two losses of each sample",
            "2 M FLOPs / speed",
            2 * given.recipe.data.heldout_samples * work.trained.forward / one,
        ),
    ]
