"""How this project runs Ray Data: the settings of a dataset that are not left to Ray's defaults."""

from collections.abc import Mapping, Sequence
from typing import Any

import ray.data
from ray.data import Dataset


def configure(dataset: Dataset, *, ordered: bool, block_bytes: int | None = None) -> Dataset:
    """Set up a dataset before anything is mapped over it; returns it.

    The settings lie in the dataset's own copy of Ray's context: those of the driver's other datasets stay.

    Args:
        dataset: as its source made it.
        ordered: whether rows keep their order.
        block_bytes: size at which a task ends a block; None: Ray's.
    """
    context = dataset.context
    context.execution_options.preserve_order = ordered
    if block_bytes is not None:
        context.target_max_block_size = block_bytes
    context.raise_original_map_exception = True  # else Ray loses the cause of a fault on its way to the driver
    # The job's own progress lines say how far it is.
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return dataset


def work_items(rows: Sequence[Mapping[str, Any]], *, ordered: bool, block_bytes: int | None = None) -> Dataset:
    """A dataset of descriptions of work, each a block of its own and so a task of its own."""
    items = ray.data.from_items([dict(row) for row in rows], override_num_blocks=len(rows))
    return configure(items, ordered=ordered, block_bytes=block_bytes)
