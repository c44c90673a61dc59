"""The optimizer steps of one worker: read, count, forward and backward, update, report.

Under ZeRO-3 every forward, every step and every report is a collective operation, so all workers do the same of them,
and every decision to stop is made from numbers that all workers have.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from numpy.random import SeedSequence

from pipelines.checkpoint.parity_file import ParityBatch
from pipelines.checkpoint.state import MAX_LISTED_DROPS, DroppedSample, TrainState
from pipelines.checkpoint.zero3 import schedule_factor
from pipelines.config.settings import TrainingSettings
from pipelines.data.sample_id import SampleId
from pipelines.io.console import progress_from_worker, say_from_worker
from pipelines.io.pulse import Phase, Pulse
from pipelines.recovery.preemption import Preemption, PreemptionWatch, preempted
from pipelines.tracking.metric_points import MetricPoint
from pipelines.training.batches import Counts, MicroBatch
from pipelines.training.checkpoint_saver import CheckpointSaver
from pipelines.training.heldout_loss import parity_batch
from pipelines.training.pace import Pace
from pipelines.training.worker import Worker

FEWEST_JUDGED_SAMPLES = 1000
NAMED_SAMPLES = 16


class TooManyDroppedError(ValueError):
    """More samples are faulty than `max_drop_share` allows, or none could be trained; the message counts and names."""


class DivergedError(ValueError):
    """The loss or its gradient is no longer a number; the message names the step and, for the loss, the samples."""


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """What one worker trained in one optimizer step."""

    step: int
    """Optimizer steps done, this one included."""
    total_steps: int
    rank: int
    world: int
    loss: float
    """Mean over the supervised tokens of the global batch; the same on every worker."""
    samples: tuple[SampleId, ...]
    """The samples that this worker's forward and backward saw."""


Observer = Callable[[StepRecord], None]
"""Called on every worker right after the optimizer's step, before a checkpoint of it."""


class MetricLogger(Protocol):
    """Where rank 0 sends its metrics."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log `metrics` of optimizer step `step` (from 1)."""

    def pending_points(self) -> list[MetricPoint]:
        """What is not delivered yet; the logger of the next start begins with it."""

    def close(self, deadline_s: float = ...) -> object:
        """Send what is still buffered, within `deadline_s` seconds; what it returns is not used."""


