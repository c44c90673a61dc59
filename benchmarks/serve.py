"""What pruning and dynamic batching bring to serving on Ray Serve: `make bench-serve`.

Four servers (`jobs/serve.py`, each on a Ray of its own) run side by side: the architecture `small` dense and with all
three stages, on the same random weights, each with batches of up to 8 rows and without batching. They take turns: in a
turn, a fixed number of clients send requests one after the other (a closed loop), each with one image and one short
prompt. That every answer has its full length is checked.

Writes benchmarks/results/serve.json: requests a second and latency of each turn, and ratios within a round.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.clocks import hardware
from benchmarks.harness import DENSE
from benchmarks.results_file import RESULTS, write_results
from infra.processes import choose_port
from infra.services import OF_EVERY_NODE
from meteor_model.architectures import architecture, build_config
from meteor_model.chat import IMAGE_PLACEHOLDER
from meteor_model.configuration_meteor import DecodePruning, EncodePruning, FusePruning, MeteorConfig, PruningConfig
from meteor_model.flops import count_flops
from meteor_model.image_processing_meteor import MeteorImageProcessor
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from meteor_model.tokenizer import train_tokenizer
from pipelines.registry.folder import export_model

ROOT = Path(__file__).resolve().parents[1]
FUSED, KEPT = 96, 48
#: Random weights say nothing about K, so K is the same for every prompt: k_min, and a lambda near 0.
METEOR = PruningConfig(
    EncodePruning(totals=(400, 280, 192)),
    FusePruning(keep=FUSED),
    DecodePruning(layer=2, target_mean=float(KEPT), lam=1e-9, k_min=KEPT),
)
PROMPT = "What is in this picture?"
START_LIMIT_S = 240.0
BATCHED, SINGLE = 8, 1


def export(folder: Path, pruning: PruningConfig, new_tokens: int) -> Path:
    """The architecture `small` with random weights, the same for every pruning.

    Raises RuntimeError where its answer ends before `new_tokens`: its requests would be shorter than the others'.
    """
    tokenizer = train_tokenizer([PROMPT, "a b c d e f g"], 320)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    placeholder = tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
    config = build_config("small", pruning, len(tokenizer), ids, placeholder)
    torch.manual_seed(0)
    model = MeteorForConditionalGeneration(config).eval()
    images = MeteorImageProcessor(architecture("small").image_size)
    processor = MeteorProcessor(images, tokenizer, config.tokens_per_image, template="short")
    batch = processor(PROMPT, [processor.load_image(picture())])
    answer = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False, eos_token_id=ids["eos_token_id"])
    if (length := answer.shape[1] - batch["input_ids"].shape[1]) != new_tokens:
        raise RuntimeError(f"the answer of {folder.name} has {length} tokens, not {new_tokens}: take another seed")
    return export_model(model, processor, folder)


@dataclass
class Server:
    """One server, and what its turns measured."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path
    per_second: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)

    def wait(self) -> None:
        """Until it serves. Raises RuntimeError with the end of its log."""
        deadline = time.monotonic() + START_LIMIT_S
        while "serving  " not in self.log.read_text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server {self.name} did not start:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.5)

    def ask(self, body: bytes) -> float:
        """Seconds of one request."""
        url, headers = f"http://127.0.0.1:{self.port}/invocations", {"Content-Type": "application/json"}
        started = time.perf_counter()
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=120) as answer:
            predictions = json.loads(answer.read())["predictions"]
        assert len(predictions) == 1, predictions
        return time.perf_counter() - started

    def turn(self, body: bytes, requests: int, clients: int) -> None:
        """All requests, `clients` at a time."""
        started = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            self.latencies += pool.map(lambda _: self.ask(body), range(requests))
        self.per_second.append(requests / (time.perf_counter() - started))


