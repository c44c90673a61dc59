"""A manifest for shards that are there already: tars, or tables. Every one is read, and none is changed.

The same settings again compare what is found with the manifest that is there, and write nothing.
"""

import fnmatch
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from pipelines.data.build import MakeResult, existing_manifest, say_nothing, shards_changed
from pipelines.data.img2dataset import failed_downloads
from pipelines.data.shards import (
    FORMAT_VERSION,
    Manifest,
    ShardError,
    ShardInfo,
    dataset_url,
    save_manifest,
    shard_info,
)
from pipelines.data.sources import HELDOUT, SPLITS, TRAIN, Packed
from pipelines.data.survey import DIGESTS_NAME, SHARED, Survey, shared
from pipelines.data.tar_format import parse_shard
from pipelines.io import storage
from pipelines.io.fingerprint import sha256_of_json
from pipelines.io.storage_check import require_access

SharedImages = Literal["stop", "count"]
"""What becomes of an image that is held out and trained on."""
_ARCHIVE = re.compile(r"\.(tar(\.\w+)?|tgz|tzst|zip)$", re.IGNORECASE)


class Found(NamedTuple):
    """A shard and its samples; entries of its file that became none, and values that are not read, by name."""

    info: ShardInfo
    samples: list[Packed]
    left_out: Mapping[str, int]
    not_read: Mapping[str, int]


class Layout(Protocol):
    """How the files of a prefix hold shards. `name` is that of the source in the manifest."""

    @property
    def name(self) -> str:
        """One of `build.INDEX_SOURCES`."""
        ...

    @property
    def globs(self) -> Sequence[str]:
        """What the paths of its files match, one or the other."""
        ...

    def settings(self) -> dict[str, Any]:
        """All that decides which samples there are, as JSON values."""
        ...

    def files(self, root: str, listed: Mapping[str, int]) -> tuple[dict[str, int], Counter[str]]:
        """Of the bytes of all files by path those that are read, and a count by reason of what is left out."""
        ...

    def shards(self, root: str, path: str, split: str, listed: Mapping[str, int]) -> Iterator[Found]:
        """The shards of one file in their order. Raises ShardError naming it, StorageError."""
        ...


@dataclass(frozen=True)
class Tars:
    """The tars that match a glob on the path below the prefix, a shard each."""

    pattern: str = "*.tar"
    name = "webdataset"

    @property
    def globs(self) -> Sequence[str]:
        """The one."""
        return (self.pattern,)

    def settings(self) -> dict[str, Any]:
        """The glob."""
        return {"pattern": self.pattern}

    def files(self, root: str, listed: Mapping[str, int]) -> tuple[dict[str, int], Counter[str]]:
        """The tars; archives that are none of them are counted."""
        matched = {path: size for path, size in listed.items() if fnmatch.fnmatchcase(path, self.pattern)}
        others = sum(bool(_ARCHIVE.search(path)) for path in listed.keys() - matched.keys())
        return matched, Counter(archive_outside_pattern=others)

    def shards(self, root: str, path: str, split: str, listed: Mapping[str, int]) -> Iterator[Found]:
        """The tar, with what img2dataset could not download for it."""
        address = storage.join(root, path)
        data = storage.read_bulk(address)
        contents = parse_shard(data, address)
        left_out = Counter(contents.ignored)
        left_out.update(failed_downloads(root, path, listed, len(contents.samples)))
        yield Found(shard_info(path, split, data, contents.samples), contents.samples, left_out, {})


def index_shards(
    url: str,
    layout: Layout | None = None,
    heldout: str = "",
    overwrite: bool = False,
    on_shard: Callable[[ShardInfo], None] = say_nothing,
    *,
    shared_images: SharedImages = "stop",
) -> MakeResult:
    """Write a manifest for the files already below the prefix `url`, reading each; none is changed.

    `layout` says which files they are (None: `*.tar`). `heldout` is a glob on the path below the prefix: files that
    match it become that split, the others train. All shards are read every time: a manifest that is there stays only
    where it says what was found.

    Raises ShardError naming the prefix that holds no such file, or the one that cannot be read; ValueError for a
    `heldout` that matches no file, and for an image in both splits (`shared_images` "count" only counts them);
    NoSampleError; DatasetConflictError when another manifest is there; StorageError.
    """
    start = time.monotonic()
    layout = Tars() if layout is None else layout
    require_access(url)
    root = dataset_url(url)
    listed = storage.list_sizes(root)
    sizes, outside = layout.files(root, listed)
    if not sizes:
        globs = " or ".join(map(repr, layout.globs))
        raise ShardError(root, "missing", f"no object matches {globs} here; is the prefix right, and not empty?")
    splits = _splits(root, list(sizes), heldout)
    settings = {**layout.settings(), "heldout": heldout, "listing_sha256": sha256_of_json(sizes)}
    spec = {"format": FORMAT_VERSION, "source": {"name": layout.name, "settings": settings}}
    existing = existing_manifest(url, spec, overwrite)
    infos: list[ShardInfo] = []
    survey = Survey()
    left_out = Counter(outside)
    for path, split in splits.items():
        for found in layout.shards(root, path, split, listed):
            for key, members in found.samples:
                survey.add(split, key, members)
            left_out.update(found.left_out)
            survey.not_read.update(found.not_read)
            infos.append(found.info)
            on_shard(found.info)
    if existing is not None and not overwrite:
        if changed := _replaced(existing, infos):
            raise shards_changed(existing, changed)
        return MakeResult(existing, True, time.monotonic() - start)
    survey.require_samples(root)
    report = survey.report(+left_out)
    if both := shared(survey.digests(TRAIN), survey.digests(HELDOUT)):
        if shared_images == "stop":
            raise ValueError(
                f"{root}: {both} images lie in shards that match --heldout {heldout!r} and in others: held-out scores "
                "would be those of pictures that were trained on. Sort the shards by picture, or let them be counted "
                "with --shared-images count"
            )
        report[SHARED] = {HELDOUT: both}
    storage.write_bytes(storage.join(root, DIGESTS_NAME), survey.to_parquet(SPLITS))
    return MakeResult(save_manifest(url, infos, spec, report), False, time.monotonic() - start)


def _splits(root: str, paths: Sequence[str], heldout: str) -> dict[str, str]:
    """The split of every shard. Raises ValueError where shards are to be held out and none is."""
    splits = {path: HELDOUT if heldout and fnmatch.fnmatchcase(path, heldout) else TRAIN for path in paths}
    if heldout and HELDOUT not in splits.values():
        raise ValueError(
            f"{root}: --heldout {heldout!r} matches none of the {len(paths)} shards, so all of them would be trained "
            f"on; the glob is for the path below the prefix, and the first one is {paths[0]!r}"
        )
    return splits


def _replaced(existing: Manifest, found: Sequence[ShardInfo]) -> list[str]:
    """Shards that are no longer what the manifest says, a line for each."""
    old = {info.path: info for info in existing.shards}
    new = {info.path: info for info in found}
    return [
        f"{path}: {_shown(old.get(path))} became {_shown(new.get(path))}"
        for path in dict.fromkeys([*old, *new])
        if old.get(path) != new.get(path)
    ]


def _shown(info: ShardInfo | None) -> str:
    return f"{info.bytes} bytes with SHA-256 {info.sha256[:12]}..." if info else "nothing"
