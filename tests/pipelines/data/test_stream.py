"""The Ray Data graph on a real in-process Ray: strict order for every world size, resume, faults, errors, starvation.

Reading and encoding are jittered in the Ray workers (`jittered`), shards are uneven, samples are corrupt on purpose.
The workers import this module, so what is heavy is imported by the tests that need it.
"""

import hashlib
import io
import json
import os
import random
import tarfile
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from PIL import Image

from pipelines.data import mixture, stream
from pipelines.data.blocks import rows_from_table, table_of
from pipelines.data.ledger import Ledger
from pipelines.data.mixture import MixturePlan, Plan
from pipelines.data.order import StreamPlan
from pipelines.data.sample_id import SampleId, SampleIds
from pipelines.data.schema import REASONS, ROW_SCHEMA, sample_of
from pipelines.data.shards import Manifest, ShardError, ShardInfo, load_manifest, read_shard, save_manifest
from pipelines.data.stream import PlannedShards, RowEncoder, build_stream, data_config, encode_table

Row = dict[str, Any]

ROOT = Path(__file__).parents[3]
SIZE, MICRO, GLOBAL, MAX_LENGTH = 16, 2, 12, 60
SHARD_SAMPLES = [23, 40, 0, 17, 31, 8]
OTHER_SAMPLES, OTHER_FIRST = [12, 9, 15, 0, 20], 1000
PAD = 7


# ---------------------------------------------------------------------------------------------------------------- data


