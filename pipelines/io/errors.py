"""Kinds of errors that callers tell apart without knowing who raises them."""


class TransientError(ValueError):
    """A fault that may pass: the same attempt, made again later, may succeed. Any other ValueError stays wrong."""
