"""Writing to this machine's disk: what does not fit is an error that names disk, folder and need.

Libraries say it in their own words (torch's archive writer: "unexpected pos 576 vs 534"), so every place that writes
more than a little does it inside `writing`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.io.disk_room import FULL, LocalDiskError, existing_part, free_bytes, no_room
from pipelines.io.node_copies import make_room

_WORDS = (
    "unexpected pos",
    "no space left",
    "disk quota exceeded",
    "file too large",
    "pytorchstreamwriter failed",
    " requested and ",
)
_RESERVE_BYTES = 2**20


@contextmanager
def writing(folder: Path, need: int | None, what: str) -> Iterator[None]:
    """Files are written below `folder` in this block.

    Args:
        folder: where; it need not be there yet.
        need: bytes that come; None where nobody knows. Copies that nobody has open make room for them; more than are
            free then is an error before anything is written.
        what: names it for people.

    Raises:
        LocalDiskError: there is no room, found before or while writing, whatever the writer raised.
    """
    if need is not None and need + _RESERVE_BYTES > free_bytes(folder):
        make_room(existing_part(folder), need + _RESERVE_BYTES)
    if need is not None and need + _RESERVE_BYTES > free_bytes(folder):
        raise LocalDiskError(no_room(folder, need, what))
    try:
        yield
    except Exception as error:
        if isinstance(error, LocalDiskError) or not is_disk_full(error):
            raise
        raise LocalDiskError(f"{no_room(folder, need, what)} ({type(error).__name__}: {str(error)[:200]})") from error


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that a file could not grow."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:  # chains of exceptions may run in circles
        chain.append(current)
        current = current.__cause__ or current.__context__
    return any(
        (isinstance(one, OSError) and one.errno in FULL) or any(word in str(one).lower() for word in _WORDS)
        for one in chain
    )
