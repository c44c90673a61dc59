"""One MLflow server and one tiny model for all tests of this folder."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from meteor_model.architectures import build_config
from meteor_model.configuration_meteor import DecodePruning, EncodePruning, FusePruning, MeteorConfig, PruningConfig
from meteor_model.image_processing_meteor import MeteorImageProcessor
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from meteor_model.tokenizer import train_tokenizer
from pipelines.evaluation.evaluate import score_of_records
from pipelines.evaluation.scores import Record, Score
from pipelines.evaluation.suite import Suite
from pipelines.registry.folder import export_model
from pipelines.registry.publish import register_model
from pipelines.registry.versions import RegisteredVersion, Registry
from pipelines.tracking.mlflow_run import RunRequest, open_run

MODEL_NAME = "meteor-test"
SUITE = Suite("s3://bucket/data/manifest.parquet", "ab" * 32, "heldout", 4)
"""Four questions of the final part."""


def tiny_pruning(fuse: int = 32, lam: float | None = None) -> PruningConfig:
    """All three stages; `fuse` tokens enter the LLM, with a lambda of their own where none is given."""
    lam = 20.0 * fuse / 32 if lam is None else lam
    return PruningConfig(
        EncodePruning(totals=(96, 64, 64)), FusePruning(keep=fuse), DecodePruning(layer=2, target_mean=16, lam=lam)
    )


def tiny_config(pruning: PruningConfig | None = None) -> MeteorConfig:
    """A small model for the tokenizer of `tiny`."""
    return build_config("tiny", pruning or tiny_pruning(), 280, {}, 0)


def record(number: int, *, right: bool = True, nll: float = 0.5, kept: int = 12) -> Record:
    """One question."""
    answer = "red" if right else "blue"
    return Record(f"sample-{number}#0", f"image-{number}", "p", "red", answer, float(right), nll, ((64, 32, kept),))


def score_of(
    records: Sequence[Record],
    pruning: PruningConfig | None = None,
    suite: Suite = SUITE,
    left_out: dict[str, int] | None = None,
) -> Score:
    """The score of the tiny model under a pruning that gave these answers."""
    return score_of_records(tiny_config(pruning), records, suite, left_out or {})


@dataclass
class Server:
    """An MLflow server on sqlite that stores artifacts in a local folder."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def artifacts(self) -> Path:
        return self.folder / "artifacts"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(self.artifacts), "--serve-artifacts"]
        env = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        env |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                time.sleep(0.1)
        self.kill()
        raise AssertionError(f"MLflow did not start:\n{(self.folder / 'server.log').read_text()[-2000:]}")

    def kill(self) -> None:
        """As a crash: no clean shutdown. The processes are those of this server's own session."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def answering(status: int, body: str) -> Iterator[str]:
    """A server that gives this answer to everything; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_PUT = do_POST

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{running.server_port}"
        finally:
            running.shutdown()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("mlflow"), free_port())
    try:
        running.start()
        yield running
    finally:
        running.kill()


@pytest.fixture(scope="session")
def tiny() -> tuple[MeteorForConditionalGeneration, MeteorProcessor]:
    """A model with random weights, all three prunings on, and its processor."""
    tokenizer = train_tokenizer(["what is this? a red square"] * 3, 280)
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    config = build_config("tiny", tiny_pruning(), len(tokenizer), special, image_token_id)
    torch.manual_seed(0)
    model = MeteorForConditionalGeneration(config).eval()
    images = MeteorImageProcessor(config.image_size)
    return model, MeteorProcessor(images, tokenizer, config.tokens_per_image, template="short")


@pytest.fixture(scope="session")
def exported(
    tiny: tuple[MeteorForConditionalGeneration, MeteorProcessor], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return export_model(*tiny, tmp_path_factory.mktemp("export") / "model")


@pytest.fixture(scope="session")
def parity_file(
    tiny: tuple[MeteorForConditionalGeneration, MeteorProcessor], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A right-padded batch of two samples with the model's own logits."""
    model, processor = tiny
    pictures = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    batch = processor(["what?", "what is this, then?"], list(pictures), padding_side="right")
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
    path = tmp_path_factory.mktemp("parity") / "parity.safetensors"
    save_file({**batch, "logits": logits}, path)
    return path


@pytest.fixture(scope="session")
def run_id(server: Server) -> str:
    """A run to which models are registered."""
    return open_run(server.uri, RunRequest("registry", "first")).run_id


@pytest.fixture(scope="session")
def registered(server: Server, exported: Path, run_id: str) -> RegisteredVersion:
    return register_model(
        exported, Registry(server.uri, MODEL_NAME), aliases=("latest-pretrain",), run_id=run_id,
        tags={"git_commit": "abc", "hub_token": "hidden-value"},
    )  # fmt: skip
