"""The store's speed as it is measured is that of the line to it, and nothing of the probe stays."""

from __future__ import annotations

import pytest

from infra.fault_proxy import FaultProxy
from infra.throttle import Link
from pipelines.io import storage
from pipelines.sizing.store_speed import measure_store_mb
from tests.pipelines.s3_fixture import BUCKET, S3Server


@pytest.mark.stack
def test_the_slower_way_counts(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    place, size = f"s3://{BUCKET}/speed", 8 * 10**6
    fast = measure_store_mb(place, size)
    with FaultProxy(s3.endpoint, up=Link(8e6)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        slow = measure_store_mb(place, size)
    assert slow < 9, "faster than the line"  # on a busy machine it is slower than that
    assert fast > slow
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    assert storage.list_files(place) == []
