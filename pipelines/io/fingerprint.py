"""Digests: of bytes, files and JSON values. The only module that hashes.

Names of runs, checkpoints, manifests, scores and outputs hold these digests, so none of the forms may ever change.
"""

import hashlib
import json
from pathlib import Path
from typing import Any


def canonical_json(value: Any) -> str:
    """One text for equal values: sorted keys, no spaces, no escapes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def sha256_bytes(data: bytes) -> bytes:
    """The 32 bytes of the SHA-256 of `data`."""
    return hashlib.sha256(data).digest()


def sha256(data: bytes | str) -> str:
    """The SHA-256 of bytes, or of a text as UTF-8, as 64 hexadecimal digits; cut them for a short one."""
    return sha256_bytes(data.encode() if isinstance(data, str) else data).hex()


def sha256_of_json(value: Any) -> str:
    """That of a value's canonical JSON."""
    return sha256(canonical_json(value))


class RunningSha256:
    """The SHA-256 of bytes that come in pieces."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, piece: bytes) -> None:
        """The next piece."""
        self._hash.update(piece)

    def hex(self) -> str:
        """64 hexadecimal digits, of all pieces so far."""
        return self._hash.hexdigest()


def sha256_of_file(path: Path) -> str:
    """That of a local file, which is read in pieces. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
