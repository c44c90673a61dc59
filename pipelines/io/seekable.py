"""A file that is read at any place and lies somewhere else: what such files have in common."""

from __future__ import annotations

import io


class SeekableFile(io.RawIOBase):
    """Keeps the place; whoever derives from it reads from `_at` and moves it on.

    Args:
        size: bytes up to the end.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size, self._at = size, 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """The place."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a place, counted from the beginning, from here or from the end. Returns it."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at
