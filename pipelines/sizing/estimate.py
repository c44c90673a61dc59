"""The size of a run before its first step: memory, disk, traffic and time, by phase and place, each as named terms.

Letters: P parameters, L those that are trained, F = P - L; b bytes of a training weight (bf16 2, fp32 4), e of an
exported one; W workers, w of them on one node, n nodes; M held-out samples.

Sources: ZeRO's 2 + 2 + 12 bytes a parameter under Adam in mixed precision, shared by W in stage 3 (Rajbhandari et al.,
2020, section 3.1); activations and FLOPs counted on the modules themselves (`pipelines.sizing.activations`,
`pipelines.sizing.work`); processes as measured (`pipelines.sizing.baseline`). What a phase loads and writes is what its
module does; `docs/scaling.md` shows all of it for 7 billion parameters, and `benchmarks/` holds it to measured peaks.
"""

from __future__ import annotations

from pipelines.checkpoint.state import WEIGHT_FILE_BYTES
from pipelines.config.recipe import Recipe
from pipelines.sizing.activations import Activations
from pipelines.sizing.after_training import after_training
from pipelines.sizing.inputs import Inputs
from pipelines.sizing.layout import Layout
from pipelines.sizing.model_size import ModelSize
from pipelines.sizing.terms import Estimate, Term, non_empty
from pipelines.sizing.times import times
from pipelines.sizing.training import before_training, training
from pipelines.sizing.work import Work


def estimate(
    recipe: Recipe,
    layout: Layout,
    size: ModelSize,
    activations: Activations | None = None,
    work: Work | None = None,
) -> Estimate:
    """The size of a run.

    Args:
        recipe: its settings.
        layout: of the cluster and the data.
        size: of the model (`model_size`).
        activations: of a micro-batch (`count_activations`); without, GPU memory lacks that term.
        work: FLOPs of a sample (`count_work`); without, no time is estimated.
    """
    given = Inputs(recipe, layout, size, activations, work)
    uses = [*before_training(given), *training(given), *after_training(given), *times(given)]
    return Estimate(non_empty(uses), _largest_object(given), _kept(given), tuple(_facts(given)), given.steps)


def _largest_object(given: Inputs) -> Term:
    most = max(WEIGHT_FILE_BYTES, 4 * given.size.largest)
    shard = Term("a weight file of the start model", "4 P, 2 GB at most", min(4 * given.size.total, most))
    optimizer = Term("a worker's file of a checkpoint", "12 L / W", 12 * given.size.learning / given.workers)
    return max(shard, optimizer, key=lambda term: term.amount)


def _kept(given: Inputs) -> tuple[Term, ...]:
    """What lies in the store at the most."""
    training = given.recipe.training
    copies = training.keep_checkpoints + 1 + (2 if training.validate_every_checkpoints else 0)
    terms = (
        Term("the start model", "4 P", 4 * given.size.total),
        Term(f"{copies} checkpoints: kept, coming, validated, best", "12 L each", copies * given.checkpoint),
        Term("the exported model, with the run and in MLflow", "2 e P", 2 * given.exported),
        Term("the shards", "as given", given.layout.data_bytes or 0),
    )
    return tuple(term for term in terms if term.amount)


def _facts(given: Inputs) -> list[tuple[str, str]]:
    size, training, layout = given.size, given.recipe.training, given.layout
    parts = ", ".join(f"{name} {count / 1e9:.3g}" for name, count in size.modules.items())
    trained = ", ".join(sorted(size.trained))
    facts = [
        ("model", f"{given.recipe.model.architecture}, {size.total / 1e9:.3g} G parameters ({parts})"),
        ("trained", f"{size.learning / 1e9:.3g} G ({trained}) in {training.precision}"),
        (
            "workers",
            f"{training.workers} on {layout.nodes} node{'s' if layout.nodes > 1 else ''}, "
            f"{training.gpus_per_worker:g} GPUs and {training.cpus_per_worker:g} CPUs each; micro-batch "
            f"{training.micro_batch}, global batch {training.global_batch}",
        ),
    ]
    if (steps := given.steps) is not None:
        facts.append(("data", f"{layout.samples:,} samples, {steps:,} steps, {given.checkpoints} checkpoints"))
    return facts
