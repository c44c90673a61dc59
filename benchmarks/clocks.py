"""Clocks of the speed benchmarks: turns, selection within a forward, peak memory; and what they ran on."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch


def seconds(call: Callable[[], None], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call on a CPU by `clock`; on a GPU by events, from an idle stream to an idle stream."""
    if device.type != "cuda":
        start = clock()
        call()
        return clock() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def take_turns(
    calls: Mapping[str, Callable[[], None]],
    rounds: int,
    device: torch.device,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every call in every round, in turns; rounds before the first are thrown away.

    `clock` may be `time.process_time` where others share the machine: on one thread it stands still while they run.
    """
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-warm_up, rounds):
        for name, call in calls.items():
            elapsed = seconds(call, device, clock)
            if turn >= 0:
                spent[name].append(elapsed)
    return spent


def realised(spent: Mapping[str, Sequence[float]], flops: Mapping[str, int], dense: str, other: str) -> dict[str, Any]:
    """Speed-up in time over speed-up in FLOPs, round by round; the median and its range."""
    speed_ups = [slow / fast for slow, fast in zip(spent[dense], spent[other], strict=True)]
    promised = flops[dense] / flops[other]
    return {
        "seconds_dense": round(statistics.median(spent[dense]), 4),
        "seconds": round(statistics.median(spent[other]), 4),
        "speed_up": round(statistics.median(speed_ups), 3),
        "speed_up_range": [round(min(speed_ups), 3), round(max(speed_ups), 3)],
        "flops_ratio": round(promised, 3),
        "realised": round(statistics.median(speed_ups) / promised, 3),
        "rounds": len(speed_ups),
    }


#: Functions whose time is selection: scores, sorting, gathering, joining kept tokens to their prefix.
SELECTION = {
    "encode": {"importance", "mean_similarity", "surprise", "top_indices", "refuse_nan", "gather_tokens", "cat"},
    "fuse": {"prune_pool"},
    "decode": {"score_layer", "decide", "gather_tokens", "keep_columns"},
}
#: Those that METEOR's own three stages call.
OF_METEOR = set().union(*SELECTION.values()) - {"surprise", "keep_columns"}
_ENTRY = {
    "encode_pruned": "encode",
    "encode_looking": "encode",
    "cut": "encode",
    "encode_images": "fuse",
    "decode_pruned": "decode",
}


class SelectionClock:
    """Time that selection takes within the real forward: entry and exit of its functions, by Python's profile hook.

    Only the outermost call counts. The hook costs some microseconds a call, on the side of more overhead. On a GPU the
    device is waited for at both ends, which again counts against selection. `needed` are functions that have to run;
    `clock` may count the process's own time where others share the machine.
    """

    def __init__(
        self,
        device: torch.device,
        needed: set[str] = OF_METEOR,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.device, self.needed, self.clock = device, needed, clock
        self.seconds = dict.fromkeys(SELECTION, 0.0)
        self.seen: set[str] = set()
        self._stages: list[str] = []
        self._inside: FrameType | None = None
        self._start = 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()

    def _open(self) -> None:
        self._start = self._now()

    def _close(self, stage: str) -> None:
        self.seconds[stage] += self._now() - self._start

    def _hook(self, frame: FrameType, event: str, argument: Any) -> None:
        if not frame.f_globals.get("__name__", "").startswith("meteor_model"):
            return
        name = frame.f_code.co_name
        if name in _ENTRY and event in ("call", "return"):
            self._stages.append(_ENTRY[name]) if event == "call" else self._stages.pop()
        if event.startswith("c_"):  # a function of torch itself, called where a stage is written down
            name = argument.__name__ if name in _ENTRY else ""
        if not self._stages or name not in SELECTION[self._stages[-1]]:
            return
        if event in ("call", "c_call") and self._inside is None:
            self._inside = frame
            self._open()
        elif event in ("return", "c_return", "c_exception") and frame is self._inside:
            self._close(self._stages[-1])
            self._inside = None
            self.seen.add(name)

    def measure(self, call: Callable[[], None]) -> float:
        """Run once; returns the whole wall time. `seconds` holds selection's share of it by stage."""
        start = self._now()
        sys.setprofile(self._hook)
        try:
            call()
        finally:
            sys.setprofile(None)
        missing = self.needed - self.seen
        assert not missing, f"selection functions that never ran, so their time is not in: {sorted(missing)}"
        return self._now() - start


# ------------------------------------------------------------------------------------------------------------ hardware


def hardware(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What the numbers were measured on, and how busy it was."""
    about: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about.update(
            gpu=properties.name, gpu_memory_gib=round(properties.total_memory / 2**30, 1), cuda=torch.version.cuda
        )
    return about


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    name = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return f"{name} ({', '.join(flag for flag in ('avx2', 'avx512f', 'avx512_bf16', 'amx_tile') if flag in flags)})"


# -------------------------------------------------------------------------------------------------------------- memory


def peak_memory(call: Callable[[], None], device: torch.device) -> float:
    """MiB that a call needs at its peak above what is allocated before it.

    On a GPU the allocator's own count; on a CPU the process's resident set, so use a fresh process each time.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before_kib = _status("VmRSS")
    call()
    return round((_status("VmHWM") - before_kib) / 2**10, 1)


def _status(field: str) -> int:
    """KiB of one line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))
