"""What goes wrong with storage, told apart by S3's code and not by words: each an error that says what to do.

Transient faults may be tried again; what is wrong for good (a missing bucket, a refused right, a clock that is off)
fails at once. A code that no table names counts as passing: better to wait in vain than to lose.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pipelines.io.addresses import is_s3, split_s3
from pipelines.io.disk_room import FULL, LocalDiskError, no_room
from pipelines.io.errors import StorageError, TransientError
from pipelines.io.retry import RETRY_S, StalledError, retry
from pipelines.io.s3_config import KMS_KEY_VARIABLE, SSE_VARIABLE, s3_config

T = TypeVar("T")


class ObjectMissingError(StorageError):
    """The bucket answers, but there is no object (or file) at this address."""


class ForbiddenError(StorageError):
    """The store knows who asks and does not allow it."""


class TransientStorageError(StorageError, TransientError):
    """A fault that may pass: a reset, a time-out, a 5xx, an endpoint that is restarting. Worth a bounded retry."""


CHECKSUMS = (
    "A store that is not AWS may not know AWS's newer checksums: AWS_REQUEST_CHECKSUM_CALCULATION=when_required and "
    "AWS_RESPONSE_CHECKSUM_VALIDATION=when_required switch them off"
)
RIGHTS = {
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject",
    "ListObjectsV2": "s3:ListBucket",
    "DeleteObject": "s3:DeleteObject",
    "CopyObject": "s3:GetObject and s3:PutObject",
    "UploadPartCopy": "s3:GetObject and s3:PutObject",
}
"""The right that each operation needs, as policies name it."""

BUCKET_CODES = frozenset({"NoSuchBucket"})
MISSING_CODES = frozenset({"NoSuchKey", "NotFound", "404"})
FORBIDDEN_CODES = frozenset({"AccessDenied", "AllAccessDisabled", "AccountProblem", "Forbidden", "403"})
CREDENTIAL_CODES = frozenset(
    {
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "InvalidToken",
        "InvalidClientTokenId",
        "UnrecognizedClientException",
        "MissingAuthenticationToken",
        "MissingSecurityHeader",
        "InvalidSecurity",
        "AuthFailure",
        "401",
    }
)
EXPIRED_CODES = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"})
CLOCK_CODES = frozenset({"RequestTimeTooSkewed", "RequestExpired", "RequestInTheFuture"})
REGION_CODES = frozenset(
    {
        "AuthorizationHeaderMalformed",
        "PermanentRedirect",
        "IllegalLocationConstraintException",
        "IncorrectEndpoint",
        "301",
        "307",
    }
)
CHECKSUM_CODES = frozenset(
    {"NotImplemented", "501", "MissingContentLength", "411", "XAmzContentSHA256Mismatch", "MalformedTrailerError"}
)
"""Also what such stores say of a body with a checksum that they do not know."""
REFUSED_CODES = frozenset(
    {
        "InvalidArgument",
        "InvalidRequest",
        "InvalidBucketName",
        "InvalidDigest",
        "MethodNotAllowed",
        "405",
        "EntityTooLarge",
        "EntityTooSmall",
        "KeyTooLongError",
        "KeyTooLong",
        "MalformedXML",
        "InvalidURI",
        "InvalidStorageClass",
    }
)
"""Requests that no repetition mends."""

_PASSING_ERRNOS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)


def where() -> str:
    """The store, for people."""
    config = s3_config()
    return config.endpoint or f"AWS ({config.region})"


def code_of(error: BaseException) -> str:
    """S3's code of an error of the client; "" where there was no answer."""
    response: Any = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def translate(url: str, error: BaseException) -> StorageError:
    """The StorageError that says what an error of the client, or of the local disk, means for `url`."""
    if isinstance(error, StorageError):
        return error
    if not is_s3(url):
        return _of_disk(url, error)
    code = code_of(error)
    return _of_answer(url, code, error) if code else _of_connection(url, error)


def _of_disk(url: str, error: BaseException) -> StorageError:
    if isinstance(error, FileNotFoundError):
        return ObjectMissingError(f"{url}: no such file or directory")
    if isinstance(error, OSError) and error.errno in FULL:
        return TransientStorageError(f"{url}: {no_room(Path(url).parent, None, 'writing this file')}")
    passing = isinstance(error, StalledError) or (isinstance(error, OSError) and error.errno in _PASSING_ERRNOS)
    return (TransientStorageError if passing else StorageError)(f"{url}: {type(error).__name__}: {error}")


