"""How many bytes of tensors are alive, operation by operation: at the peak of a pass, and at that of its selection.

A process's resident set would need a fresh process for each measurement, and cannot tell selection from the layers
around it. What a kernel takes for itself while it runs is not seen.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.clocks import SELECTION, SelectionClock

MIB = 2**20


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations inside it make, until they are freed.

    Args:
        known: tensors that were there before (weights, inputs); views of them are nothing new.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._alive: dict[int, Any] = {}
        for tensor in known:
            self._alive[tensor.untyped_storage()._cdata] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and take in what it made."""
        out = func(*args, **(kwargs or {}))
        for item in tree_leaves(out):
            if isinstance(item, Tensor):
                self._take(item.untyped_storage())
        return out

    def _take(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def freed(_: Any) -> None:
            self._alive.pop(key, None)
            self.live -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


class SelectionMemory(SelectionClock):
    """As well as its time: the most that selection has alive above what was alive when it began, in MiB by stage."""

    def __init__(self, counter: LiveBytes, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(torch.device("cpu"), needed=set(), clock=clock)
        self.counter = counter
        self.mib = dict.fromkeys(SELECTION, 0.0)
        self._whole = self._live = 0

    def _open(self) -> None:
        super()._open()
        self._live, self._whole, self.counter.peak = self.counter.live, self.counter.peak, self.counter.live

    def _close(self, stage: str) -> None:
        super()._close(stage)
        self.mib[stage] = max(self.mib[stage], (self.counter.peak - self._live) / MIB)
        self.counter.peak = max(self.counter.peak, self._whole)


class Spent(NamedTuple):
    """What a call took: seconds of the clock, those of its selection, and MiB of tensors at the peak of both."""

    seconds: float
    selection_seconds: float
    peak_mib: float
    selection_mib: float


def spent_by(
    call: Callable[[], None], known: Iterable[Tensor], clock: Callable[[], float] = time.perf_counter
) -> Spent:
    """Time and memory of a call in one pass: counting costs some microseconds an operation."""
    with LiveBytes(known) as counter:
        selection = SelectionMemory(counter, clock)
        seconds = selection.measure(call)
    return Spent(seconds, sum(selection.seconds.values()), counter.peak / MIB, max(selection.mib.values()))
