"""Making a dataset: shards from a source, or a manifest for shards that are there already.

Idempotent: the manifest holds the settings it was made with. Asked again with the same ones, nothing is done; with
other ones, the differences are named and nothing is touched unless told to overwrite. While shards are written a marker
lies in the prefix, so that what a killed run left is told apart from a user's own files.
"""

import fnmatch
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipelines.data.shards import (
    FORMAT_VERSION,
    SAMPLES_PER_SHARD,
    Manifest,
    ShardError,
    ShardInfo,
    dataset_url,
    load_manifest,
    manifest_url,
    save_manifest,
    shard_info,
    write_shards,
)
from pipelines.data.sources import HELDOUT, SPLITS, TRAIN, Source
from pipelines.data.tar_format import parse_shard
from pipelines.io import storage
from pipelines.io.fingerprint import canonical_json, sha256_of_json
from pipelines.io.redact import redact

MARKER_NAME = "_WRITING.json"
INDEX_SOURCE = "webdataset"


class DatasetConflictError(ValueError):
    """The prefix holds something else than what is asked for; the message says what, and how to go on."""


@dataclass(frozen=True)
class MakeResult:
    """What was made: the manifest, whether it was there already, what was left out by reason, and the seconds taken."""

    manifest: Manifest
    reused: bool
    left_out: dict[str, int]
    seconds: float


def _say_nothing(info: ShardInfo) -> None:
    return None


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """The leaves in which two specs differ, as `a.b: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))]
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


def _existing(url: str, spec: dict[str, Any], overwrite: bool) -> Manifest | None:
    """The manifest that is there; None where there is none (or an unreadable one that may be overwritten).

    Raises DatasetConflictError naming the differences when it was made with another spec and may not be overwritten.
    """
    try:
        existing = load_manifest(url)
    except ShardError as error:
        if error.fault == "missing" or overwrite:
            return None
        raise
    if existing.spec != spec and not overwrite:
        changed = "\n".join(f"  {line}" for line in differences(existing.spec, spec))
        raise DatasetConflictError(
            f"{existing.url} was made with other settings:\n{changed}\n"
            "choose another --out, or replace it with --overwrite"
        )
    return existing


def _check_prefix_is_ours(url: str, existing: Manifest | None, overwrite: bool) -> None:
    """Refuse to write over, or among, shards that no run of make_shards left here."""
    root = dataset_url(url)
    if existing is not None and existing.spec.get("source", {}).get("name") == INDEX_SOURCE:
        raise DatasetConflictError(
            f"{root} holds shards that were indexed, not made here; those are never overwritten: choose another --out"
        )
    if existing is not None or overwrite:
        return
    files = storage.list_files(root)
    tars = [name for name in files if name.endswith(".tar")]
    if tars and MARKER_NAME not in files:
        raise DatasetConflictError(
            f"{root} holds {len(tars)} tars (the first is {tars[0]}) but no manifest: choose another --out, index them "
            "with the `webdataset` command, or replace them with --overwrite"
        )


def make_shards(
    source: Source,
    url: str,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    overwrite: bool = False,
    on_shard: Callable[[ShardInfo], None] = _say_nothing,
) -> MakeResult:
    """Write all splits of `source` as shards below the prefix `url`, then the manifest.

    Raises DatasetConflictError (another dataset is there), SourceError, StorageError, or ValueError for a setting.
    """
    start = time.monotonic()
    storage.require_bucket(url)
    # Through JSON and back: the spec as a manifest returns it (tuples become lists).
    spec: dict[str, Any] = redact(
        json.loads(
            canonical_json({"format": FORMAT_VERSION, "samples_per_shard": samples_per_shard, "source": source.spec()})
        )
    )
    existing = _existing(url, spec, overwrite)
    if existing is not None and not overwrite:
        return MakeResult(existing, True, {}, time.monotonic() - start)
    _check_prefix_is_ours(url, existing, overwrite)
    root = dataset_url(url)
    marker = storage.join(root, MARKER_NAME)
    storage.write_json(marker, spec)
    storage.delete(manifest_url(url))  # from here to the end the prefix is unfinished, and says so
    infos: list[ShardInfo] = []
    for split in SPLITS:
        infos.extend(write_shards(source.samples(split), root, split, samples_per_shard, on_shard))
    if not infos:
        raise ValueError(f"the source {spec['source']['name']!r} gave no samples with these settings")
    stale = {shard.path for shard in existing.shards} - {info.path for info in infos} if existing else set()
    for path in sorted(stale):
        storage.delete(storage.join(root, path))
    manifest = save_manifest(url, infos, spec)
    storage.delete(marker)
    return MakeResult(manifest, False, source.report(), time.monotonic() - start)


def index_shards(
    url: str,
    pattern: str = "*.tar",
    heldout: str = "",
    overwrite: bool = False,
    on_shard: Callable[[ShardInfo], None] = _say_nothing,
) -> MakeResult:
    """Write a manifest for the tars already below the prefix `url`, reading each whole; no shard is changed.

    `pattern` and `heldout` are globs on the path below the prefix; shards that match `heldout` become that split, the
    others train. Raises ShardError naming the prefix that holds no such file, or the shard that is no tar, is truncated
    or has a key twice; DatasetConflictError when another manifest is there; StorageError.
    """
    start = time.monotonic()
    storage.require_bucket(url)
    root = dataset_url(url)
    sizes = {path: size for path, size in storage.list_sizes(root).items() if fnmatch.fnmatchcase(path, pattern)}
    if not sizes:
        raise ShardError(root, "missing", f"no object matches {pattern!r} here; is the prefix right, and not empty?")
    listing = sha256_of_json(sizes)
    settings = {"pattern": pattern, "heldout": heldout, "listing_sha256": listing}
    spec = {"format": FORMAT_VERSION, "source": {"name": INDEX_SOURCE, "settings": settings}}
    existing = _existing(url, spec, overwrite)
    if existing is not None and not overwrite:
        return MakeResult(existing, True, {}, time.monotonic() - start)
    infos: list[ShardInfo] = []
    ignored: Counter[str] = Counter()
    for path in sizes:
        split = HELDOUT if heldout and fnmatch.fnmatchcase(path, heldout) else TRAIN
        address = storage.join(root, path)
        data = storage.read_bulk(address)
        contents = parse_shard(data, address)
        ignored.update(contents.ignored)
        infos.append(shard_info(path, split, data, contents))
        on_shard(infos[-1])
    manifest = save_manifest(url, infos, spec)
    return MakeResult(manifest, False, dict(sorted(ignored.items())), time.monotonic() - start)