@contextmanager
def serving(name: str, model: Path, folder: Path, *options: str) -> Iterator[Server]:
    """`jobs/serve.py` with these options on a Ray of its own, on loopback, once it serves; stopped in the end.

    Raises RuntimeError with the end of its log where it does not start.
    """
    port, log = choose_port(set()), folder / f"{name}.log"
    command = [sys.executable, "jobs/serve.py", "--model", str(model), "--port", str(port), *options]
    own = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    environment = own | OF_EVERY_NODE
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        server = Server(name, port, process, log)
        server.wait()
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def picture() -> bytes:
    """A random image, as a JPEG file."""
    pixels = np.random.default_rng(0).integers(0, 256, (336, 336, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def request_body(new_tokens: int) -> bytes:
    """The image and the prompt."""
    row = {"image": base64.b64encode(picture()).decode(), "prompt": PROMPT}
    return json.dumps({"dataframe_records": [row], "params": {"max_new_tokens": new_tokens}}).encode()


def summary(server: Server) -> dict[str, Any]:
    """Medians over turns and percentiles over requests."""
    ordered = sorted(server.latencies)
    return {
        "requests_per_second": statistics.median(server.per_second),
        "requests_per_second_by_turn": server.per_second,
        "latency_p50_s": statistics.median(ordered),
        "latency_p95_s": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
        "requests": len(ordered),
    }


def ratio(one: Server, other: Server) -> dict[str, float]:
    """Throughput of the second over the first, round by round."""
    rounds = [b / a for a, b in zip(one.per_second, other.per_second, strict=True)]
    return {"median": statistics.median(rounds), "lowest": min(rounds), "highest": max(rounds)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=8, help="a turn")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--output", type=Path, default=RESULTS / "serve.json")
    options = parser.parse_args(arguments)
    about = hardware(torch.device("cpu"), torch.float32)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="meteor-bench-serve-") as name, ExitStack() as stack:
        folder = Path(name)
        prunings = {"dense": DENSE, "meteor": METEOR}
        models = {key: export(folder / key, pruning, options.new_tokens) for key, pruning in prunings.items()}
        servers: dict[str, Server] = {}
        for key, model in models.items():
            for kind, rows in (("batched", BATCHED), ("single", SINGLE)):
                options_of = ("--serve.batch-rows", str(rows), "--serve.batch-wait-s", "0.05", "--serve.cpus", "0.1")
                server = stack.enter_context(serving(f"{key}-{kind}", model, folder, *options_of))
                servers[server.name] = server
                print(f"{server.name} serves after {time.monotonic() - started:.0f} s", flush=True)
        body = request_body(options.new_tokens)
        for server in servers.values():  # warm-up
            server.ask(body)
        for number in range(options.rounds):
            for server in servers.values():
                server.turn(body, options.requests, options.clients)
            rates = "  ".join(f"{s.name} {s.per_second[-1]:.2f}/s" for s in servers.values())
            print(f"round {number + 1} of {options.rounds}: {rates}", flush=True)
        configs = {key: MeteorConfig.from_pretrained(model) for key, model in models.items()}
        flops = {key: count_flops(config).total / 1e12 for key, config in configs.items()}
    result = {
        "hardware": about,
        "load_after": round(os.getloadavg()[0], 2),
        "architecture": "small, random weights",
        "clients": options.clients,
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "visual_tokens": {"dense": configs["dense"].tokens_per_image, "meteor": [FUSED, KEPT]},
        "tflops_to_first_token": flops,
        "servers": {server.name: summary(server) for server in servers.values()},
        "throughput_ratio": {
            "meteor over dense, batched": ratio(servers["dense-batched"], servers["meteor-batched"]),
            "meteor over dense, single": ratio(servers["dense-single"], servers["meteor-single"]),
            "batched over single, meteor": ratio(servers["meteor-single"], servers["meteor-batched"]),
            "batched over single, dense": ratio(servers["dense-single"], servers["dense-batched"]),
        },
        "seconds": round(time.monotonic() - started, 1),
    }
    write_results(options.output, result)
    for what, numbers in result["throughput_ratio"].items():
        print(f"{what}: {numbers['median']:.2f} ({numbers['lowest']:.2f} to {numbers['highest']:.2f})")


if __name__ == "__main__":
    main()
