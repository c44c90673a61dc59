"""Kinds of errors that callers tell apart without knowing who raises them."""

from pipelines.io.redact import redact_text


class TransientError(ValueError):
    """A fault that may pass: the same attempt, made again later, may succeed. Any other ValueError stays wrong."""


class StorageError(ValueError):
    """Storage could not be used as asked; the message names the address and what to do, never a secret."""

    def __init__(self, message: str) -> None:
        super().__init__(redact_text(message))
