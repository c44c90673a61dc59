"""Reading through every storage fault: a proxy between the real clients and a real S3 server injects them.

The samples read must be exactly those written, and faults must have been met, or a test says nothing.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from infra import services
from infra.fault_proxy import (
    DISK_FULL,
    INSUFFICIENT_STORAGE,
    INTERNAL_ERROR,
    SLOW_DOWN,
    Delay,
    Drip,
    Fault,
    FaultProxy,
    Flip,
    Refuse,
    Reset,
    Rule,
    Truncate,
)
from infra.faults import rules_from_json
from infra.local import Stack, up
from infra.stack import crash
from pipelines.data.shards import (
    Manifest,
    ShardError,
    fetch_shard,
    load_manifest,
    read_shard,
    save_manifest,
    write_shards,
)
from pipelines.io import ranged, retry, storage
from tests.pipelines.s3_fixture import BUCKET, S3Server
from tests.stack_fixture import start_stack, stop_stack

pytestmark = pytest.mark.stack
Samples = list[tuple[str, dict[str, bytes]]]
URL = f"s3://{BUCKET}/faults"


def some_samples(first: int, count: int) -> Samples:
    return [
        (f"k{n}", {"json": b"{}", "jpg": hashlib.sha256(b"%d" % n).digest() * 300}) for n in range(first, first + count)
    ]


@pytest.fixture
def dataset(s3: S3Server) -> tuple[Manifest, Samples]:
    samples = some_samples(0, 64)
    return save_manifest(URL, write_shards(samples, URL, "train", 64), {"format": 1}), samples


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses that fit a test; what counts is the number of tries."""
    monkeypatch.setattr(retry, "BACKOFF", retry.Backoff(longest_s=0.1))


@pytest.fixture
def proxy(dataset: object, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(s3.endpoint) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.endpoint)
        yield running


READ_FAULTS: dict[str, tuple[Fault, int]] = {
    "reset_at_first_byte": (Reset(0), 3),
    "reset_25": (Reset(0.25), 3),
    "reset_50": (Reset(0.5), 5),
    "reset_75": (Reset(0.75), 3),
    "reset_last_byte": (Reset(0.999999), 3),
    "reset_before_answer": (Reset(where="answer"), 3),
    "truncated_empty": (Truncate(0), 3),
    "truncated_50": (Truncate(0.5), 3),
    "flipped_early": (Flip(700), 3),
    "flipped_50": (Flip(0.5, 4), 3),
    "slow_down": (SLOW_DOWN, 3),
    "internal_error": (INTERNAL_ERROR, 3),
    "insufficient_storage": (INSUFFICIENT_STORAGE, 3),
    "late_answer": (Delay(0.5), 1),
    "slow_body": (Drip(2_000_000), 1),
    "server_down": (Refuse(1.5), 1),
}


@pytest.mark.parametrize("name", READ_FAULTS)
def test_no_fault_on_the_way_loses_a_sample(dataset: tuple[Manifest, Samples], proxy: FaultProxy, name: str) -> None:
    manifest, samples = dataset
    fault, times = READ_FAULTS[name]
    proxy.add(Rule(fault, method="GET", path=r"\.tar", times=times))
    assert read_shard(manifest.url, manifest.shards[0], backoff=retry.Backoff(0.01)) == samples
    assert len(proxy.injected) == times
    assert {one.path.partition("?")[0] for one in proxy.injected} == {f"/{BUCKET}/faults/train-000000.tar"}


def test_seeded_chance_of_all_faults_at_once(dataset: tuple[Manifest, Samples], proxy: FaultProxy) -> None:
    manifest, samples = dataset
    kinds: list[Fault] = [Reset(0.3), Truncate(0.6), Flip(0.5), SLOW_DOWN, INTERNAL_ERROR, Reset(where="answer")]
    proxy.add(*(Rule(kind, times=None, share=0.15, seed=seed) for seed, kind in enumerate(kinds)))
    for _ in range(3):
        assert load_manifest(manifest.url) == manifest
        assert read_shard(manifest.url, manifest.shards[0], backoff=retry.Backoff(0.01)) == samples
    assert len({type(one.rule.fault) for one in proxy.injected}) >= 2
    assert len(proxy.injected) >= 3


def written() -> bool:
    storage.write_bytes(f"{URL}/small.bin", b"x" * 999)
    storage.delete(f"{URL}/small.txt")
    return storage.list_sizes(URL)["small.bin"] == 999


SMALL_CALLS: dict[str, Callable[[], bool]] = {
    "manifest": lambda: load_manifest(URL).samples("train") == 64,
    "exists": lambda: storage.exists(f"{URL}/manifest.parquet") and not storage.exists(f"{URL}/nothing"),
    "list": lambda: "train-000000.tar" in storage.list_files(URL),
    "write_and_delete": written,
}


@pytest.mark.parametrize("name", SMALL_CALLS)
def test_small_calls_outlast_faults(proxy: FaultProxy, name: str) -> None:
    """A store that is full for a while, a lost answer, an error of its own."""
    faults: tuple[Fault, ...] = (INSUFFICIENT_STORAGE, Reset(where="answer"), INTERNAL_ERROR)
    for fault in faults:
        proxy.add(Rule(fault, times=2))
    assert SMALL_CALLS[name]()
    assert len(proxy.injected) == 6


