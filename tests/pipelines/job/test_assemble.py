"""What a training is assembled of, without a cluster."""

from dataclasses import replace
from typing import Any

import pytest

from pipelines.config.recipe import Recipe
from pipelines.data.shards import Manifest, ShardInfo
from pipelines.data.stream import PlannedShards, rows_to
from pipelines.job.assemble import plan_heldout

SHARDS = tuple(
    ShardInfo(f"{split}-{number}.tar", split, size, 1, "", {})
    for split, sizes in {"train": [5], "heldout": [4, 0, 7, 3, 9]}.items()
    for number, size in enumerate(sizes)
)
MANIFEST = Manifest("manifest.parquet", SHARDS, {})
IN_SPLIT = 23


@pytest.mark.parametrize("wanted", [1, 2, 7, 16, 22, 23, 24, 500])
def test_the_heldout_samples_are_the_same_for_every_micro_batch(wanted: int) -> None:
    """`best` compares held-out losses over resumes, which may have another micro-batch."""
    measured = set()
    for micro_batch in range(1, 12):
        recipe = Recipe()
        training = replace(recipe.training, micro_batch=micro_batch, global_batch=12 * micro_batch)
        recipe = replace(recipe, training=training, data=replace(recipe.data, heldout_samples=wanted))
        heldout = plan_heldout(recipe, MANIFEST)
        assert heldout.rows % micro_batch == 0
        assert heldout.rows - heldout.samples < micro_batch

        def items(split: str, **stream: Any) -> Any:
            spare = stream.pop("spare_rows")
            sources = [(MANIFEST.url, MANIFEST.split(split))]
            return PlannedShards(sources, stream["plan"], 0, stream["stop_row"], spare)

        spare = heldout.rows - heldout.samples
        stream: Any = rows_to(items, "heldout", heldout.plan, heldout.samples, spare)
        works = [work.item for task in stream._tasks for work in task]
        assert sum(item.rows for item in works) == heldout.rows
        ids = [sample for item in works if not item.is_void for sample in zip(*_columns(item), strict=True)]
        assert len(ids) == len(set(ids)) == min(wanted, IN_SPLIT)
        measured.add(tuple(ids))
    assert len(measured) == 1


def _columns(item: Any) -> list[list[int]]:
    ids = item.sample_ids()
    return [ids.shard.tolist(), ids.index.tolist()]
