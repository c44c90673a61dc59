"""Memory, disk and traffic after the last step: export, parity, held-out answers, registration.

Each is a task in a process of its own, which holds one model at a time. Letters as in `pipelines.sizing.estimate`.
"""

from __future__ import annotations

from pipelines.sizing.inputs import Inputs
from pipelines.sizing.terms import Phase, Term, Use, use
from pipelines.sizing.training import on_gpu, process

ON_GPU: tuple[Phase, ...] = ("export", "parity", "answer")


def after_training(given: Inputs) -> list[Use]:
    """`export`, `parity`, `answer` and `register`."""
    model = Term("the exported model", "e P", given.exported)
    tensor = Term("the largest tensor while it is read, fp32", "4 x its elements", 4.0 * given.size.largest)
    start = Term("the start model, one copy", "4 P", given.whole)
    checkpoint = Term("the checkpoint", "12 L", given.checkpoint)
    packed = Term("the exported model, packed for MLflow", "e P", given.exported)
    batch = (
        Term("a batch of answers", "counted", float(given.activations.no_grad), bound=True)
        if given.activations
        else None
    )
    on_host = None if given.on_gpu else batch
    return [
        # The task has a GPU of its own: lambda is solved, logits are compared and questions are answered there.
        *(on_gpu(given, phase, model, batch) for phase in ON_GPU),
        use("export", "task", "ram", *process(1, given.on_gpu), model, tensor),
        use("export", "task", "temp", checkpoint, start, model),
        use("export", "store", "down", checkpoint, start),
        use("export", "store", "up", model),
        use("parity", "task", "ram", *process(1, given.on_gpu), model, on_host),
        use("parity", "task", "temp", checkpoint, start, model),
        use("answer", "task", "ram", *process(1, given.on_gpu), model, on_host),
        use("answer", "task", "temp", model),
        use("answer", "store", "down", model),
        use("register", "task", "ram", *process(), model),  # it answers its own example first
        use("register", "task", "temp", model, packed),
        use("register", "store", "up", Term("the exported model, to MLflow", "e P", given.exported)),
    ]
