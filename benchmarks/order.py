"""What order, ledger and training state cost at a billion samples in 100,000 shards, by simulation.

1. plan       seconds to make the order of one dataset, and of a mixture of three with as many samples and shards
2. start      seconds to the first work item of a start at row 0, and of one near the end (what a resume waits for)
3. locate     samples a second, work item by work item, which every reading task does for its own rows
4. consumed   seconds in which a resume computes what the plan has consumed up to its row
5. ledger     one epoch, sample by sample, window by window in plan order, with 0.1% of all samples dropped, and
              `CHECKPOINTS` checkpoints at which it is compared with what the plan says
6. file       seconds and bytes of the ledger in a checkpoint, and seconds to compare it with the plan
7. state      what a run of 100,000 to 3,900,000 optimizer steps (the billion samples, four times, 1,024 a step) pays
              for its training state and losses: a step, a checkpoint (state and losses written), a start (state
              read), the end (all losses read, from local disk)

No shard exists and nothing is read: all of it is arithmetic on the sizes of shards. Each part runs in a process of its
own, whose peak of memory is told with and without what the imports take.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import operator
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results_file import RESULTS, write_results
from pipelines.checkpoint.losses import LossFile, LossLog, read_losses, write_losses
from pipelines.checkpoint.state import DroppedSample, TrainState
from pipelines.data.ledger import Ledger
from pipelines.data.mixture import Plan, make_plan, read_amplification
from pipelines.data.order import WorkItem
from pipelines.data.sample_id import SampleId, SampleIds
from pipelines.io.run_folder import RunFolder

EPOCHS, SEED, GLOBAL_BATCH, WINDOW_SHARDS = 3, 7, 4096, 4
CHECKPOINTS = 10
DROPPED_SHARE = 0.001
LOCATED_ITEMS = 20
RUN_STEPS = (100_000, 1_000_000, 3_900_000)
STEPS_PER_CHECKPOINT = 1000


def sizes_of(name: str, shards: int, samples: int) -> tuple[list[np.ndarray], list[float]]:
    """Samples per shard of every dataset, uneven by 10%, and the weights."""
    generator = np.random.default_rng(SEED)
    if name == "one":
        parts, weights = [shards], [1.0]
    else:
        parts, weights = [shards * 6 // 10, shards * 3 // 10, shards // 10], [1.0, 0.5, 2.0]
    mean = samples // shards
    return [generator.integers(mean * 9 // 10, mean * 11 // 10 + 1, part) for part in parts], weights


def timed(run: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What `run` returns for the arguments, and its wall-clock seconds."""
    start = time.perf_counter()
    value = run(*arguments)
    return value, round(time.perf_counter() - start, 4)


