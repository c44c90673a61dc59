"""Which checkpoint a start goes on from: the newest whole one, or the one that is asked for.

Ray Train resumes from what its snapshot names as the latest. So a start settles that first:

- a checkpoint whose files are gone or are not what was written is set aside, and the one before it is the latest;
- `run.resume_step` makes the checkpoint of that step the latest, once;
- where the snapshot itself is lost or damaged, nothing is removed: whole checkpoints prove themselves by their lists
  (`pipelines.io.sealed`), and `run.resume_step` writes the snapshot anew from them.

A checkpoint that is set aside stays where it is until a later step is committed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import PurePosixPath

from pipelines.checkpoint.committed import CHECKPOINT_PREFIX, CheckpointRef, read_snapshot, read_state
from pipelines.checkpoint.losses import remove_uncommitted_losses
from pipelines.checkpoint.state import CheckpointError, TrainState
from pipelines.compat.ray import make_snapshot, parse_snapshot, without_checkpoints
from pipelines.io import codec, sealed, storage
from pipelines.io.run_folder import RunFolder, run_folder

RECORD_VERSION = 1


class LostSnapshotError(CheckpointError):
    """There are checkpoints, and no record of which of them count; the message says how to go on."""


@dataclass(frozen=True)
class SetAside:
    """A checkpoint that is not resumed from any more, though it was committed."""

    name: str
    step: int
    why: str
    when: str
    """For people."""


@dataclass(frozen=True)
class Record:
    """What `set-aside.json` says."""

    version: int = RECORD_VERSION
    checkpoints: tuple[SetAside, ...] = ()
    went_back_to: tuple[str, ...] = ()
    """Names of checkpoints that `run.resume_step` has made the latest."""


@dataclass(frozen=True)
class _Found:
    """The folders of checkpoints below `train/`, and what becomes of each file of them."""

    files: Mapping[str, Mapping[str, int]]
    """Bytes by path, by folder."""
    snapshot: bytes | None

    @classmethod
    def of(cls, run: RunFolder) -> _Found:
        listed = storage.list_sizes(run.train)
        files: dict[str, dict[str, int]] = {}
        for path, size in listed.items():
            name, _, rest = path.partition("/")
            if rest and name.startswith(CHECKPOINT_PREFIX):
                files.setdefault(name, {})[rest] = size
        there = PurePosixPath(run.snapshot).name in listed
        return cls(files, storage.read_bytes(run.snapshot) if there else None)


def settle_start(root: str, run_name: str, resume_step: int | None, say: Callable[[str], None]) -> CheckpointRef | None:
    """The checkpoint that the next start of the workers goes on from; Ray's snapshot says so, too, afterwards.

    Only while no worker of the run is alive.

    Args:
        root: the storage.
        run_name: of the run.
        resume_step: optimizer step of the checkpoint to go on from; None: the newest whole one.
        say: is told what is not as usual.

    Returns:
        the checkpoint; None where there is none yet.

    Raises:
        LostSnapshotError: checkpoints without a snapshot.
        CheckpointError: no checkpoint is whole, or none is of `resume_step`.
        StorageError: if storage fails.
    """
    run = run_folder(root, run_name)
    found = _Found.of(run)
    latest, committed = _committed(run, found, resume_step, say)
    gone = [name for name in committed if name not in found.files]
    for name in gone:
        latest = _set_aside(run, [name], "its files are gone", say)
    if resume_step is not None:
        latest = _go_back(run, [name for name in committed if name not in gone], latest, resume_step, say)
    while latest is not None:
        url = run.checkpoint(latest)
        try:
            return CheckpointRef(url, read_state(url))
        except (sealed.DamagedFileError, storage.ObjectMissingError) as error:
            latest = fall_back(run, url, error, say)
    return None


def fall_back(run: RunFolder, url: str, error: Exception, say: Callable[[str], None]) -> str:
    """Set a damaged checkpoint aside; the name of the one before it, which is the latest now.

    Raises:
        CheckpointError: there is none.
    """
    name = PurePosixPath(url).name
    snapshot = parse_snapshot(storage.read_bytes(run.snapshot))
    if not snapshot.names - {name}:
        raise CheckpointError(
            f"{error}. No other checkpoint of the run is kept (training.keep_checkpoints), so it cannot go on: restore "
            f"the file, or train again under another --run.name. {_best_of(run)}"
        ) from error
    before = _set_aside(run, [name], str(error), say)
    assert before is not None
    return before


def remove_uncommitted(root: str, run_name: str) -> list[str]:
    """Remove what an interrupted upload left, and what is superseded; only while no worker of the run is alive.

    Each with evidence: folders of checkpoints that Ray's snapshot is there to name, and does not; without a snapshot,
    the one folder that proves by its list that its upload never ended; checkpoints that were set aside, once a later
    step is committed; losses beyond the last committed step, which is trained again.

    Returns:
        the names of the folders.

    Raises:
        LostSnapshotError: folders without a snapshot that prove nothing.
        CheckpointError, StorageError: as `settle_start`.
    """
    run = run_folder(root, run_name)
    found = _Found.of(run)
    if found.snapshot is None:
        names, committed_step = _first_upload(run, found), 0
    else:
        snapshot = read_snapshot(run, found.snapshot)
        committed_step = read_state(run.checkpoint(snapshot.latest)).step if snapshot.latest is not None else 0
        kept = {one.name for one in set_aside(run).checkpoints if one.step >= committed_step}
        names = sorted(found.files.keys() - snapshot.names - kept)
    for name in names:
        for path in sorted(found.files[name], key=sealed.is_list):  # lists last: they say what is missing
            storage.delete(storage.join(run.checkpoint(name), path))
    remove_uncommitted_losses(run, committed_step)
    return names


def _first_upload(run: RunFolder, found: _Found) -> list[str]:
    """What the upload of a run's first checkpoint left when it was cut short."""
    cut = [name for name, files in found.files.items() if is_cut_short(run.checkpoint(name), files)]
    if len(found.files) > 1 or len(cut) != len(found.files):
        raise LostSnapshotError(_lost_message(run, "is gone", found, _whole(run, found)))
    _refuse_lost_folder(run)
    return cut