def test_retries_have_an_end_and_say_so(dataset: tuple[Manifest, Samples], proxy: FaultProxy) -> None:
    manifest, _ = dataset
    proxy.add(Rule(INTERNAL_ERROR, times=None))
    start = time.monotonic()
    with pytest.raises(ShardError, match=r"train-000000\.tar: could not be read, .* for 2 s .*same command") as caught:
        fetch_shard(manifest.url, manifest.shards[0], retry_s=2.0, bad_shards="drop")
    assert 2 <= time.monotonic() - start < 15
    assert caught.value.fault == "unreadable"
    assert "AWS Error" not in str(caught.value)  # what Ray repeats on its own, ten times
    assert len(proxy.injected) > 2


@pytest.mark.parametrize("read", [storage.read_bulk, storage.read_bytes])
def test_a_body_that_trickles_is_given_up(
    dataset: tuple[Manifest, Samples],
    proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
    read: Callable[[str], bytes],
) -> None:
    monkeypatch.setattr(ranged, "part_limit_s", lambda length=0: 1.0)
    proxy.add(Rule(Drip(1000), method="GET", times=2))
    start = time.monotonic()
    assert len(read(f"{URL}/train-000000.tar")) == dataset[0].shards[0].bytes
    assert 2 < time.monotonic() - start < 10
    assert len(proxy.injected) == 2


def test_what_is_wrong_for_good_fails_at_once(
    dataset: tuple[Manifest, Samples], proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, _ = dataset
    start = time.monotonic()
    with pytest.raises(ShardError, match="missing, but the manifest lists it"):
        read_shard(f"s3://{BUCKET}/elsewhere", manifest.shards[0], backoff=retry.Backoff(0.01))
    with pytest.raises(storage.StorageError, match="bucket 'nowhere' does not exist"):
        fetch_shard("s3://nowhere/x", manifest.shards[0], bad_shards="drop")
    with pytest.raises(storage.StorageError, match="refused the request") as caught:
        storage.write_bytes(f"s3://{BUCKET}/{'k' * 1100}", b"x")
    assert not isinstance(caught.value, storage.TransientStorageError)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "wrong")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(storage.StorageError, match="refused the credentials"):
        fetch_shard(manifest.url, manifest.shards[0], bad_shards="drop")
    assert time.monotonic() - start < 10


def test_disk_full_passes(proxy: FaultProxy) -> None:
    proxy.add(Rule(DISK_FULL, method="PUT", times=5))
    storage.write_bytes(f"{URL}/late.bin", b"y" * 5000)
    assert storage.read_bytes(f"{URL}/late.bin") == b"y" * 5000
    assert len(proxy.injected) == 5


def test_a_server_that_is_killed_and_restarted_loses_nothing(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards are read without a pause while the server is killed and started again."""
    stack: Stack = start_stack(tmp_path_factory.mktemp("restart"), only=["s3"])
    try:
        for name, value in services.stack_env(stack).items():
            monkeypatch.setenv(name, value)
        samples = some_samples(0, 96)
        manifest = save_manifest(URL, write_shards(samples, URL, "train", 32), {"format": 1})
        back = threading.Event()

        def restart() -> None:
            crash(stack.state_dir, "s3")
            time.sleep(2.0)
            up(stack.state_dir, only=["s3"])
            back.set()

        worker = threading.Thread(target=restart)
        worker.start()
        longest = 0.0
        while not back.is_set():
            start = time.monotonic()
            assert [one for shard in load_manifest(URL).shards for one in read_shard(URL, shard)] == samples
            storage.write_bytes(f"{URL}/beat.bin", b"beat")
            longest = max(longest, time.monotonic() - start)
        worker.join()
        assert longest > 1.5  # the restart was met
        assert load_manifest(URL) == manifest
    finally:
        stop_stack(stack)


# ----------------------------------------------------------------------------------------------- the proxy itself


def test_rules_count_and_skip(dataset: object, proxy: FaultProxy) -> None:
    rules = rules_from_json('[{"fault": {"kind": "Status", "code": 404, "error": "NoSuchKey"}, "skip": 2, "times": 2}]')
    proxy.add(*rules)
    seen = []
    for _ in range(6):
        try:
            storage.read_bytes(f"{URL}/manifest.parquet", retry_s=0)
            seen.append(True)
        except storage.ObjectMissingError:
            seen.append(False)
    assert seen == [True, True, False, False, True, True]
    assert [one.rule for one in proxy.injected] == rules * 2
    proxy.clear()
    assert storage.exists(f"{URL}/manifest.parquet")
    with pytest.raises(ValueError, match="unknown fault 'Fire'; there are Reset"):
        rules_from_json('[{"fault": {"kind": "Fire"}}]')


def test_the_port_stays_the_proxys_while_it_refuses(dataset: object, proxy: FaultProxy) -> None:
    endpoint = proxy.endpoint
    proxy.refuse(60)
    with pytest.raises(storage.TransientStorageError, match="cannot be reached"):
        storage.read_bytes(f"{URL}/manifest.parquet", retry_s=0.0)
    proxy.clear()
    assert proxy.endpoint == endpoint
    assert storage.exists(f"{URL}/manifest.parquet", retry_s=0.0)
