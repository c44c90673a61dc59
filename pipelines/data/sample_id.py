"""Which sample: the one form in which plan, stream, batches, ledger and checkpoints name a sample of a training.

Ray Train's controller imports this module: it needs NumPy alone.

Length legend: N samples.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]

VOID_EPOCH = -1
"""In all four numbers of a row that holds no sample."""


@dataclass(frozen=True, order=True, slots=True)
class SampleId:
    """One sample of a training.

    Attributes:
        dataset: of the mixture.
        epoch: pass of that dataset.
        shard: its position in the split.
        index: in the shard.
        key: its name in the shard, for people; the four numbers say which sample it is.
    """

    dataset: int
    epoch: int
    shard: int
    index: int
    key: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"dataset {self.dataset}, epoch {self.epoch}, shard {self.shard}, index {self.index}"


NO_SAMPLE = SampleId(VOID_EPOCH, VOID_EPOCH, VOID_EPOCH, VOID_EPOCH)
"""Of a void row."""


@dataclass(frozen=True, slots=True, eq=False)
class SampleIds:
    """Many samples as columns, (N,) int64 each; keys are left out.

    Raises:
        ValueError: columns of unequal lengths.
    """

    dataset: Int64s
    epoch: Int64s
    shard: Int64s
    index: Int64s

    def __post_init__(self) -> None:
        shapes = [column.shape for column in self.columns]
        if len(shapes[0]) != 1 or len(set(shapes)) != 1:
            raise ValueError(f"dataset, epoch, shard and index have shapes {shapes}")

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[SampleId]:
        for place in zip(*(column.tolist() for column in self.columns), strict=True):
            yield SampleId(*place)

    @property
    def columns(self) -> tuple[Int64s, Int64s, Int64s, Int64s]:
        """The four arrays."""
        return self.dataset, self.epoch, self.shard, self.index

    @classmethod
    def of(cls, samples: Iterable[SampleId]) -> "SampleIds":
        """Those of `samples`, in their order."""
        places = [(one.dataset, one.epoch, one.shard, one.index) for one in samples]
        return cls(*np.array(places, dtype=np.int64).reshape(-1, 4).T)

    @classmethod
    def void(cls, rows: int) -> "SampleIds":
        """Those of void rows."""
        return cls(*(np.full(rows, VOID_EPOCH, dtype=np.int64) for _ in range(4)))

    def take(self, chosen: NDArray[np.integer] | NDArray[np.bool_] | slice) -> "SampleIds":
        """Those at some places: numbers, a mask (N,), or a slice."""
        return SampleIds(*(column[chosen] for column in self.columns))
