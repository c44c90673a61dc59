"""Where S3 is, read once for every client: the environment, then the files of the AWS command line.

botocore knows `endpoint_url` and `services` sections of ~/.aws/config and not AWS_REGION; the AWS library inside
pyarrow knows AWS_REGION and no `endpoint_url`. Left to themselves they would go to two stores. Both get what is here:

    endpoint   AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, the profile's `services` section for s3, its `endpoint_url`;
               none where AWS_IGNORE_CONFIGURED_ENDPOINT_URLS (or the profile) says so
    region     AWS_REGION, AWS_DEFAULT_REGION, the profile's `region`, us-east-1 (self-hosted stores take any)
    CA bundle  AWS_CA_BUNDLE, the profile's `ca_bundle`

The profile is AWS_PROFILE, AWS_DEFAULT_PROFILE or `default`; the file is AWS_CONFIG_FILE or ~/.aws/config. Credentials
are each client's own to find: both follow AWS's one order, and renew those that expire. Only the profile of
AWS_DEFAULT_PROFILE, which pyarrow does not know, is looked up for it.
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
_FILES = {"AWS_CONFIG_FILE": "~/.aws/config", "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials"}


@dataclass(frozen=True)
class S3Config:
    """What every S3 client is made with.

    Attributes:
        endpoint: scheme://host:port of the store; None for AWS itself.
        region: that requests are signed for.
        ca_bundle: file of the certificates to trust; None for the system's.
        keys: access key, secret key and session token or None, for a client that would not find them itself.
    """

    endpoint: str | None
    region: str
    ca_bundle: str | None = None
    keys: tuple[str, str, str | None] | None = field(default=None, repr=False)


def s3_config() -> S3Config:
    """The configuration as environment and files are now.

    Raises:
        StorageError: naming the variable, profile or file that is wrong, and what to write.
    """
    return _read(config_stamp())


def config_stamp() -> str:
    """A hash that changes with anything the configuration or a client's credentials are read from; holds no secret."""
    values = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("AWS_")]
    for variable, usual in _FILES.items():
        path = Path(os.environ.get(variable) or usual).expanduser()
        try:
            status = path.stat()
            values.append(f"{path} {status.st_mtime_ns} {status.st_size}")
        except OSError:
            values.append(f"{path} is not there")
    return sha256("\n".join(values))


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
        keys = None if profiles[0] or not profiles[1] else _lasting_keys(session)
    except botocore.exceptions.ProfileNotFound as error:
        raise StorageError(
            f"AWS_PROFILE names the profile {session.profile!r}, which is in neither {_place('AWS_CONFIG_FILE')} nor "
            f"{_place('AWS_SHARED_CREDENTIALS_FILE')}: correct the variable or add the profile"
        ) from error
    except botocore.exceptions.ConfigParseError as error:
        raise StorageError(f"{_place('AWS_CONFIG_FILE')} cannot be read: {error}; mend or remove it") from error
    if found is not None and not re.match(r"^https?://[^/\s]", found[1]):
        raise StorageError(f"{found[0]}={found[1]!r} has no scheme; write it as http://HOST:PORT")
    return S3Config(found[1].rstrip("/") if found else None, region, ca_bundle, keys)


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


def _lasting_keys(session: Any) -> tuple[str, str, str | None] | None:
    from botocore.credentials import RefreshableCredentials

    found = session.get_credentials()
    if isinstance(found, RefreshableCredentials):
        raise StorageError("AWS_DEFAULT_PROFILE names a profile whose keys expire: name it in AWS_PROFILE instead")
    return None if found is None else (found.access_key, found.secret_key, found.token)


def _first(variables: tuple[str, ...]) -> str | None:
    return next((value for name in variables if (value := os.environ.get(name))), None)


def _place(variable: str) -> str:
    return os.environ.get(variable) or _FILES[variable]


__all__ = ["DEFAULT_REGION", "S3Config", "config_stamp", "s3_config"]
