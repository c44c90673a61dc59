"""Workers that wait for room: the line that says who holds it, in a real cluster."""

from __future__ import annotations

import time

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from pipelines.recovery.room import current_holdings, waiting_line
from pipelines.sizing.cluster import look_at_nodes


@pytest.mark.stack
def test_the_line_names_a_placement_group_that_was_left_behind(cluster: None) -> None:
    group = placement_group([{"CPU": 1.0}], name="left-behind")
    ray.get(group.ready(), timeout=60)
    try:
        assert any("left-behind" in one.who and one.resources == {"CPU": 1.0} for one in current_holdings())
        line = waiting_line("2 workers of {'CPU': 5.0}")
        assert line.startswith("the workers wait for room in the cluster: they need 2 workers of {'CPU': 5.0}; free: {")
        assert "1 CPU by a placement group (1 bundles, left-behind)" in line
    finally:
        remove_placement_group(group)


@pytest.mark.stack
def test_the_cluster_is_looked_at_in_no_time(cluster: None) -> None:
    began = time.monotonic()
    (here,) = look_at_nodes()
    assert time.monotonic() - began < 0.5
    assert (here.cpus, here.gpus, here.head) == (6.0, 0.0, True)
    assert here.ram > 1e8
    assert here.temp_free > 0
