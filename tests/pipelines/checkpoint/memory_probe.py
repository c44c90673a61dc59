"""A process whose memory `test_memory.py` measures: python -m tests.pipelines.checkpoint.memory_probe PHASE FOLDER."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch

from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from pipelines.checkpoint.consolidate import consolidate
from pipelines.registry.folder import export_model
from pipelines.registry.parity import check_parity


def status(field: str) -> int:
    """Bytes of this process: VmRSS are in memory, mapped files included; VmHWM is the most that ever were.

    `ru_maxrss` would count the process that started this one, too.
    """
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def run(phase: str, folder: Path) -> None:
    """One phase on the model in a folder."""
    if phase == "export":
        model = consolidate(folder / "checkpoint", MeteorForConditionalGeneration, folder / "init")
        export_model(model, MeteorProcessor.from_pretrained(folder / "init"), folder / "model", shard_bytes=100_000_000)
    else:
        check_parity(folder / "model", folder / "checkpoint" / "parity.safetensors")


def main() -> None:
    """Print the bytes that a phase took at its peak beyond what the same phase on a small model had left."""
    phase, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    run(phase, folder / "small")
    gc.collect()
    before = status("VmRSS")
    run(phase, folder / "large")
    print(json.dumps(max(0, status("VmHWM") - before)))


if __name__ == "__main__":
    main()
