"""The Ray Data graph: from rows of the plan to micro-batches on a Train worker, in one strict order.

1. read: one task a work item fetches the shards of its windows (checked against the manifest), each window when its
   first row is due, and emits raw members in plan order;
2. encode: parse -> tokenise -> decode images to uint8; a faulty sample keeps its row and carries its reason;
3. strict repartition: every block is one micro-batch, so with W workers micro-batch j of the plan goes to worker j % W;
   it is one row (`pipelines.data.blocks`), which is never cut;

`pipelines.training.batches` takes over on the worker, and refuses a micro-batch that is not the one the plan says.

Read tasks reserve half of what encode tasks do (they mostly wait), and their number at a time is bounded: the raw
members of a window are in memory while it is emitted, one window of every dataset of a mixture. Unequal reservations
also keep Ray from fusing the two, which would bundle whole windows into one task.

Between 1 and 2 travel tables of RAW_SCHEMA, each the members of one micro-batch where its bytes allow it, from 2 on
those of `pipelines.data.blocks.BLOCK_SCHEMA`.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol
from uuid import uuid4

import pyarrow as pa
import ray.data
import ray.train
from ray.data import DataContext, Dataset, Datasource, ExecutionOptions, ReadTask, TaskPoolStrategy
from ray.data.block import BlockMetadata

from meteor_model.chat import IGNORE_INDEX
from meteor_model.limits import MAX_CHARACTERS, ImageLimits
from pipelines.data.blocks import PixelMemory, block_of, rows_to_table
from pipelines.data.length import SampleTooLongError, TooLong, fit
from pipelines.data.mixture import Item, Plan
from pipelines.data.order import WorkItem, void_item
from pipelines.data.ray_data import configure
from pipelines.data.sample_id import NO_SAMPLE, VOID_EPOCH, SampleId
from pipelines.data.samples import SampleFault, try_sample
from pipelines.data.schema import (
    PLACE_FIELDS,
    VOID,
    RawSample,
    Row,
    SampleError,
    image_members,
    place_columns,
    sample_of,
)
from pipelines.data.shards import Manifest, ShardInfo, read_shard
from pipelines.io.pulse import Phase, begin_data_task, doing, mark

RAW_BLOCK_BYTES = 2**20  # raw members in a block at least, unless the micro-batch ends before
MOST_RAW_BLOCK_BYTES = 2**25  # and about at most, however large a micro-batch is
RAW_BLOCK_SHARE = 0.75  # of the bytes of a mean micro-batch; Ray cuts what is above 1.5 times the size that it is given
MAX_READ_TASKS = 4096  # a task costs the driver about 2 ms before the first row; beyond this, items share a task
SHARD_FETCHES = 4  # shards of one window that are fetched at a time

RAW_SCHEMA = pa.schema([*PLACE_FIELDS, ("names", pa.list_(pa.string())), ("data", pa.list_(pa.large_binary()))])
"""Between reading and encoding: the members of a sample."""


# ---------------------------------------------------------------------------------------------------------------- read


Samples = list[tuple[str, dict[str, bytes]]]
"""The samples of a shard in order: (key, members by extension)."""
Fetch = Callable[[str, ShardInfo], Samples]
"""Address of the manifest and a row of it -> the samples of that shard, `info.samples` of them; picklable."""


@dataclass(frozen=True, slots=True)
class ReadWork:
    """One work item, and the manifests' rows of the shards of each of its parts."""

    item: Item
    infos: tuple[tuple[ShardInfo, ...], ...]

    @property
    def bytes(self) -> int:
        """Bytes of the shards that are fetched."""
        return sum(info.bytes for of_part in self.infos for info in of_part)


def fetch_window(manifest_url: str, infos: Sequence[ShardInfo], fetch: Fetch) -> list[Samples]:
    """The samples of the shards of one window, several shards at a time."""
    names = f"{manifest_url}: {', '.join(info.path for info in infos)}"
    with doing(Phase.READING, names), ThreadPoolExecutor(min(SHARD_FETCHES, len(infos))) as pool:
        return list(pool.map(partial(fetch, manifest_url), infos))


