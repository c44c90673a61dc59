#!/usr/bin/env python
"""Serve a model over HTTP on Ray: `python jobs/serve.py --model models:/NAME@ALIAS`, until it is interrupted.

POST to /invocations what `mlflow models serve` takes: `{"dataframe_records": [{"image", "prompt"}], "params": {...}}`.
"""

import signal
import sys
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.command_line import Job
from jobs.settings import Device, Tracking, check_gpus, check_model, cluster_gpus
from pipelines.inference.settings import ServeSettings, ServingError
from pipelines.io.console import say


@dataclass(frozen=True)
class Serve:
    """What is served, and where."""

    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, or the folder of a model that all nodes can read (also s3://)."""
    host: str = "127.0.0.1"
    """Address to listen at. There is no authentication: beyond loopback, put a proxy that has it in front."""
    port: int = 8000
    """Port to listen at."""
    device: Device = "auto"
    """Where the model runs; auto takes a GPU for each copy where the cluster has any."""
    serve: ServeSettings = field(default_factory=ServeSettings)
    """How."""
    tracking: Tracking = field(default_factory=Tracking)
    """MLflow."""


def check(settings: Serve) -> None:
    """What can be wrong before anything is started. Raises ValueError."""
    check_model(settings.model, settings.tracking)
    if not 1 <= settings.port <= 65535:
        raise ServingError(f"port is {settings.port}; it must be in 1..65535")
    check_gpus(settings.device, settings.serve.gpus)


def run(settings: Serve) -> None:
    """Serve until SIGINT or SIGTERM, then shut down."""
    # Here: seconds of imports, which --help does not need.
    from ray import serve

    from pipelines.inference.serving import APP_NAME, build_app
    from pipelines.registry.versions import pin_model

    # All replicas serve one version, wherever the alias moves.
    model = pin_model(settings.model, settings.tracking.uri)
    how = replace(settings.serve, gpus=cluster_gpus(settings.device, settings.serve.gpus))
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    serve.start(http_options={"host": settings.host, "port": settings.port})
    try:
        serve.run(build_app(model, how), name=APP_NAME, route_prefix="/")
        say(f"serving   {model.address} at http://{settings.host}:{settings.port}/invocations")
        stopped.wait()
    finally:
        serve.shutdown()


JOB = Job("serve", Serve, run, __doc__, check=check, needs_ray=True)

if __name__ == "__main__":
    sys.exit(JOB.main())
