"""How a model is served. The command line is made from it, so it imports no model."""

from __future__ import annotations

from pydantic import NonNegativeFloat, PositiveInt

from pipelines.io.validation import settings_class


class ServingError(ValueError):
    """A setting of the server that cannot be; the message names it."""


@settings_class("serve", error=ServingError)
class ServeSettings:
    """How a model is served."""

    replicas: PositiveInt = 1
    """Copies of the model."""
    cpus: NonNegativeFloat = 0.5
    """Ray CPUs that one of them reserves."""
    gpus: NonNegativeFloat = 0.0
    """GPUs that one of them reserves, fractions of one too; 0 leaves it to device."""
    batch_rows: PositiveInt = 8
    """Most rows that the model answers together; 1 batches nothing."""
    batch_wait_s: NonNegativeFloat = 0.02
    """Longest that a row waits for others, in seconds."""
    ongoing: PositiveInt = 32
    """Requests that a replica works on at a time."""
    queued: PositiveInt = 64
    """Requests that may wait for a replica; more get a 503."""
