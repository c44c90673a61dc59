"""Addresses of what is stored: `s3://BUCKET/KEY`, or plain local paths."""

from __future__ import annotations

import re
from pathlib import Path

from pipelines.io.errors import StorageError

S3_SCHEME = "s3://"


def is_s3(url: str) -> bool:
    """Whether `url` is an object-storage address; anything else is a local path.

    Raises StorageError for another scheme.
    """
    match = re.match(r"^([A-Za-z][A-Za-z0-9+.-]*)://", url)
    if match and match.group(1) != "s3":
        raise StorageError(f"{url!r}: the scheme {match.group(1)!r} is not supported; use s3://BUCKET/PREFIX or a path")
    return match is not None


def split_s3(url: str) -> tuple[str, str]:
    """`s3://bucket/a/b` -> ("bucket", "a/b"). Raises StorageError when the bucket is missing, or for steps upwards."""
    bucket, _, key = url.removeprefix(S3_SCHEME).partition("/")
    if {".", ".."} & set(key.split("/")):
        raise StorageError(f"{url!r} has a part '.' or '..': a store has no folders to go up; write the prefix itself")
    if not bucket:
        raise StorageError(f"{url!r} names no bucket; write it as s3://BUCKET/PREFIX")
    return bucket, key.strip("/")


def join(url: str, *parts: str) -> str:
    """Append path parts to a URL or a local path; a part may hold slashes of its own."""
    pieces = [part.strip("/") for part in parts]
    root = url.rstrip("/")
    return "/".join([root, *(piece for piece in pieces if piece)]) or "/"


def local_path(url: str) -> Path:
    """The absolute path of an address that is a local one."""
    return Path(url).expanduser().absolute()
