"""Uploads that outlast a storage that fails for a while: of a folder, and of a checkpoint for Ray Train's `report`.

File by file (`storage.write_file`): an upload that breaks off leaves no visible object, and the size that storage
states is compared. A repetition overwrites with equal bytes, so an upload may be started again at any time.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ray.train

from pipelines.io import sealed, storage
from pipelines.io.arrow import arrow_filesystem
from pipelines.io.pulse import Phase, pulse

UPLOAD_RETRY_S = 300.0


class UploadError(RuntimeError):
    """A file could not be brought to storage; the message says which, and what was kept. No fault of the settings."""


def _gets_on(count: int) -> None:
    """A process that waits for an upload is not stuck while parts arrive."""
    pulse().gets_on(Phase.UPLOAD)


def upload_file(local: Path, url: str, retry_s: float = UPLOAD_RETRY_S) -> int:
    """Bring one file to an address, however often that takes until `retry_s` after the first fault; its bytes.

    Every part that arrives is a sign of life of the phase `upload` (`pipelines.io.pulse`).

    Raises:
        StorageError: for a missing bucket, refused credentials or a refused request, at once.
        TransientStorageError: storage failed for longer than `retry_s`.
        FileNotFoundError: there is no such local file.
    """
    size = local.stat().st_size
    storage.write_file(local, url, retry_s, _gets_on)
    return size


def upload_folder(folder: Path, url: str, retry_s: float = UPLOAD_RETRY_S) -> dict[str, int]:
    """Bring every file of a local folder below a URL; bytes by path. `retry_s` counts for each file.

    Raises UploadError naming the file and the address, or a folder without files; StorageError where repeating is of no
    use (see upload_file).
    """
    sizes: dict[str, int] = {}
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    if not paths:
        raise UploadError(f"{folder} {_emptiness(folder)}: there is nothing to bring to {url}")
    for path in paths:
        name = path.relative_to(folder).as_posix()
        try:
            sizes[name] = upload_file(path, storage.join(url, name), retry_s)
        except storage.TransientStorageError as error:
            raise UploadError(
                f"{path} could not be uploaded, though it was tried again for {retry_s:.0f} s; {len(sizes)} of "
                f"{len(paths)} files of the folder are in {url}: {error}"
            ) from error
    return sizes


def _emptiness(folder: Path) -> str:
    return "is empty" if folder.is_dir() else "is not there"


@dataclass(frozen=True)
class CheckpointUpload:
    """How a worker brings its files of a checkpoint to the run's storage: `report(checkpoint_upload_fn=...)`.

    Ray's snapshot names a checkpoint once every worker's upload has returned: it is the commit mark, so a folder that
    is half there is never resumed from.

    Args:
        folder: address of the folder that Ray Train keeps its checkpoints in.
        retry_s: seconds for which one file outlasts a storage that fails.
        part: rank of the worker; each writes its own list of SHA-256 (`pipelines.io.sealed`).
        parts: workers that write the checkpoint.
    """

    folder: str
    retry_s: float = UPLOAD_RETRY_S
    part: int = 0
    parts: int = 1

    def __call__(self, checkpoint: ray.train.Checkpoint, checkpoint_dir_name: str) -> ray.train.Checkpoint:
        """The checkpoint in storage, for a local one. Raises UploadError, StorageError."""
        url = storage.join(self.folder, checkpoint_dir_name)
        if not storage.is_s3(self.folder) and not Path(self.folder).is_dir():
            raise storage.StorageError(
                f"{self.folder}: no such folder on this machine; all must share the run's storage"
            )
        local = Path(os.fspath(checkpoint.path))
        try:
            sums = sealed.sums_of(local)
            if not sums:  # committed without them it would look whole
                raise UploadError(
                    f"{local} {_emptiness(local)}: worker {self.part} of {self.parts} has lost its files of the "
                    "checkpoint before their upload. Something else removes files in that temp folder; give every node "
                    "its own (TMPDIR)"
                )
            self._write_list(url, sums)
            upload_folder(local, url, self.retry_s)
        except UploadError as error:
            raise UploadError(
                f"{error}\nThis checkpoint does not count; the one before it is kept and whole. Make room or bring the "
                "object store back, then start the same command again under the same run name."
            ) from error
        filesystem, path = arrow_filesystem(url)
        return ray.train.Checkpoint(path=path, filesystem=filesystem)

    def _write_list(self, url: str, sums: Mapping[str, sealed.FileSum]) -> None:
        """Before its files: what is there without them is then known to be cut short."""
        try:
            sealed.write_list(url, sums, self.part, self.parts, self.retry_s)
        except storage.TransientStorageError as error:
            raise UploadError(
                f"the list of {len(sums)} files could not be stored, though it was tried again for {self.retry_s:.0f} "
                f"s: {error}"
            ) from error
