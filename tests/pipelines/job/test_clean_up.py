"""A run that has ended leaves no copies on the nodes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.exceptions

from pipelines.io.node_copies import Content, open_copy
from pipelines.io.run_folder import RunFolder
from pipelines.job import clean_up
from pipelines.job.clean_up import remove_copies_everywhere

RUN = RunFolder("s3://bucket/runs/a")
GONE, SILENT = "aa" * 28, "bb" * 28


@pytest.fixture
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # for Ray's workers
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")  # paths of its sockets may have 107 characters at most
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def cluster(temp: Path) -> Iterator[None]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def copy_of(address: str) -> Content:
    def fill(folder: Path) -> None:
        (folder / "a").write_text("a")

    return Content(address.replace("/", "x").ljust(24, "x")[-24:], address, ["a"], 1, fill)


@pytest.mark.stack
def test_a_task_on_each_node_removes_the_copies_of_this_run_alone(temp: Path, cluster: None) -> None:
    for address in (RUN.init, RUN.processor, "s3://bucket/runs/ab/init"):
        with open_copy(copy_of(address)):
            pass
    assert remove_copies_everywhere(RUN) == 2
    (left,) = [path for path in temp.glob("meteor-copies-*/*") if path.is_dir()]
    assert "ab" in left.name


def test_a_node_that_does_not_answer_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One has gone, one is silent, one answers."""

    class Task:
        def options(self, scheduling_strategy: Any) -> Task:
            self.node = scheduling_strategy.node_id
            return self

        def remote(self, address: str) -> str:
            assert address == RUN.url
            return f"task on {self.node}"

    def get(task: str, timeout: float) -> int:
        if GONE in task:
            raise ray.exceptions.NodeDiedError("gone")
        return 3

    monkeypatch.setattr(clean_up.ray, "remote", lambda **_: lambda function: Task())
    names = (GONE, SILENT, "cc" * 28)
    monkeypatch.setattr(clean_up.ray, "nodes", lambda: [{"NodeID": name, "Alive": True} for name in names])
    monkeypatch.setattr(clean_up.ray, "wait", lambda all_, **_: ([all_[0], all_[2]], [all_[1]]))
    monkeypatch.setattr(clean_up.ray, "get", get)
    assert remove_copies_everywhere(RUN) == 3
    assert f"on the nodes {SILENT[:12]}, {GONE[:12]}, which" in capsys.readouterr().out
