"""An estimate for people: a line a phase, peaks, what is largest; with all terms on request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipelines.sizing.terms import PHASES, Estimate, Phase, Place, Resource

COLUMNS: tuple[tuple[str, Place, Resource], ...] = (
    ("head RAM", "head", "ram"),
    ("task RAM", "task", "ram"),
    ("task temp", "task", "temp"),
    ("node RAM", "node", "ram"),
    ("node temp", "node", "temp"),
    ("GPU", "gpu", "gpu"),
    ("up", "store", "up"),
    ("down", "store", "down"),
)
UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def size_text(amount: float) -> str:
    """Bytes in three digits and a unit; nothing for none."""
    for unit, name in UNITS:
        if amount >= 0.9995 * unit:
            return f"{amount / unit:.3g} {name}" if amount < 999.5 * unit else f"{amount / unit:.0f} {name}"
    return f"{amount:.0f} B" if amount else ""


def time_text(seconds: float) -> str:
    """Seconds in a unit that a person reads."""
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 120:
        return f"{seconds / 60:.0f} min"
    if not seconds:
        return ""
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def table(found: Estimate) -> str:
    """Facts, a line a phase, and the peaks."""
    lines = [f"{name:<10}{text}" for name, text in found.facts]
    rows = [["phase", *(title for title, _, _ in COLUMNS), "time"]]
    rows += [_row(found, phase) for phase in PHASES]
    rows.append(["peak, sum", *(_last(found, place, resource) for _, place, resource in COLUMNS), _all_time(found)])
    lines += ["", *aligned(rows), ""]
    lines.append(f"largest object  {size_text(found.largest_object.amount)}  {found.largest_object.what}")
    kept = sum(term.amount for term in found.kept)
    lines.append(f"in the store    {size_text(kept)}  {'; '.join(term.what for term in found.kept)}")
    return "\n".join(lines)


def terms_text(found: Estimate) -> str:
    """Every term of every phase with its formula."""
    lines: list[str] = []
    for use in found.uses:
        shown = time_text if use.resource == "time" else size_text
        lines.append(f"{use.phase}, {use.place} {use.resource}: {shown(use.total)}")
        lines += [f"  {shown(term.amount):>10}  {term.what} ({term.formula})" for term in use.terms]
    return "\n".join(lines)


def _row(found: Estimate, phase: Phase) -> list[str]:
    cells = [size_text(found.total(phase, place, resource)) for _, place, resource in COLUMNS]
    seconds = sum(found.total(phase, place, "time") for place in ("task", "node"))
    return [phase, *cells, time_text(seconds)]


def _last(found: Estimate, place: Place, resource: Resource) -> str:
    return size_text(found.moved(resource) if place == "store" else found.peak(place, resource)[1])  # type: ignore[arg-type]


def _all_time(found: Estimate) -> str:
    """One after the other, but what goes on beside the training."""
    beside = ("checkpoint", "validation")
    return time_text(sum(use.total for use in found.uses if use.resource == "time" and use.phase not in beside))


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of columns as wide as their widest cell, the first to the left and all others to the right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()