@dataclasses.dataclass
class Loop:
    """The optimizer steps of one worker, and what it knows about the training so far.

    Attributes:
        settings: of the training.
        expected_samples: of all epochs.
        worker: which worker it is.
        state: counts after the last step; every step makes a new one.
        saver: of this worker's checkpoints.
        preemption: how the workers agree on a notice.
        logger: of rank 0; None logs nothing.
        observe: told of every step.
        pulse: of this process; the watchdog hears of every phase.
        pace: how fast it goes, and the others.
    """

    settings: TrainingSettings
    expected_samples: int
    worker: Worker
    state: TrainState
    saver: CheckpointSaver
    preemption: PreemptionWatch
    logger: MetricLogger | None = None
    observe: Observer | None = None
    pulse: Pulse = dataclasses.field(default_factory=Pulse)
    pace: Pace = dataclasses.field(default_factory=Pace)
    _new_drops: list[DroppedSample] = dataclasses.field(default_factory=list)
    _stats: Any = None

    def run(self, steps: Iterator[Sequence[MicroBatch]]) -> None:
        """Make every remaining step, with a progress line and a checkpoint as often as the settings say.

        Raises:
            PreemptedError: after the checkpoint that a notice by SIGTERM asked for.
        """
        settings = self.settings
        self.pulse.mark(Phase.DATA, self.state.step + 1, detail="")  # what was loaded is no sample
        while not self.state.done:
            started = time.perf_counter()
            self.pulse.mark(Phase.DATA, self.state.step + 1)
            members = next(steps)
            ready = time.perf_counter()
            self.pulse.mark(Phase.COLLECTIVE, detail=last_sample(members))
            counts = Counts.of(members, self.preemption.votes()).summed_over_workers(self.worker.device)
            together = time.perf_counter()
            self._new_drops += [sample for batch in members for sample in batch.dropped]
            loss = self._optimizer_step(members, counts)
            norm = float(self.worker.engine.get_global_grad_norm())  # waits for a GPU, which is still at its update
            ended = time.perf_counter()
            self.pulse.step_took(ended - started)
            self.pace.add(members, counts, ready - started, together - ready, ended - started)
            self._count(loss, norm, counts, ended - started)
            self.saver.trained(members, loss)
            step = self.state.step
            if self.observe is not None:
                trained = tuple(sample for batch in members for sample in batch.samples)
                self.observe(
                    StepRecord(step, self.state.total_steps, self.worker.rank, self.worker.world, loss, trained)
                )
            if step == 1 or step % settings.log_every_steps == 0 or self.state.done:
                self._log(loss, norm)
            notice = self.preemption.agree(*counts.votes)
            if self.state.done:
                continue
            if notice is not None:
                self._checkpoint_for(notice, members)
            elif step % settings.checkpoint_every_steps == 0:
                self._checkpoint(members)

    def _optimizer_step(self, members: Sequence[MicroBatch], counts: Counts) -> float:
        """Forward, backward and update; returns the mean loss over the supervised tokens of the global batch.

        DeepSpeed averages gradients over workers and micro-batches. Each micro-batch divides its summed loss by
        tokens / (world * accumulation), so that the average is the sum over all of them, divided by all tokens.
        """
        engine, step = self.worker.engine, self.state.step
        _seed(self.settings.seed, step, self.worker.rank)
        factor = schedule_factor(step, self.state.total_steps, self.settings.schedule)
        for group in engine.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        tokens = max(1, counts.supervised)
        divisor = tokens / (self.worker.world * len(members))
        losses = torch.zeros(len(members), dtype=torch.float64, device=engine.device)
        for index, batch in enumerate(members):
            inputs = {name: tensor.to(engine.device) for name, tensor in batch.inputs.items()}
            self.pulse.mark(Phase.FORWARD)
            output = engine(**inputs, num_items_in_batch=divisor, loss_chunk=self.settings.loss_chunk)
            self.pulse.mark(Phase.BACKWARD)
            engine.backward(output.loss)
            losses[index] = output.loss.detach().double() * divisor
            if index < len(members) - 1:
                engine.step()
        self._stats = output.pruning_stats
        total = losses.sum()
        self.pulse.mark(Phase.COLLECTIVE)
        torch.distributed.all_reduce(total)
        loss = total.item() / tokens
        if not math.isfinite(loss):
            self._raise_diverged(loss, members, losses.tolist())
        self.pulse.mark(Phase.UPDATE)
        engine.step()
        return loss

    def _raise_diverged(self, loss: float, members: Sequence[MicroBatch], losses: Sequence[float]) -> None:
        """Raise what ends a training whose loss is no number, which all workers know.

        Together they name the samples of the micro-batches it is in (all of the step, where only the sum is too large).
        """
        mine = [(batch.samples, math.isfinite(own)) for batch, own in zip(members, losses, strict=True)]
        everywhere: list[list[tuple[tuple[SampleId, ...], bool]]] = [[] for _ in range(self.worker.world)]
        torch.distributed.all_gather_object(everywhere, mine)
        batches = list(itertools.chain.from_iterable(everywhere))
        guilty = [samples for samples, finite in batches if not finite] or [samples for samples, _ in batches]
        samples = list(itertools.chain.from_iterable(guilty))
        named = "; ".join(f"{one.key} ({one})" for one in samples[:NAMED_SAMPLES])
        more = f" and {len(samples) - NAMED_SAMPLES} more" if len(samples) > NAMED_SAMPLES else ""
        raise DivergedError(
            f"the loss of step {self.state.step + 1} is {loss}; no weight was touched in that step, and the last "
            f"checkpoint is from before it. It comes from the micro-batches with the samples {named}{more}. Look at "
            "them, or lower the learning rates or optimizer.clip_norm, and start under another run name"
        )

    def _count(self, loss: float, norm: float, counts: Counts, seconds: float) -> None:
        state = self.state
        dropped = {reason: state.dropped.get(reason, 0) + number for reason, number in counts.dropped.items()}
        self.state = dataclasses.replace(
            state.with_loss(loss),
            step=state.step + 1,
            rows=state.rows + self.settings.global_batch,
            samples_seen=state.samples_seen + counts.seen,
            tokens=state.tokens + counts.tokens,
            cells=state.cells + counts.cells,
            dropped={reason: number for reason, number in dropped.items() if number},
            truncated=state.truncated + counts.truncated,
            step_seconds=state.step_seconds + seconds,
        )
        self._check_norm(norm)
        self._check_drops()

    def _check_norm(self, norm: float) -> None:
        """A finite loss may have a gradient that is not: nothing of such a step is saved."""
        if not math.isfinite(norm):
            raise DivergedError(
                f"the gradient of step {self.state.step} has the norm {norm}; nothing of that step was saved, and the "
                "last checkpoint is from before it. Lower the learning rates, or train with precision fp32, and start "
                "under another run name"
            )

    def _check_drops(self) -> None:
        """All workers know the same counts, so all of them stop, or none."""
        share, few = self.settings.max_drop_share, min(self.expected_samples, FEWEST_JUDGED_SAMPLES)
        met = self.state.samples_seen + sum(self.state.dropped.values())
        faulty, judged = self.state.faulty, max(met, few)
        untrained = met >= few and not self.state.samples_seen
        if faulty <= share * judged and not untrained:
            return
        self._gather_drops()
        first = "; ".join(
            f"{one.sample.key} ({one.sample}): {one.reason}, {one.detail}" for one in self.state.dropped_samples[:5]
        )
        counted = f"By reason: {self.state.dropped}. First: {first}"
        if faulty <= share * judged:
            raise TooManyDroppedError(
                f"none of the first {met} samples could be trained. {counted}. Raise data.max_length, or give an image "
                "fewer tokens (pruning.fuse.keep)."
            )
        raise TooManyDroppedError(
            f"{faulty} of {judged} samples are faulty, more than max_drop_share {share} allows. {counted}. Repair the "
            "data, or raise max_drop_share."
        )

    def _gather_drops(self) -> None:
        """Collect the faulty samples that the workers met since the last time."""
        everywhere: list[list[DroppedSample]] = [[] for _ in range(self.worker.world)]
        torch.distributed.all_gather_object(everywhere, self._new_drops)
        self._new_drops = []
        listed = sorted({*self.state.dropped_samples, *itertools.chain.from_iterable(everywhere)})
        self.state = dataclasses.replace(self.state, dropped_samples=tuple(listed[:MAX_LISTED_DROPS]))

    def _log(self, loss: float, norm: float) -> None:
        self.state = self.pace.share(self.state, self.worker)
        if self.worker.rank != 0:
            return
        rates = {f"learning_rate/{group['part']}": group["lr"] for group in self.worker.engine.optimizer.param_groups}
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            **rates,
            **self._stats.as_metrics(),
            "samples_seen": float(self.state.samples_seen),
            "samples_dropped": float(sum(self.state.dropped.values())),
            "samples_truncated": float(self.state.truncated),
            **self.pace.as_metrics(),
            "workers": float(self.worker.world),
        }
        progress_from_worker(self.state.step, self.state.total_steps, progress_line(self.state, metrics))
        if self.logger is not None:
            self.logger.log(metrics, self.state.step)

    def _checkpoint_for(self, notice: Preemption, members: Sequence[MicroBatch]) -> None:
        """Just in time. After a drain notice the training goes on: its end is up to Ray."""
        name = self._checkpoint(members)
        if notice.kind == "signal":
            committed = self.saver.wait_committed(name, notice.seconds_left(self.settings.preemption_grace_s))
            raise preempted(notice, self.state.step, committed)
        if self.worker.rank == 0:
            say_from_worker(f"  {notice.detail}: checkpoint of step {self.state.step}; the training goes on")

    def _checkpoint(self, members: Sequence[MicroBatch]) -> str:
        """The checkpoint of the step that trained `members`; one that is validated may be exported."""
        validated = self.saver.validates_next(self.state)
        if not validated:
            return self._save(None)
        return self._save(parity_batch(self.worker.engine, members[0], self.settings.precision))

    def _save(self, parity: ParityBatch | None) -> str:
        self.pulse.mark(Phase.CHECKPOINT)
        self._gather_drops()
        pending = self.logger.pending_points() if self.logger is not None else []
        return self.saver.save(self.state, pending, parity)

    def finish(self, final: dict[str, float], parity: ParityBatch) -> None:
        """The last checkpoint, and the held-out metrics to the logger."""
        self.state = dataclasses.replace(self.state, final=final)
        if self.logger is not None:
            self.logger.log(final, self.state.step)
        self._save(parity)
        if self.logger is not None:
            self.logger.close()


