"""JPEG through libjpeg, whose warnings count.

libjpeg goes on where a file is damaged: half a file with zeros behind it becomes a picture with a grey lower half. It
says so in a warning, which neither torchvision nor Pillow hands on: torchvision's copy writes it to the process's
standard error, Pillow's nowhere. So standard error is listened to while torchvision decodes, by one thread at a time.
What other threads write in these milliseconds is passed on; a process that another thread starts in them has its
standard error lost.

What is heard: entropy-coded data that end too early or go on too long, codes that do not exist, restart marks that are
missing, scans that contradict each other. What cannot be heard: a JPEG has no checksum, so flipped bits that leave
everything in step decode to other pixels.
"""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

RGB = 3
"""torchvision's `ImageReadMode.RGB`."""
_STANDARD_ERROR = 2
_WARNING = re.compile(
    rb"^(?:Corrupt JPEG data: |Premature end of JPEG file|Inconsistent progression sequence |Invalid SOS parameters "
    rb"|Warning: unknown JFIF revision |Unknown Adobe color transform |Application transferred )[^\n]*\n",
    re.MULTILINE,
)
_hearing = threading.Lock()


def _hear_anew() -> None:
    global _hearing
    _hearing = threading.Lock()


os.register_at_fork(after_in_child=_hear_anew)


class JpegDamageError(ValueError):
    """A JPEG that libjpeg refuses, or decodes with a warning; the text is libjpeg's."""


def decode_whole_jpeg(data: bytes) -> torch.Tensor:
    """Uint8 (3, H, W), RGB, not turned, of a JPEG without a fault that libjpeg sees. Raises JpegDamageError."""
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    with _hearing, _scratch_file() as heard:
        try:
            with _standard_error_to(heard):
                image_3HW = _decoder()(encoded)
        except RuntimeError as error:
            raise JpegDamageError(str(error).rpartition(", ")[2]) from error
        heard.seek(0)
        text = heard.read()
    if others := _WARNING.sub(b"", text):
        os.write(_STANDARD_ERROR, others)
    if warning := _WARNING.search(text):
        raise JpegDamageError(warning.group().decode(errors="replace").strip())
    return image_3HW


@cache
def _decoder() -> Callable[[Tensor], Tensor]:
    """Torchvision's decoder to RGB. Its library alone is loaded where it is found: the package costs a second more."""
    found = importlib.util.find_spec("torchvision")
    folder = Path(found.origin).parent if found is not None and found.origin else Path()
    for library in folder.glob("image*.so"):
        torch.ops.load_library(str(library))
        if hasattr(torch.ops.image, "decode_jpeg"):
            return lambda encoded: torch.ops.image.decode_jpeg(encoded, RGB)
    from torchvision.io import ImageReadMode, decode_jpeg  # another layout of the package

    return lambda encoded: decode_jpeg(encoded, mode=ImageReadMode.RGB)


def _scratch_file() -> IO[bytes]:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("libjpeg"), "w+b")
    return tempfile.TemporaryFile()


@contextmanager
def _standard_error_to(file: IO[bytes]) -> Iterator[None]:
    try:
        before = os.dup(_STANDARD_ERROR)
    except OSError:  # a process without one
        before = None
    os.dup2(file.fileno(), _STANDARD_ERROR)
    try:
        yield
    finally:
        if before is None:
            os.close(_STANDARD_ERROR)
        else:
            os.dup2(before, _STANDARD_ERROR)
            os.close(before)
