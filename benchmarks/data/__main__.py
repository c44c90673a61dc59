"""The stream of a training beside what its users would take instead: `make bench-data`.

Every reader gets the same pictures, made here, and hands over batches that nothing is done with. They take turns,
round by round, each in a process of its own; Ray and SeaweedFS run all the time. Writes benchmarks/results/data.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.data.dataset import make_dataset, make_encoder
from benchmarks.environment import end_on_sigterm, environment
from benchmarks.results_file import RESULTS, hardware, write_results
from infra.local import down, up
from infra.services import full_env
from pipelines.io import storage

ROOT = Path(__file__).resolve().parents[2]
OBJECT_STORE_BYTES = 600_000_000
LIMIT_S = 600.0
BARE = "decode_image alone"
OURS = "our stream"
SAME = ("webdataset, our decode_image", "mosaicml-streaming, our decode_image")
USUAL = ("webdataset, Pillow bicubic", "mosaicml-streaming, Pillow bicubic")
S3 = ("our stream, S3", "mosaicml-streaming, our decode_image, S3")
NOTE = (
    "Medians of rounds that took turns, all at one nice value. Where the load is not near 0, other programs had a part "
    "of the cores: read the ratios, not the rates."
)


def commands(arguments: argparse.Namespace, folder: Path, s3: str) -> dict[str, list[str]]:
    """The program of every reader, without its numbers of readers and passes."""
    peers = [str(arguments.peers), "-m", "benchmarks.data.peers"]
    where = ["--shards", str(folder / "set"), "--mds", str(folder / "mds")]
    ours = [sys.executable, "-m", "benchmarks.data.ours", "--encoder", str(folder)]
    found = {
        BARE: [*peers, "bare", "--count", str(arguments.samples), *where],
        SAME[0]: [*peers, "webdataset", *where],
        SAME[1]: [*peers, "streaming", *where],
        USUAL[0]: [*peers, "webdataset", "--decoder", "pillow", *where],
        USUAL[1]: [*peers, "streaming", "--decoder", "pillow", *where],
        OURS: [*ours, "--manifest", str(folder / "set")],
    }
    if s3:
        found[S3[0]] = [*ours, "--manifest", f"{s3}/set"]
        found[S3[1]] = [*peers, "streaming", "--remote", f"{s3}/mds", *where]
    return found


def run(command: Sequence[str], env: Mapping[str, str], passes: Sequence[str]) -> tuple[float, list[dict[str, Any]]]:
    """When the process was started, and what it found of its passes. Raises RuntimeError where it failed."""
    began = time.time()
    done = subprocess.run(
        [*command, "--passes", *passes], cwd=ROOT, env=dict(env), capture_output=True, text=True, timeout=LIMIT_S
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found: list[dict[str, Any]] = json.loads(done.stdout.strip().splitlines()[-1])["passes"]
    return began, found


def measure(command: Sequence[str], env: Mapping[str, str], samples: int, batch: int) -> dict[str, float]:
    """One round of one reader: a short pass from a cold start, a whole one, a short one from the middle."""
    middle = samples // 2 // batch * batch
    short = 4 * batch
    began, (cold, whole, resumed) = run(command, env, [f"0:{short}", "0:0", f"{middle}:{middle + short}"])
    return {
        "samples_per_s": round(whole["samples_per_s"], 1),
        "cold_first_batch_s": round(cold["first_batch"] - began, 2),
        "warm_first_batch_s": round(whole["first_batch"] - whole["start"], 2),
        "resume_first_batch_s": round(resumed["first_batch"] - resumed["start"], 2),
    }


def ratios(rounds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, list[float]]:
    """Our stream over others in the same round: median, least, most."""
    of = {
        "over the fastest peer, same decoder": lambda rates: rates[OURS] / max(rates[name] for name in SAME),
        "over the fastest peer, usual settings": lambda rates: rates[OURS] / max(rates[name] for name in USUAL),
        "over the bare decoder": lambda rates: rates[OURS] / rates[BARE],
        "fastest peer, same decoder, over the bare decoder": lambda rates: max(rates[n] for n in SAME) / rates[BARE],
    }
    if S3[0] in rounds[0]:
        of["from S3, over mosaicml-streaming, same decoder"] = lambda rates: rates[S3[0]] / rates[S3[1]]
    rates = [{name: row["samples_per_s"] for name, row in one.items()} for one in rounds]
    found = {name: [ratio(one) for one in rates] for name, ratio in of.items()}
    return {
        name: [round(value, 3) for value in (statistics.median(all_), min(all_), max(all_))]
        for name, all_ in found.items()
    }


def median_of(rounds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """The median of every number over the rounds."""
    return {
        name: {key: round(statistics.median(one[name][key] for one in rounds), 2) for key in rounds[0][name]}
        for name in rounds[0]
    }


def prepare(arguments: argparse.Namespace, folder: Path, s3: str) -> None:
    """Shards, their copy in the peers' format, the encoder's file; all of it in S3 as well."""
    make_dataset(str(folder / "set"), arguments.samples)
    make_encoder(folder, arguments.size)
    write = [str(arguments.peers), "-m", "benchmarks.data.peers", "write"]
    subprocess.run(
        [*write, "--shards", str(folder / "set"), "--mds", str(folder / "mds")], cwd=ROOT, check=True, timeout=LIMIT_S
    )
    for name in ("set", "mds") if s3 else ():
        for file in sorted((folder / name).iterdir()):
            storage.write_bytes(f"{s3}/{name}/{file.name}", file.read_bytes())


def main(argv: list[str] | None = None) -> int:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_argument("--peers", type=Path, required=True, help="Python of the peers' environment")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (%(default)s)")
    parser.add_argument("--samples", type=int, default=2048, help="pictures (%(default)s)")
    parser.add_argument("--size", type=int, default=448, help="side of what is handed over (%(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="samples of a batch (%(default)s)")
    parser.add_argument("--readers", type=int, nargs="+", default=[1, 2], help="processes that decode (%(default)s)")
    parser.add_argument("--local-only", action="store_true", help="without the part from S3")
    parser.add_argument("--output", type=Path, default=RESULTS / "data.json", help="the results (%(default)s)")
    arguments = parser.parse_args(argv)
    end_on_sigterm()
    machine = hardware()
    with tempfile.TemporaryDirectory(prefix="meteor-data-") as name:
        folder = Path(name)
        services = ("ray",) if arguments.local_only else ("s3", "ray")
        stack = up(folder / "stack", only=services, object_store_bytes=OBJECT_STORE_BYTES)
        try:
            env = {
                **full_env(stack),
                "PYTHONPATH": str(ROOT),
                "S3_ENDPOINT_URL": full_env(stack).get("AWS_ENDPOINT_URL", ""),
            }
            s3 = "" if arguments.local_only else f"{env['METEOR_STORAGE']}/bench-data"
            with environment(env):
                prepare(arguments, folder, s3)
            by_readers = {}
            for readers in arguments.readers:
                rounds = []
                for number in range(arguments.rounds):
                    found = {}
                    for reader, command in commands(arguments, folder, s3).items():
                        words = [*command, "--size", str(arguments.size), "--batch", str(arguments.batch)]
                        words += ["--readers", str(readers)]
                        words += ["--cache", str(folder / f"cache-{readers}-{number}")] * ("--remote" in words)
                        found[reader] = measure(words, env, arguments.samples, arguments.batch)
                        print(f"{readers} readers, round {number + 1}, {reader}: {found[reader]}", flush=True)
                    rounds.append(found)
                by_readers[readers] = {"ratios": ratios(rounds), "median": median_of(rounds), "rounds": rounds}
            words = [str(folder), str(arguments.size), str(arguments.batch)]
            costs = subprocess.run(
                [sys.executable, "-m", "benchmarks.data.stages", *words],
                cwd=ROOT,
                env=env,
                check=True,
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
            )
        finally:
            down(folder / "stack", purge=True)
    write_results(
        arguments.output,
        {
            "machine": {
                **machine,
                "load_at_the_end": round(os.getloadavg()[0], 2),
                "nice": os.getpriority(os.PRIO_PROCESS, 0),
            },
            "note": NOTE,
            "settings": {key: getattr(arguments, key) for key in ("rounds", "samples", "size", "batch", "readers")}
            | {"object_store_bytes": OBJECT_STORE_BYTES},
            "readers": by_readers,
            "cpu_ms_per_sample": json.loads(costs.stdout.strip().splitlines()[-1]),
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