def set_aside(run: RunFolder) -> Record:
    """What is set aside. Raises StorageError, CheckpointError."""
    try:
        document = sealed.read_document(run.set_aside)
    except storage.ObjectMissingError:
        return Record()
    return codec.from_plain(Record, document, run.set_aside, CheckpointError)


def is_cut_short(url: str, files: Mapping[str, int]) -> bool:
    """Whether a folder proves by its own lists that an upload to it never ended.

    A folder without any list proves nothing.
    """
    try:
        folder = sealed.open_folder(url, files)
    except sealed.DamagedFileError as error:
        return error.detail == sealed.LIST_MISSING
    return folder.sums is not None and bool(folder.missing)


def is_whole(url: str, files: Mapping[str, int]) -> bool:
    """Whether every listed file of a folder is there, in its length."""
    try:
        folder = sealed.open_folder(url, files)
    except sealed.DamagedFileError:
        return False
    return folder.sums is not None and not folder.missing


# -------------------------------------------------------------------------------------------------------------- helpers


def _committed(
    run: RunFolder, found: _Found, resume_step: int | None, say: Callable[[str], None]
) -> tuple[str | None, list[str]]:
    """The latest committed checkpoint and all of them; out of their own lists where the snapshot cannot say."""
    why = "is gone"
    if found.snapshot is not None:
        try:
            snapshot = parse_snapshot(found.snapshot)
            return snapshot.latest, sorted(snapshot.names)
        except ValueError as error:
            why = f"is damaged ({error})"
    if not found.files and found.snapshot is None:
        _refuse_lost_folder(run)
        return None, []
    whole = _whole(run, found)
    if found.snapshot is None and resume_step is None and len(found.files) == 1:
        ((name, files),) = found.files.items()
        if is_cut_short(run.checkpoint(name), files):
            return None, []  # the run's first upload
        if whole:
            say(f"  {name} is whole, and was about to be committed as the run's first: going on from it")
            _write_snapshot(run, whole)
            return name, [name]
    chosen = {name: state for name, state in whole.items() if state.step == resume_step}
    if not chosen:
        raise LostSnapshotError(_lost_message(run, why, found, whole))
    kept = {name: state for name, state in whole.items() if resume_step is not None and state.step <= resume_step}
    say(f"  {run.snapshot} {why}; written anew from the checkpoints of the steps {_steps(kept.values())}")
    _write_snapshot(run, kept)
    return max(kept, key=lambda name: (kept[name].step, name)), sorted(kept)