def _samples(
    manifest_urls: Sequence[str], parts: Sequence[tuple[WorkItem, tuple[ShardInfo, ...]]], fetch: Fetch
) -> Iterator[tuple[SampleId, dict[str, bytes]]]:
    """The samples of consecutive windows of one dataset, and their members.

    A window is fetched when its first sample is due and let go after its last one, so one at a time is in memory.
    """
    for part, infos in parts:
        contents = dict(zip(part.shards, fetch_window(manifest_urls[part.dataset], infos, fetch), strict=True))
        for place in part.sample_ids():
            key, members = contents[place.shard][place.index]
            yield replace(place, key=key), members
        del contents


@dataclass(frozen=True)
class Cut:
    """Where the tables of raw members end: behind every micro-batch, and where they have enough bytes.

    Attributes:
        first_row: of the stream, where its first micro-batch begins.
        rows: of a micro-batch.
        bytes: of members; a table that has them ends.
    """

    first_row: int
    rows: int
    bytes: int

    def behind(self, row: int, size: int) -> bool:
        """Whether a table ends behind this row, with which it has `size` bytes."""
        return size >= self.bytes or (row + 1 - self.first_row) % self.rows == 0


def read_item(manifest_urls: Sequence[str], work: ReadWork, fetch: Fetch, cut: Cut) -> Iterator[pa.Table]:
    """The rows of one work item in plan order, as tables of RAW_SCHEMA.

    `manifest_urls` are by dataset. Void rows have no members. Raises ShardError, StorageError.
    """
    item = work.item
    parts: dict[int, list[tuple[WorkItem, tuple[ShardInfo, ...]]]] = {}
    for part, infos in zip(item.parts, work.infos, strict=True):
        parts.setdefault(part.dataset, []).append((part, infos))
    samples = {dataset: _samples(manifest_urls, of_dataset, fetch) for dataset, of_dataset in parts.items()}
    samples[VOID_EPOCH] = itertools.repeat((NO_SAMPLE, {}))
    rows: list[dict[str, Any]] = []
    size = 0
    datasets = itertools.chain.from_iterable(piece.tolist() for piece in item.datasets())
    for row, dataset in enumerate(datasets, start=item.first_row):
        sample, members = next(samples[dataset])
        rows.append({**place_columns(row, sample), "names": list(members), "data": list(members.values())})
        size += sum(map(len, members.values()))
        if cut.behind(row, size):
            yield pa.Table.from_pylist(rows, schema=RAW_SCHEMA)
            rows, size = [], 0
    if rows:
        yield pa.Table.from_pylist(rows, schema=RAW_SCHEMA)


def _read_task(
    manifest_urls: Sequence[str], works: Sequence[ReadWork], fetch: Fetch, cut: Cut, mailbox: str
) -> Iterator[pa.Table]:
    begin_data_task(mailbox)
    for work in works:
        yield from read_item(manifest_urls, work, fetch, cut)


