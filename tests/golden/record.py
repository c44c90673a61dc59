"""Golden numbers of the recipe `tiny`, cut to 40 optimizer steps, at one and at two workers.

    python -m tests.golden.record            run it on a local stack of its own and compare with losses.json
    python -m tests.golden.record --write    write losses.json anew

Recorded: the loss of every step, the held-out losses, the score on the held-out suite, and the SHA-256 of the
exported weights. On the machine that wrote the file everything is equal to the last bit; elsewhere (another CPU,
another number of threads in BLAS) losses may differ by `TOLERANCE`, relative, the accuracy by `FLIPPED`, and checksums
are not compared. A change that moves these numbers says so in docs/LOG.md, with the reason, and writes the file anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from infra.services import Stack, full_env
from tests.stack_fixture import start_stack, stop_stack

ROOT = Path(__file__).resolve().parents[2]
FILE = Path(__file__).with_name("losses.json")
WORLDS = (1, 2)
STEPS = 40
TOLERANCE = 1e-3
"""Largest relative difference of a loss on another machine."""
FLIPPED = 0.02
"""Largest share of answers that may turn out differently on another machine."""
SETTINGS = ("--source.code-points", "320", "--source.variants", "4", "--training.log-every-steps", "1")


def machine() -> dict[str, str]:
    """What decides the last bits: the processor, Python and torch."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if "model name" in line), platform.processor())
    return {"cpu": cpu, "python": platform.python_version(), "torch": torch.__version__}


def record_world(stack: Stack, workers: int, folder: Path) -> dict[str, Any]:
    """Train on `workers` workers and read the numbers from where a user would: MLflow and the run's folder."""
    output = folder / f"world-{workers}"
    ray = str(Path(sys.executable).with_name("ray"))
    command = [
        ray, "job", "submit", "--working-dir", ".", "--", "python", "jobs/pretrain.py", *SETTINGS,
        "--training.workers", str(workers), "--run.name", f"golden-{workers}", "--run.output", str(output),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=full_env(stack), capture_output=True, text=True)
    if done.returncode:
        said = done.stdout[-4000:] + done.stderr[-4000:]
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{said}")
    return read_numbers(stack, json.loads((output / "summary.json").read_text()))


def read_numbers(stack: Stack, summary: dict[str, Any]) -> dict[str, Any]:
    """The golden numbers of a finished run."""
    from mlflow import MlflowClient

    from tests.stack_fixture import applied

    with applied(stack):
        client = MlflowClient(stack.mlflow_uri)
        history = {point.step: point.value for point in client.get_metric_history(summary["run_id"], "loss")}
        version = client.get_model_version_by_alias("meteor", "latest-pretrain")
        score = json.loads(next(value for name, value in version.tags.items() if name.startswith("score.")))["score"]
        with tempfile.TemporaryDirectory() as name:
            model = Path(client.download_artifacts(summary["run_id"], "recipe.json", name))
            storage = json.loads(model.read_text())["run"]["storage"]
        weights = weights_digest(f"{storage}/runs/{summary['run_name']}/export")
    return {
        "losses": [history[step] for step in sorted(history)],
        "heldout_loss": summary["heldout_loss"],
        "heldout_loss_shuffled_images": summary["heldout_loss_shuffled_images"],
        "accuracy": score["accuracy"],
        "answer_nll": score["answer_nll"],
        "weights_sha256": weights,
    }


def weights_digest(url: str) -> str:
    """SHA-256 over names, types, shapes and bytes of all exported tensors, in the order of their names."""
    from safetensors import safe_open

    from pipelines.io import storage

    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as name:
        for file in sorted(
            file for file in storage.list_files(url) if file.endswith(".safetensors") and "/" not in file
        ):
            local = Path(name) / file
            local.write_bytes(storage.read_bulk(storage.join(url, file)))
            with safe_open(local, "numpy") as tensors:
                for key in sorted(tensors.keys()):
                    array = tensors.get_tensor(key)
                    digest.update(f"{key} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def record() -> dict[str, Any]:
    """All golden numbers, measured on a stack of its own."""
    with tempfile.TemporaryDirectory(prefix="meteor-golden-") as name:
        stack = start_stack(Path(name) / "stack")
        try:
            worlds = {str(workers): record_world(stack, workers, Path(name)) for workers in WORLDS}
        finally:
            stop_stack(stack)
    return {"machine": machine(), "steps": STEPS, "settings": " ".join(SETTINGS), "worlds": worlds}


def differences(golden: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What differs, in words: every bit on the same machine, beyond `TOLERANCE` on another."""
    same_machine = golden["machine"] == found["machine"]
    faults: list[str] = []
    for world, expected in golden["worlds"].items():
        was, now = _named(expected), _named(found["worlds"][world])
        for name in sorted({*was, *now}):
            old, new = was.get(name), now.get(name)
            if not (old == new if same_machine else _close(name, old, new)):
                faults.append(f"world {world}: {name} is {new!r}, golden {old!r}")
    return faults


def _named(world: dict[str, Any]) -> dict[str, float | str]:
    """One world's numbers by name, the losses one by one."""
    losses = {f"loss of step {step:2d}": loss for step, loss in enumerate(world["losses"], 1)}
    return {**losses, **{name: value for name, value in world.items() if name != "losses"}}


def _close(name: str, old: float | str | None, new: float | str | None) -> bool:
    if isinstance(old, float) and isinstance(new, float):
        return math.isclose(old, new, rel_tol=TOLERANCE, abs_tol=FLIPPED if name == "accuracy" else 0.0)
    return isinstance(old, str) and isinstance(new, str)  # a checksum tells nothing between machines


def main() -> int:
    """Command line; 0 where the numbers are the golden ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write losses.json anew")
    arguments = parser.parse_args()
    found = record()
    if arguments.write:
        FILE.write_text(json.dumps(found, indent=1) + "\n")
        print(f"wrote {FILE}")
        return 0
    golden = json.loads(FILE.read_text())
    faults = differences(golden, found)
    kind = "to the last bit" if golden["machine"] == found["machine"] else f"to {TOLERANCE:g} (another machine)"
    print("\n".join(faults) if faults else f"golden numbers equal {kind} at {', '.join(map(str, WORLDS))} workers")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
