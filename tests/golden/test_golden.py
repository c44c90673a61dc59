"""The golden numbers: equal on the machine that wrote them, near on others; and a difference is seen."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from tests.golden.record import FILE, differences, record


@pytest.fixture
def golden() -> dict[str, Any]:
    numbers: dict[str, Any] = json.loads(FILE.read_text())
    return numbers


def test_a_last_bit_is_a_difference_on_the_same_machine_alone(golden: dict[str, Any]) -> None:
    found = copy.deepcopy(golden)
    assert differences(golden, found) == []
    found["worlds"]["2"]["losses"][3] *= 1 + 1e-15
    found["worlds"]["1"]["weights_sha256"] = "0" * 64
    assert len(differences(golden, found)) == 2
    found["machine"]["cpu"] = "another"
    assert differences(golden, found) == []


def test_a_loss_elsewhere_is_a_difference_on_any_machine(golden: dict[str, Any]) -> None:
    found = copy.deepcopy(golden)
    found["machine"]["cpu"] = "another"
    found["worlds"]["1"]["losses"][7] *= 1.01
    found["worlds"]["2"]["losses"].pop()
    assert [fault.partition(" is ")[0] for fault in differences(golden, found)] == [
        "world 1: loss of step  8",
        "world 2: loss of step 40",
    ]


@pytest.mark.slow
@pytest.mark.stack
@pytest.mark.timeout(1200)
def test_the_golden_numbers(golden: dict[str, Any]) -> None:
    assert differences(golden, record()) == []
