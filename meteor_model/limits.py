"""What images and requests from outside may cost: limits that speak before anything is decoded.

`docs/data.md` and `docs/serving.md` say what is measured at them.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 64 * 2**20
MAX_ASPECT = 512
MAX_SCANS = 64
MAX_CHARACTERS = 2**20
"""Of all turns of a conversation that is trained on."""


@dataclass(frozen=True)
class ImageLimits:
    """The most that is accepted of one image.

    Attributes:
        bytes: of its file.
        pixels: of its picture, by its header.
        aspect: longer side by shorter side; at 512 the shorter one is less than a pixel of a travelling square.
        scans: of a JPEG, each of which costs a pass over all pixels; encoders write about ten.
    """

    bytes: int = MAX_BYTES
    pixels: int = MAX_PIXELS
    aspect: int = MAX_ASPECT
    scans: int = MAX_SCANS


@dataclass(frozen=True)
class RequestLimits:
    """The most that is accepted of one request.

    Attributes:
        image: of each of its images.
        rows: questions.
        characters: of a prompt.
        all_characters: of all its prompts.
        image_bytes: of all its images.
        pixels: of all its images.
    """

    image: ImageLimits = ImageLimits()
    rows: int = 256
    characters: int = 2**16
    all_characters: int = 2**20
    image_bytes: int = MAX_BYTES
    pixels: int = 2 * MAX_PIXELS
