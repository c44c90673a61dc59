"""Memory, disk and traffic up to the last step: start model, ranks, training, checkpoints, validation.

Letters as in `pipelines.sizing.estimate`.
"""

from __future__ import annotations

from pipelines.data.shards import SAMPLES_PER_SHARD
from pipelines.sizing.baseline import CUDA_CONTEXT, CUDA_HOST, DATA_TASK, LIBRARIES, PROCESS
from pipelines.sizing.inputs import Inputs
from pipelines.sizing.terms import ONCE, Phase, Place, Term, Use, use

START_MODEL = "4 P n"
"""Formula of what all nodes fetch before the first step."""
SUB_GROUP = 1e9
"""Elements that DeepSpeed's optimizer steps over at a time (`sub_group_size`, its default)."""


def process(count: int = 1, gpu: bool = False) -> tuple[Term | None, ...]:
    """Terms of processes before they load anything, with the libraries that they share."""
    return (
        Term("libraries, shared by all processes", ONCE, LIBRARIES),
        Term(f"{count} process{'es' if count > 1 else ''}", "0.66 GB each", count * PROCESS),
        Term("CUDA, host side", "2 GB each (assumed)", count * CUDA_HOST) if gpu else None,
    )


def before_training(given: Inputs) -> list[Use]:
    """`prepare` and `calibrate`: the start model is built by a task, ranks are measured by tasks."""
    recipe, whole = given.recipe, given.whole
    started = recipe.model.start is not None
    gpu = given.on_gpu
    pulled = Term("the model to start from, pulled", "4 P", whole) if started else None
    batch = recipe.calibration.batch * 3 * _side(given) ** 2
    return [
        use("prepare", "head", "ram", *process()),
        use("calibrate", "task", "ram", *process(), Term("the start model, fp32", "4 P", whole)),
        use("calibrate", "task", "temp", Term("the start model, to be uploaded", "4 P", whole), pulled),
        use("calibrate", "store", "up", Term("the start model", "4 P", whole)),
        use("calibrate", "store", "down", pulled, Term("the start model, to measure ranks", "4 P", whole)),
        use("calibrate", "node", "temp", Term("the start model, one copy", "4 P", whole)),
        use(
            "calibrate",
            "node",
            "ram",
            *process(2, gpu),
            Term("the start model, fp32", "4 P", whole),
            Term("two batches of images", "2 batch 3 S^2", 2.0 * batch),
        ),
        on_gpu(given, "calibrate", Term("the start model, fp32", "4 P", whole)),
    ]


def training(given: Inputs) -> list[Use]:
    """`train`, `checkpoint` and `validation`, which go on side by side."""
    return [*_train(given), *_checkpoint(given), *_validation(given)]


def _train(given: Inputs) -> list[Use]:
    nodes, whole = given.layout.nodes, given.whole
    states = _states(given)
    shard = _shard_bytes(given)
    tasks = min(given.recipe.data.data_tasks, 2 * given.on_node)
    data = (
        Term(f"{tasks} data tasks", "0.45 GB each", tasks * DATA_TASK),
        Term("a shard in each of them", "data tasks x shard", tasks * shard),
        Term("decoded images on their way", "4 micro-batches a worker", _pixels(given) * 4 * given.on_node),
    )
    loading = Term("the largest tensor while loading", "4 x its elements", 4.0 * given.size.largest)
    node = [*process(given.on_node, given.on_gpu), loading, *data]
    if given.on_gpu:
        node += _offloaded(given)
    else:
        node += [
            Term(f"{given.on_node} x {one.what}", f"w ({one.formula})", given.on_node * one.amount, one.bound)
            for one in states
        ]
    return [
        use("train", "head", "ram", *process(2)),  # the driver and Ray's controller
        use("train", "node", "ram", *node),
        use("train", "node", "temp", Term("the start model, one copy", "4 P", whole)),
        on_gpu(given, "train", *states),
        use(
            "train",
            "store",
            "down",
            Term("the start model, one copy a node", START_MODEL, whole * nodes),
            Term(
                "shards, once an epoch", "data x epochs", (given.layout.data_bytes or 0) * given.recipe.training.epochs
            ),
        ),
    ]


