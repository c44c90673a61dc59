"""How a model is served. The command line is made from it, so it imports no model."""

from __future__ import annotations

from dataclasses import field

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from meteor_model.limits import ImageLimits, RequestLimits
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
    read_threads: PositiveInt = 2
    """Threads that read requests and decode their images; one more decodes those of many pixels, one after another."""
    read_s: PositiveFloat = 10.0
    """Seconds in which a request must be read and its images decoded; later it gets a 503."""
    image_pixels: PositiveInt = ImageLimits.pixels
    """Pixels of an image, by its header; more are refused."""
    image_aspect: PositiveInt = ImageLimits.aspect
    """Longer side of an image by its shorter one; more is refused."""
    jpeg_scans: PositiveInt = ImageLimits.scans
    """Scans of a JPEG; more are refused."""
    request_pixels: PositiveInt = RequestLimits.pixels
    """Pixels of all images of a request; more are refused."""
    prompt_characters: PositiveInt = RequestLimits.characters
    """Characters of a prompt; more are refused."""
    origins: tuple[str, ...] = ()
    """Origins (scheme://host:port) of web pages that may ask; requests of any other page get a 403."""
    request_characters: PositiveInt = RequestLimits.all_characters
    """Characters of all prompts of a request; more are refused."""

    pruner: str = ""
    """Another pruner than the model's own (docs/pruners.md), e.g. fastv; empty: the model's own."""
    pruner_keep: NonNegativeInt = 0
    """Visual tokens that an image keeps under it in the language model's last layer."""
    pruner_options: dict[str, float] = field(default_factory=dict)
    """Its own numbers, by name."""

    def __post_init__(self) -> None:
        if bool(self.pruner) != bool(self.pruner_keep):
            raise ServingError("give serve.pruner and serve.pruner_keep together, or neither")

    @property
    def limits(self) -> RequestLimits:
        """The most that is accepted of a request."""
        image = ImageLimits(pixels=self.image_pixels, aspect=self.image_aspect, scans=self.jpeg_scans)
        return RequestLimits(
            image,
            characters=self.prompt_characters,
            all_characters=self.request_characters,
            pixels=self.request_pixels,
        )
