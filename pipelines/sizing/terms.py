"""What a phase takes at a place, as a sum of named terms: nothing is added up before it is shown.

Units: bytes, and seconds for time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Phase = Literal["prepare", "calibrate", "train", "checkpoint", "validation", "export", "parity", "answer", "register"]
PHASES: tuple[Phase, ...] = (
    *("prepare", "calibrate", "train", "checkpoint", "validation", "export", "parity", "answer", "register"),
)
BESIDE: tuple[Phase, ...] = ("train", "checkpoint", "validation")
"""Phases that go on at the same time."""
Place = Literal["head", "task", "node", "gpu", "store"]
"""The driver's machine; the one that Ray chooses for a phase; each that trains; each GPU; the object store."""
Resource = Literal["ram", "gpu", "temp", "up", "down", "time"]
"""Peak of memory, of GPU memory, of the temporary folder; bytes to and from the store; seconds."""

ONCE = "once a node"
"""Formula of a term that the processes of a machine share."""


@dataclass(frozen=True)
class Term:
    """One summand.

    Attributes:
        what: for people.
        formula: with the letters of `pipelines.sizing.estimate`.
        amount: bytes, or seconds.
        bound: whether it is the most that the data may ask for, and not what usual samples take.
    """

    what: str
    formula: str
    amount: float
    bound: bool = False


@dataclass(frozen=True)
class Use:
    """What one phase takes of one resource at one place."""

    phase: Phase
    place: Place
    resource: Resource
    terms: tuple[Term, ...]

    @property
    def total(self) -> float:
        """Of all terms."""
        return sum(term.amount for term in self.terms)


@dataclass(frozen=True)
class Estimate:
    """All uses of a run.

    Attributes:
        uses: in the order of the phases.
        largest_object: bytes of the largest object in the store, and what it is.
        kept: bytes that stay in the store at the most, checkpoints that come and go included.
        facts: what was assumed, for people: a name and a text.
        steps: optimizer steps; None where the number of samples is not known.
    """

    uses: tuple[Use, ...]
    largest_object: Term
    kept: tuple[Term, ...]
    facts: tuple[tuple[str, str], ...]
    steps: int | None = None

    def total(self, phase: Phase, place: Place, resource: Resource) -> float:
        """Of one phase at one place."""
        return sum(use.total for use in self._of(place, resource) if use.phase == phase)

    def peak(self, place: Place, resource: Resource) -> tuple[Phase, float]:
        """The most at a time, and in which phase: training, checkpoints and validation go on side by side."""
        return self.peak_of((place,), resource)

    def peak_of(self, places: Collection[Place], resource: Resource, bounds: bool = True) -> tuple[Phase, float]:
        """The same of a machine that is several places; without `bounds`, what it takes whatever the samples are."""
        groups: list[tuple[Phase, ...]] = [BESIDE, *((phase,) for phase in PHASES if phase not in BESIDE)]
        found = [(group[0], self._at(group, places, resource, bounds)) for group in groups]
        return max(found, key=lambda one: one[1])

    def _at(self, phases: Collection[Phase], places: Collection[Place], resource: Resource, bounds: bool) -> float:
        uses = [one for one in self.uses if one.phase in phases and one.place in places and one.resource == resource]
        terms = [term for one in uses for term in one.terms if bounds or not term.bound]
        shared = {term.what: term.amount for term in terms if term.formula == ONCE}
        return sum(term.amount for term in terms if term.formula != ONCE) + sum(shared.values())

    def moved(self, resource: Literal["up", "down"]) -> float:
        """Bytes of the whole run to or from the store, over all places."""
        return sum(use.total for use in self.uses if use.resource == resource and use.place == "store")

    def _of(self, place: Place, resource: Resource) -> Iterable[Use]:
        return (use for use in self.uses if use.place == place and use.resource == resource)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: every term, and the peaks."""
        peaks = {
            f"{place} {resource}": dict(zip(("phase", "amount"), self.peak(place, resource), strict=True))
            for place in ("head", "task", "node", "gpu")
            for resource in ("ram", "gpu", "temp")
            if self.peak(place, resource)[1]
        }
        return {
            "facts": dict(self.facts),
            "uses": [{**asdict(use), "total": use.total} for use in self.uses],
            "peaks": peaks,
            "largest_object": asdict(self.largest_object),
            "kept": [asdict(term) for term in self.kept],
            "up": self.moved("up"),
            "down": self.moved("down"),
        }


def use(phase: Phase, place: Place, resource: Resource, *terms: Term | None) -> Use:
    """A use without the terms that are nothing."""
    return Use(phase, place, resource, tuple(term for term in terms if term is not None and term.amount > 0))


def non_empty(uses: Sequence[Use]) -> tuple[Use, ...]:
    """Those that have a term."""
    return tuple(one for one in uses if one.terms)
