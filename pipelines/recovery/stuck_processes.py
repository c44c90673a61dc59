"""Looking at, and ending, processes of other machines that do not answer: by tasks that run beside them on their nodes.

Nothing is asked of the process itself. Its stack comes from py-spy where that is installed (Ray's dashboard brings it)
and may look; else from Python's faulthandler, by a signal, which a stopped process cannot answer.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.io.pulse import Process, born, state_of

STACK_SIGNAL = signal.SIGUSR1
STACK_S = 5.0
"""Seconds for one stack."""
NODE_S = 60.0
"""Seconds for a node to answer, a new process for the task included."""
MOST_STACKS = 32

T = TypeVar("T")
Fate = Literal["ended", "gone", "left", "unreachable"]
"""What came of ending a process: it was killed; it was not there any more; it was left; its node does not answer."""


def show_stacks_on_signal() -> None:
    """Let this process write the stacks of its threads to a file when `STACK_SIGNAL` comes, whatever it is doing."""
    path = _stack_file(os.getpid())
    path.parent.mkdir(mode=0o700, exist_ok=True)
    faulthandler.register(STACK_SIGNAL, file=path.open("w"), all_threads=True)


def _stack_file(pid: int) -> Path:
    return Path(tempfile.gettempdir(), f"meteor-stacks-{os.getuid()}", f"{pid}.txt")


# ------------------------------------------------------------------------------------------------- on the node of them


def stack_of(process: Process) -> str:
    """The stacks of a process of this machine, or why there are none."""
    if born(process.pid) != process.born:
        return "the process is gone"
    state = f"state {state_of(process.pid)}{' (stopped)' if state_of(process.pid) == 'T' else ''}"
    text = _py_spy(process.pid)
    if text is None and _stack_file(process.pid).exists():
        os.kill(process.pid, STACK_SIGNAL)
        time.sleep(1.0)
        text = _stack_file(process.pid).read_text()
    return f"{state}\n{text or 'no stack: py-spy is not there or may not look, and faulthandler did not answer'}"


def _py_spy(pid: int) -> str | None:
    tool = shutil.which("py-spy") or str(Path(sys.executable).with_name("py-spy"))
    try:
        done = subprocess.run(
            [tool, "dump", "--nonblocking", "--pid", str(pid)],
            capture_output=True,
            text=True,
            timeout=STACK_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def end(process: Process, if_stopped: bool = False) -> Fate:
    """SIGKILL to a process of this machine; with `if_stopped` only where the kernel says that it is stopped."""
    if born(process.pid) != process.born:
        return "gone"
    if if_stopped and state_of(process.pid) != "T":
        return "left"
    os.kill(process.pid, signal.SIGKILL)
    return "ended"


# -------------------------------------------------------------------------------------------------- from the observer


def stacks(processes: Sequence[Process]) -> list[str]:
    """The stacks of processes anywhere in the cluster, or why there are none."""
    found = on_their_nodes(stack_of, [(one,) for one in processes[:MOST_STACKS]], processes[:MOST_STACKS])
    return [one if isinstance(one, str) else "no answer from its node" for one in found]


def end_all(processes: Sequence[Process], if_stopped: Sequence[bool]) -> list[Fate]:
    """End processes anywhere in the cluster; what came of each."""
    found = on_their_nodes(end, list(zip(processes, if_stopped, strict=True)), processes)
    return ["unreachable" if one is None else one for one in found]


def on_their_nodes(
    call: Callable[..., T], arguments: Sequence[tuple[object, ...]], processes: Sequence[Process]
) -> list[T | None]:
    """`call(*arguments[i])` on the node of `processes[i]`, in a task that reserves nothing.

    None where the node does not answer within `NODE_S`.
    """
    task = ray.remote(num_cpus=0, max_retries=0)(call)
    refs = []
    for given, process in zip(arguments, processes, strict=True):
        there = NodeAffinitySchedulingStrategy(process.node, soft=False)
        refs.append(task.options(scheduling_strategy=there).remote(*given))
    ready, late = ray.wait(refs, num_returns=len(refs), timeout=NODE_S) if refs else ([], [])
    for ref in late:
        ray.cancel(ref, force=True)
    done = set(ready)
    return [_result(ref) if ref in done else None for ref in refs]


def _result(ref: ray.ObjectRef[T]) -> T | None:
    try:
        return ray.get(ref, timeout=STACK_S)
    except ray.exceptions.RayError:
        return None
