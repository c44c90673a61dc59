"""A folder in storage whose paths are properties, so that no other module spells a name."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.io import storage


@dataclass(frozen=True)
class StoredFolder:
    """Where the paths of one thing begin.

    Attributes:
        url: address of the folder.
    """

    url: str

    def _path(self, *parts: str) -> str:
        return storage.join(self.url, *parts)
