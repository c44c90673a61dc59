"""Counting what was trained, from the workers' own lines and the tars; nothing here knows the plan or the ledger.

A training is made of attempts (one start of all workers each). A step that was rolled back to a checkpoint is trained
again by a later attempt; only its last execution is in the final weights, and only that one counts.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.checkpoint.state import TrainState
from pipelines.data.ledger import Ledger
from pipelines.data.sample_id import SampleId, SampleIds
from pipelines.io import codec

Sample = tuple[int, str]
"""Epoch and key."""


class AuditError(ValueError):
    """The workers' lines cannot be read; the message names the file and the line."""


@dataclass(frozen=True)
class Line:
    """What one worker trained in one execution of one step."""

    attempt: str
    pid: int
    time: float
    step: int
    rank: int
    world: int
    loss: float
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Audit:
    """What the final weights contain, counted."""

    losses: dict[int, float]
    """Loss of each step."""
    worlds: dict[int, int]
    """Workers of each step."""
    samples: dict[int, tuple[Sample, ...]]
    """What all workers together trained in each step, sorted."""
    lost: dict[int, list[str]]
    """By epoch: keys of the shards that were not trained, faulty ones left out."""
    repeated: dict[int, list[str]]
    """By epoch: keys that were trained more often than once, as often as too often."""
    foreign: list[Sample]
    """Trained, but in no shard, in no epoch of this training, or faulty."""
    faults: list[str]
    """What the lines themselves show to be wrong: steps without one of their workers, workers that disagree."""
    attempts: int
    replayed: int
    """Executions of steps that are not in the final weights."""

    @property
    def lost_samples(self) -> int:
        """Number of samples lost."""
        return sum(map(len, self.lost.values()))


def read_lines(path: Path) -> list[Line]:
    """All lines of the file that `Recorder` writes, in the order in which they were written.

    Raises:
        AuditError: for a line that is none.
    """
    lines = []
    for number, text in enumerate(path.read_text().splitlines() if path.exists() else [], start=1):
        lines.append(codec.decode(Line, text, f"{path}, line {number}", AuditError))
    return lines


def attempts_of(lines: Sequence[Line]) -> list[list[Line]]:
    """The lines of each attempt, attempts in the order in which they began to step."""
    groups: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        groups[line.attempt].append(line)
    return sorted(groups.values(), key=lambda group: min(line.time for line in group))


def audit(
    lines: Sequence[Line], shards: Sequence[Sequence[str]], faulty: Collection[str], epochs: int, total_steps: int
) -> Audit:
    """Count the last execution of every step.

    Args:
        lines: of all attempts.
        shards: the keys that lie in each shard.
        faulty: keys of the samples that cannot be trained.
        epochs: passes over the data.
        total_steps: steps of the whole training.
    """
    stored = Counter(key for keys in shards for key in keys)
    attempts = attempts_of(lines)
    last: dict[int, list[Line]] = {}
    executions = 0
    faults: list[str] = []
    for attempt in attempts:
        steps = sorted({line.step for line in attempt})
        executions += len(steps)
        if steps != list(range(steps[0], steps[-1] + 1)):
            faults.append(f"one start of the workers made the steps {steps}, which have a gap")
        for step in steps:
            last[step] = [line for line in attempt if line.step == step]
    expected_steps = range(1, total_steps + 1)
    faults += [f"step {step} was never made" for step in expected_steps if step not in last]
    faults += [f"step {step} is beyond the last step {total_steps}" for step in last if step not in expected_steps]
    for step, members in sorted(last.items()):
        ranks = sorted(line.rank for line in members)
        if ranks != list(range(members[0].world)):
            faults.append(f"step {step}: its last execution has lines of workers {ranks} of {members[0].world}")
        if len({line.loss for line in members}) > 1:
            faults.append(f"step {step}: the workers saw different losses {sorted({line.loss for line in members})}")
    trained = Counter(sample for members in last.values() for line in members for sample in line.samples)
    good = {key for key in stored if key not in faulty}
    return Audit(
        losses={step: members[0].loss for step, members in sorted(last.items())},
        worlds={step: members[0].world for step, members in sorted(last.items())},
        samples={
            step: tuple(sorted(sample for line in members for sample in line.samples))
            for step, members in sorted(last.items())
        },
        lost={
            epoch: sorted(key for key in good for _ in range(max(0, stored[key] - trained[epoch, key])))
            for epoch in range(epochs)
        },
        repeated={
            epoch: sorted(key for key in good for _ in range(max(0, trained[epoch, key] - stored[key])))
            for epoch in range(epochs)
        },
        foreign=sorted(sample for sample in trained if sample[1] not in good or sample[0] not in range(epochs)),
        faults=faults,
        attempts=len(attempts),
        replayed=executions - len(last),
    )


def loss_difference(found: Audit, reference: Audit) -> float:
    """Largest difference between the losses of two trainings, step by step.

    Infinite where steps are missing or a loss is no number.
    """
    if found.losses.keys() != reference.losses.keys() or not reference.losses:
        return float("inf")
    differences = [abs(found.losses[step] - reference.losses[step]) for step in reference.losses]
    return max(differences) if all(map(math.isfinite, differences)) else float("inf")


