"""Who may draw what: code points, texts and fonts of each split, by hash or by table, never both of two splits.

A split other than `train` draws half of its pictures with drawings, or with fonts, that training has seen. Those, too,
belong to it among the three, so that `validation`, `search` and `final` share no code point, no text and no font. No
text of theirs is ever trained on.
"""

import random
import unicodedata
from functools import cache
from typing import Literal

from pipelines.data.sources import fraction_of
from pipelines.io.fingerprint import sha256_bytes

Split = Literal["train", "validation", "search", "final"]
SPLITS: tuple[Split, ...] = ("train", "validation", "search", "final")

Familiarity = Literal["seen", "unseen"]
"""Whether training has had a drawing, text or font."""

UNSEEN_FROM: tuple[tuple[float, Split], ...] = ((0.74, "train"), (0.81, "validation"), (0.88, "search"), (1.0, "final"))
"""Families of drawings of a category, in the order of their hashes: each split has those below its share."""
SEEN_FROM: tuple[tuple[float, Split], ...] = ((0.25, "validation"), (0.5, "search"), (1.0, "final"))
"""The families of `train`: which of the other splits may show them, too."""
TEXTS_FROM: tuple[tuple[float, Split], ...] = ((0.7, "train"), (0.76, "validation"), (0.84, "search"), (1.0, "final"))
"""Texts by the hash of their letters."""

_SEEN_FONTS: dict[Split, tuple[str, ...]] = {
    "validation": ("DejaVuSans-Oblique", "DejaVuSerif-Bold", "cmr10"),
    "search": ("DejaVuSans-Bold", "DejaVuSansMono", "STIXGeneralItalic"),
    "final": ("DejaVuSans", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSerif", "STIXGeneral", "cmss10"),
}
FONTS: dict[tuple[Split, Familiarity], tuple[str, ...]] = {
    ("train", "seen"): tuple(sorted(name for names in _SEEN_FONTS.values() for name in names)),
    **{(split, "seen"): names for split, names in _SEEN_FONTS.items()},
    ("search", "unseen"): ("DejaVuSansMono-BoldOblique", "DejaVuSerif-BoldItalic", "STIXGeneralBolIta"),
    ("final", "unseen"): ("DejaVuSans-BoldOblique", "DejaVuSerif-Italic", "STIXGeneralBol", "cmtt10"),
}
"""Fonts that matplotlib ships, by file name; `validation` is drawn with those of `train` alone."""

LETTERS, DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"
SHORTEST, LONGEST = 3, 8  # characters of a word
TextKind = Literal["number", "letters", "word"]
TEXT_KINDS: tuple[TextKind, ...] = ("number", "letters", "word")
TEXT_SHARES: dict[Split, tuple[float, float, float]] = {
    "train": (0.3, 0.35, 0.35),
    "validation": (0.3, 0.2, 0.5),
    "search": (0.3, 0.2, 0.5),
    "final": (0.3, 0.2, 0.5),
}
"""Shares of TEXT_KINDS."""
_NAMED = ((0x20, 0x3040), (0x3200, 0x3400))


def seeded(*parts: object) -> random.Random:
    """A generator that belongs to these values for ever."""
    digest = sha256_bytes("|".join(map(str, parts)).encode())
    return random.Random(int.from_bytes(digest[:8], "big"))


def at_share(share: float, shares: tuple[tuple[float, Split], ...]) -> Split:
    """The first split whose bound is above `share`, a number in [0, 1)."""
    return next(split for bound, split in shares if share < bound)


def split_of_text(text: str) -> Split:
    """The only split that may write `text`."""
    return at_share(fraction_of(f"scenes text:{text}"), TEXTS_FROM)


@cache
def words(split: Split) -> tuple[str, ...]:
    """Words in capitals that a split may write: of the names of Unicode 3.2's characters, the same in any Python."""
    found: set[str] = set()
    for code in (code for begin, end in _NAMED for code in range(begin, end)):
        name = unicodedata.ucd_3_2_0.name(chr(code), "")
        found |= {word for word in name.replace("-", " ").split() if word.isascii() and word.isalpha()}
    fit = (word for word in found if SHORTEST <= len(word) <= LONGEST)
    return tuple(sorted(word for word in fit if split_of_text(word) == split))


def draw_text(rng: random.Random, split: Split, kind: TextKind) -> str:
    """A text of this kind that the split may write: 2 to 5 digits, 3 to 7 letters, or a word."""
    if kind == "word":
        return rng.choice(words(split))
    while True:
        alphabet, length = (DIGITS, rng.randint(2, 5)) if kind == "number" else (LETTERS, rng.randint(3, 7))
        text = "".join(rng.choices(alphabet, k=length))
        if split_of_text(text) == split:
            return text
