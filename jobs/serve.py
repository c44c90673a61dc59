"""Serve a model over HTTP on Ray: `python jobs/serve.py --model models:/NAME@ALIAS`, until it is interrupted.

POST to /invocations what `mlflow models serve` takes: `{"dataframe_records": [{"image", "prompt"}], "params": {...}}`.
"""

import signal
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ray
import tyro
from ray import serve

from jobs.command_line import run_command
from pipelines.inference.serving import APP_NAME, ServeSettings, ServingError, build_app
from pipelines.registry.versions import pin_model
from pipelines.tracking.redact import hide_passwords


@dataclass(frozen=True)
class Serve:
    """What is served, and where."""

    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, or the folder of a model that all nodes can read (also s3://)."""
    host: str = "127.0.0.1"
    """Address to listen at. There is no authentication: beyond loopback, put a proxy that has it in front."""
    port: int = 8000
    """Port to listen at."""
    serve: ServeSettings = field(default_factory=ServeSettings)
    """How."""


def run(settings: Serve) -> None:
    """Serve until SIGINT or SIGTERM, then shut down. Raises ValueError for what is wrong with the settings."""
    if not 1 <= settings.port <= 65535:
        raise ServingError(f"port is {settings.port}; it must be in 1..65535")
    # All replicas serve one version, wherever the alias moves.
    model = pin_model(settings.model)
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    ray.init(ignore_reinit_error=True, logging_level="WARNING")
    serve.start(http_options={"host": settings.host, "port": settings.port})
    try:
        serve.run(build_app(model, settings.serve), name=APP_NAME, route_prefix="/")
        print(
            f"serving   {hide_passwords(model.address)} at http://{settings.host}:{settings.port}/invocations",
            flush=True,
        )
        stopped.wait()
    finally:
        serve.shutdown()


def main() -> int:
    """Command line; a fault of the input is one line on stderr and exit code 2."""
    settings = tyro.cli(Serve, description=__doc__)
    return run_command(lambda: run(settings))


if __name__ == "__main__":
    sys.exit(main())
