"""Making a dataset: shards from a source.

Idempotent: the manifest holds the settings it was made with. Asked again with the same ones, the shards are read and
compared with it, and nothing is written; with other ones, the differences are named and nothing is touched unless told
to overwrite. While shards are written a marker lies in the prefix, so that what a killed run left is told apart from a
user's own files.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.data.shards import (
    FORMAT_VERSION,
    SAMPLES_PER_SHARD,
    Manifest,
    ShardError,
    ShardInfo,
    check_shards,
    dataset_url,
    load_manifest,
    manifest_url,
    save_manifest,
    write_shards,
)
from pipelines.data.sources import TRAIN, Packed, Source
from pipelines.data.survey import DIGESTS_NAME, Survey, images_of, is_among
from pipelines.io import storage
from pipelines.io.fingerprint import canonical_json
from pipelines.io.redact import redact
from pipelines.io.storage_check import require_access

MARKER_NAME = "_WRITING.json"
INDEX_SOURCES = ("webdataset", "tables")
"""Of manifests that were written for shards which were there already (`pipelines.data.indexing`)."""
_SHOWN = 5  # shards listed in an error


class DatasetConflictError(ValueError):
    """The prefix holds something else than what is asked for; the message says what, and how to go on."""


@dataclass(frozen=True)
class MakeResult:
    """What was made: the manifest, with what was left out, whether it was there already, and the seconds taken."""

    manifest: Manifest
    reused: bool
    seconds: float


def say_nothing(info: ShardInfo) -> None:
    """Nobody wants to hear of the shards that are done."""


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """The leaves in which two specs differ, as `a.b: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))]
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


def existing_manifest(url: str, spec: dict[str, Any], overwrite: bool) -> Manifest | None:
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
            "choose another --output, or replace it with --overwrite"
        )
    return existing


def _check_prefix_is_ours(url: str, existing: Manifest | None, overwrite: bool) -> None:
    """Refuse to write over, or among, shards that no run of make_shards left here."""
    root = dataset_url(url)
    if existing is not None and existing.spec.get("source", {}).get("name") in INDEX_SOURCES:
        raise DatasetConflictError(
            f"{root} holds shards that were indexed, not made here; those are never overwritten: choose another "
            "--output"
        )
    if existing is not None or overwrite:
        return
    files = storage.list_files(root)
    tars = [name for name in files if name.endswith(".tar")]
    if tars and MARKER_NAME not in files:
        raise DatasetConflictError(
            f"{root} holds {len(tars)} tars (the first is {tars[0]}) but no manifest: choose another --output, index "
            "them with the `webdataset` command, or replace them with --overwrite"
        )


def make_shards(
    source: Source,
    url: str,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    overwrite: bool = False,
    on_shard: Callable[[ShardInfo], None] = say_nothing,
    *,
    check: bool = True,
) -> MakeResult:
    """Write all splits of `source` as shards below the prefix `url`, then the manifest.

    A held-out sample with an image that is trained on, too, is left out and counted. Where the dataset is there
    already, its shards are read and compared with the manifest, unless `check` is off.

    Raises DatasetConflictError (another dataset is there, or other shards than it says), SourceError, StorageError,
    NoSampleError, or ValueError for a setting.
    """
    start = time.monotonic()
    require_access(url)
    # Through JSON and back: the spec as a manifest returns it (tuples become lists).
    spec: dict[str, Any] = redact(
        json.loads(
            canonical_json({"format": FORMAT_VERSION, "samples_per_shard": samples_per_shard, "source": source.spec()})
        )
    )
    existing = existing_manifest(url, spec, overwrite)
    if existing is not None and not overwrite:
        if check and (changed := check_shards(existing)):
            raise shards_changed(existing, changed)
        return MakeResult(existing, True, time.monotonic() - start)
    _check_prefix_is_ours(url, existing, overwrite)
    root = dataset_url(url)
    marker = storage.join(root, MARKER_NAME)
    storage.write_json(marker, spec)
    storage.delete(manifest_url(url))  # from here to the end the prefix is unfinished, and says so
    infos: list[ShardInfo] = []
    survey, left_out = Survey(), Counter[str]()
    for split in source.splits:
        samples = _surveyed(source.samples(split), split, survey, left_out)
        infos.extend(write_shards(samples, root, split, samples_per_shard, on_shard))
    if not infos:
        raise ValueError(f"the source {spec['source']['name']!r} gave no samples with these settings")
    survey.require_samples(root)
    stale = {shard.path for shard in existing.shards} - {info.path for info in infos} if existing else set()
    for path in sorted(stale):
        storage.delete(storage.join(root, path))
    storage.write_bytes(storage.join(root, DIGESTS_NAME), survey.to_parquet(source.splits))
    survey.not_read.update(source.not_read())
    manifest = save_manifest(url, infos, spec, survey.report({**source.report(), **left_out}))
    storage.delete(marker)
    return MakeResult(manifest, False, time.monotonic() - start)


def _surveyed(samples: Iterable[Packed], split: str, survey: Survey, left_out: Counter[str]) -> Iterator[Packed]:
    """The samples of a split; of the held-out ones those whose images were not trained on."""
    trained = survey.digests(TRAIN)
    for key, members in samples:
        if split != TRAIN and any(is_among(image, trained) for image in images_of(members)):
            left_out["image_trained_on"] += 1
            continue
        survey.add(split, key, members)
        yield key, members


def shards_changed(existing: Manifest, changed: Sequence[str]) -> DatasetConflictError:
    """The error for shards that are not those of the manifest, a line for each."""
    shown = "\n".join(f"  {line}" for line in changed[:_SHOWN])
    more = f"\n  ... and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    return DatasetConflictError(
        f"{existing.url} is there, but {len(changed)} of its {len(existing.shards)} shards are not as it says:\n"
        f"{shown}{more}\nrestore them, or replace it with --overwrite"
    )
