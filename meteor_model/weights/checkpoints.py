"""Reading a checkpoint, wherever it is: a local folder, one file, or a repository of the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import cached_file

from meteor_model.foreign import foreign, quoted

SAFETENSORS = (".safetensors",)
PICKLED = (".bin", ".pth", ".pt")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of whole checkpoints in a folder, in this order; each may be cut into shards listed by NAME.index.json."""
WRAPPERS = ("model", "state_dict", "module")
"""Keys under which training programs store the weights in a .pth file."""
PARTS_PREFIX = "parts:"
_HUB = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<file>[\w./-]+))?")
_OFFLINE_HINT = (
    "without the network, point HF_HOME at a cache that holds it (HF_HUB_OFFLINE=1 then uses nothing else), or give a "
    "local folder or file instead"
)


class WeightsError(ValueError):
    """The weights of a part cannot be read, do not fit it, or are not those that were expected."""


@dataclass(frozen=True)
class Source:
    """Where the weights of a part come from, see `parse_source`."""

    text: str
    place: str
    revision: str | None = None
    file: str | None = None
    sha256: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether `place` is a path of this machine; else it is a hub repository."""
        return Path(self.place).exists()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        tensors: by the names that the files give them.
        files: what was read.
        config: the content of the config.json beside them; empty for a file without one.
        folder: the local folder that holds config and tokenizer; for the hub, its cache.
    """

    tensors: dict[str, Tensor]
    files: tuple[Path, ...]
    config: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    @property
    def described(self) -> str:
        """The files, for an error message."""
        if len(self.files) == 1:
            return str(self.files[0])
        return f"{len(self.files)} shards in {self.files[0].parent}"


def parse_source(text: str) -> Source:
    """What a source says: FOLDER, FILE or OWNER/NAME[@REVISION][:FILE], and maybe `#sha256=HEX`.

    Raises:
        WeightsError: for a path that does not exist, a malformed checksum, or what is neither path nor repository.
    """
    place, mark, condition = text.partition("#")
    sha256 = None
    if mark:
        found = re.fullmatch(r"sha256=([0-9a-f]{64})", condition)
        if found is None:
            raise WeightsError(f"source {text!r}: write #sha256= and 64 lower-case hexadecimal digits after the place")
        sha256 = found.group(1)
    if place.startswith(PARTS_PREFIX):
        raise WeightsError(
            f"source {text!r} names a part of the local cache, which pipelines.parts resolves; give its folder here"
        )
    path = Path(place).expanduser()
    if path.exists():
        return Source(text, str(path), sha256=sha256)
    hub = _HUB.fullmatch(place)
    if hub is None or place.startswith((".", "/", "~")) or (place.endswith(SAFETENSORS + PICKLED) and not hub["file"]):
        raise WeightsError(
            f"source {text!r}: there is no such file or folder, and it is no hub repository (OWNER/NAME[@REVISION])"
        )
    return Source(text, hub["repository"], hub["revision"], hub["file"], sha256)


def source_file(source: Source, name: str) -> Path | None:
    """A file of the source on this machine, fetched from the hub where needed; None where the source lacks it.

    Raises:
        WeightsError: when the hub does not answer, or does not know the repository or revision.
    """
    if source.is_local:
        place = Path(source.place)
        path = (place if place.is_dir() else place.parent) / name
        return path if path.is_file() else None
    return _fetched(source, name, required=False)


def _fetched(source: Source, name: str, required: bool) -> Path | None:
    """A file of a hub repository, from the cache or the hub.

    Without the network the library cannot tell a file that the repository lacks from one that is not cached; with
    `required` either is an error in the library's words.
    """
    try:
        found = cached_file(
            source.place, name, revision=source.revision, _raise_exceptions_for_missing_entries=required
        )
    except OSError as error:
        reason = " ".join(str(error).split())
        raise WeightsError(
            f"{name} of {source.text!r} does not come from the hub: {reason} ({_OFFLINE_HINT})"
        ) from error
    return None if found is None else Path(found)


def read_config(source: Source) -> dict[str, Any]:
    """The config.json beside the weights; empty where there is none (a single file can stand alone)."""
    path = source_file(source, "config.json")
    return {} if path is None else _read_json(path)


def read_checkpoint(source: Source) -> Checkpoint:
    """All tensors of a source, on the CPU, in the numbers they are stored in.

    Raises:
        WeightsError: naming the file that is missing or damaged, or holds no plain tensors.
    """
    files = _weight_files(source)
    tensors: dict[str, Tensor] = {}
    for path, expected in files.items():
        loaded = _read_file(path)
        if lacking := sorted(expected - loaded.keys()):
            raise WeightsError(f"{path} lacks {lacking[0]!r}, which the index of {source.text!r} promises there")
        tensors.update(loaded)
    first = next(iter(files))
    return Checkpoint(tensors, tuple(files), read_config(source), first.parent)


def _weight_files(source: Source) -> dict[Path, set[str]]:
    """The files to read and the tensors that an index promises in each."""
    if source.is_local and Path(source.place).is_file():
        return {Path(source.place): set()}
    if source.file is not None:
        path = _fetched(source, source.file, required=True)
        assert path is not None
        return {path: set()}
    for name in WEIGHT_FILES:
        if (index := source_file(source, f"{name}.index.json")) is not None:
            return _shards(source, index)
        if (whole := source_file(source, name)) is not None:
            return {whole: set()}
    if not source.is_local:
        _fetched(source, WEIGHT_FILES[0], required=True)  # raises in the library's words
    if len(single := sorted(Path(source.place).glob("*.safetensors"))) == 1:
        return {single[0]: set()}
    looked = ", ".join(f"{name}[.index.json]" for name in WEIGHT_FILES)
    raise WeightsError(
        f"{source.text!r} holds no weights: looked for {looked}; name the file if it is called otherwise"
    )


def _shards(source: Source, index: Path) -> dict[Path, set[str]]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise WeightsError(f"{index} has no weight_map: it is no index of shards")
    files: dict[Path, set[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or "/" in name or "\\" in name or name in ("", ".", ".."):
            raise WeightsError(f"{index} says that {quoted(tensor)} is in {quoted(name)}, which is no file beside it")
        path = source_file(source, name)
        if path is None:
            raise WeightsError(f"{source.text!r} lacks the shard {name}, which holds {tensor!r}")
        files.setdefault(path, set()).add(tensor)
    return files


def _read_json(path: Path) -> dict[str, Any]:
    with foreign(lambda what: WeightsError(f"{path} is damaged: {what}")):
        content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise WeightsError(f"{path} is damaged: it holds no mapping")
    return content


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix in SAFETENSORS:
        with foreign(lambda what: WeightsError(f"{path} is damaged: {what}")):
            return load_file(path)
    if path.suffix not in PICKLED:
        raise WeightsError(f"{path}: weights are read from {', '.join(SAFETENSORS + PICKLED)} files")
    with foreign(
        lambda what: WeightsError(f"{path} cannot be read as plain tensors (torch.load, weights_only=True): {what}")
    ):
        content = torch.load(path, map_location="cpu", weights_only=True)
    return _unwrapped(content, path)


def _unwrapped(content: Any, path: Path) -> dict[str, Tensor]:
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{path} holds no mapping of names to tensors")
    if other := [name for name, value in content.items() if not isinstance(value, Tensor)]:
        raise WeightsError(f"{path}: {other[0]!r} is no tensor; save the state dict alone")
    return dict(content)
