"""Every byte of a run's folder is the one that was written, or the reader says which file is not."""

import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infra.fault_proxy import FaultProxy, Flip, Rule, Truncate
from pipelines.checkpoint.local import local_copy
from pipelines.io import retry, sealed, storage
from pipelines.io.sealed import DamagedFileError
from pipelines.io.upload import CheckpointUpload, upload_folder
from tests.pipelines.s3_fixture import BUCKET, S3Server

FILES = {"a.json": b'{"step": 12}', "deep/weights.pt": os.urandom(5000), "empty": b""}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(retry, "BACKOFF", retry.Backoff(0.001, 0.01))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))


def write(folder: Path, files: dict[str, bytes] | None = None) -> Path:
    for name, data in (FILES if files is None else files).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def stored(tmp_path: Path, parts: int = 1) -> Path:
    """A folder as the uploads of `parts` workers leave it."""
    (tmp_path / "train").mkdir()
    for part in range(parts):
        local = write(tmp_path / f"local-{part}", FILES if part == 0 else {f"rank-{part}.pt": os.urandom(100)})
        import ray.train

        upload = CheckpointUpload(str(tmp_path / "train"), part=part, parts=parts)
        upload(ray.train.Checkpoint.from_directory(str(local)), "step-1")
    return tmp_path / "train" / "step-1"