def _of_answer(url: str, code: str, error: Any) -> StorageError:
    """What the store's answer means; its code is known."""
    bucket, _ = split_s3(url)
    place = where()
    operation = getattr(error, "operation_name", "")
    for codes, text in (
        (BUCKET_CODES, f"the bucket {bucket!r} does not exist at {place}; create it or correct the URL"),
        (CREDENTIAL_CODES, _credentials(bucket, place, code)),
        (EXPIRED_CODES, f"the credentials for the bucket {bucket!r} have expired ({code}): renew them, or use a role"),
        (CLOCK_CODES, _clock(place, code)),
        (REGION_CODES, _region(bucket, place, error)),
    ):
        if code in codes:
            return StorageError(f"{url}: {text}")
    detail = f"{code}: {error}"
    if code in MISSING_CODES:
        return ObjectMissingError(f"{url}: no such object in the bucket {bucket!r} at {place}")
    if code.startswith("KMS."):
        return StorageError(
            f"{url}: {place} cannot use the encryption key: {detail}; check {KMS_KEY_VARIABLE} and the right to use it"
        )
    if code in FORBIDDEN_CODES:
        return ForbiddenError(f"{url}: {_forbidden(bucket, place, operation, code)}")
    if code in CHECKSUM_CODES:
        return StorageError(f"{url}: {place} refused the request: {detail}. {CHECKSUMS}")
    if code in REFUSED_CODES:
        return StorageError(f"{url}: {place} refused the request: {detail}")
    return TransientStorageError(f"{url}: reading or writing failed at {place}: {detail}")


def _credentials(bucket: str, place: str, code: str) -> str:
    hint = "" if code != "SignatureDoesNotMatch" or place.startswith("AWS") else f". Or: {CHECKSUMS}"
    return (
        f"{place} refused the credentials for the bucket {bucket!r} ({code}); check AWS_SHARED_CREDENTIALS_FILE and "
        f"AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY{hint}"
    )


def _forbidden(bucket: str, place: str, operation: str, code: str) -> str:
    right = RIGHTS.get(operation, operation)
    text = f"{place} does not allow {operation} in the bucket {bucket!r} ({code}); the credentials need {right} there"
    if right.endswith("PutObject"):
        text += f" (a bucket that takes encrypted writes alone wants {SSE_VARIABLE})"
    return text


def _clock(place: str, code: str) -> str:
    return (
        f"the clock of this machine differs from that of {place} ({code}): set it, e.g. by NTP; the keys may be right"
    )


def _region(bucket: str, place: str, error: Any) -> str:
    response = error.response
    headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region = response.get("Error", {}).get("Region") or headers.get("x-amz-bucket-region")
    lies = (
        f"lies in the region {region}: set AWS_REGION={region}" if region else "lies in another region: set AWS_REGION"
    )
    return f"the bucket {bucket!r} is not served here by {place} ({code_of(error)}); it {lies}"


def _of_connection(url: str, error: BaseException) -> StorageError:
    """What it means that there was no answer, or not the whole of one."""
    from botocore import exceptions as boto

    bucket, _ = split_s3(url)
    place = where()
    detail = f"{type(error).__name__}: {error}"
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError):
        return StorageError(f"{url}: {_credentials(bucket, place, str(error))}")
    if isinstance(error, boto.TokenRetrievalError | boto.UnauthorizedSSOTokenError | boto.SSOError):
        return StorageError(f"{url}: {_credentials(bucket, place, str(error))}")
    if isinstance(error, boto.ParamValidationError | boto.InvalidRegionError | boto.InvalidProxiesConfigError):
        return StorageError(f"{url}: {place} cannot be asked this: {detail}")
    if isinstance(error, boto.ProxyConnectionError):
        return TransientStorageError(
            f"{url}: the proxy on the way to {place} cannot be reached ({detail}); HTTPS_PROXY and HTTP_PROXY name it, "
            "NO_PROXY lists what needs none"
        )
    if isinstance(error, boto.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return StorageError(
            f"{url}: the certificate of {place} is not trusted ({detail}); AWS_CA_BUNDLE names the file of a private CA"
        )
    if isinstance(error, boto.EndpointConnectionError | boto.ConnectTimeoutError):
        return TransientStorageError(
            f"{url}: the endpoint {place} cannot be reached; is the object store up? (AWS_ENDPOINT_URL names it)"
        )
    return TransientStorageError(f"{url}: reading or writing failed at {place}: {detail}")


def _storage_faults() -> tuple[type[BaseException], ...]:
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
    from urllib3.exceptions import HTTPError

    return (OSError, BotoCoreError, ClientError, HTTPClientError, HTTPError)


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turn the faults of the client and of the disk inside the block into StorageErrors that name `url`."""
    try:
        yield
    except LocalDiskError:  # no fault of storage, and no repetition mends it
        raise
    except OSError as error:
        raise translate(url, error) from error
    except _storage_faults() as error:
        raise translate(url, error) from error


def retried(url: str, call: Callable[[], T], retry_s: float = RETRY_S) -> T:
    """The result of a call to the client, made again for `retry_s` seconds; its faults are StorageErrors."""

    def attempt() -> T:
        with storage_errors(url):
            return call()

    return retry(attempt, url, retry_s=retry_s)