def _states(given: Inputs) -> list[Term]:
    """What one worker holds of the model, ZeRO-3, and of a micro-batch."""
    settings, size, b = given.recipe.training, given.size, given.weight_bytes
    world, zero3 = given.workers, settings.zero3
    share = size.learning / world
    gathered = min(size.total, zero3.max_live_parameters + zero3.prefetch_bucket)
    live = given.activations
    rows = [
        Term("weights, its share", "b P / W", b * size.total / world),
        Term("gradients, its share", "b L / W", b * share),
        Term("gathered weights", "b min(P, max_live + prefetch)", float(b * gathered)),
        Term("buckets of gradients", "2 b min(L, reduce_bucket)", 2.0 * b * min(size.learning, zero3.reduce_bucket)),
        Term("fp32 gradients of a sub-group", "4 min(L / W, 1e9)", 4 * min(share, SUB_GROUP)),
        Term("activations of a micro-batch", "counted, all of max_length", float(live.peak), bound=True)
        if live
        else None,
    ]
    if zero3.secondary_partition > 1:
        rows.append(
            Term("weights once more in a node, its share", "b P / k", b * size.total / zero3.secondary_partition)
        )
    if zero3.offload == "none" or not given.on_gpu:
        rows.insert(2, Term("optimizer, its share", "12 L / W", 12 * share))
    if zero3.offload == "all" and given.on_gpu:
        rows.pop(0)
    return [row for row in rows if row is not None]


def _offloaded(given: Inputs) -> list[Term]:
    """What rests in host memory instead of on the GPUs of a node."""
    offload, w = given.recipe.training.zero3.offload, given.on_node
    share = given.size.learning / given.workers
    rows = []
    if offload != "none":
        rows.append(Term("optimizer, offloaded", "w (12 + 4) L / W", w * 16 * share))
    if offload == "all":
        rows.append(Term("weights, offloaded", "w b P / W", w * given.weight_bytes * given.size.total / given.workers))
    return rows


def _checkpoint(given: Inputs) -> list[Use]:
    share = given.checkpoint * given.on_node / given.workers
    parity = Term("logits of the parity batch", "4 micro-batch T V", float(_parity(given)), bound=True)
    count = given.checkpoints
    return [
        use("checkpoint", "node", "temp", Term("this node's part of a checkpoint", "12 L w / W", share), parity),
        use("checkpoint", "node", "ram", parity),
        use("checkpoint", "store", "up", Term(f"{count} checkpoints", "12 L each", count * given.checkpoint)),
    ]


def _validation(given: Inputs) -> list[Use]:
    settings, size = given.recipe.training, given.size
    if not settings.validate_every_checkpoints:
        return []
    gpu = validates_on_gpu(given)
    place: Place = "node"
    weights = Term("the model", "b P", float(given.weight_bytes * size.total))
    trained = Term("trained weights of the checkpoint, fp32", "4 L", 4.0 * size.learning)
    live = given.activations
    batch = Term("a micro-batch without gradients", "counted", float(live.no_grad), bound=True) if live else None
    on_host = (*process(2, gpu), weights, trained, None if gpu else batch)
    down = Term(f"{given.validations} checkpoints", "12 L each", given.validations * given.checkpoint)
    return [
        use("validation", place, "ram", *on_host),
        use("validation", place, "temp", Term("the checkpoint", "12 L", given.checkpoint)),
        use("validation", "store", "down", down),
    ]


def validates_on_gpu(given: Inputs) -> bool:
    """Whether a validation reserves a GPU of its own: it stands beside those of the workers."""
    return given.recipe.training.gpus_per_validation > 0


def on_gpu(given: Inputs, phase: Phase, *terms: Term | None) -> Use:
    """What a phase takes of a GPU: nothing without one, else a context and these terms."""
    shown = (Term("CUDA context", "1 GB (assumed)", CUDA_CONTEXT), *terms) if given.on_gpu else ()
    return use(phase, "gpu", "gpu", *shown)


def _side(given: Inputs) -> int:
    return given.recipe.model.pretrained().image_size


def _pixels(given: Inputs) -> float:
    """Bytes of the decoded images of a micro-batch."""
    return given.recipe.training.micro_batch * 3.0 * _side(given) ** 2


def _parity(given: Inputs) -> int:
    vocabulary = given.recipe.model.pretrained().text_config.get("vocab_size", given.recipe.model.vocab_size)
    return int(4 * given.recipe.training.micro_batch * given.recipe.data.max_length * vocabulary)


def _shard_bytes(given: Inputs) -> float:
    """Of a shard of `SAMPLES_PER_SHARD`."""
    return SAMPLES_PER_SHARD * given.layout.sample_bytes