def moved_steps(found: Audit, reference: Audit) -> list[int]:
    """Steps that consumed other samples than in the undisturbed training."""
    steps = sorted(found.samples.keys() | reference.samples.keys())
    return [step for step in steps if found.samples.get(step) != reference.samples.get(step)]


def seconds_to_resume(lines: Sequence[Line], fault_time: float) -> float | None:
    """Seconds from the fault to the first optimizer step after it.

    Of a later start of the workers where there is one, else of the same. None where no step came after it.
    """
    starts = [min(line.time for line in attempt) for attempt in attempts_of(lines)]
    later = [start for start in starts if start > fault_time] or [line.time for line in lines if line.time > fault_time]
    return min(later) - fault_time if later else None


@dataclass(frozen=True)
class Expectation:
    """What an audit is held against."""

    faulty: Collection[str]
    epochs: int
    tolerance: float
    """Largest loss difference to the undisturbed training; 0 asks for equal bits."""
    replayed: int | None = None
    """Exact number of replayed steps, where it is known."""
    worlds: tuple[int, ...] | None = None
    """The numbers of workers, in the order in which the steps had them."""
    given_up: Mapping[str, str] = field(default_factory=dict)
    """Keys that this scenario gives up with a notice, in every epoch, and the name each is listed under as dropped."""


def violations(
    found: Audit, reference: Audit, state: TrainState, losses: Sequence[float], expected: Expectation
) -> list[str]:
    """Everything in which a training is not what it must be; [] when it passes.

    The committed state of the training and its stored losses (what it says of itself) are held against the audit, too.
    """
    wrong = list(found.faults)
    given_up = expected.given_up
    lost = {epoch: [key for key in keys if key not in given_up] for epoch, keys in found.lost.items()}
    for what, by_epoch in (("lost", lost), ("repeated", found.repeated)):
        wrong += [f"epoch {epoch}: {len(keys)} samples {what}: {keys[:5]}" for epoch, keys in by_epoch.items() if keys]
    if found.foreign:
        wrong.append(f"{len(found.foreign)} samples trained that must not be: {found.foreign[:5]}")
    difference = loss_difference(found, reference)
    if not difference <= expected.tolerance and not given_up:
        wrong.append(f"the losses differ from the undisturbed ones by {difference:.3g} (at most {expected.tolerance})")
    moved = moved_steps(found, reference)
    if moved and not given_up:
        wrong.append(f"steps {moved} consumed other samples than undisturbed")
    if expected.replayed is not None and found.replayed != expected.replayed:
        wrong.append(f"{found.replayed} steps were replayed instead of {expected.replayed}")
    worlds = tuple(size for step, size in found.worlds.items() if size != found.worlds.get(step - 1))
    if expected.worlds is not None and worlds != expected.worlds:
        wrong.append(f"the steps were made by {worlds} workers instead of {expected.worlds}")
    return wrong + state_violations(found, state, losses, expected)


def state_violations(found: Audit, state: TrainState, losses: Sequence[float], expected: Expectation) -> list[str]:
    """Where the committed state and losses of a finished training disagree with the audit."""
    wrong = []
    if list(losses) != list(found.losses.values()):
        wrong.append("the stored losses are not those that the workers saw")
    trained = sum(map(len, found.samples.values()))
    if state.samples_seen != trained:
        wrong.append(f"the checkpoint counts {state.samples_seen} samples, the workers trained {trained}")
    dropped = Counter(dropped.sample.key for dropped in state.dropped_samples)
    awaited = Counter(dict.fromkeys([*expected.faulty, *expected.given_up.values()], expected.epochs))
    if dropped != awaited:
        wrong.append(f"the checkpoint lists the dropped samples {dict(dropped)}, they are {dict(awaited)}")
    if sum(state.dropped.values()) != sum(awaited.values()):
        wrong.append(f"the checkpoint counts {state.dropped} as dropped, they are {sum(awaited.values())}")
    return wrong


def ledger_violations(found: Audit, data: bytes, shards: Sequence[Sequence[str]], expected: Expectation) -> list[str]:
    """Where the committed ledger of a finished training (its bytes) disagrees with the audit."""
    sizes = [[len(keys) for keys in shards]]
    place = {key: (shard, index) for shard, keys in enumerate(shards) for index, key in enumerate(keys)}
    ledger, counted = Ledger.from_bytes(data, sizes), Ledger(sizes)
    passed_over = sorted(
        (epoch, key) for key in [*expected.faulty, *expected.given_up] for epoch in range(expected.epochs)
    )
    trained = sorted({sample for samples in found.samples.values() for sample in samples if sample[1] in place})
    for dropped, samples in ((False, trained), (True, passed_over)):
        counted.add(SampleIds.of(SampleId(0, epoch, *place[key]) for epoch, key in samples), dropped=dropped)
    more, fewer = ledger.difference(counted)
    wrong = [f"the ledger holds {sample}, which was not consumed" for sample in more]
    wrong += [f"the ledger lacks {sample}, which was consumed" for sample in fewer]
    if list(ledger.dropped_samples()) != list(counted.dropped_samples()):
        wrong.append(f"the ledger has {ledger.dropped} samples as dropped, they are {counted.dropped}")
    return wrong
