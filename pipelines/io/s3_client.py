"""The one S3 client: botocore's, made from `pipelines.io.s3_config`.

A client holds sockets, so it is made on first use inside the process that uses it (never before a fork): the cache is
keyed by the process id, and by all that it is made from. It may be used by many threads at once. It repeats nothing by
itself; `pipelines.io.retry` does.
"""

from __future__ import annotations

import os
import threading
from functools import lru_cache
from typing import Any

from pipelines.io.s3_config import config_stamp, s3_config

CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 30.0
STALL_S = 60.0
"""Seconds in which something of a file must move, however little."""
PART_BYTES = 8 * 2**20
"""Of a large file in one request."""
WINDOW = 4
"""Requests of one large file at a time."""
LEAST_BYTES_PER_S = 256 * 2**10
"""Of a large file, all its requests together; a store that is slower counts as one that has stalled."""
CONNECTIONS = 64

_making = threading.Lock()


def part_limit_s(part_bytes: int = PART_BYTES) -> float:
    """Seconds that one request of a large file may take, its answer included."""
    return max(STALL_S, WINDOW * part_bytes / LEAST_BYTES_PER_S)


def s3_client() -> Any:
    """The client for small objects, listings and everything that is asked. Raises StorageError for the settings."""
    with _making:
        return _client(os.getpid(), config_stamp(), False)


def bulk_client() -> Any:
    """The same for large files: it waits longer for a store that takes or gives nothing for a while.

    While it sends, a socket's limit is that of the connection, for 16 KiB at a time.
    """
    with _making:
        return _client(os.getpid(), config_stamp(), True)


@lru_cache(maxsize=4)
def _client(pid: int, stamp: str, bulk: bool) -> Any:
    import botocore.session  # here: a tenth of a second, which local paths do not need
    from botocore.config import Config

    config = s3_config()
    session = botocore.session.Session()
    session.set_config_variable("region", config.region)  # of the service that gives keys for a role, too
    return session.create_client(
        "s3",
        region_name=config.region,
        endpoint_url=config.endpoint,
        verify=config.ca_bundle,
        config=Config(
            s3={"addressing_style": config.addressing} if config.addressing else None,
            connect_timeout=STALL_S if bulk else CONNECT_TIMEOUT_S,
            read_timeout=part_limit_s() if bulk else REQUEST_TIMEOUT_S,
            retries={"mode": "standard", "total_max_attempts": 1},
            max_pool_connections=CONNECTIONS,
        ),
    )
