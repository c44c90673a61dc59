"""The one place that makes filesystems and turns their faults into errors a user can act on.

Where S3 is comes from the standard environment and files of S3 clients (`pipelines.io.s3_config`). URLs are
`s3://bucket/prefix` or plain local paths.

Two clients, each for what it does well:
- pyarrow (`arrow_filesystem`): listings (4 times as fast as s3fs), shards, which the manifest's checksum protects,
  uploads of files, Ray Train's storage; with the AWS standard retry;
- s3fs (`fsspec_filesystem`): small objects, whose CRC it checks on reading, copies inside the store, the check of a
  bucket.

A filesystem holds sockets and threads, so it is made on first use inside the process that uses it (never before a
fork): the caches below are keyed by the process id.

Transient faults are retried: each call is made again until `retry_s` after its first fault, so that the restart of a
server costs time and nothing else. What is wrong for good (a missing bucket, refused credentials, a
refused request) fails at once. No try may stall either: one that makes no progress for STALL_S is given up.
"""

import errno
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import pyarrow.fs
from pyarrow.fs import FileInfo, FileSelector, FileType

from meteor_model.foreign import foreign
from pipelines.io.errors import StorageError, TransientError
from pipelines.io.local_disk import FULL, LocalDiskError, no_room
from pipelines.io.retry import RETRY_S, Progress, retry, with_stall_limit
from pipelines.io.s3_config import config_stamp, s3_config

T = TypeVar("T")

S3_SCHEME = "s3://"
CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 30.0
BULK_ATTEMPTS = 2  # of pyarrow within one try of a bulk read, which is retried as a whole
FILESYSTEM_ATTEMPTS = 12  # of pyarrow for Ray, about a minute: with fewer, Ray's controller dies of a server's restart
STALL_S = 60.0
"""Seconds in which PIECE_BYTES of a bulk read must arrive."""
SMALL_READ_S = 300.0
"""Seconds in which the whole object of `read_bytes` must arrive."""
PIECE_BYTES = 16 * 2**20

# How each client words one kind of fault; matched case-insensitively against the texts of the whole exception chain.
_BUCKET_WORDS = ("nosuchbucket", "no_such_bucket", "bucket does not exist")
_CREDENTIAL_WORDS = (
    "access_denied",
    "accessdenied",
    "access denied",
    "forbidden",
    "invalidaccesskeyid",
    "invalid_access_key_id",
    "invalid_client_token_id",
    "signaturedoesnotmatch",
    "signature_does_not_match",
    "does not match the signature",
    "unrecognized_client",
    "unable to locate credentials",
    "nocredentials",
    "missing_authentication_token",
    "expiredtoken",
    "request_expired",
    "config profile",
)
# Requests that no repetition mends. What is not listed here counts as passing: better to wait in vain than to lose.
_REFUSED_WORDS = (
    "invalidargument",
    "invalidrequest",
    "invalid_request",
    "invalidbucketname",
    "invalid bucket name",
    "methodnotallowed",
    "entitytoolarge",
    "keytoolong",
    "notimplemented",
    "paramvalidationerror",
)
_PASSING_ERRNOS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)
_UNREACHABLE_WORDS = (
    "could not connect",
    "couldn't connect",
    "cannot connect",
    "connection refused",
    "name or service not known",
    "could not resolve",
    "couldn't resolve",
    "connect timeout",
    "curlcode: 7",
    "curlcode: 6",
)


class ObjectMissingError(StorageError):
    """The bucket answers, but there is no object (or file) at this address."""


class TransientStorageError(StorageError, TransientError):
    """A fault that may pass: a reset, a time-out, a 5xx, an endpoint that is restarting. Worth a bounded retry."""


# ---------------------------------------------------------------------------------------------------------- addresses


def is_s3(url: str) -> bool:
    """Whether `url` is an object-storage address (anything else is a local path)."""
    return url.startswith(S3_SCHEME)


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


