"""How fast the workers go, and how evenly: what a step does and takes, who is slowest, how long they wait for data.

Each worker measures its own steps. Once a progress line the numbers meet in one small collective operation. A worker's
own time is that of its steps without the wait for others where a step begins; within forward and backward, ZeRO-3 holds
all workers together, so a slow one shows less there than it costs.

The first steps after a start are slower (caches fill, kernels are chosen, ZeRO-3 learns the order of the modules, the
data stream runs up): `WARM_UP_STEPS` of them are in no figure of speed but that of their own progress line.
"""

import dataclasses
import resource
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from meteor_model.flops import TrainingFlops
from pipelines.checkpoint.state import TrainState
from pipelines.checkpoint.throughput import Throughput
from pipelines.training.batches import Counts, MicroBatch
from pipelines.training.worker import Worker

WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Device:
    """What FLOPs are counted with.

    Attributes:
        flops: of the model that is trained.
        peak: FLOP/s of a worker's device (`pipelines.training.peak`).
    """

    flops: TrainingFlops
    peak: float


@dataclass
class Pace:
    """This worker's steps since the last progress line, and what all workers made together until then."""

    device: Device | None = None
    """None counts no FLOPs."""
    _data: float = 0.0
    _waiting: float = 0.0
    _steps: float = 0.0
    _made: int = 0
    _own: Throughput = field(default_factory=Throughput)
    _metrics: dict[str, float] = field(default_factory=dict)

    def add(
        self, members: Sequence[MicroBatch], counts: Counts, data_s: float, waiting_s: float, step_s: float
    ) -> None:
        """One step: this worker's part and the counts of all, how long it waited for data, then for the others."""
        self._data += data_s
        self._waiting += waiting_s
        self._steps += step_s
        if self._made == WARM_UP_STEPS:
            self._own = Throughput()
        self._made += 1
        made = Throughput(step_s, step_s, data_s, counts.seen, counts.tokens, counts.cells)
        if self.device is not None:
            spent = [step_flops(self.device.flops, batch) for batch in members]
            model, hardware = (float(sum(flops)) for flops in zip(*spent, strict=True))
            peak = self.device.peak * step_s
            made = dataclasses.replace(made, model_flops=model, hardware_flops=hardware, peak_flops=peak)
        self._own += made

    def share(self, state: TrainState, worker: Worker) -> TrainState:
        """Meet the other workers; every worker must call it. Returns `state` with what was made since the last time."""
        own, memory = self._own, _peak_memory(worker.device)
        sums = [own.worker_seconds, own.model_flops, own.hardware_flops, own.peak_flops]
        row = [self._data, self._steps - self._waiting, own.data_seconds, memory, *sums]
        mine = torch.tensor(row, dtype=torch.float64, device=worker.device)
        everywhere = [torch.empty_like(mine) for _ in range(worker.world)]
        torch.distributed.all_gather(everywhere, mine)
        data, alone, waits, memories, *summed = zip(*(one.tolist() for one in everywhere), strict=True)
        worker_seconds, model, hardware, peak = (sum(values) for values in summed)
        together = dataclasses.replace(
            own,
            worker_seconds=worker_seconds,
            data_seconds=max(waits),
            model_flops=model,
            hardware_flops=hardware,
            peak_flops=peak,
            peak_memory=int(max(memories)),
        )
        warm = self._made > WARM_UP_STEPS
        self._metrics = {**evenness(alone), **(together.metrics() if warm else together.rates())}
        self._data = self._waiting = self._steps = 0.0
        self._own = Throughput()
        return dataclasses.replace(
            state,
            data_seconds=_added(state.data_seconds, data),
            own_seconds=_added(state.own_seconds, alone),
            measured=state.measured + together if warm else state.measured,
        )

    def as_metrics(self) -> dict[str, float]:
        """Of the steps before the last `share`; those of the warm-up have their rates alone."""
        return dict(self._metrics)


def step_flops(flops: TrainingFlops, batch: MicroBatch) -> tuple[int, int]:
    """FLOPs of a micro-batch: those that its samples ask for, each at its own length, and those that are computed.

    The device computes every row as long as the longest, samples that share a row as one, and, without any image,
    a blank one.
    """
    images, (rows, length) = sum(batch.num_images), batch.inputs["input_ids"].shape
    asked = flops.of(images, batch.lengths, batch.supervised)
    computed = flops.of(max(1, images), [length] * rows, batch.supervised)
    return asked.model, computed.hardware


def _peak_memory(device: torch.device) -> int:
    """Most bytes that this process held since it started: of its GPU, or of this machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def evenness(own_s: tuple[float, ...]) -> dict[str, float]:
    """Metrics from every worker's own seconds."""
    return {"workers/slowest": float(slowest(own_s)), "workers/spread": spread(own_s)}


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
