"""docs/data.md names every column, fault and reason that there is, and no other."""

import re
from pathlib import Path
from typing import get_args

from pipelines.data.schema import REASONS, ROW_SCHEMA
from pipelines.data.shards import MANIFEST_SCHEMA
from pipelines.data.tar_format import ShardFault

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "data.md").read_text()


def first_column(heading: str) -> list[str]:
    """Names in the first column of the table whose heading begins like this."""
    (table,) = re.findall(rf"^\| {heading} \|.*\n\|[-| ]+\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    return [name for line in table.splitlines() for name in re.findall(r"`([^`]+)`", line.split("|")[1])]


def test_the_manifest_s_columns_are_those_of_its_schema() -> None:
    begin = PAGE.index("## The manifest")
    names = re.findall(r"^\| `(\w+)` \|", PAGE[begin : PAGE.index("## Faults")], re.MULTILINE)
    assert names == MANIFEST_SCHEMA.names


def test_the_row_s_columns_are_those_of_its_schema() -> None:
    table = PAGE[PAGE.index("## On the way to the model") :]
    names = [
        name for line in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", line)
    ]
    assert names == ROW_SCHEMA.names


def test_every_fault_of_a_shard_and_every_reason_of_a_sample_is_there() -> None:
    assert first_column("fault") == list(get_args(ShardFault))
    assert first_column("reason") == list(REASONS)