def _check_scheme(url: str) -> None:
    match = re.match(r"^([A-Za-z][A-Za-z0-9+.-]*)://", url)
    if match and match.group(1) != "s3":
        raise StorageError(f"{url!r}: the scheme {match.group(1)!r} is not supported; use s3://BUCKET/PREFIX or a path")


# --------------------------------------------------------------------------------------------------------- filesystems


@lru_cache(maxsize=4)
def _s3fs(pid: int, stamp: str) -> Any:
    config = s3_config()
    return fsspec.filesystem(
        "s3",
        endpoint_url=config.endpoint,
        client_kwargs={"region_name": config.region, "verify": config.ca_bundle},
        config_kwargs={
            "s3": {"addressing_style": "path"},
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": REQUEST_TIMEOUT_S,
            "retries": {"mode": "standard", "max_attempts": 3},
        },
        use_listings_cache=False,  # other processes write to the same prefixes
        skip_instance_cache=True,  # the cache is this function's
    )


@lru_cache(maxsize=8)
def _arrow_s3(pid: int, stamp: str, attempts: int) -> pyarrow.fs.FileSystem:
    config = s3_config()
    # Always said: without, pyarrow would look for AWS_ENDPOINT_URL itself, also where it is to be ignored.
    scheme, _, address = (config.endpoint or f"https://s3.{config.region}.amazonaws.com").partition("://")
    access_key, secret_key, session_token = config.keys or (None, None, None)
    return pyarrow.fs.S3FileSystem(
        access_key=access_key,
        secret_key=secret_key,
        session_token=session_token,
        endpoint_override=address,
        scheme=scheme,
        region=config.region,
        tls_ca_file_path=config.ca_bundle,
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
        force_virtual_addressing=False,
        allow_bucket_creation=False,
    )


def fsspec_filesystem(url: str) -> tuple[Any, str]:
    """The fsspec filesystem for `url` and the path inside it (`bucket/key`, or an absolute local path).

    Raises StorageError for an unsupported scheme or a URL without a bucket.
    """
    _check_scheme(url)
    if is_s3(url):
        bucket, key = split_s3(url)
        return _s3fs(os.getpid(), config_stamp()), f"{bucket}/{key}".rstrip("/")
    return fsspec.filesystem("file"), str(local_path(url))


def local_path(url: str) -> Path:
    """The absolute path of an address that is a local one."""
    return Path(url).expanduser().absolute()


def arrow_filesystem(url: str, attempts: int = FILESYSTEM_ATTEMPTS) -> tuple[pyarrow.fs.FileSystem, str]:
    """The pyarrow filesystem for `url` and the path inside it.

    S3 with the AWS standard retry strategy, which makes each request up to `attempts` times.

    Raises:
        StorageError: for an unsupported scheme, a URL without a bucket, or an endpoint without a scheme.
    """
    _check_scheme(url)
    if is_s3(url):
        bucket, key = split_s3(url)
        return _arrow_s3(os.getpid(), config_stamp(), attempts), f"{bucket}/{key}".rstrip("/")
    return pyarrow.fs.LocalFileSystem(), str(local_path(url))


# -------------------------------------------------------------------------------------------------------------- faults


def _chain_text(error: BaseException) -> str:
    texts: list[str] = []
    current: BaseException | None = error
    while current is not None and len(texts) < 8:
        texts.append(f"{type(current).__name__}: {current}")
        current = current.__cause__ or current.__context__
    return " | ".join(texts).lower()


def _where() -> str:
    config = s3_config()
    return config.endpoint or f"AWS ({config.region})"