def flip(path: Path, place: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


READERS: dict[str, Callable[[str, str], object]] = {
    "local_copy": lambda url, name: _through_a_copy(url, name),
    "read_file": sealed.read_file,
    "fetch": lambda url, name: sealed.fetch(sealed.open_folder(url), Path(os.environ["TARGET"])),
    "verify": lambda url, name: sealed.verify(sealed.open_folder(url)),
}


def _through_a_copy(url: str, name: str) -> bytes:
    with local_copy(url) as folder:
        return (folder / name).read_bytes()


@pytest.mark.parametrize("reader", READERS)
def test_every_changed_byte_cut_and_missing_file_is_named_by_every_reader(
    tmp_path: Path, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TARGET", str(tmp_path / "target"))
    folder = stored(tmp_path)
    READERS[reader](str(folder), "a.json")
    for name in ("a.json", sealed.list_name()):
        whole = (folder / name).read_bytes()
        for place in range(0, len(whole), max(1, len(whole) // 25)):
            flip(folder / name, place)
            with pytest.raises(DamagedFileError) as caught:
                READERS[reader](str(folder), "a.json")
            assert f"{folder}/" in str(caught.value)
            assert (caught.value.folder, caught.value.name) in [(str(folder), "a.json"), (str(folder), name)]
            (folder / name).write_bytes(whole)
    for damaged in (b"", FILES["a.json"][:-1], FILES["a.json"] + b"\n", None):
        (folder / "a.json").unlink()
        if damaged is not None:
            (folder / "a.json").write_bytes(damaged)
        with pytest.raises(storage.StorageError, match=r"step-1/a.json"):
            READERS[reader](str(folder), "a.json")
        (folder / "a.json").write_bytes(FILES["a.json"])
    READERS[reader](str(folder), "a.json")


def test_a_list_that_is_missing_is_noticed(tmp_path: Path) -> None:
    folder = stored(tmp_path, parts=3)
    found = sealed.open_folder(str(folder))
    assert found.sums is not None
    assert {"rank-1.pt", "rank-2.pt", *FILES} == set(found.sums)
    for part in range(3):
        path = folder / sealed.list_name(part, 3)
        kept = path.read_bytes()
        path.unlink()
        with pytest.raises(
            DamagedFileError, match=rf"checksums-0000{part}-of-00003.json is damaged: the list is missing"
        ):
            sealed.open_folder(str(folder))
        path.write_bytes(kept)
    with local_copy(str(folder)):
        pass


def test_a_list_without_files_is_a_part_that_is_missing(tmp_path: Path) -> None:
    folder = stored(tmp_path, parts=3)
    (folder / sealed.list_name(1, 3)).write_bytes(sealed.encode_list({}))
    with pytest.raises(DamagedFileError, match=r"checksums-00001-of-00003.json is damaged: .*writer 1 left none"):
        sealed.open_folder(str(folder))


def test_a_folder_of_an_earlier_version_is_read_as_it_is(tmp_path: Path) -> None:
    folder = write(tmp_path / "old")
    assert sealed.open_folder(str(folder)).sums is None
    assert sealed.read_file(str(folder), "a.json") == FILES["a.json"]
    with local_copy(str(folder)) as copy:
        assert (copy / "deep/weights.pt").read_bytes() == FILES["deep/weights.pt"]
    with pytest.raises(storage.ObjectMissingError), local_copy(str(tmp_path / "none")):
        pass


def test_an_exported_model_s_own_list_is_compared_too(tmp_path: Path) -> None:
    folder = write(tmp_path / "export")
    sums = {name: one.sha256 for name, one in sealed.sums_of(folder).items()}
    (folder / "checksums.json").write_text(json.dumps(sums))
    with local_copy(str(folder)):
        pass
    flip(folder / "deep/weights.pt", 77)
    with pytest.raises(DamagedFileError, match=r"deep/weights.pt is damaged"), local_copy(str(folder)):
        pass


def test_a_document_knows_its_own_content(tmp_path: Path) -> None:
    url = str(tmp_path / "exported.json")
    value = {"checkpoint": "s3://b/step-1", "parity": 1e-7, "lists": [1, 2.5, None], "text": "ü", "nan": float("nan")}
    sealed.write_document(url, value)
    assert repr(sealed.read_document(url)) == repr(dict(sorted(value.items())))
    whole = Path(url).read_bytes()
    silent = []
    for place in range(len(whole)):
        flip(Path(url), place)
        try:
            found = sealed.read_document(url)
        except DamagedFileError:
            pass
        else:
            silent.append((place, found))
        Path(url).write_bytes(whole)
    # What is left says the same: a blank that became another, or the name of the sum itself.
    assert all({**found, "sha256": 0}.keys() >= value.keys() for _, found in silent)
    assert all(repr(found["parity"]) == repr(value["parity"]) for _, found in silent)
    Path(url).write_text('{"checkpoint": "old"}')  # of an earlier version
    assert sealed.read_document(url) == {"checkpoint": "old"}


FOREIGN = {
    "a nest of thousands": b"[" * 100_000,
    "an endless integer": b'{"a": ' + b"9" * 5000 + b"}",
    "not UTF-8": b'{"a": "\xff"}',
    "half a document": b'{"a": ',
    "of another kind": b"[1, 2]",
}


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("name", ["best.json", "checksums.json", sealed.list_name()])
def test_whatever_a_document_or_a_list_holds_its_file_is_named(what: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FOREIGN[what])
    read, url = (sealed.read_document, tmp_path / name) if name == "best.json" else (sealed.open_folder, tmp_path)
    with pytest.raises(DamagedFileError, match=f"{name} is damaged") as caught:
        read(str(url))
    assert len(str(caught.value)) < 1000


def test_the_error_survives_the_way_from_a_worker() -> None:
    error = DamagedFileError("s3://b/runs/a/train/step-1", "zero3/x.pt", "it is missing")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.folder, again.name) == (str(error), error.folder, error.name)


# ------------------------------------------------------------------------------------------------------------- the wire


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(s3.endpoint) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.endpoint)
        yield running


@pytest.mark.stack
@pytest.mark.parametrize("fault", [Flip(0.5, 4), Truncate(0.5)], ids=["wrong", "cut"])
@pytest.mark.parametrize("name", ["a.json", "deep/weights.pt", "checksums-00000-of-00001.json"])
def test_damage_on_the_wire_is_read_again_and_damage_at_rest_is_named(
    proxy: FaultProxy, tmp_path: Path, fault: Flip | Truncate, name: str, request: pytest.FixtureRequest
) -> None:
    url = f"s3://{BUCKET}/sealed/{request.node.callspec.id}"
    local = write(tmp_path / "local")
    sealed.write_list(url, sealed.sums_of(local))
    upload_folder(local, url)
    proxy.add(Rule(fault, method="GET", path=f"{name}", times=2))
    with local_copy(url) as folder:
        assert {item: (folder / item).read_bytes() for item in FILES} == FILES
    assert proxy.injected
    proxy.clear()
    kept = set((tmp_path / "tmp").rglob("*.whole"))
    data = bytearray(storage.read_bytes(storage.join(url, name)))
    data[len(data) // 2] ^= 1
    storage.write_bytes(storage.join(url, name), bytes(data))
    with pytest.raises(DamagedFileError, match=rf"{url}/{name} is damaged"):  # the kept copy of this machine is whole
        sealed.fetch(sealed.open_folder(url), tmp_path / "direct")
    assert set((tmp_path / "tmp").rglob("*.whole")) == kept  # none of what is damaged
