"""Which variables of the submitter's environment a job on a cluster needs, and which of them are secret.

Ray gives a job the environment of its nodes and what is in its runtime environment, nothing of the submitter's shell.
A runtime environment can be read by everybody who sees the cluster's jobs, in the dashboard and in Ray's API.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.io.git import COMMIT_VARIABLE
from pipelines.io.redact import is_secret_name, redact_text

CARRIED = (
    # places
    "METEOR_STORAGE",
    "METEOR_PARTS_DIR",
    COMMIT_VARIABLE,
    # the object store (pipelines/io/s3_config.py)
    "METEOR_S3_ADDRESSING",
    "METEOR_S3_SSE",
    "METEOR_S3_SSE_KMS_KEY",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_PROFILE",
    "AWS_DEFAULT_PROFILE",
    "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_CA_BUNDLE",
    "AWS_ROLE_ARN",
    "AWS_ROLE_SESSION_NAME",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_EC2_METADATA_DISABLED",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    # MLflow
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_INSECURE_TLS",
    "MLFLOW_TRACKING_SERVER_CERT_PATH",
    "MLFLOW_TRACKING_CLIENT_CERT_PATH",
    "MLFLOW_DISABLE_TELEMETRY",
    # proxies and private certificate authorities, for every client
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "all_proxy",
    "no_proxy",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
)
"""Variables that go with a job where they are set."""
OF_THE_NODE = (
    "METEOR_LOG_DIR",
    "METEOR_STATE_DIR",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
)
"""Variables that a program reads, and that mean another thing on each machine."""


@dataclass(frozen=True)
class Carried:
    """What of an environment goes with a job.

    Attributes:
        variables: name to value.
        withheld: names of secrets that stay.
    """

    variables: Mapping[str, str]
    withheld: Sequence[str]

    @property
    def secrets(self) -> list[str]:
        """Names of the secrets that go."""
        return [name for name, value in self.variables.items() if is_secret(name, value)]


def carried(environment: Mapping[str, str], further: Sequence[str] = (), send_secrets: bool = False) -> Carried:
    """Choose from an environment what a job gets.

    Args:
        environment: the submitter's.
        further: names beside those of CARRIED.
        send_secrets: whether secrets go, too.

    Raises:
        ValueError: a further name that is not set.
    """
    if missing := [name for name in further if name not in environment]:
        raise ValueError(f"env names {', '.join(missing)}, which is not set here: set it, or leave it out")
    names = dict.fromkeys([*CARRIED, *further])
    there = {name: environment[name] for name in names if environment.get(name)}
    kept = {name: value for name, value in there.items() if send_secrets or not is_secret(name, value)}
    return Carried(kept, [name for name in there if name not in kept])


def is_secret(name: str, value: str) -> bool:
    """Whether a variable is one that others must not read: by its name, or by a login in its value."""
    return is_secret_name(name) or redact_text(f"{value}\n") != f"{value}\n"
