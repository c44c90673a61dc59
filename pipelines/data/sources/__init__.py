"""Where samples come from: a drawing set that needs no download, and the user's own LLaVA-format data.

A source knows its settings (`spec`), its splits, and yields each split's samples ready for a shard. A new source is one
module here and one subcommand in jobs/make_shards.py.
"""

from collections.abc import Iterator
from typing import Any, Protocol

from pipelines.io.fingerprint import sha256_bytes

TRAIN = "train"
HELDOUT = "heldout"
SPLITS = (TRAIN, HELDOUT)

Packed = tuple[str, dict[str, bytes]]
"""One sample as a shard takes it: its key and its members by extension."""


class SourceError(ValueError):
    """The material or the settings of a source are unusable; the message names the setting, record or file."""


class Source(Protocol):
    """What makes samples. `samples` yields the same samples, in the same order, for an equal `spec`.

    Attributes:
        splits: that it has, TRAIN first.
    """

    splits: tuple[str, ...]

    def spec(self) -> dict[str, Any]:
        """All that decides the samples, as JSON values; stored in the manifest and compared before a rebuild."""
        ...

    def samples(self, split: str) -> Iterator[Packed]:
        """The samples of one of its splits (may be none)."""
        ...

    def report(self) -> dict[str, int]:
        """What was left out so far, by reason."""
        ...

    def not_read(self) -> dict[str, int]:
        """Fields of the material that were passed over, by name."""
        ...


def fraction_of(name: str) -> float:
    """A number in [0, 1) that belongs to `name` for ever, whatever the machine and the Python: for stable splits."""
    return int.from_bytes(sha256_bytes(name.encode())[:6], "big") / 2**48


def split_of(name: str, heldout_share: float) -> str:
    """The split of an identity: HELDOUT for `heldout_share` of all names, stable when other names come or go."""
    return HELDOUT if fraction_of(f"split:{name}") < heldout_share else TRAIN
