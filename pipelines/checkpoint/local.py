"""Folders on this machine: copies of what is in storage, and a worker's files of a checkpoint before their upload.

Data tasks import this module, so what needs torch or transformers is imported where it is used.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from pipelines.io import storage
from pipelines.io.fingerprint import sha256
from pipelines.io.run_folder import RunFolder

if TYPE_CHECKING:
    from meteor_model.processing_meteor import MeteorProcessor


@contextmanager
def local_copy(url: str) -> Iterator[Path]:
    """The files of the folder `url` on this machine; a local folder is given as it is."""
    import ray.train

    filesystem, path = storage.arrow_filesystem(url)
    with ray.train.Checkpoint(path=path, filesystem=filesystem).as_directory() as directory:
        yield Path(directory)


def load_processor(url: str) -> MeteorProcessor:
    """The processor of the run at `url`, on any machine that reads its storage."""
    from meteor_model.processing_meteor import MeteorProcessor  # here: the controller only passes this function on

    with local_copy(RunFolder(url).processor) as folder:
        return MeteorProcessor.from_pretrained(folder)


def new_folder(run: str) -> Path:
    """A fresh local folder for one worker's files of one checkpoint of the run at `run`.

    Ray deletes it after the upload. What killed workers of the run left on this machine is removed first.
    """
    prefix = f"meteor-checkpoint-{sha256(run)[:12]}-"
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        owner = folder.name.removeprefix(prefix).partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-"))
