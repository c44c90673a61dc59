"""Who is stuck: judged from signs of life alone, plain values in and out, so that it is tested without a cluster.

- silent: a process has sent nothing for a while. It is stopped, or something in it keeps Python from running.
- still: the workers beat, and none of them gets on. They go in step, so one of them holds all: the one that is in no
  collective operation, or a data task that all wait for.
- nobody starts: Ray's controller is in one part of a start for too long.

Limits follow the training: what is not known yet gets `start_s`, and then ten times the slowest of the last steps, at
least `floor_s`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from pipelines.io.pulse import Beat, Phase

STEPS = 10.0
"""Workers are stuck when none of them gets on for so many times their slowest step."""
REPLACED_IN_A_ROW = 2
"""Data tasks that are replaced without the training getting on, before its workers are started again."""
CONTROLLER = "controller"
IN_STEPS = {Phase.DATA, Phase.COLLECTIVE, Phase.FORWARD, Phase.BACKWARD, Phase.UPDATE}
WAITING = {Phase.COLLECTIVE, Phase.UPLOAD}
"""Phases in which a worker waits for others."""
LOADS = {Phase.START, Phase.LOAD}
LOADING = 2.0
"""While a process loads libraries and weights, it may be silent for so many times the usual."""
OPEN_ENDED = {Phase.ENDED, Phase.RUNNING, Phase.IDLE, Phase.ROOM}
"""Phases that may last; a process that has ended may be silent, too."""


@dataclass(frozen=True)
class Limits:
    """Seconds after which something counts as stuck.

    Attributes:
        floor_s: at least.
        start_s: for what has no known length: parts of the start, reading a shard, writing a checkpoint.
        upload_s: more, for an upload, which outlasts a storage that fails.
    """

    floor_s: float
    start_s: float
    upload_s: float

    def silence_s(self, beat: Beat, slowest_step_s: float) -> float:
        """Of a process: what keeps Python from running is at most one step, or the import of a large library."""
        return LOADING * self.floor_s if beat.phase in LOADS else self.floor_s + slowest_step_s

    def still_s(self, beat: Beat) -> float:
        """Of a worker."""
        if beat.phase in IN_STEPS:
            return max(self.floor_s, STEPS * beat.slowest_step_s) if beat.slowest_step_s else self.start_s
        return self.start_s + (self.upload_s if beat.phase is Phase.UPLOAD else 0.0)


@dataclass(frozen=True)
class Stuck:
    """What was found, and what to do about it."""

    kind: Literal["silent", "still", "start"]
    action: Literal["replace", "restart"]
    """replace: end the culprits, which Ray makes anew; restart: end them, and all workers begin again."""
    culprits: tuple[Beat, ...]
    seconds: float
    limit_s: float
    others: tuple[Beat, ...] = ()
    """What the other workers do meanwhile."""

    @property
    def nodes(self) -> frozenset[str]:
        """Where the culprits are; of a start that nobody came of, none."""
        return frozenset(one.process.node for one in self.culprits if is_worker(one))

    def __str__(self) -> str:
        """One line that names everyone, and how long."""
        names = "; ".join(f"{one.member} ({one.process}) last in {one.doing}" for one in self.culprits[:8])
        more = f"; {len(self.culprits) - 8} more" if len(self.culprits) > 8 else ""
        what = {
            "silent": "no sign of life",
            "still": "no progress",
            "start": "no worker has begun",
        }[self.kind]
        meanwhile = "; ".join(f"{one.member} in {one.phase}" for one in self.others[:8])
        tail = f". Meanwhile: {meanwhile}" if meanwhile else ""
        return f"{what} for {self.seconds:.0f} s (limit {self.limit_s:.0f} s): {names}{more}{tail}"


@dataclass
class _Member:
    beat: Beat
    heard: float
    got_on: float
    """When it last said something new."""


def is_worker(beat: Beat) -> bool:
    """Whether it is one of the processes that train."""
    return beat.member.startswith("worker ")


def is_data_task(beat: Beat) -> bool:
    """Whether it reads or encodes."""
    return beat.member.startswith("data task ")


@dataclass
class Judge:
    """Remembers when every member was last heard and last got on, by the observer's own clock.

    Args:
        limits: what counts as stuck.
    """

    limits: Limits
    _members: dict[str, _Member] = field(default_factory=dict)
    _replaced: int = 0

    def begin(self, now: float) -> list[str]:
        """A new start of the workers: nobody of the one before counts, but data tasks; who is left out."""
        before = [one.beat for one in self._members.values() if not is_data_task(one.beat)]
        self._replaced = 0
        for one in self._members.values():
            one.heard = one.got_on = now
        return self.forget(before)

    def see(self, beats: Iterable[Beat], now: float) -> None:
        """Take the newest beats."""
        for beat in beats:
            known = self._members.get(beat.member)
            if known is None or known.beat.process != beat.process:
                self._members[beat.member] = _Member(beat, now, now)
                continue
            if beat.number == known.beat.number:
                continue
            known.heard = now
            if beat.marks != known.beat.marks:
                known.got_on = now
                if is_worker(beat):
                    self._replaced = 0
            known.beat = beat

    def slept(self, seconds: float, now: float) -> None:
        """The observer itself was stopped for so long: nobody is blamed for it."""
        for one in self._members.values():
            one.heard = min(now, one.heard + seconds)
            one.got_on = min(now, one.got_on + seconds)

    def forget(self, beats: Iterable[Beat]) -> list[str]:
        """Leave out members that are gone; their names."""
        names = [beat.member for beat in beats]
        for name in names:
            self._members.pop(name, None)
        return names

    def replaced(self, beats: Iterable[Beat], now: float) -> None:
        """Data tasks were ended: Ray makes them anew in other processes, and what waits for them has its time again."""
        self.forget(beats)
        self._replaced += 1
        for one in self._members.values():
            one.got_on = now

    @property
    def workers(self) -> list[Beat]:
        """The newest beats of the workers."""
        return [one.beat for one in self._members.values() if is_worker(one.beat)]

    @property
    def controller(self) -> Beat | None:
        """The newest beat of Ray's controller."""
        found = self._members.get(CONTROLLER)
        return found.beat if found else None

    def stuck(self, now: float) -> Stuck | None:
        """Who is, if anyone; silence first, which says most."""
        return self._silent(now) or self._still(now) or self._start(now)

    def _select(self, of: Callable[[Beat], bool]) -> list[_Member]:
        return [one for one in self._members.values() if of(one.beat) and one.beat.phase is not Phase.ENDED]

    def _silent(self, now: float) -> Stuck | None:
        slowest = max((one.beat.slowest_step_s for one in self._select(is_worker)), default=0.0)
        silent = [
            one for one in self._select(lambda beat: True) if now - one.heard > self.limits.silence_s(one.beat, slowest)
        ]
        if not silent:
            return None
        first = min(silent, key=lambda one: one.heard)
        limit = self.limits.silence_s(first.beat, slowest)
        # Those that fell silent with it, as on a node that is stopped; one kind at a time, since they are ended apart.
        same = [one.beat for one in silent if is_data_task(one.beat) == is_data_task(first.beat)]
        action: Literal["replace", "restart"] = "replace" if is_data_task(first.beat) else "restart"
        return self._found("silent", action, same, now - first.heard, limit)

    def _still(self, now: float) -> Stuck | None:
        workers = self._select(is_worker)
        if not workers:
            return None
        seconds = now - max(one.got_on for one in workers)
        limit = max(self.limits.still_s(one.beat) for one in workers)
        if seconds <= limit:
            return None
        if any(one.beat.phase is Phase.DATA for one in workers):
            tasks = [one for one in self._select(is_data_task) if one.beat.phase not in OPEN_ENDED]
            tasks.sort(key=lambda one: one.got_on)
            # What is being read has a patience of its own.
            late = [
                one for one in tasks if one.beat.phase is not Phase.READING or now - one.got_on > self.limits.start_s
            ]
            late = [one for one in late if now - one.got_on > self.limits.floor_s]
            if late and self._replaced < REPLACED_IN_A_ROW:
                return self._found("still", "replace", [late[0].beat], now - late[0].got_on, self.limits.floor_s)
            # Processes that only just begin are not heard of yet: it may be their imports that all wait for.
            if (tasks and not late) or (not late and seconds <= self.limits.start_s):
                return None
        holding = [one.beat for one in workers if one.beat.phase not in WAITING]
        return self._found("still", "restart", holding or [one.beat for one in workers], seconds, limit)

    def _start(self, now: float) -> Stuck | None:
        found = self._members.get(CONTROLLER)
        if found is None or found.beat.phase in OPEN_ENDED:
            return None
        seconds = now - found.got_on
        if seconds <= self.limits.start_s or self._select(is_worker):
            return None
        return self._found("start", "restart", [found.beat], seconds, self.limits.start_s)

    def _found(
        self,
        kind: Literal["silent", "still", "start"],
        action: Literal["replace", "restart"],
        culprits: list[Beat],
        seconds: float,
        limit_s: float,
    ) -> Stuck:
        guilty = {beat.member for beat in culprits}
        others = tuple(beat for beat in self.workers if beat.member not in guilty and beat.phase is not Phase.ENDED)
        ordered = tuple(sorted(culprits, key=lambda beat: beat.member))
        return Stuck(kind, action, ordered, seconds, limit_s, others)