def best_of(run: Callable[[], Any], times: int = 5) -> float:
    """The shortest wall-clock seconds of some calls: what the work takes where nothing else runs."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return round(min(seconds), 7)


def make(name: str, shards: int, samples: int) -> Plan:
    sizes, weights = sizes_of(name, shards, samples)
    return make_plan(sizes, weights, SEED, EPOCHS, GLOBAL_BATCH, WINDOW_SHARDS)


def measure_plan(name: str, shards: int, samples: int) -> dict[str, Any]:
    """Parts 1 to 4. Every start is the first of a fresh plan, so that nothing is remembered."""
    sizes, weights = sizes_of(name, shards, samples)
    out: dict[str, Any] = {"shards": sum(map(len, sizes)), "samples": int(sum(map(np.sum, sizes)))}
    plan, out["make_s"] = timed(lambda: make_plan(sizes, weights, SEED, EPOCHS, GLOBAL_BATCH, WINDOW_SHARDS))
    out["rows"] = plan.total_rows
    late = plan.total_rows * 99 // 100
    for start, row in (("first", 0), ("late", late)):
        fresh = make_plan(sizes, weights, SEED, EPOCHS, GLOBAL_BATCH, WINDOW_SHARDS)
        item, out[f"{start}_item_s"] = timed(lambda plan, row: next(plan.work(row)), fresh, row)
        _, out[f"{start}_item_locations_s"] = timed(item.sample_ids)
    items, out["all_items_s"] = timed(lambda: list(plan.work(0)))
    out["items"] = len(items)
    out["windows"] = sum(len(item.parts) for item in items)
    out["read_amplification"] = round(read_amplification(items), 4)
    some = items[:: max(1, len(items) // LOCATED_ITEMS)]
    out["located_samples_per_s"] = round(
        sum(item.rows for item in some) / sum(timed(item.sample_ids)[1] for item in some)
    )
    for end, row in (("first", GLOBAL_BATCH), ("late", late)):
        _, out[f"consumed_{end}_s"] = timed(plan.consumed, row)
    return out


def additions(plan: Plan, rows: int) -> Iterator[tuple[Ledger, int]]:
    """The ledger of the first `rows` rows, filled window by window in plan order; yields it at every checkpoint's row.

    Every sample is added by its number, a random 0.1% as dropped. Those of a window that ends are added in ascending
    order instead of the plan's, which spares the permutation.
    """
    generator = np.random.default_rng(SEED)
    ledger = Ledger(plan.sizes)
    marks = [rows * part // CHECKPOINTS // GLOBAL_BATCH * GLOBAL_BATCH for part in range(CHECKPOINTS + 1)]
    for start, stop in itertools.pairwise(marks):
        for item in plan.work(start, stop):
            for part in item.parts:
                whole = part.rows == sum(part.samples)
                samples = ascending(part) if whole else part.sample_ids()
                faulty = generator.random(part.rows) < DROPPED_SHARE
                for chosen, dropped in ((~faulty, False), (faulty, True)):
                    ledger.add(samples.take(chosen), dropped=dropped)
        yield ledger, stop


def ascending(part: WorkItem) -> SampleIds:
    """All samples of a window."""
    samples = np.array(part.samples)
    index = np.arange(part.rows) - np.repeat(np.cumsum(samples) - samples, samples)
    return SampleIds(
        np.full(part.rows, part.dataset), np.full(part.rows, part.epoch), np.repeat(part.shards, samples), index
    )


def measure_ledger(name: str, shards: int, samples: int) -> dict[str, Any]:
    """Parts 5 and 6, over the rows of one epoch of three."""
    plan = make(name, shards, samples)
    rows = plan.total_samples // EPOCHS
    out: dict[str, Any] = {"samples": rows}
    start, spent, checkpoints = time.perf_counter(), 0.0, []
    for ledger, row in additions(plan, rows):
        mark = time.perf_counter()
        data, write_s = timed(ledger.to_bytes)
        again, read_s = timed(Ledger.from_bytes, data, ledger.sizes)
        planned, planned_s = timed(plan.consumed, row)
        same, compare_s = timed(operator.eq, again, planned)
        if not same or again.counts != ledger.counts:
            raise AssertionError(f"the ledger at row {row} is not what the plan says")
        one = {"row": row, "bytes": len(data), "write_s": write_s, "read_s": read_s}
        checkpoints.append({**one, "planned_s": planned_s, "compare_s": compare_s})
        spent += time.perf_counter() - mark
    out["fill_s"] = round(time.perf_counter() - start - spent, 2)
    out["trained"], out["dropped"] = ledger.trained, ledger.dropped
    out["checkpoints"] = checkpoints
    batch = plan.locate(np.arange(row, row + 500_000))
    _, out["add_500000_samples_s"] = timed(ledger.add, batch)
    return out


def train_steps(state: TrainState, log: LossLog, losses: Sequence[float]) -> TrainState:
    """What the loop does with its state and its loss in every step."""
    for loss in losses:
        log.add(loss)
        state = dataclasses.replace(state.with_loss(loss), step=state.step + 1)
    return state


def measure_state(steps: int) -> dict[str, Any]:
    """Part 7, at the end of a run of `steps` optimizer steps that saved every `STEPS_PER_CHECKPOINT`."""
    generator = np.random.default_rng(SEED)
    losses = generator.random(STEPS_PER_CHECKPOINT).tolist()
    drops = tuple(DroppedSample(row, SampleId(0, 0, 0, row, f"{row:09d}"), "too_long", "x" * 80) for row in range(200))
    state = TrainState("0123456789ab", 8, steps, step=steps - STEPS_PER_CHECKPOINT, dropped_samples=drops)
    log = LossLog(state)
    out: dict[str, Any] = {"step_s": best_of(lambda: train_steps(state, LossLog(state), losses)) / STEPS_PER_CHECKPOINT}
    state = train_steps(state, log, losses)
    with tempfile.TemporaryDirectory(prefix="meteor-order-") as folder:
        run = RunFolder(folder)
        for last in range(STEPS_PER_CHECKPOINT, steps, STEPS_PER_CHECKPOINT):
            file = LossFile(last - STEPS_PER_CHECKPOINT, last)
            write_losses(run, file, np.array(losses).tobytes(), retry_s=0.0)
        text, (file, content) = state.to_json(), log.take()
        out["state_s"] = best_of(state.to_json)
        out["losses_s"] = best_of(lambda: write_losses(run, file, content, retry_s=0.0))
        out["checkpoint_bytes"] = len(text) + len(content)
        again = TrainState.from_json(text, "here")
        out["start_s"] = best_of(lambda: TrainState.from_json(text, "here"))
        found, out["read_all_losses_s"] = timed(lambda: read_losses(run, again))
    if again != state or found.tolist() != losses * (steps // STEPS_PER_CHECKPOINT):
        raise AssertionError("state or losses are not what was written")
    return out


PARTS = {"plan": measure_plan, "ledger": measure_ledger}


def peak_mb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1)


def run_part(part: str, name: str, shards: int, samples: int) -> dict[str, Any]:
    """One part in this process, with its peak of memory."""
    imported = peak_mb()
    out = measure_state(int(name)) if part == "state" else PARTS[part](name, shards, samples)
    return {**out, "peak_mb": peak_mb(), "peak_mb_above_imports": round(peak_mb() - imported, 1)}


def hardware() -> dict[str, Any]:
    """The machine and the versions that the numbers come from."""
    names = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        **versions,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=1_000_000_000)
    parser.add_argument("--output", type=Path, default=RESULTS / "order.json")
    parser.add_argument("--only", choices=[*PARTS, "state"], help="measure one part, and keep the file's other numbers")
    parser.add_argument("--part", nargs=2, metavar=("PART", "DATA"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part:
        part, data = options.part
        print(json.dumps(run_part(part, data, options.shards, options.samples)))
        return
    start = time.perf_counter()
    size = ["--shards", str(options.shards), "--samples", str(options.samples)]
    runs = [(part, data) for part in PARTS for data in ("one", "mixture")]
    runs += [("state", str(steps)) for steps in RUN_STEPS]
    results: dict[str, Any] = {"hardware": hardware(), "epochs": EPOCHS, "window_shards": WINDOW_SHARDS}
    if options.only:
        results = json.loads(options.output.read_text())
        runs = [(part, data) for part, data in runs if part == options.only]
    for part, data in runs:
        command = [sys.executable, "-m", "benchmarks.order", "--part", part, data, *size]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        results[f"{part}_{data}"] = json.loads(done.stdout.splitlines()[-1])
        if options.only:
            results[f"{part}_{data}"]["hardware"] = hardware()
        print(f"{part} {data}: {json.dumps(results[f'{part}_{data}'])}", flush=True)
    if not options.only:
        results["minutes"] = round((time.perf_counter() - start) / 60, 1)
    write_results(options.output, results)


if __name__ == "__main__":
    main()