def jpeg(seed: int, size: tuple[int, int] = (20, 16)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def record(question: str, answer: str) -> bytes:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return json.dumps({"id": "x", "conversations": turns}).encode()


def members_of(number: int) -> tuple[dict[str, bytes], str]:
    """Members of sample `number`, and the reason it must end with: one in eight is faulty, some are special."""
    question, answer = f"<image>what is {number}?", f"a {number}"
    match number % 16:
        case 1:
            return {"json": record(question, answer), "jpg": jpeg(number)[:200]}, "undecodable_image"
        case 5:
            return {"jpg": jpeg(number)}, "missing_json"
        case 9 if number % 32 == 9:
            return {"json": record(question, "long " * 40), "jpg": jpeg(number)}, "too_long"
        case 9:
            return {"json": record(f"{question} <image>", answer), "jpg": jpeg(number)}, "placeholder_excess"
        case 3:
            return {"json": record(f"say {number}", answer)}, ""
        case 7:
            pair = {"0.jpg": jpeg(number), "1.jpg": jpeg(number + 1000)}
            return {"json": record(f"<image><image>{number}?", answer), **pair}, ""
        case _:
            return {"json": record(question, answer), "jpg": jpeg(number)}, ""


def write_dataset(folder: Path, shard_samples: list[int], number: int = 0) -> Manifest:
    """A dataset with samples numbered through its shards from `number` on; keys are s000000, s000001, ..."""
    infos = []
    for position, samples in enumerate(shard_samples):
        buffer = io.BytesIO()
        counts: Counter[str] = Counter()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for _ in range(samples):
                for extension, data in members_of(number)[0].items():
                    entry = tarfile.TarInfo(f"s{number:06d}.{extension}")
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
                    counts[extension] += 1
                number += 1
        data = buffer.getvalue()
        (folder / f"train-{position:06d}.tar").write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        infos.append(ShardInfo(f"train-{position:06d}.tar", "train", samples, len(data), digest, dict(counts)))
    save_manifest(str(folder), infos, {"source": "test"})
    return load_manifest(str(folder))


@dataclass
class ByteProcessor:
    """The interface of a processor with the bytes of the text as tokens; replies alone are supervised."""

    image_size: int = SIZE
    jittered: bool = False

    def encode(self, turns: Any, num_images: int) -> SimpleNamespace:
        if self.jittered:
            time.sleep(random.random() * 0.01)
        ids: list[int] = []
        labels: list[int] = []
        for role, text in turns:
            tokens = list(text.encode())
            ids += tokens
            labels += tokens if role == "assistant" else [-100] * len(tokens)
        return SimpleNamespace(input_ids=ids, labels=labels)


def make_processor(log: str | None = None) -> ByteProcessor:
    if log is not None:
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
    return ByteProcessor(jittered=True)


def encoder() -> RowEncoder:
    return RowEncoder(make_processor, PAD, MAX_LENGTH, "drop")


def jittered(manifest_url: str, info: ShardInfo) -> stream.Samples:
    """Every shard is read with a random delay, so that tasks overtake each other."""
    time.sleep(random.random() * 0.3)
    return read_shard(manifest_url, info)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_dataset(tmp_path_factory.mktemp("dataset"), SHARD_SAMPLES)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=150 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_dataset(tmp_path_factory.mktemp("other"), OTHER_SAMPLES, OTHER_FIRST)


def mixed_plan() -> MixturePlan:
    return MixturePlan(
        [SHARD_SAMPLES, OTHER_SAMPLES], [1.0, 0.5], seed=5, epochs=2, global_batch=GLOBAL, window_shards=2
    )


def make_plan(window_shards: int = 2, epochs: int = 2) -> StreamPlan:
    return StreamPlan(SHARD_SAMPLES, seed=5, epochs=epochs, global_batch=GLOBAL, window_shards=window_shards)


def consume(dataset: ray.data.Dataset, world: int) -> list[list[list[Row]]]:
    """Micro-batches of rows of every rank, taken concurrently and unevenly, through Ray Train's own splitting."""
    shards = data_config().configure({"train": dataset}, world, None, ["node"] * world)
    taken: list[list[list[Row]]] = [[] for _ in range(world)]
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            for block in shards[rank]["train"].iter_batches(batch_size=1, batch_format="pyarrow"):
                time.sleep(random.random() * 0.005 * (rank + 1))
                taken[rank].append(table_of(block).to_pylist())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "the stream stalled"
    return taken


def expected_row(plan: Plan, row: int) -> tuple[str, str]:
    """(key, reason) of a row by the plan and the way the samples were numbered."""
    location = plan.locate(np.array([row]))
    if location.epoch[0] < 0:
        return "", "void"
    dataset = int(location.dataset[0])
    before = sum((SHARD_SAMPLES, OTHER_SAMPLES)[dataset][: location.shard[0]])
    number = dataset * OTHER_FIRST + before + int(location.index[0])
    return f"s{number:06d}", members_of(number)[1]


def check_order(taken: list[list[list[Row]]], plan: Plan, start_row: int) -> None:
    """Micro-batch j of the plan is on worker j % W, so optimizer step g is exactly rows [g G, (g + 1) G)."""
    world = len(taken)
    for rank, batches in enumerate(taken):
        firsts = range(start_row + rank * MICRO, plan.total_rows, MICRO * world)
        assert [[row["row"] for row in rows] for rows in batches] == [list(range(f, f + MICRO)) for f in firsts]
        for row in (row for rows in batches for row in rows):
            assert (row["key"], row["reason"]) == expected_row(plan, row["row"])
    per_step = GLOBAL // (MICRO * world)
    for step in range((plan.total_rows - start_row) // GLOBAL):
        of_step = [b for batches in taken for b in batches[step * per_step : (step + 1) * per_step]]
        first = start_row + step * GLOBAL
        assert sorted(row["row"] for rows in of_step for row in rows) == list(range(first, first + GLOBAL))


# ------------------------------------------------------------------------------------------------------- without Ray


def sources(*manifests: Manifest) -> list[tuple[str, tuple[ShardInfo, ...]]]:
    return [(manifest.url, manifest.split("train")) for manifest in manifests]


def local_tables(manifest: Manifest, plan: StreamPlan, start: int = 0) -> list[pa.Table]:
    """What the graph computes, in this process."""
    source = PlannedShards(sources(manifest), plan, start, plan.total_rows)
    raw = [table for task in source.get_read_tasks(1) for table in task()]
    return [encode_table(table, RowEncoder(ByteProcessor, PAD, MAX_LENGTH, "drop")) for table in raw]


def test_rows_hold_what_the_sample_holds(manifest: Manifest) -> None:
    from meteor_model.images import decode_image

    plan = make_plan()
    table = pa.concat_tables(local_tables(manifest, plan))
    assert table.schema.equals(ROW_SCHEMA)
    assert table["row"].to_pylist() == list(range(plan.total_rows))
    located = plan.locate(np.arange(plan.total_rows))
    for name, column in zip(("dataset", "epoch", "shard", "index"), located.columns, strict=True):
        assert table[name].to_pylist() == column.tolist()
    for row in table.to_pylist():
        key, reason = expected_row(plan, row["row"])
        assert (row["key"], row["reason"]) == (key, reason)
        if reason:
            assert (row["input_ids"], row["labels"], row["images"], row["num_images"]) == ([PAD], [-100], b"", 0)
            assert row["detail"]
            continue
        members = members_of(int(key[1:]))[0]
        question, answer = (turn["value"] for turn in json.loads(members["json"])["conversations"])
        assert bytes(row["input_ids"]).decode() == question + answer
        assert row["labels"] == [-100] * len(question) + list(answer.encode())
        images = [decode_image(data, SIZE) for name, data in sorted(members.items()) if name.endswith("jpg")]
        assert (row["num_images"], row["image_size"]) == (len(images), SIZE if images else 0)
        assert row["images"] == b"".join(image.numpy().tobytes() for image in images)


def test_every_row_is_seen_dropped_or_void(manifest: Manifest) -> None:
    plan = make_plan()
    table = pa.concat_tables(local_tables(manifest, plan))
    found = Counter(table["reason"].to_pylist())
    one_epoch = Counter(members_of(number)[1] for number in range(sum(SHARD_SAMPLES)))
    assert set(one_epoch) == {"", "undecodable_image", "missing_json", "too_long", "placeholder_excess"}
    assert found.pop("void") == plan.total_rows - plan.total_samples == 2
    assert found == {reason: 2 * count for reason, count in one_epoch.items()}
    assert found.total() == plan.total_samples
    details = {row["reason"]: row["detail"] for row in table.to_pylist()}
    assert details["undecodable_image"].startswith("image 0: ")
    assert details["too_long"].endswith(f"the limit is {MAX_LENGTH}")


def test_the_worker_side_takes_these_rows(manifest: Manifest) -> None:
    from meteor_model.collate import collate
    from pipelines.training.batches import BatchReader, Share

    plan = make_plan()
    rows = rows_from_table(pa.concat_tables(local_tables(manifest, plan)))
    mine = [rows[first : first + MICRO] for first in range(MICRO, len(rows), 2 * MICRO)]
    share = Share(rank=1, world=2, per_step=GLOBAL // MICRO)
    reader = BatchReader(partial(collate, pad_token_id=PAD, image_size=SIZE), PAD, MICRO, share)
    batches = [batch for step in reader.read(iter(mine), 0, plan.total_rows) for batch in step]
    assert sum(batch.seen for batch in batches) == sum(row.usable for batch in mine for row in batch)
    assert sum(len(batch.dropped) for batch in batches) == sum(row.reason in REASONS for batch in mine for row in batch)
    for batch, of_batch in zip(batches, mine, strict=True):
        pixels = b"".join(row.images for row in of_batch)
        assert batch.inputs["pixel_values"].numpy().tobytes() == pixels


def test_long_samples_are_refused_before_their_images_are_decoded() -> None:
    members = {"json": record("<image>" + "long " * 40, "yes"), "jpg": b"no image at all"}
    row = RowEncoder(ByteProcessor, PAD, MAX_LENGTH)(3, SampleId(0, 0, 0, 0, "key"), members)
    assert (row.row, row.sample.key, row.reason) == (3, "key", "too_long")


def test_a_processor_that_refuses_a_good_sample_is_an_error_that_names_it() -> None:
    class Refusing(ByteProcessor):
        def encode(self, turns: Any, num_images: int) -> SimpleNamespace:
            raise ValueError("no template")

    with pytest.raises(ValueError, match="sample 'k7' is well-formed but cannot be encoded: no template"):
        RowEncoder(Refusing, PAD, MAX_LENGTH)(0, SampleId(0, 0, 0, 0, "k7"), {"json": record("hello", "yes")})


def test_many_windows_share_read_tasks(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(window_shards=1)
    one_each = PlannedShards(sources(manifest), plan, 0, plan.total_rows)
    assert one_each.num_tasks == 2 * 5 + 1, "five shards with samples, two epochs, the void tail"
    monkeypatch.setattr(stream, "MAX_READ_TASKS", 3)
    shared = PlannedShards(sources(manifest), plan, 0, plan.total_rows)
    assert shared.num_tasks == 3
    rows = [row for task in shared.get_read_tasks(1) for table in task() for row in table["row"].to_pylist()]
    assert rows == list(range(plan.total_rows))


def test_a_plan_of_other_shards_or_without_rows_is_refused(manifest: Manifest) -> None:
    other = StreamPlan([1, 2, 3], 0, 1, GLOBAL, 1)
    with pytest.raises(ValueError, match=r"the plan holds 3 shards with 6 samples.*has 6 with 119"):
        build_stream(manifest, "train", other, encoder(), MICRO)
    plan = make_plan()
    with pytest.raises(ValueError, match="no row is left from row 240 to row 240; this plan has 20 steps"):
        build_stream(manifest, "train", plan, encoder(), MICRO, start_row=plan.total_rows)
    with pytest.raises(ValueError, match="no split 'eval'"):
        build_stream(manifest, "eval", plan, encoder(), MICRO)


def test_a_mixture_needs_the_manifests_of_its_plan(manifest: Manifest, other: Manifest) -> None:
    plan = mixed_plan()
    with pytest.raises(ValueError, match="the plan holds 2 datasets, but there are 1 manifests"):
        build_stream(manifest, "train", plan, encoder(), MICRO, fetch=jittered)
    with pytest.raises(ValueError, match=r"6 shards with 119 samples, but .* has 5 with 56"):
        build_stream(other, "train", plan, encoder(), MICRO, others=[manifest])


def test_one_window_of_every_dataset_is_in_memory_at_a_time(
    manifest: Manifest, other: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Contents(list):
        """A list that can be watched."""

        __hash__ = object.__hash__  # type: ignore[assignment] # list says None; a WeakSet wants the object's own

    alive: weakref.WeakSet[Contents] = weakref.WeakSet()
    fetched: list[str] = []

    def watched(url: str, info: ShardInfo) -> stream.Samples:
        fetched.append(f"{url}/{info.path}")
        contents = Contents(read_shard(url, info))
        alive.add(contents)
        return contents

    monkeypatch.setattr(mixture, "BLOCK", 8)
    plan = mixed_plan()
    (task, *rest) = PlannedShards(sources(manifest, other), plan, 0, plan.total_samples, 0, watched).get_read_tasks(1)
    assert not rest, "so small a mixture is one item"
    most = 0
    for number, table in enumerate(task()):
        assert table["row"].to_pylist() == [number]
        most = max(most, len(alive))
    assert number == plan.total_samples - 1
    assert len(fetched) == 2 * 5 + 4, "two passes of one dataset, one of the other, each window once"
    assert most == sum(one.window_shards for one in plan.streams) == 3


def test_the_split_configuration_is_the_strict_one() -> None:
    config = data_config("train")
    assert config._datasets_to_split == ["train"]
    assert config._enable_shard_locality is False
    assert config._resolve_execution_options("train").preserve_order is True


# ---------------------------------------------------------------------------------------------------------- with Ray


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_step_is_its_slice_of_the_plan(manifest: Manifest, world: int) -> None:
    plan = make_plan()
    check_order(consume(build_stream(manifest, "train", plan, encoder(), MICRO, fetch=jittered), world), plan, 0)


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("world", [1, 2, 3])
def test_two_datasets_mix_as_planned(
    manifest: Manifest, other: Manifest, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixture, "ITEM_WINDOWS", 1)
    monkeypatch.setattr(mixture, "BLOCK", 1024 if world == 2 else 64)  # also where items end inside of windows
    plan = mixed_plan()
    assert plan.quotas == (238, 56)
    spare = MICRO * world
    dataset = build_stream(manifest, "train", plan, encoder(), MICRO, others=[other], spare_rows=spare, fetch=jittered)
    taken = consume(dataset, world)
    for rank, batches in enumerate(taken):
        last = [(row["row"], row["reason"]) for row in batches.pop()]
        first = plan.total_rows + rank * MICRO
        assert last == [(row, "void") for row in range(first, first + MICRO)], "the spare rows come last"
    check_order(taken, plan, 0)
    rows = [row for batches in taken for batch in batches for row in batch if row["reason"] != "void"]
    ledger = Ledger(plan.sizes)
    ledger.add(SampleIds.of(sample_of(row) for row in rows))
    assert ledger == plan.consumed(plan.total_rows)


@pytest.mark.usefixtures("cluster")
def test_a_resume_is_the_suffix_with_the_same_content(manifest: Manifest) -> None:
    plan = make_plan(window_shards=6)
    start = 13 * GLOBAL
    whole = consume(build_stream(manifest, "train", plan, encoder(), MICRO, fetch=jittered), 2)
    resumed = consume(build_stream(manifest, "train", plan, encoder(), MICRO, start_row=start, fetch=jittered), 2)
    check_order(resumed, plan, start)
    assert [batches[start // (2 * MICRO) :] for batches in whole] == resumed


@pytest.mark.usefixtures("cluster")
def test_data_tasks_run_where_less_than_a_cpu_is_free(manifest: Manifest, tmp_path: Path) -> None:
    class Holder:
        def ready(self) -> bool:
            return True

    holder = ray.remote(num_cpus=3.5)(Holder).remote()
    assert ray.get(holder.ready.remote())
    log = tmp_path / "built"
    plan = make_plan(epochs=1)
    logging = RowEncoder(partial(make_processor, str(log)), PAD, MAX_LENGTH, "drop")
    dataset = build_stream(manifest, "train", plan, logging, MICRO, cpus_per_task=0.25)
    try:
        taken = consume(dataset, 1)
    finally:
        ray.kill(holder)
    check_order(taken, plan, 0)
    built = log.read_text().split()
    assert len(built) == len(set(built)), "a process built its processor more than once"


@pytest.mark.usefixtures("cluster")
def test_a_broken_shard_reaches_the_driver_by_name(tmp_path: Path) -> None:
    from pipelines.recovery.failures import root_cause

    sizes = [6, 6]
    manifest = write_dataset(tmp_path, sizes)
    path = tmp_path / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:3000])
    plan = StreamPlan(sizes, 0, 1, GLOBAL, 1)
    with pytest.raises(ShardError, match="truncated") as caught:
        consume(build_stream(manifest, "train", plan, encoder(), MICRO, fetch=jittered), 1)
    cause = root_cause(ray.train.WorkerGroupError("failed", {0: caught.value}), "run 'a'")
    assert isinstance(cause, ShardError)
    assert (cause.shard, cause.fault) == (str(path), "truncated")


def test_samples_above_the_limits_are_dropped_by_reason() -> None:
    members = {"json": record("hello", "yes"), "jpg": b""}
    limited = RowEncoder(ByteProcessor, PAD, MAX_LENGTH, max_characters=7)
    row = limited(0, SampleId(0, 0, 0, 0, "key"), {"json": members["json"]})
    assert (row.reason, row.detail) == ("bad_conversation", "8 characters, the limit is 7")