class PlannedShards(Datasource):
    """Ray's view of the rows [start_row, stop_row) of a plan and of `spare_rows` void ones behind them.

    One read task a work item, each self-contained. `sources` are the address of the manifest and its shards, by
    dataset; None for `cut` ends a table behind every row.
    """

    def __init__(
        self,
        sources: Sequence[tuple[str, Sequence[ShardInfo]]],
        plan: Plan,
        start_row: int,
        stop_row: int,
        spare_rows: int = 0,
        fetch: Fetch = read_shard,
        mailbox: str = "",
        cut: Cut | None = None,
    ) -> None:
        super().__init__()
        items: list[Item] = list(plan.work(start_row, stop_row))
        if spare_rows:
            items.append(void_item(spare_rows, stop_row))
        works = [
            ReadWork(item, tuple(tuple(sources[part.dataset][1][s] for s in part.shards) for part in item.parts))
            for item in items
        ]
        per_task = -(-len(works) // MAX_READ_TASKS)
        self._tasks = [works[first : first + per_task] for first in range(0, len(works), per_task)]
        self._read = partial(
            _read_task,
            tuple(url for url, _ in sources),
            fetch=fetch,
            cut=cut or Cut(start_row, 1, RAW_BLOCK_BYTES),
            mailbox=mailbox,
        )

    @property
    def num_tasks(self) -> int:
        """Number of read tasks."""
        return len(self._tasks)

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all shards that will be read, once per item that needs them."""
        return sum(work.bytes for works in self._tasks for work in works)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """The tasks in plan order; their number is the plan's, whatever `parallelism` asks for."""
        return [
            ReadTask(
                partial(self._read, works=works),
                BlockMetadata(
                    num_rows=sum(work.item.rows for work in works),
                    size_bytes=sum(work.bytes for work in works),
                    input_files=None,
                    exec_stats=None,
                ),
                per_task_row_limit=per_task_row_limit,
            )
            for works in self._tasks
        ]


# -------------------------------------------------------------------------------------------------------------- encode


class Processor(Protocol):
    """What encoding needs of a processor: `MeteorProcessor` is one, and `meteor_model.sample_encoder.SampleEncoder`."""

    @property
    def image_size(self) -> int:
        """Side of the square image that travels."""

    def encode(self, turns: Sequence[tuple[str, str]], num_images: int) -> Any:
        """(role, text) turns -> an object with `input_ids` and `labels`, lists of equal length."""


# One per process: a task's copy of the encoder is new, the tokenizer it needs is not.
_PROCESSORS: dict[str, Processor] = {}


@dataclass(frozen=True)
class RowEncoder:
    """The members of a sample -> its row. Cheap to ship: the processor is built once per process, on first use.

    Args:
        factory: picklable, makes the processor (e.g. `partial(MeteorProcessor.from_pretrained, folder)`).
        pad_token_id: the single token of a row that has nothing to train on.
        max_length: tokens of a row at most; images of what does not fit are not decoded.
        too_long: what becomes of longer samples (`pipelines.data.length`).
        limits: images above them get the reason `image_too_large`.
        max_characters: samples whose turns have more get the reason `bad_conversation`, before they are tokenised.
    """

    factory: Callable[[], Processor]
    pad_token_id: int
    max_length: int
    too_long: TooLong = "truncate"
    limits: ImageLimits = field(default_factory=ImageLimits)
    max_characters: int = MAX_CHARACTERS
    identity: str = field(default_factory=lambda: uuid4().hex, init=False)

    @property
    def processor(self) -> Processor:
        """This process's processor."""
        if self.identity not in _PROCESSORS:
            _PROCESSORS.clear()  # a process serves one stream at a time
            _PROCESSORS[self.identity] = self.factory()
        return _PROCESSORS[self.identity]

    def __call__(
        self, row: int, sample: SampleId, members: Mapping[str, bytes], memory: PixelMemory | None = None
    ) -> Row:
        """Row number `row`. Faults of the sample end in `reason` and `detail`, nothing else is caught.

        `memory` is where its images are decoded to, of the processor's size; None: memory of their own.

        Raises SampleTooLongError, naming the sample, where `too_long` is fail.
        """
        found = try_sample(sample.key, members, partial(self._encode, row, sample, memory))
        if isinstance(found, SampleFault):
            return self.without_sample(row, sample, found.reason, found.detail)
        return found

    def without_sample(self, row: int, sample: SampleId, reason: str, detail: str) -> Row:
        """A row that trains nothing: one pad token, no supervised label, no image."""
        return Row(row, sample, reason, detail, [self.pad_token_id], [IGNORE_INDEX])

    def _encode(self, row: int, sample: SampleId, memory: PixelMemory | None, raw: RawSample) -> Row:
        characters = sum(len(turn.text) for turn in raw.turns)
        if characters > self.max_characters:
            raise SampleError("bad_conversation", f"{characters} characters, the limit is {self.max_characters}")
        try:
            fitted = fit(raw.turns, len(raw.images), self.processor.encode, self.max_length, self.too_long)
        except SampleTooLongError as error:
            raise SampleTooLongError(f"sample {sample.key!r} ({sample}) has {error}") from error
        except SampleError:
            raise
        except ValueError as error:  # no fault that a sample may have: the processor and the schema disagree
            raise ValueError(f"sample {sample.key!r} is well-formed but cannot be encoded: {error}") from error
        count = fitted.num_images
        if not count:
            return Row(row, sample, "", "", fitted.input_ids, fitted.labels, cut=fitted.cut)
        size = self.processor.image_size
        images = self._decode(raw.images[:count], memory or PixelMemory(count, size))
        return Row(row, sample, "", "", fitted.input_ids, fitted.labels, images, count, size, fitted.cut)

    def _decode(self, images: Sequence[bytes], memory: PixelMemory) -> memoryview:
        """The pixels of the images of a sample, one image behind the other; those of a faulty one leave no trace."""
        import torch

        from meteor_model.images import ImageError, decode_image

        room_n3SS = memory.take(len(images))
        try:
            for position, (data, out_3SS) in enumerate(zip(images, torch.from_numpy(room_n3SS), strict=True)):
                try:
                    decode_image(data, memory.size, self.limits, out_3SS)
                except ImageError as fault:
                    raise ImageError(fault.reason, f"image {position}: {fault.detail}") from fault
        except BaseException:
            memory.give_back(len(images))
            raise
        return room_n3SS.reshape(-1).data


def encode_table(raw: pa.Table, encoder: RowEncoder, mailbox: str = "") -> pa.Table:
    """A table of RAW_SCHEMA -> the same rows in ROW_SCHEMA. The watchdog with this mailbox hears of every row."""
    begin_data_task(mailbox)
    with doing(Phase.ENCODING):
        return _encode_rows(raw, encoder)


def encode_micro_batch(raw: pa.Table, encoder: RowEncoder, mailbox: str = "") -> pa.Table:
    """`encode_table`, as a block of BLOCK_SCHEMA."""
    return block_of(encode_table(raw, encoder, mailbox))


def _encode_rows(raw: pa.Table, encoder: RowEncoder) -> pa.Table:
    rows = []
    images = sum(len(image_members(tuple(name.lower() for name in names))) for names in raw["names"].to_pylist())
    memory = PixelMemory(images, encoder.processor.image_size) if images else None
    for columns in raw.to_pylist():
        row, sample = columns["row"], sample_of(columns)
        mark(Phase.ENCODING, detail=f"row {row}, sample {sample.key} ({sample})")
        if sample.epoch == VOID_EPOCH:
            rows.append(encoder.without_sample(row, sample, VOID, "fills up the last step"))
        else:
            rows.append(encoder(row, sample, dict(zip(columns["names"], columns["data"], strict=True)), memory))
    return rows_to_table(rows)


# --------------------------------------------------------------------------------------------------------------- graph


def _planned_sources(manifests: Sequence[Manifest], split: str, plan: Plan) -> list[tuple[str, tuple[ShardInfo, ...]]]:
    """Address and shards of the split of every dataset. Raises ValueError where the plan was made from others."""
    sources = [(one.url, one.split(split)) for one in manifests]
    if len(sources) != len(plan.sizes):
        raise ValueError(f"the plan holds {len(plan.sizes)} datasets, but there are {len(sources)} manifests")
    for (url, shards), sizes in zip(sources, plan.sizes, strict=True):
        if [info.samples for info in shards] != sizes.tolist():
            raise ValueError(
                f"the plan holds {len(sizes)} shards with {sizes.sum()} samples, but the split {split!r} of {url} has "
                f"{len(shards)} with {sum(info.samples for info in shards)}: the manifest changed since the plan was "
                "made"
            )
    return sources


def raw_block_bytes(datasets: Sequence[Sequence[ShardInfo]], micro_batch: int) -> int:
    """The size at which Ray ends a block of raw members: below that of most micro-batches, above half of it.

    So a block is mostly one micro-batch, and an encode task is given one block.
    """
    shards = [info for of_dataset in datasets for info in of_dataset]
    mean = sum(info.bytes for info in shards) / max(1, sum(info.samples for info in shards))
    return int(min(max(mean * micro_batch * RAW_BLOCK_SHARE, RAW_BLOCK_BYTES), MOST_RAW_BLOCK_BYTES))


def build_stream(  # noqa: PLR0913 - the settings of a stream, by name
    manifest: Manifest,
    split: str,
    plan: Plan,
    encoder: RowEncoder,
    micro_batch: int,
    *,
    others: Sequence[Manifest] = (),
    start_row: int = 0,
    stop_row: int | None = None,
    spare_rows: int = 0,
    fetch: Fetch = read_shard,
    cpus_per_task: float = 0.5,
    read_concurrency: int = 2,
    encode_concurrency: int | None = None,
    mailbox: str = "",
) -> Dataset:
    """The rows [start_row, stop_row) of the plan as a Ray dataset of BLOCK_SCHEMA, one micro-batch a block of one row.

    Args:
        manifest: of dataset 0.
        split: names the shards that the plan was made from.
        plan: the order of the rows.
        encoder: makes a row's tokens and pixels of a sample.
        micro_batch: rows of a micro-batch.
        others: of datasets 1, 2, ... of a mixture; the same split of each.
        start_row: first row; a resume after optimizer step g starts at `g * plan.global_batch`.
        stop_row: row behind the last one; None: the plan's end.
        spare_rows: void rows behind the last one, numbered on.
        fetch: reads one shard.
        cpus_per_task: Ray CPUs that an encode task reserves; may be fractional, so that data tasks still run where the
            workers hold most CPUs.
        read_concurrency: items that are read at a time (one window of every dataset in memory for each).
        encode_concurrency: encode tasks at a time; None: as many as `read_concurrency`. Each is a process that loads
            torch (some 5 s of CPU time), so more than there are cores to spare delay the first batch.
        mailbox: of the watchdog that hears what its tasks do (`pipelines.io.pulse`); "": of none.

    Raises:
        ValueError: when the plan was not made from these splits, or when no row is left.
    """
    sources = _planned_sources([manifest, *others], split, plan)
    stop = plan.total_rows if stop_row is None else stop_row
    if start_row == stop:
        raise ValueError(f"no row is left from row {start_row} to row {stop}; this plan has {plan.steps} steps")
    block_bytes = raw_block_bytes([shards for _, shards in sources], micro_batch)
    cut = Cut(start_row, micro_batch, MOST_RAW_BLOCK_BYTES)
    source = PlannedShards(sources, plan, start_row, stop, spare_rows, fetch, mailbox, cut)
    raw = ray.data.read_datasource(
        source,
        override_num_blocks=source.num_tasks,
        compute=TaskPoolStrategy(read_concurrency),
        num_cpus=cpus_per_task / 2,
    )
    configure(raw, ordered=True, block_bytes=block_bytes)
    encoded = raw.map_batches(
        encode_micro_batch,
        batch_size=micro_batch,
        batch_format="pyarrow",
        fn_kwargs={"encoder": encoder, "mailbox": mailbox},
        num_cpus=cpus_per_task,
        compute=TaskPoolStrategy(encode_concurrency or read_concurrency),
    )
    # Fused with the encode tasks, it gives them whole multiples of `batch_size` rows, and ends a block behind each of
    # the rows that they make.
    stream = encoded.repartition(target_num_rows_per_block=1, strict=True)
    # `repartition` takes no reservation and would ask for a whole CPU; with that of the encode tasks Ray fuses the two
    # into one operator, and neither starves where less than a CPU is free.
    repartition = stream._logical_plan.dag
    repartition.ray_remote_args["num_cpus"] = cpus_per_task
    repartition.compute.size = encode_concurrency or read_concurrency
    return stream


def rows_from(build: Callable[..., Dataset], split: str, plan: Plan, start_row: int) -> Dataset:
    """A stream by `build_stream`, its other settings bound, from a row on.

    Here, so that who builds it later imports no more than this module.
    """
    return build(split=split, plan=plan, start_row=start_row)


def rows_to(build: Callable[..., Dataset], split: str, plan: Plan, stop_row: int, spare_rows: int = 0) -> Dataset:
    """The same, from the first row to `stop_row`, and void rows behind them."""
    return build(split=split, plan=plan, stop_row=stop_row, spare_rows=spare_rows)


def data_config(train: str = "train") -> ray.train.DataConfig:
    """How Ray Train splits the dataset named `train`: in strict order, without regard to where blocks lie.

    Other datasets (validation) are not split: each worker that asks gets all of them, and no worker waits for another.
    """
    return ray.train.DataConfig(
        datasets_to_split=[train],
        execution_options=ExecutionOptions(preserve_order=True),
        enable_shard_locality=False,
    )