def last_sample(members: Sequence[MicroBatch]) -> str:
    """The last sample of a step, for people."""
    samples = [sample for batch in members for sample in batch.samples]
    return f"last sample {samples[-1].key} ({samples[-1]})" if samples else ""


def progress_line(state: TrainState, metrics: Mapping[str, float]) -> str:
    """One readable line about the step that was just made."""
    rates = [value for name, value in metrics.items() if name.startswith("learning_rate/")]
    truncated = f"  truncated {state.truncated}" if state.truncated else ""
    utilisation = f"MFU {metrics['mfu']:.0%}  " if "mfu" in metrics else ""
    if "workers/data_wait_share" in metrics:
        utilisation += f"data wait {metrics['workers/data_wait_share']:.0%}  "
    return (
        f"step {state.step}/{state.total_steps}  loss {metrics['loss']:.4f}  lr {max(rates):.2e}  "
        f"grad {metrics['grad_norm']:.2f}  {metrics['samples_per_s']:.1f} samples/s  "
        f"{metrics['tokens_per_s']:.0f} tokens/s  {utilisation}padding {metrics['padding_share']:.0%}  "
        f"visual tokens {metrics['visual_tokens/in']:.0f} in, {metrics['visual_tokens/fuse/kept']:.0f} kept  "
        f"dropped {metrics['samples_dropped']:.0f}{truncated}"
    )


def _seed(seed: int, step: int, rank: int) -> None:
    """Random numbers are a function of (seed, step, rank), so a resumed run draws the same ones."""
    torch.manual_seed(int(SeedSequence([seed, step, rank]).generate_state(1)[0]))
