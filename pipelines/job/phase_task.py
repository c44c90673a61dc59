"""A phase of a job as a Ray task, on a node that has the CPUs, the GPU and the memory that it reserves.

The driver may run on a small head. What a phase says is shown as if the driver had said it, and its errors are raised
there. A phase can be done again: one whose node is lost is, elsewhere.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.config.recipe import Recipe
from pipelines.io.console import handing_over, say, show
from pipelines.recovery.room import NoRoomError, waiting_line
from pipelines.sizing.inputs import task_cpus
from pipelines.sizing.table import size_text
from pipelines.sizing.terms import Estimate, Phase

TRIES = 3
"""Times that a phase is begun, when the nodes that do it are lost."""
TELL_S = 60.0
LOST = (WorkerCrashedError, NodeDiedError)

T = TypeVar("T")


class PhaseError(RuntimeError):
    """A phase that was ended from outside; the message says by what, and what to change."""


@dataclass(frozen=True)
class Reservation:
    """What a phase reserves in Ray.

    Attributes:
        cpus: Ray CPUs.
        gpus: Ray GPUs.
        memory: bytes.
        wait_s: seconds that it waits for them, at the most.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    memory: int = 0
    wait_s: float = 900.0

    def within(self, nodes: Collection[Mapping[str, Any]]) -> Reservation:
        """The same, or what the best of some nodes has: an estimate alone must not keep a phase waiting for ever."""
        alive = [node["Resources"] for node in nodes if node["Alive"]]
        wanted = self.amounts
        if not alive or any(all(has.get(name, 0.0) >= amount for name, amount in wanted.items()) for has in alive):
            return self
        best = max(alive, key=lambda has: [min(has.get(name, 0.0), amount) for name, amount in wanted.items()])
        got = {name: min(best.get(name, 0.0), amount) for name, amount in wanted.items()}
        return Reservation(got["CPU"], got["GPU"], int(got["memory"]), self.wait_s)

    @property
    def amounts(self) -> dict[str, float]:
        """By the names of Ray's resources, the scarcest first."""
        return {"GPU": self.gpus, "memory": float(self.memory), "CPU": self.cpus}

    def __str__(self) -> str:
        """For people."""
        gpus = f", {self.gpus:g} GPU" if self.gpus else ""
        return f"{self.cpus:g} CPU{gpus}, {size_text(self.memory) or 'no'} memory"


def reserve(recipe: Recipe, found: Estimate, *phases: Phase) -> Reservation:
    """What a task reserves that goes through some phases one after the other.

    The memory is the estimate's; a GPU goes with them where the workers have one.
    """
    training = recipe.training
    memory = max(found.total(phase, "task", "ram") for phase in phases)
    return Reservation(float(task_cpus(recipe)), float(training.uses_gpu), int(memory), training.room_wait_s)


def on_device(call: Callable[..., T], *arguments: Any) -> T:
    """`call(*arguments, device)` with the GPU that this task has reserved, or the CPU."""
    import torch  # here: seconds, and the driver only passes this function on

    has_gpu = bool(ray.get_runtime_context().get_accelerator_ids().get("GPU"))
    return call(*arguments, device="cuda" if has_gpu and torch.cuda.is_available() else "cpu")


def run_task(call: Callable[[], T], name: str, needs: Reservation, *, here: bool = False) -> T:
    """The result of `call`, made in a Ray task that holds `needs` on any node that has them.

    Args:
        call: can be pickled, and can be made again.
        name: of the phase.
        needs: less is taken where no node has as much.
        here: only on the driver's own node, which has files that others may lack.

    Raises:
        what `call` raises.
        NoRoomError: others held the room for longer than `needs.wait_s`.
        PhaseError: the task was ended for lack of memory, or lost its node too often.
    """
    mine = ray.get_runtime_context().get_node_id() if here else None
    got = needs.within([node for node in ray.nodes() if mine in (None, node["NodeID"])])
    if got.memory < needs.memory:
        say(f"  warning: {name} takes about {size_text(needs.memory)} of memory, no node offers more than {got}")
    for attempt in range(1, TRIES + 1):
        try:
            return _follow(call, name, got, mine)
        except OutOfMemoryError as error:
            raise PhaseError(
                f"{name} was ended for lack of memory; it had reserved {got}. Give Ray a node with more, or keep other "
                f"work off it: {error}"
            ) from error
        except LOST as error:
            if attempt == TRIES:
                raise PhaseError(f"{name} lost its process or node {TRIES} times, the last time so: {error}") from error
            say(f"  warning: {name} lost its process or node and begins again: {_first_line(error)}")
    raise AssertionError("the last try returns or raises")


def _follow(call: Callable[[], T], name: str, needs: Reservation, node: str | None) -> T:
    """Submit the task, show what it says, and return or raise what it comes to."""
    task = ray.remote(_work).options(
        name=f"meteor {name}",
        num_returns="streaming",
        num_cpus=needs.cpus,
        num_gpus=needs.gpus,
        memory=needs.memory or None,
        max_retries=0,
        scheduling_strategy="DEFAULT" if node is None else NodeAffinitySchedulingStrategy(node, soft=False),
    )
    items = task.remote(call)
    try:
        _await_begin(items, name, needs)
        for item in items:
            kind, value = ray.get(item, timeout=TELL_S)  # it is there
            if kind == "said":
                show(value)
            elif kind == "result":
                return cast(T, value)
    except RayTaskError as error:
        raise error.cause from error
    finally:
        _end(items)
    raise PhaseError(f"{name} ended without a result")


def _await_begin(items: Any, name: str, needs: Reservation) -> None:
    """Return when the task runs; say once a minute who holds the room that it waits for."""
    began = time.monotonic()
    while not ray.wait([items], timeout=TELL_S)[0]:
        waited = time.monotonic() - began
        line = waiting_line(str(needs), tuple(needs.amounts), f"{name} waits for room in the cluster: it needs")
        if waited >= needs.wait_s:
            raise NoRoomError(f"{line}; that for {waited:.0f} s (training.room_wait_s)")
        say(f"  {line}")


def _end(items: Any) -> None:
    """Cancel a task that still runs: an interrupt must not leave it its resources."""
    try:
        ray.cancel(items, force=False)
    except (RayError, ValueError, TypeError):  # it has ended
        return


def _work(call: Callable[[], Any]) -> Iterator[tuple[str, Any]]:
    """The task: first that it runs, then what it says, at last its result."""
    said: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    results: list[Any] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with handing_over(said.put):
                results.append(call())
        except BaseException as error:
            errors.append(error)
        finally:
            said.put(None)

    yield "began", None
    worker = threading.Thread(target=work, name="phase", daemon=True)
    worker.start()
    while (text := said.get()) is not None:
        yield "said", text
    worker.join(TELL_S)  # it has said its last
    if errors:
        raise errors[0]
    yield "result", results[0]


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
