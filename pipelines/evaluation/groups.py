"""Which questions are no independent draws, and which of two disjoint parts of a split they belong to.

Questions that show one image, or a sample of one named group (`pipelines.data.schema.RawSample.groups`), directly or by
others between them, are one group. A group lies in one part as a whole, by a hash of its name, so that what was chosen
on the part `search` is not tested on its own questions. A dataset may hold its parts as splits of their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

from pipelines.io.fingerprint import sha256_bytes

Part = Literal["search", "final", "all"]
"""search: for whatever chooses among models. final: for what is reported and promoted. all: both."""
SEARCH: Final = "search"
FINAL: Final = "final"
SEARCH_SHARE = 0.25
"""Of the groups of a split, so many are for the search."""


def components(names: Sequence[Sequence[str]]) -> list[str]:
    """For each item its group: the smallest name of all items that share a name with it, by others between, too.

    Items without a name are in the group "".
    """
    parent = {name: name for own in names for name in own}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for own in names:
        for name in own[1:]:
            low, high = sorted((root(own[0]), root(name)))
            parent[high] = low
    return [root(own[0]) if own else "" for own in names]


def split_of_part(splits: Sequence[str], split: str, part: Part) -> str:
    """The split that holds a part of `split`: the one of the part's name, where the dataset has that and no `split`."""
    return part if split not in splits and part in splits else split


def part_of(group: str, split: str) -> Part:
    """The part that a group lies in: its split, where that is a part; else by a hash of its name and SEARCH_SHARE."""
    if split in (SEARCH, FINAL):
        return SEARCH if split == SEARCH else FINAL
    place = int.from_bytes(sha256_bytes(f"part:{group}".encode())[:8], "big") / 2**64
    return SEARCH if place < SEARCH_SHARE else FINAL
