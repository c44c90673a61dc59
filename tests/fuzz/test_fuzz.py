"""The quick part of `make fuzz`: a fixed number of inputs of every reader, and all that was ever found."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.fuzz.run import CORPUS, Outcome, cases, keep, try_input
from tests.fuzz.targets import TARGETS, Target

INPUTS = {"tar": 1000, "record": 1000, "image": 500, "config": 150}
OTHERS = 200


def found_in(outcome: Outcome) -> str:
    return "\n".join(fault for _, fault in outcome.found)


@pytest.mark.parametrize("name", TARGETS)
def test_a_reader_refuses_what_it_cannot_read_by_its_own_error(name: str) -> None:
    target, outcome = TARGETS[name], Outcome()
    for data in target.seeds():
        try_input(target, data, outcome)
    assert outcome.accepted == outcome.inputs, "the seeds are well-formed"
    for data in itertools.islice(cases(target, f"{name}/quick", 600), INPUTS.get(name, OTHERS)):
        try_input(target, data, outcome)
    assert not outcome.found, found_in(outcome)
    assert outcome.refused, "no input was refused: the mutations change nothing"


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*.bin")), ids=lambda path: path.name)
def test_what_was_found_once(path: Path) -> None:
    outcome = Outcome()
    try_input(TARGETS[path.name.rpartition("-")[0]], path.read_bytes(), outcome)
    assert not outcome.found, found_in(outcome)


def test_equal_seeds_give_equal_inputs() -> None:
    for target in TARGETS.values():
        assert [target.case("a", number) for number in range(3)] == [target.case("a", number) for number in range(3)]
        assert target.case("a", 0) != target.case("b", 0)


def test_what_a_reader_does_wrong_is_found(tmp_path: Path) -> None:
    def read(data: bytes) -> None:
        if data == b"long":
            raise ValueError("x" * 10_000)
        if data == b"other":
            raise KeyError("k")
        if data == b"refused":
            raise ValueError("no")

    target = Target(lambda: (), lambda rng, data: data, read, (ValueError,))
    outcome = Outcome()
    for data in (b"long", b"other", b"refused", b"good"):
        try_input(target, data, outcome)
    assert [data for data, _ in outcome.found] == [b"long", b"other"]
    assert "KeyError" in outcome.found[1][1]
    assert keep("x", b"other", tmp_path).read_bytes() == b"other"