def translate(url: str, error: BaseException) -> StorageError:
    """The StorageError that says what `error` means for `url`, from the words of s3fs, botocore or pyarrow."""
    if isinstance(error, StorageError):
        return error
    text = _chain_text(error)
    if not is_s3(url):
        if isinstance(error, FileNotFoundError):
            return ObjectMissingError(f"{url}: no such file or directory")
        if isinstance(error, OSError) and error.errno in FULL:
            return TransientStorageError(f"{url}: {no_room(Path(url).parent, None, 'writing this file')}")
        passing = isinstance(error, OSError) and error.errno in _PASSING_ERRNOS
        return (TransientStorageError if passing else StorageError)(f"{url}: {type(error).__name__}: {error}")
    bucket, _ = split_s3(url)
    if any(word in text for word in _BUCKET_WORDS):
        return StorageError(f"{url}: the bucket {bucket!r} does not exist at {_where()}; create it or correct the URL")
    if isinstance(error, PermissionError) or any(word in text for word in _CREDENTIAL_WORDS):
        return StorageError(
            f"{url}: {_where()} refused the credentials for the bucket {bucket!r}; check AWS_SHARED_CREDENTIALS_FILE "
            "and AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if isinstance(error, FileNotFoundError) or "no_such_key" in text or "path does not exist" in text:
        return ObjectMissingError(f"{url}: no such object in the bucket {bucket!r} at {_where()}")
    # Ray repeats on its own what speaks of an "AWS Error", up to ten times, with all our retries inside each.
    detail = f"{type(error).__name__}: {error}".replace("AWS Error", "S3 error")
    if any(word in text for word in _REFUSED_WORDS):
        return StorageError(f"{url}: {_where()} refused the request: {detail}")
    if any(word in text for word in _UNREACHABLE_WORDS):
        return TransientStorageError(
            f"{url}: the endpoint {_where()} cannot be reached; is the object store up? (AWS_ENDPOINT_URL names it)"
        )
    return TransientStorageError(f"{url}: reading or writing failed at {_where()}: {detail}")


def _storage_faults() -> tuple[type[BaseException], ...]:
    from aiohttp import ClientError as AioHttpError  # s3fs lets those of a body through
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError

    return (OSError, BotoCoreError, ClientError, HTTPClientError, AioHttpError)  # pyarrow's faults are OSErrors


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turn the faults of s3fs, botocore and pyarrow inside the block into StorageErrors that name `url`."""
    try:
        yield
    except LocalDiskError:  # no fault of storage, and no repetition mends it
        raise
    except _storage_faults() as error:
        raise translate(url, error) from error


def require_bucket(url: str) -> None:
    """Raise StorageError unless the bucket of `url` exists and the credentials may use it; nothing for local paths.

    Nothing is retried: jobs ask it first, and who mistypes an address wants to know at once.
    """
    if not is_s3(url):
        return
    bucket, _ = split_s3(url)
    fs, _ = fsspec_filesystem(url)
    try:
        with storage_errors(url):
            fs.call_s3("head_bucket", Bucket=bucket)
    except ObjectMissingError as error:  # HEAD carries no body, so a missing bucket says only "404"
        raise StorageError(
            f"{url}: the bucket {bucket!r} does not exist at {_where()}; create it or correct the URL"
        ) from error


# ------------------------------------------------------------------------------------------------ reading and writing


def _missing(url: str, error: ObjectMissingError) -> StorageError:
    """Tell a missing bucket from a missing object: S3 answers a plain 404 to a HEAD of either."""
    try:
        require_bucket(url)
    except StorageError as bucket_error:
        return bucket_error
    return error


def retried(url: str, call: Callable[[], T], retry_s: float = RETRY_S) -> T:
    """The result of a call to a client, made again for `retry_s` seconds; its faults are StorageErrors."""

    def attempt() -> T:
        try:
            with storage_errors(url):
                return call()
        except ObjectMissingError as error:
            raise _missing(url, error) from error

    return retry(attempt, url, retry_s=retry_s)


def read_bytes(url: str, retry_s: float = RETRY_S) -> bytes:
    """The whole object. Raises ObjectMissingError, StorageError, or, after `retry_s`, TransientStorageError."""

    def read(_: Progress) -> bytes:
        fs, path = fsspec_filesystem(url)  # it notices a byte that flips on the wire, by S3's CRC; pyarrow does not
        return bytes(fs.cat_file(path))

    return retried(url, lambda: with_stall_limit(read, SMALL_READ_S), retry_s)


def read_bulk(url: str, retry_s: float = RETRY_S) -> bytes:
    """The whole object through pyarrow (ranged GETs of PIECE_BYTES); for shards. Errors as read_bytes."""

    def read(progress: Progress) -> bytes:
        fs, path = arrow_filesystem(url, BULK_ATTEMPTS)
        with fs.open_input_file(path) as stream:
            pieces = []
            while piece := stream.read(PIECE_BYTES):
                progress.note()
                pieces.append(piece)
                if len(piece) < PIECE_BYTES:
                    break
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    return retried(url, lambda: with_stall_limit(read, STALL_S), retry_s)


def write_bytes(url: str, data: bytes, retry_s: float = RETRY_S) -> None:
    """Write the whole object at once: a reader sees all of it or nothing. Raises StorageError."""

    def write() -> None:
        fs, path = fsspec_filesystem(url)
        if is_s3(url):
            fs.pipe_file(path, data)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
            Path(name).chmod(0o644)
            Path(name).replace(target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    retried(url, write, retry_s)


def delete(url: str, retry_s: float = RETRY_S) -> None:
    """Remove one object; one that is not there is no error. Raises StorageError."""

    def remove() -> None:
        fs, path = fsspec_filesystem(url)
        try:
            fs.rm_file(path)
        except FileNotFoundError:
            return

    retried(url, remove, retry_s)


def exists(url: str, retry_s: float = RETRY_S) -> bool:
    """Whether an object or a prefix with objects is there. A missing bucket is a StorageError, not False."""

    def ask() -> bool:
        fs, path = arrow_filesystem(url, BULK_ATTEMPTS)
        found = fs.get_file_info(path).type != FileType.NotFound
        if not found:
            require_bucket(url)
        return found

    return retried(url, ask, retry_s)


def _entries(url: str, recursive: bool) -> tuple[str, list[FileInfo]]:
    """The path of a prefix with a slash at its end, and what lies below it. StorageError for a missing bucket."""
    fs, path = arrow_filesystem(url, BULK_ATTEMPTS)
    found = fs.get_file_info(FileSelector(path, allow_not_found=True, recursive=recursive))
    if not found:
        require_bucket(url)
    return f"{path.rstrip('/')}/", found


def list_sizes(url: str, retry_s: float = RETRY_S) -> dict[str, int]:
    """Bytes of every file below a prefix by its path relative to it, sorted by path; {} where there are none.

    A missing bucket is a StorageError.
    """

    def find() -> dict[str, int]:
        root, found = _entries(url, recursive=True)
        files = {entry.path.removeprefix(root): int(entry.size) for entry in found if entry.type == FileType.File}
        return dict(sorted(files.items()))

    return retried(url, find, retry_s)


def list_files(url: str, retry_s: float = RETRY_S) -> list[str]:
    """Paths of all files below a prefix, relative to it, sorted; [] where there are none. Raises StorageError."""
    return list(list_sizes(url, retry_s))


def list_folders(url: str, retry_s: float = RETRY_S) -> list[str]:
    """Names of the folders directly below a prefix, sorted; [] where there are none.

    One listing (S3 gives a thousand names a page), whatever the folders hold. Raises StorageError, also for a missing
    bucket.
    """

    def find() -> list[str]:
        _, found = _entries(url, recursive=False)
        return sorted(entry.base_name for entry in found if entry.type == FileType.Directory)

    return retried(url, find, retry_s)


def read_json(url: str, retry_s: float = RETRY_S) -> Any:
    """Parse the object as JSON. Raises StorageError naming the URL when it is not JSON; else as read_bytes."""
    data = read_bytes(url, retry_s)
    with foreign(lambda what: StorageError(f"{url}: not JSON: {what}")):
        return json.loads(data)


def write_json(url: str, value: Any, retry_s: float = RETRY_S) -> None:
    """Write `value` as indented JSON with sorted keys. Raises StorageError."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    write_bytes(url, text.encode(), retry_s)
