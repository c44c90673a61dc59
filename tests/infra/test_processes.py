"""Pid files, recycled pids, leftovers, ports and private files, each on real processes that the test started itself."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from infra import processes
from infra.processes import Record, StackError


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[Record]:
    """A service of two processes: a leader and a child of it in another session."""
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(120)'], "
    script = child + "start_new_session=True); import time; time.sleep(120)"
    tag = f"test@{tmp_path}"
    _, record = processes.spawn(
        "test", [sys.executable, "-c", script], dict(os.environ), tmp_path / "log", tmp_path, tag
    )
    deadline = time.monotonic() + 10
    while len(processes.members(record)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    yield record
    processes.stop(record, 5.0)


def test_record_round_trip_finds_the_leader(sleeper: Record, tmp_path: Path) -> None:
    path = tmp_path / "pids" / "test.json"
    processes.write_record(path, sleeper)
    assert processes.read_record(path) == sleeper
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    found = processes.leader(sleeper)
    assert found is not None
    assert found.pid == sleeper.pid


@pytest.mark.parametrize("pid", [-1, 0, 1])
def test_no_pid_or_init_never_matches_a_process(pid: int) -> None:
    record = replace(processes.lost_record("test", "test@/nowhere"), pid=pid)
    assert processes.leader(record) is None
    assert processes.members(record) == []
    assert processes.members(replace(record, tag="")) == []


def test_record_of_pid_zero_in_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "test.json"
    processes.write_record(path, processes.lost_record("test", "test@/nowhere"))
    assert processes.read_record(path) is None
    path.write_text("{half")
    assert processes.read_record(path) is None


def test_recycled_pid_is_not_ours_and_survives_stop() -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        created = psutil.Process(stranger.pid).create_time()
        stale = Record("test", stranger.pid, created - 500.0, processes.boot_id(), "test@/nowhere")
        assert processes.leader(stale) is None
        assert processes.stop(stale, 0.2) == []
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_stranger_in_a_dead_leaders_session_survives_stop(tmp_path: Path) -> None:
    """Session and age alone are not enough: a process without our tag and without a Ray title is left alone."""
    script = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    head = subprocess.Popen(
        [sys.executable, "-c", script + "; print(p.pid)"], start_new_session=True, stdout=subprocess.PIPE, text=True
    )
    created = psutil.Process(head.pid).create_time()
    assert head.stdout is not None
    orphan = psutil.Process(int(head.stdout.readline()))
    head.wait()
    head.stdout.close()
    try:
        assert os.getsid(orphan.pid) == head.pid
        assert processes.stop(Record("test", head.pid, created, processes.boot_id(), "test@/nowhere"), 0.2) == []
        assert processes.is_alive(orphan)
    finally:
        orphan.kill()


def test_record_of_another_boot_matches_nothing(sleeper: Record) -> None:
    stale = replace(sleeper, boot_id="another")
    assert processes.leader(stale) is None
    assert processes.members(stale) == []


def test_stop_ends_children_in_other_sessions_too(sleeper: Record) -> None:
    assert len(processes.members(sleeper)) == 2
    assert len(processes.stop(sleeper, 5.0)) == 2
    assert processes.members(sleeper) == []
    assert processes.leader(sleeper) is None


def test_orphans_of_a_killed_leader_are_found_by_their_tag(sleeper: Record) -> None:
    psutil.Process(sleeper.pid).kill()
    processes.reap(sleeper.pid)
    left = processes.members(sleeper)
    assert [process.pid for process in left if process.pid == sleeper.pid] == []
    assert len(left) == 1
    # The same orphan without any pid file: the tag alone suffices.
    assert processes.members(processes.lost_record("test", sleeper.tag)) == left
    processes.stop(sleeper, 5.0)
    assert not processes.is_alive(left[0])


def test_stop_kills_what_ignores_sigterm(tmp_path: Path) -> None:
    script = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('set', flush=True); time.sleep(60)"
    )
    log = tmp_path / "log"
    _, record = processes.spawn(
        "test", [sys.executable, "-c", script], dict(os.environ), log, tmp_path, f"t@{tmp_path}"
    )
    deadline = time.monotonic() + 10
    while "set" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    processes.stop(record, 0.3)
    assert processes.leader(record) is None


def test_port_free_and_owner() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert not processes.port_free(port)
        assert f"pid {os.getpid()}" in processes.port_owner(port)
    assert processes.port_free(port)


def test_choose_port_keeps_clear_of_taken_and_of_the_offset() -> None:
    taken: set[int] = set()
    for _ in range(50):
        port = processes.choose_port(taken, offset=10000)
        assert not {port, port + 10000} & taken
        assert port + 10000 < 32768
        taken |= {port, port + 10000}


def test_lock_is_exclusive_and_names_its_holder(tmp_path: Path) -> None:
    with (
        processes.exclusive(tmp_path / "lock", 1.0, "up"),
        pytest.raises(StackError, match=f"pid {os.getpid()}"),
        processes.exclusive(tmp_path / "lock", 0.2, "up"),
    ):
        pytest.fail("two holders at once")
    with processes.exclusive(tmp_path / "lock", 0.2, "up"):
        pass


def test_private_file_is_private_from_the_first_byte(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        processes.write_private(tmp_path / "secret", "x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


def test_log_of_the_run_before_is_kept(tmp_path: Path) -> None:
    for number in (1, 2):
        command = [sys.executable, "-c", f"print('run {number}')"]
        pid, _ = processes.spawn("test", command, dict(os.environ), tmp_path / "x.log", tmp_path, "t@x")
        os.waitpid(pid, 0)
    assert "run 2" in processes.tail(tmp_path / "x.log")
    assert "run 1" in processes.tail(tmp_path / "x.log.1")
