"""Nothing waits for ever: a call that can wait has a deadline in it, or stands in a table here with the reason.

What is looked for are the calls themselves (`ray.get`, `queue.get`, `join`, `wait`, `subprocess.run`, an HTTP call), by
their form, so one that nobody thought of is found as well. A row whose call is gone has to go, too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("pipelines", "jobs", "tune", "infra")

FIRST_ARGUMENT = {"wait", "join", "result"}
"""Methods whose first argument is the deadline (of events, conditions, threads, processes, futures)."""
BY_KEYWORD = {"run", "call", "check_call", "check_output", "communicate", "urlopen", "create_connection"}
"""Calls that take `timeout=`; the first four of `subprocess`."""
HTTP = {"get", "put", "post", "head", "delete", "patch", "request"}
WITHOUT = {"fit", "serve_forever", "iter_rows", "iter_batches", "take_all", "materialize", "barrier"}
"""Calls that know no deadline: what makes them end must stand in the table."""

ALLOWED: dict[str, str] = {
    "infra/fault_proxy.py::FaultProxy._exchange::asyncio.wait": "ends with the connections, which `close` resets",
    "infra/fault_proxy.py::FaultProxy._exchange::answering.result": "of a task that is done",
    "infra/fault_proxy.py::FaultProxy._exchange::sending.result": "of a task that is done",
    "infra/throttle.py::Pace.take::wait": "a dead network; ends with the connection, which `close` resets",
    "pipelines/calibration/image_plan.py::_survey::iter_rows": "tasks read under data.read_patience_s; a person waits",
    "pipelines/calibration/job.py::_in_a_task::ray.get": "reads under data.read_patience_s, computes; a person waits",
    "pipelines/calibration/measure.py::measure_plan::measured.iter_rows": "the same",
    "pipelines/inference/batch.py::_answer_parts::written.iter_rows": "the same, with a progress line for every part",
    "pipelines/data/tables/parquet.py::group_tables::file.iter_batches": "decodes bytes that have been fetched",
    "pipelines/io/bulk.py::_in_parts::future.result": "of a future that is done",
    "pipelines/io/ranged.py::_taken::future.result": "its requests have limits, and their repetitions an end",
    "pipelines/parts/reader_conv.py::_fit::ahead.result": "composes images in a thread of this process; a person waits",
    "pipelines/job/phase_task.py::_work::said.get": "ends with the phase, which the driver's end ends",
    "pipelines/recovery/lease.py::hold_run::beating.join": "ends with its last write to storage, which has limits",
    "pipelines/training/batches.py::first_ahead.taken::fetched.get": "the watchdog ends what it waits for",
    "pipelines/training/batches.py::iterate_rows::share.iter_batches": "the watchdog ends what it waits for",
    "pipelines/training/trainer.py::_attempt::trainer.fit": "the watchdog ends what it waits for",
    "pipelines/training/validation.py::_result::ray.get": "of a task that is done",
    "jobs/serve.py::run::stopped.wait": "serves until it is told to stop",
    "tune/sweep.py::_run::tuner.fit": "a person waits; a training inside has its own watchdog",
}
"""File, function and call -> why it may wait without a deadline of its own."""


def dotted(node: ast.expr) -> str:
    """The name of what is called, as far as it is one: `ray.get`, `self._thread.join`; `?` for what is no name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def timed(call: ast.Call, names: tuple[str, ...] = ("timeout", "timeout_s")) -> bool:
    """Whether a keyword gives a deadline that is not None."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if None in given:  # **options: looked at by people
        return True
    found = [given[name] for name in names if name in given]
    return any(not (isinstance(value, ast.Constant) and value.value is None) for value in found)


def positional(call: ast.Call) -> bool:
    return bool(call.args) and not (isinstance(call.args[0], ast.Constant) and call.args[0].value is None)


def is_wait(call: ast.Call) -> bool:
    """Whether a call may wait and has no deadline."""
    name = dotted(call.func)
    owner, _, last = name.rpartition(".")
    if timed(call):
        return False
    if name in ("ray.get", "ray.wait", "asyncio.wait"):
        return True
    if last in WITHOUT:
        return bool(owner) and (last != "fit" or not call.args)
    if not owner:
        return last in ("as_completed", "urlopen", "create_connection")
    if owner in ("requests", "httpx"):
        return last in HTTP
    if owner == "subprocess" or last in ("communicate", "urlopen", "create_connection"):
        return last in BY_KEYWORD
    if last in FIRST_ARGUMENT:
        return not positional(call) and not isinstance(getattr(call.func, "value", None), ast.Constant)
    if last == "get":  # of a queue or a future: a mapping's has an argument
        return not call.args and not call.keywords
    if last == "acquire":
        return not call.args and not call.keywords
    return last == "HTTPConnection"


def waits(tree: ast.AST, where: str = "") -> Iterator[tuple[str, str, int]]:
    """Function, call and line of every wait without a deadline."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from waits(node, f"{where}.{node.name}".lstrip("."))
            continue
        if isinstance(node, ast.Call) and is_wait(node):
            name = dotted(node.func)
            yield where, name.removeprefix("?.").rpartition("?.")[2], node.lineno
        yield from waits(node, where)


def all_waits() -> dict[str, int]:
    files = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    return {
        f"{path.relative_to(ROOT)}::{where}::{call}": line
        for path in files
        for where, call, line in waits(ast.parse(path.read_text()))
    }


def test_every_wait_has_a_deadline_or_a_reason() -> None:
    found = all_waits()
    new = [f"{key} (line {line})" for key, line in found.items() if key not in ALLOWED]
    assert new == [], "give it a deadline, or a row in ALLOWED that says what makes it end"
    assert sorted(set(ALLOWED) - set(found)) == [], "rows whose call is gone"


@pytest.mark.parametrize(
    "planted",
    [
        "ray.get(ref)",
        "ray.get([ref, other])",
        "ray.get(ref, timeout=None)",
        "ray.wait(refs, num_returns=2)",
        "work.get()",
        "self.queue.get()",
        "thread.join()",
        "self._thread.join()",
        "event.wait()",
        "event.wait(None)",
        "process.wait()",
        "process.communicate()",
        "future.result()",
        "pool.submit(f).result()",
        "subprocess.run(['x'])",
        "subprocess.check_output(['x'], text=True)",
        "urllib.request.urlopen(url)",
        "urlopen(url)",
        "requests.get(url)",
        "httpx.post(url, json={})",
        "http.client.HTTPConnection(host, port)",
        "socket.create_connection(address)",
        "lock.acquire()",
        "dataset.iter_rows()",
        "trainer.fit()",
    ],
)
def test_a_planted_wait_is_found(planted: str) -> None:
    assert [line for _, _, line in waits(ast.parse(f"def f():\n    with x:\n        y = {planted}\n"))] == [3]


@pytest.mark.parametrize(
    "bounded",
    [
        "ray.get(ref, timeout=5)",
        "ray.wait(refs, timeout=limit)",
        "work.get(timeout=1)",
        "values.get('key')",
        "thread.join(5)",
        "', '.join(names)",
        "event.wait(POLL_S)",
        "process.wait(timeout=3)",
        "subprocess.run(['x'], timeout=9)",
        "urlopen(url, timeout=9)",
        "lock.acquire(timeout=3)",
        "storage.join(url, name)",
    ],
)
def test_one_with_a_deadline_is_none(bounded: str) -> None:
    assert list(waits(ast.parse(f"def f():\n    {bounded}\n"))) == []
