"""What a job asks of its storage before anything is started: one small object written, listed, read and removed.

That is all that a run will do, so a right that is missing is named at once, not hours later. A policy for one prefix is
enough: nothing is asked of the bucket itself.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable

from pipelines.io import bulk, ranged
from pipelines.io.addresses import is_s3, join, split_s3
from pipelines.io.errors import StorageError
from pipelines.io.s3_client import s3_client
from pipelines.io.s3_config import s3_config
from pipelines.io.storage_faults import RIGHTS, ForbiddenError, ObjectMissingError, storage_errors, where

PROBE = ".meteor-check"
_CONTENT = b"Written by a start check; it may be removed.\n"


def require_access(url: str) -> None:
    """Raise StorageError unless objects below `url` can be written, listed, read and removed; nothing for local paths.

    Nothing is retried: jobs ask it first, and who mistypes an address wants to know at once.

    Args:
        url: s3://BUCKET/PREFIX. An object `.meteor-check-...` is made there and removed.

    Raises:
        StorageError: naming every right that is missing, or what else is wrong.
    """
    if not is_s3(url):
        return
    probe = join(url, f"{PROBE}-{uuid.uuid4().hex}")
    bucket, key = split_s3(probe)
    place = {"Bucket": bucket, "Key": key}
    denied: list[str] = []

    def allowed(what: str, operation: str, call: Callable[[], object]) -> bool:
        try:
            with storage_errors(url):
                call()
        except ForbiddenError:
            denied.append(f"{what} ({RIGHTS[operation]})")
            return False
        return True

    written = allowed("write", "PutObject", lambda: bulk.put_once(probe, _CONTENT))
    allowed("list", "ListObjectsV2", lambda: s3_client().list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1))
    try:
        allowed("read", "GetObject", lambda: _compare(url, ranged.read_checked(s3_client().get_object(**place))))
    except ObjectMissingError:
        if written:
            raise
    if written:
        allowed("upload in parts", "AbortMultipartUpload", lambda: _begin_and_abort(place))
        removed = allowed("remove", "DeleteObject", lambda: s3_client().delete_object(**place))
        if not removed:
            denied.append(f"so {probe} stays there")
    if denied:
        raise StorageError(
            f"{url}: {where()} knows the credentials, but they may not {', '.join(denied)} in the bucket {bucket!r} "
            f"below this prefix. A policy needs {', '.join(sorted(set(RIGHTS.values()) - {RIGHTS['CopyObject']}))}"
        )


def _begin_and_abort(place: dict[str, str]) -> None:
    created = s3_client().create_multipart_upload(**place, **s3_config().encryption)
    s3_client().abort_multipart_upload(**place, UploadId=created["UploadId"])


def _compare(url: str, data: bytes) -> None:
    if data != _CONTENT:
        raise StorageError(f"{url}: {where()} gives back other bytes than were written; is it an object store?")
