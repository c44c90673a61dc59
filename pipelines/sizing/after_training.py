"""Memory, disk and traffic after the last step: export, parity, held-out answers, registration.

Each runs in one process, which holds one model at a time. Letters as in `pipelines.sizing.estimate`.
"""

from __future__ import annotations

from pipelines.sizing.inputs import Inputs
from pipelines.sizing.terms import Term, Use, use
from pipelines.sizing.training import process


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
    return [
        use("export", "head", "ram", *process(), model, tensor),
        use("export", "head", "temp", checkpoint, start, model),
        use("export", "store", "down", checkpoint, start),
        use("export", "store", "up", model),
        use("parity", "head", "ram", *process(), model, batch),
        use("parity", "head", "temp", checkpoint, start, model),
        use("answer", "head", "ram", *process(), model, batch),
        use("answer", "head", "temp", model),
        use("register", "head", "ram", *process(), model),  # it answers its own example first
        use("register", "head", "temp", model, packed),
        use("register", "store", "up", Term("the exported model, to MLflow", "e P", given.exported)),
    ]
