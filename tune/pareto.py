"""Pareto fronts and their hypervolume, in two dimensions: a score that shall be high at a cost that shall be low."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """One trial: what it costs and how well it answers (higher is better)."""

    id: str
    cost: float
    score: float


def front(points: Iterable[Point]) -> list[Point]:
    """The points that no other one dominates, by rising cost (of equal ones the first)."""
    best: list[Point] = []
    for point in sorted(points, key=lambda item: (item.cost, -item.score)):
        if not best or point.score > best[-1].score:
            best.append(point)
    return best


def hypervolume(points: Iterable[Point], corner: tuple[float, float]) -> float:
    """Area that the points dominate inside the corner (cost, score); points beyond it count nothing.

    Zitzler and Thiele, "Multiobjective optimization using evolutionary algorithms" (PPSN 1998).
    """
    area, reached = 0.0, corner[1]
    inside = [p for p in points if p.cost < corner[0] and p.score > corner[1]]
    for point in front(inside):
        area += (corner[0] - point.cost) * (point.score - reached)
        reached = point.score
    return area
