"""How evenly the workers go: who is slowest, how far apart they are, how long they wait for data.

Each worker measures its own steps. Once a progress line the numbers meet in one small collective operation. A worker's
own time is that of its steps without the wait for others where a step begins; within forward and backward, ZeRO-3 holds
all workers together, so a slow one shows less there than it costs.
"""

import dataclasses
from dataclasses import dataclass, field

import torch

from pipelines.checkpoint.state import TrainState
from pipelines.training.worker import Worker


@dataclass
class Pace:
    """Seconds of this worker since the last progress line, and what all of them made together until then."""

    _data: float = 0.0
    _waiting: float = 0.0
    _steps: float = 0.0
    _metrics: dict[str, float] = field(default_factory=dict)

    def add(self, data_s: float, waiting_s: float, step_s: float) -> None:
        """One step: how long it waited for data, then for the other workers, and all of it."""
        self._data += data_s
        self._waiting += waiting_s
        self._steps += step_s

    def share(self, state: TrainState, worker: Worker) -> TrainState:
        """Compare with the other workers; every worker must call it. Returns `state` with the seconds added."""
        mine = torch.tensor([self._data, self._steps - self._waiting], dtype=torch.float64, device=worker.device)
        everywhere = [torch.empty_like(mine) for _ in range(worker.world)]
        torch.distributed.all_gather(everywhere, mine)
        data, own = (tuple(values) for values in zip(*(one.tolist() for one in everywhere), strict=True))
        self._metrics = pace_metrics(data, own, self._steps)
        self._data = self._waiting = self._steps = 0.0
        return dataclasses.replace(
            state, data_seconds=_added(state.data_seconds, data), own_seconds=_added(state.own_seconds, own)
        )

    def as_metrics(self) -> dict[str, float]:
        """Of the steps before the last `share`."""
        return dict(self._metrics)


def pace_metrics(data_s: tuple[float, ...], own_s: tuple[float, ...], steps_s: float) -> dict[str, float]:
    """Metrics from every worker's seconds: waiting for data, and its own time; `steps_s` is that of all steps."""
    return {
        "workers/slowest": float(slowest(own_s)),
        "workers/spread": spread(own_s),
        "workers/data_wait_share": max(data_s) / steps_s if steps_s > 0 else 0.0,
    }


def slowest(own_s: tuple[float, ...]) -> int:
    """The worker with the most time of its own."""
    return max(range(len(own_s)), key=lambda rank: own_s[rank])


def spread(own_s: tuple[float, ...]) -> float:
    """Difference of the slowest and the quickest worker's own time, as a share of their mean."""
    mean = sum(own_s) / len(own_s)
    return (max(own_s) - min(own_s)) / mean if mean > 0 else 0.0


def _added(before: tuple[float, ...], now: tuple[float, ...]) -> tuple[float, ...]:
    """The sums by worker; they begin anew with another number of workers."""
    return tuple(map(sum, zip(before, now, strict=True))) if len(before) == len(now) else now
