"""Pictures with exact answers: one drawing on a plain background, and questions that its making answers.

Every choice is drawn from a `random.Random` that the caller seeds, so a picture is a pure function of (seed, drawing,
variant). Answers are one or two words of a small vocabulary: a model of a few million parameters can learn them from
scratch in minutes.
"""

import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from meteor_model.chat import IMAGE_PLACEHOLDER

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "yellow": (250, 214, 40),
    "purple": (140, 60, 190),
    "gray": (140, 140, 140),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
}
"""Background colours by name (8-bit RGB), far apart so that JPEG and a little noise leave no doubt."""

CENTERS: dict[str, tuple[float, float]] = {
    "left": (0.25, 0.5),
    "right": (0.75, 0.5),
    "top": (0.5, 0.25),
    "bottom": (0.5, 0.75),
    "center": (0.5, 0.5),
}
"""Where the middle of the drawing is, as (x, y) shares of the image's side."""

COLOR_NOISE = 8  # of 255, per channel, the same over the whole background
POSITION_NOISE = 0.04  # of the image's side
MIN_SCALE, MAX_SCALE = 0.36, 0.5  # longer side of the drawing as a share of the image's side

ASKED: dict[str, tuple[str, ...]] = {
    "background": ("What color is the background?", "Which color is behind the drawing?"),
    "position": ("Where is the drawing?", "In which part is the drawing?"),
    "color": ("What color is the drawing?",),
    "name": ("What is this?", "Name the drawing."),
}
"""Wordings of each kind of question about one image."""

FACTS: tuple[tuple[str, str], ...] = (
    ("What is the opposite of left?", "right"),
    ("What is the opposite of right?", "left"),
    ("What is the opposite of top?", "bottom"),
    ("What is the opposite of bottom?", "top"),
    ("What is the opposite of black?", "white"),
    ("What is the opposite of white?", "black"),
    ("What color do yellow and blue make?", "green"),
    ("What color do red and blue make?", "purple"),
    ("What color do black and white make?", "gray"),
    ("What comes after first?", "second"),
)
"""Questions that need no image, in the vocabulary of the others."""


@dataclass(frozen=True)
class Drawing:
    """A drawing cut to what is visible: `rgba` (h, w, 4) uint8, its name and main colour where they are certain."""

    code_point: str
    rgba: np.ndarray
    name: str | None
    color: str | None


@dataclass(frozen=True)
class Picture:
    """An encoded image and the truth about it, by kind of question."""

    extension: str
    image: bytes
    answers: dict[str, str]


def main_color(rgba: np.ndarray) -> str | None:
    """The palette name of most of the drawing's own colour, or None where no one colour has a clear majority.

    Opaque pixels (h, w, 4) vote for their nearest palette colour; black outlines do not vote unless all is black.
    """
    pixels = rgba.reshape(-1, 4)
    rgb = pixels[pixels[:, 3] > 200, :3].astype(np.int32)
    if len(rgb) == 0:
        return None
    colors = np.array(list(PALETTE.values()), dtype=np.int32)
    nearest = ((rgb[:, None, :] - colors[None]) ** 2).sum(-1).argmin(-1)
    names = list(PALETTE)
    votes = np.bincount(nearest, minlength=len(names))
    if votes.sum() > votes[names.index("black")]:
        votes[names.index("black")] = 0
    best = int(votes.argmax())
    return names[best] if votes[best] >= 0.7 * votes.sum() else None


def compose(drawing: Drawing, size: int, rng: random.Random, as_png: bool, avoid: str | None = None) -> Picture:
    """Put `drawing` on a plain background of (size, size), as JPEG or as PNG with alpha.

    The background is not of the colour `avoid` nor of the drawing's own, so that the drawing can be seen. A PNG's
    background is fully transparent: its answer is white, the colour that alpha is laid on.
    """
    as_png = as_png and drawing.color != "white"
    background = "white" if as_png else rng.choice([name for name in PALETTE if name not in (avoid, drawing.color)])
    position = rng.choice(list(CENTERS))
    noise = [rng.randint(-COLOR_NOISE, COLOR_NOISE) for _ in range(3)]
    scale = size * (MIN_SCALE + (MAX_SCALE - MIN_SCALE) * rng.random())
    center = [c * size + size * POSITION_NOISE * (2 * rng.random() - 1) for c in CENTERS[position]]

    height, width = drawing.rgba.shape[:2]
    factor = scale / max(height, width)
    box = (max(1, round(width * factor)), max(1, round(height * factor)))
    stamp = Image.fromarray(drawing.rgba).resize(box, Image.Resampling.BILINEAR)
    left = min(max(round(center[0] - box[0] / 2), 0), size - box[0])
    top = min(max(round(center[1] - box[1] / 2), 0), size - box[1])

    answers = {"background": background, "position": position}
    if drawing.color is not None:
        answers["color"] = drawing.color
    if drawing.name is not None:
        answers["name"] = drawing.name
    buffer = io.BytesIO()
    if as_png:
        canvas = Image.new("RGBA", (size, size), (255, 255, 255, 0))
        canvas.paste(stamp, (left, top))
        canvas.save(buffer, "PNG", compress_level=6)
        return Picture("png", buffer.getvalue(), answers)
    red, green, blue = (min(max(c + n, 0), 255) for c, n in zip(PALETTE[background], noise, strict=True))
    canvas = Image.new("RGB", (size, size), (red, green, blue))
    canvas.paste(stamp, (left, top), stamp)
    canvas.save(buffer, "JPEG", quality=90, subsampling=0)
    return Picture("jpg", buffer.getvalue(), answers)


def _turns(pairs: Sequence[tuple[str, str]], num_images: int) -> list[dict[str, str]]:
    turns: list[dict[str, str]] = []
    for position, (question, answer) in enumerate(pairs):
        opening = f"{IMAGE_PLACEHOLDER}\n" * num_images if position == 0 else ""
        turns.append({"from": "human", "value": opening + question})
        turns.append({"from": "gpt", "value": answer})
    return turns


def _pick_kinds(weights: Mapping[str, float], count: int, rng: random.Random) -> list[str]:
    """Up to `count` different kinds, one after the other with chances proportional to their weights."""
    left = {kind: weight for kind, weight in weights.items() if weight > 0}
    picked: list[str] = []
    while left and len(picked) < count:
        kind = rng.choices(list(left), weights=list(left.values()))[0]
        picked.append(kind)
        del left[kind]
    return picked


def ask_one(picture: Picture, weights: Mapping[str, float], turns: int, rng: random.Random) -> list[dict[str, str]]:
    """A conversation of up to `turns` questions about one image, of different kinds, by weight."""
    open_kinds = {kind: weights[kind] for kind in ASKED if kind in picture.answers}
    kinds = _pick_kinds(open_kinds, turns, rng)
    return _turns([(rng.choice(ASKED[kind]), picture.answers[kind]) for kind in kinds], 1)


def ask_two(first: Picture, second: Picture, rng: random.Random) -> list[dict[str, str]]:
    """A conversation about two images with different backgrounds: which has the colour, and where the drawing is."""
    order = ("first", "second")
    which = rng.randrange(2)
    color = (first, second)[which].answers["background"]
    other = rng.randrange(2)
    pairs = [
        (f"Which image has a {color} background?", order[which]),
        (f"Where is the drawing in the {order[other]} image?", (first, second)[other].answers["position"]),
    ]
    return _turns(pairs, 2)


def ask_none(turns: int, rng: random.Random) -> list[dict[str, str]]:
    """A conversation of up to `turns` different facts, without an image."""
    return _turns(rng.sample(FACTS, min(turns, len(FACTS))), 0)
