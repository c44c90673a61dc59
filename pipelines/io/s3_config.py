"""What the S3 client is made with: the environment, then the files of the AWS command line.

    endpoint    AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, the profile's `services` section for s3, its `endpoint_url`;
                none where AWS_IGNORE_CONFIGURED_ENDPOINT_URLS (or the profile) says so
    region      AWS_REGION, AWS_DEFAULT_REGION, the profile's `region`, us-east-1 (self-hosted stores take any)
    CA bundle   AWS_CA_BUNDLE, the profile's `ca_bundle`
    proxy       HTTPS_PROXY, HTTP_PROXY, NO_PROXY
    checksums   AWS_REQUEST_CHECKSUM_CALCULATION, AWS_RESPONSE_CHECKSUM_VALIDATION: `when_required` for a store that
                does not know AWS's newer checksums (some releases of Ceph, R2, the S3 side of GCS)
    addressing  METEOR_S3_ADDRESSING: `path` or `virtual` (the bucket in the host's name), the profile's
                `addressing_style`; else `virtual` for AWS and `path` for an endpoint
    encryption  METEOR_S3_SSE: `AES256`, `aws:kms` or `aws:kms:dsse`, sent with every write; METEOR_S3_SSE_KMS_KEY: its
                key. Without, the bucket's own default applies

The profile is AWS_PROFILE, AWS_DEFAULT_PROFILE or `default`; the file is AWS_CONFIG_FILE or ~/.aws/config. Keys,
assumed roles and tokens are botocore's to find and to renew.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipelines.io.errors import StorageError
from pipelines.io.fingerprint import sha256

DEFAULT_REGION = "us-east-1"
ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
REGION_VARIABLES = ("AWS_REGION", "AWS_DEFAULT_REGION")
ADDRESSING_VARIABLE = "METEOR_S3_ADDRESSING"
SSE_VARIABLE = "METEOR_S3_SSE"
KMS_KEY_VARIABLE = "METEOR_S3_SSE_KMS_KEY"
ENCRYPTIONS = ("AES256", "aws:kms", "aws:kms:dsse")
ADDRESSINGS = ("path", "virtual")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
_FILES = {"AWS_CONFIG_FILE": "~/.aws/config", "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials"}


@dataclass(frozen=True)
class S3Config:
    """What the S3 client is made with.

    Attributes:
        endpoint: scheme://host:port of the store; None for AWS itself.
        region: that requests are signed for.
        ca_bundle: file of the certificates to trust; None for the system's.
        addressing: `path` or `virtual`; None leaves it to the profile and the endpoint.
        encryption: arguments of every write that say how the store is to encrypt.
    """

    endpoint: str | None
    region: str
    ca_bundle: str | None = None
    addressing: str | None = None
    encryption: Mapping[str, str] = field(default_factory=dict)


def s3_config() -> S3Config:
    """The configuration as environment and files are now.

    Raises:
        StorageError: naming the variable, profile or file that is wrong, and what to write.
    """
    return _read(config_stamp())


def config_stamp() -> str:
    """A hash that changes with anything the configuration or a client's credentials are read from; holds no secret."""
    values = [f"{name}={value}" for name, value in sorted(os.environ.items()) if _matters(name)]
    for variable, usual in _FILES.items():
        path = Path(os.environ.get(variable) or usual).expanduser()
        try:
            status = path.stat()
            values.append(f"{path} {status.st_mtime_ns} {status.st_size}")
        except OSError:
            values.append(f"{path} is not there")
    return sha256("\n".join(values))


def _matters(name: str) -> bool:
    return name.startswith(("AWS_", "METEOR_S3_")) or name.lower() in _PROXIES


@lru_cache(maxsize=8)
def _read(stamp: str) -> S3Config:
    import botocore.exceptions
    import botocore.session  # here: a tenth of a second, which local paths do not need

    profiles = [os.environ.get("AWS_PROFILE"), os.environ.get("AWS_DEFAULT_PROFILE")]
    if all(profiles) and profiles[0] != profiles[1]:
        raise StorageError(
            f"AWS_PROFILE is {profiles[0]!r} and AWS_DEFAULT_PROFILE is {profiles[1]!r}, and clients differ in which "
            "one they take: unset one of them"
        )
    session = botocore.session.Session()
    try:
        profile = session.get_scoped_config()
        found = _endpoint(session, profile)
        region = _first(REGION_VARIABLES) or profile.get("region") or DEFAULT_REGION
        ca_bundle = session.get_config_variable("ca_bundle")
    except botocore.exceptions.ProfileNotFound as error:
        raise StorageError(
            f"AWS_PROFILE names the profile {session.profile!r}, which is in neither {_place('AWS_CONFIG_FILE')} nor "
            f"{_place('AWS_SHARED_CREDENTIALS_FILE')}: correct the variable or add the profile"
        ) from error
    except botocore.exceptions.ConfigParseError as error:
        raise StorageError(f"{_place('AWS_CONFIG_FILE')} cannot be read: {error}; mend or remove it") from error
    if found is not None and not re.match(r"^https?://[^/\s]", found[1]):
        raise StorageError(f"{found[0]}={found[1]!r} has no scheme; write it as http://HOST:PORT")
    addressing = _choice(ADDRESSING_VARIABLE, ADDRESSINGS)
    return S3Config(found[1].rstrip("/") if found else None, region, ca_bundle, addressing, _encryption())


def _choice(variable: str, allowed: tuple[str, ...]) -> str | None:
    value = os.environ.get(variable) or None
    if value is not None and value not in allowed:
        raise StorageError(f"{variable}={value!r} is not one of {', '.join(allowed)}")
    return value


def _encryption() -> dict[str, str]:
    kind, key = _choice(SSE_VARIABLE, ENCRYPTIONS), os.environ.get(KMS_KEY_VARIABLE)
    if key and (kind is None or not kind.startswith("aws:kms")):
        raise StorageError(f"{KMS_KEY_VARIABLE} names a key and {SSE_VARIABLE} is {kind}: set it to aws:kms")
    arguments = {} if kind is None else {"ServerSideEncryption": kind}
    return arguments | ({"SSEKMSKeyId": key} if key else {})


def _endpoint(session: Any, profile: Mapping[str, Any]) -> tuple[str, str] | None:
    """Where the endpoint is named, and the endpoint."""
    if session.get_config_variable("ignore_configured_endpoint_urls"):
        return None
    for variable in ENDPOINT_VARIABLES:
        if value := os.environ.get(variable):
            return variable, value
    services = session.full_config.get("services", {}).get(profile.get("services"), {})
    s3 = services.get("s3", {})
    for section in (s3 if isinstance(s3, Mapping) else {}, profile):
        if value := section.get("endpoint_url"):
            return f"endpoint_url of {_place('AWS_CONFIG_FILE')}", value
    return None


def _first(variables: tuple[str, ...]) -> str | None:
    return next((value for name in variables if (value := os.environ.get(name))), None)


def _place(variable: str) -> str:
    return os.environ.get(variable) or _FILES[variable]


__all__ = ["DEFAULT_REGION", "S3Config", "config_stamp", "s3_config"]
