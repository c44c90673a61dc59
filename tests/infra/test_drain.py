"""A node that will go says so to its own cluster, and to no other that runs on the machine."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from infra import drain

RAYLETS = [("a" * 56, "10.0.0.1:6379"), ("b" * 56, "10.0.0.2:6379"), ("c" * 56, "127.0.0.1:6379")]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that Ray gets, which does what it is told."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(drain.subprocess, "run", run)
    monkeypatch.setattr(drain, "_raylets", lambda: iter(RAYLETS))
    return commands


def test_only_the_nodes_of_the_cluster_that_is_named_are_told(
    told: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    assert drain.main(["--seconds", "30"], wait=waited.append) == 0
    (command,) = told
    assert Path(command[0]).name == "ray"
    assert {f"--node-id={'b' * 56}", "--address=10.0.0.2:6379", "--deadline-remaining-seconds=30"} <= set(command)
    assert 29 < waited[0] <= 30, "the node lives as long as the hook"


def test_a_name_is_the_address_that_it_stands_for(told: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "localhost:6379")
    assert drain.main(["--seconds", "1"], wait=lambda _: None) == 0
    assert f"--node-id={'c' * 56}" in told[0]


@pytest.mark.parametrize(
    ("address", "status", "message"),
    [("", 2, "RAY_ADDRESS is ''"), ("auto", 2, "HOST:PORT"), ("10.0.0.9:6379", 1, "no Ray node of the cluster")],
)
def test_no_cluster_is_guessed(
    told: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    address: str,
    status: int,
    message: str,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert drain.main(["--seconds", "1"], wait=lambda _: None) == status
    assert message in capsys.readouterr().err
    assert told == []