def _whole(run: RunFolder, found: _Found) -> dict[str, TrainState]:
    """The checkpoints that prove by their lists to be whole."""
    proven = [name for name, files in sorted(found.files.items()) if is_whole(run.checkpoint(name), files)]
    return {name: read_state(run.checkpoint(name)) for name in proven}


def _lost_message(run: RunFolder, why: str, found: _Found, whole: Mapping[str, TrainState]) -> str:
    there = ", ".join(sorted(found.files)) or "none"
    ways = (
        f"give the same command with --run.resume-step {max(state.step for state in whole.values())} (whole: the steps "
        f"{_steps(whole.values())}), or restore that file"
        if whole
        else "restore that file; no checkpoint here proves to be whole (those of earlier versions hold no checksums)"
    )
    return (
        f"{run.snapshot} {why}, so nothing says which of the checkpoints in {run.train} count ({there}). Nothing was "
        f"removed. To go on, {ways}; to begin at step 0, use another --run.name"
    )


def _refuse_lost_folder(run: RunFolder) -> None:
    """A run that stored losses of more than its first checkpoint had checkpoints."""
    losses = [name for name in storage.list_files(run.losses) if name.endswith(".f64")]
    if len(losses) > 1:
        raise LostSnapshotError(
            f"{run.train} holds no checkpoint, though {run.losses} holds the losses of {len(losses)} of them. Nothing "
            f"was removed. Restore {run.train}; to begin at step 0, use another --run.name, or remove {run.losses}"
        )


def _steps(states: Iterable[TrainState]) -> str:
    return ", ".join(str(step) for step in sorted(state.step for state in states))


def _write_snapshot(run: RunFolder, states: Mapping[str, TrainState]) -> None:
    ordered = sorted(states.items(), key=lambda item: (item[1].step, item[0]))
    results = [(name, {"step": state.step, "loss": state.loss_last, **state.final}) for name, state in ordered]
    storage.write_bytes(run.snapshot, make_snapshot(results))


def _set_aside(run: RunFolder, names: list[str], why: str, say: Callable[[str], None]) -> str | None:
    """Take checkpoints out of Ray's snapshot and note them; the latest that is left."""
    when = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    record = set_aside(run)
    more = tuple(SetAside(name, _step_of(name), why, when) for name in names)
    _store(run, replace(record, checkpoints=(*record.checkpoints, *more)))  # first: what it names is not removed
    snapshot = without_checkpoints(storage.read_bytes(run.snapshot), frozenset(names))
    storage.write_bytes(run.snapshot, snapshot)
    left = parse_snapshot(snapshot).latest
    for name in names:
        say(f"  CHECKPOINT SET ASIDE: {name}: {why}. {'Going on from ' + left if left else 'None is left'}")
    return left


def _go_back(
    run: RunFolder, names: list[str], latest: str | None, resume_step: int, say: Callable[[str], None]
) -> str | None:
    steps = {name: _step_of(name) for name in names}
    wanted = sorted(name for name, step in steps.items() if step == resume_step)
    record = set_aside(run)
    if not wanted:
        done = [name for name in record.went_back_to if _step_of(name) == resume_step]
        if done and latest is not None:  # the same command again: that checkpoint is older than what is kept
            say(f"  run.resume_step {resume_step}: the run went back to it before; going on from {latest}")
            return latest
        raise CheckpointError(
            f"run.resume_step is {resume_step}, but {run.train} keeps the checkpoints of the steps "
            f"{', '.join(map(str, sorted(steps.values()))) or '(none)'}"
        )
    target = wanted[-1]
    if target == latest:
        return latest
    if target in record.went_back_to:
        say(f"  run.resume_step {resume_step}: the run went back to it before; going on from {latest}")
        return latest
    _store(run, replace(record, went_back_to=(*record.went_back_to, target)))
    newer = sorted(name for name in names if (steps[name], name) > (resume_step, target))
    return _set_aside(run, newer, f"run.resume_step is {resume_step}", say)


def _step_of(name: str) -> int:
    """Of a checkpoint's folder, `step-0000012-...`."""
    digits = name.removeprefix(CHECKPOINT_PREFIX).partition("-")[0]
    return int(digits) if digits.isdigit() else -1


def _store(run: RunFolder, record: Record) -> None:
    sealed.write_document(run.set_aside, asdict(record))


def _best_of(run: RunFolder) -> str:
    return f"A whole copy of the best validated one may be in {run.best}"
