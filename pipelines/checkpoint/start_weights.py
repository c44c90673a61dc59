"""The weight files of a start model, and who they are: checkpoints leave to them what is frozen.

A checkpoint names the files by one digest, so that it is never completed from others. `weights.json` beside the files
says the SHA-256 of each; a start model of an earlier version has none, and is hashed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath

from safetensors import safe_open
from torch import Tensor

from meteor_model.foreign import foreign
from pipelines.io import sealed
from pipelines.io.fingerprint import sha256_of_file, sha256_of_json
from pipelines.io.run_folder import RunFolder

SUMS_FILE = PurePosixPath(RunFolder("").init_weights).name


class WeightsError(ValueError):
    """The weights in a folder do not fit the model; the message names the parameter, the file and the shapes."""


class StartWeights:
    """The safetensors files of a folder as one mapping from tensor name to tensor, read one tensor at a time."""

    def __init__(self, directory: Path) -> None:
        """Find the files. Raises WeightsError where there are none."""
        self.directory = directory
        self._paths = sorted(directory.glob("*.safetensors"))
        self._file_of: dict[str, Path] = {}
        for path in self._paths:
            with safe_open(path, framework="pt") as file:
                self._file_of.update(dict.fromkeys(file.keys(), path))
        if not self._file_of:
            raise WeightsError(f"{directory} holds no *.safetensors; it must be a folder that save_for_sharding wrote")

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`, without reading it."""
        with safe_open(self._file_of[name], framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """Tensor `name`, on the CPU."""
        with safe_open(self._file_of[name], framework="pt") as file:
            return file.get_tensor(name)

    @cached_property
    def digest(self) -> str:
        """Of names and content of the files.

        Raises:
            WeightsError: if `weights.json` is none, or of other files.
        """
        listed = self.directory / SUMS_FILE
        names = [path.name for path in self._paths]
        if not listed.exists():
            known = sealed.open_folder(str(self.directory)).sums or {}
            files = {
                path: known[path.name].sha256 if path.name in known else sha256_of_file(path) for path in self._paths
            }
            return _digest({path.name: sha256 for path, sha256 in files.items()})
        with foreign(lambda what: WeightsError(f"{listed} is no list of SHA-256: {what}")):
            sums = {str(name): str(sha256) for name, sha256 in json.loads(listed.read_bytes()).items()}
        if sorted(sums) != names:
            raise WeightsError(f"{listed} names {sorted(sums)}, but the folder holds {names}")
        return _digest(sums)


def write_sums(directory: Path, sums: Mapping[str, sealed.FileSum]) -> Path:
    """Write `weights.json` into a folder, out of the sums of its files; returns its path."""
    path = directory / SUMS_FILE
    files = {name: one.sha256 for name, one in sorted(sums.items()) if name.endswith(".safetensors")}
    path.write_text(json.dumps(files, indent=1) + "\n")
    return path


def _digest(sums: Mapping[str, str]) -> str:
    return sha256_of_json(sums)
