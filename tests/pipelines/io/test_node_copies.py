"""One copy a node: many processes, killed ones, restarts, a short disk, temp folders of one's own and shared."""

import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipelines.io import local_disk, node_copies, node_locks
from pipelines.io.errors import StorageError
from pipelines.io.node_copies import Content, make_room, open_copy, remove_copies

SIZE = 200_000
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temp folder of a node."""
    folder = tmp_path / "temp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A line for every fetch: the store's count of bytes."""
    return tmp_path / "fetched"


def fetched(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def fetch(log: Path, pause_s: float, folder: Path) -> None:
    """A store that counts what is read from it."""
    for name in ("a", "b"):
        (folder / name).write_bytes(name.encode() * (SIZE // 2))
        time.sleep(pause_s)
    with log.open("a") as file:
        file.write(f"{SIZE}\n")


def content(log: Path, name: str = "x", pause_s: float = 0.0) -> Content:
    return Content(name * 24, f"s3://bucket/{name}", ["a", "b"], SIZE, partial(fetch, log, pause_s))


def use(wanted: Content, temp: Path, results: Any, hold_s: float = 0.0) -> None:
    """A process that opens a copy, reads it and says what it saw."""
    tempfile.tempdir = str(temp)
    with open_copy(wanted) as folder:
        results.put((folder, sum(len((folder / name).read_bytes()) for name in ("a", "b"))))
        time.sleep(hold_s)


def start(target: Any, *arguments: Any) -> Any:
    process = FORK.Process(target=target, args=arguments)
    process.start()
    return process


def folders(temp: Path) -> list[str]:
    """Copies by name, in any folder of copies."""
    return sorted(path.name[0] for path in temp.glob("meteor-copies-*/*") if path.is_dir())


def test_processes_at_once_and_a_restart_bring_one_copy(temp: Path, log: Path) -> None:
    results = FORK.Queue()
    for _ in range(2):  # the second round: workers that are started again, after all have closed it
        processes = [start(use, content(log, pause_s=0.2), temp, results) for _ in range(8)]
        seen = {results.get(timeout=60) for _ in processes}
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        assert len(seen) == 1
        assert seen.pop()[1] == SIZE
    assert fetched(log) == [SIZE]


def test_who_has_it_open_keeps_it_and_a_killed_process_does_not(temp: Path, log: Path) -> None:
    results = FORK.Queue()
    process = start(use, content(log), temp, results, 600.0)
    folder, _ = results.get(timeout=60)
    assert remove_copies("s3://bucket") == 0, "a process has it open"
    make_room(temp, 2**62)
    assert (folder / "a").exists()
    assert remove_copies("s3://bucket/xy") == 0, "another folder whose name begins alike"
    process.kill()
    process.join(60)
    assert remove_copies("s3://bucket/") == 1
    assert not folder.exists()
    assert list(folder.parent.iterdir()) == [], "locks and stamps are gone as well"


def test_half_of_what_a_killed_process_brought_is_not_used(temp: Path, log: Path) -> None:
    results = FORK.Queue()
    process = start(use, content(log, pause_s=600.0), temp, results)
    deadline = time.monotonic() + 60
    while not list(temp.glob("*/x*/a")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join(60)
    assert fetched(log) == []
    with open_copy(content(log, "y")):
        assert folders(temp) == ["y"], "what the killed one left is removed by the next"
    with open_copy(content(log)) as folder:
        assert (folder / "b").stat().st_size == SIZE // 2


def test_a_failed_fetch_leaves_nothing_and_is_tried_by_the_next(temp: Path, log: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "a").write_bytes(b"half")
        raise StorageError("away")

    with pytest.raises(StorageError, match="away"), open_copy(Content("x" * 24, "s3://b/x", ["a"], 1, fail)):
        pass
    assert folders(temp) == []
    with open_copy(content(log)):
        assert fetched(log) == [SIZE]


@pytest.mark.parametrize("damage", ["cut", "changed", "removed"])
def test_a_copy_that_changed_since_its_check_is_brought_again(temp: Path, log: Path, damage: str) -> None:
    with open_copy(content(log)) as folder:
        pass
    path = folder / "a"
    if damage == "cut":
        os.truncate(path, 10)
    elif damage == "changed":
        path.write_bytes(b"z" * (SIZE // 2))
    else:
        path.unlink()
    with open_copy(content(log)) as again:
        assert (again / "a").read_bytes() == b"a" * (SIZE // 2)
    assert fetched(log) == [SIZE, SIZE]


def test_one_that_is_not_to_be_kept_goes_with_its_last_user(temp: Path, log: Path) -> None:
    with open_copy(content(log), keep=False) as folder:
        with open_copy(content(log), keep=False):
            pass
        assert folder.exists()
    assert folders(temp) == []
    assert fetched(log) == [SIZE]


def test_copies_keep_to_their_share_of_the_disk(temp: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = {"x": 30.0, "y": 20.0, "z": 10.0}
    for name, ago in used.items():
        with open_copy(content(log, name)) as folder:
            pass
        os.utime(folder.parent / f"{name * 24}.whole", (time.time() - ago, time.time() - ago))
    monkeypatch.setattr(node_copies, "_free", lambda _: 3 * SIZE)
    with open_copy(content(log, "w")):  # 4 copies beside room for 3: one is too many
        pass
    assert folders(temp) == ["w", "y", "z"], "the least recently used one went"
    with open_copy(content(log, "y")):
        assert len(fetched(log)) == 4


def test_what_is_to_be_written_comes_before_copies(temp: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`writing` finds the disk full, and nobody has the copies open."""
    for name in "xy":
        with open_copy(content(log, name)):
            pass
    need = 1_000_000

    def free(folder: Path) -> int:
        return need - 1 if "x" in folders(temp) else 10 * need

    monkeypatch.setattr(node_copies, "_free", free)
    monkeypatch.setattr(local_disk, "free_bytes", free)
    with local_disk.writing(temp / "new" / "folder", need, "a checkpoint"):
        assert folders(temp) == ["y"]
    with (
        open_copy(content(log, "x")),
        pytest.raises(local_disk.LocalDiskError, match="a checkpoint needs 1000000"),
        local_disk.writing(temp / "new", need, "a checkpoint"),
    ):
        pass


def test_what_nobody_used_for_a_day_goes(temp: Path, log: Path) -> None:
    with open_copy(content(log)) as folder:
        pass
    day = time.time() - node_copies.UNUSED_S - 1
    os.utime(folder.parent / f"{'x' * 24}.whole", (day, day))
    with open_copy(content(log, "y")):
        assert folders(temp) == ["y"]


# ---------------------------------------------------------------------------------------------------------- two nodes


def _machine(monkeypatch: pytest.MonkeyPatch, name: str, own_disk: bool) -> None:
    for module in (node_copies, node_locks):
        monkeypatch.setattr(module, "machine", lambda: name)
    monkeypatch.setattr(node_copies, "own_disk", lambda _: own_disk)


def test_each_temp_folder_of_its_own_holds_one_copy(tmp_path: Path, temp: Path, log: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    results = FORK.Queue()
    processes = [start(use, content(log, pause_s=0.1), place, results) for place in (temp, other) for _ in range(3)]
    seen = {results.get(timeout=60)[0] for _ in processes}
    for process in processes:
        process.join(60)
    assert {path.parents[1] for path in seen} == {temp, other}
    assert fetched(log) == [SIZE, SIZE]


def test_nothing_of_another_node_is_removed_in_a_shared_temp_folder(
    temp: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its locks may not be seen here, so nobody seems to have its copies open."""
    _machine(monkeypatch, "node-a", own_disk=False)
    with open_copy(content(log)) as of_a:
        pass
    long_ago = time.time() - 10 * node_copies.UNUSED_S
    os.utime(of_a.parent / f"{'x' * 24}.whole", (long_ago, long_ago))
    _machine(monkeypatch, "node-b", own_disk=False)
    with open_copy(content(log)) as of_b:
        assert of_b != of_a
    assert remove_copies("s3://bucket") == 1, "its own"
    make_room(temp, 2**62)
    assert (of_a / "a").exists()
    assert fetched(log) == [SIZE, SIZE]


def test_what_an_earlier_boot_left_on_an_own_disk_is_removed(
    temp: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _machine(monkeypatch, "node-11111111", own_disk=True)
    with open_copy(content(log)) as before:
        pass
    _machine(monkeypatch, "node-22222222", own_disk=True)
    assert before.exists()
    make_room(temp, 2**62)
    with open_copy(content(log, "y")):
        assert not before.parent.exists()


# --------------------------------------------------------------------------------------------------------------- locks


def test_the_machine_is_a_part_of_a_file_name() -> None:
    assert node_locks.machine() == node_locks.machine()
    assert not set(node_locks.machine()) & set("/ *")


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(node_locks.fcntl, "flock", refuse)
    with (tmp_path / "gate").open("w") as handle, pytest.raises(StorageError, match=r"gate.*knows no locks.*TMPDIR"):
        node_locks.try_lock(handle)


def _inside(gate: Path, counter: Path) -> None:
    for _ in range(50):
        with node_locks.alone(gate):
            number = int(counter.read_text())
            counter.write_text(str(number + 1))
            gate.unlink()  # others meet at a new file


def test_a_gate_may_be_removed_by_who_is_inside(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    processes = [start(_inside, tmp_path / "gate", counter) for _ in range(4)]
    for process in processes:
        process.join(120)
    assert counter.read_text() == "200"


@pytest.fixture(autouse=True)
def _no_child_left() -> Iterator[None]:
    yield
    for process in multiprocessing.active_children():
        with suppress(ProcessLookupError):
            os.kill(process.pid or 0, signal.SIGKILL)
