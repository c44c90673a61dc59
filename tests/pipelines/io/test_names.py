"""A name is one part of a path, whoever gives it: what is none is refused before anything is read or written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_model_alias_name, _validate_model_name

from jobs.register import PromoteCommand, RollbackCommand, check
from jobs.settings import RegistryAddress
from pipelines.config.recipe import Recipe, RunSettings, TrackingSettings
from pipelines.io import storage
from pipelines.io.arrow import arrow_filesystem
from pipelines.io.names import LONGEST, NamingError, is_name, require_alias, require_name
from pipelines.io.run_folder import run_folder, split_run_url
from pipelines.registry.aliases import move_alias
from pipelines.registry.versions import Registry
from tune.folder import sweep_folder
from tune.settings import SweepSettings

HOSTILE = [
    "", ".", "..", "../x", "../../x", "a/../b", "a/b", "/etc", "a\\b", "~", "~/x", "-rf", "--name", ".hidden", "a b",
    "a\n", "\na", "a\tb", "a\x00b", "a%2fb", "a?b", "a#b", "a:b", "a@b", "$HOME", "`x`", "a;b", "a|b", "a*", "\u00e4",
    "\uff41", "a\u202eb", "s3://x", "x" * (LONGEST + 1),
]  # fmt: skip
NAMES = ["pretrain-tiny-1a2b3c-001", "a", "0", "Meteor_7B.v2", "x" * LONGEST]
ADDRESS = RegistryAddress("http://127.0.0.1:9")

GIVEN: dict[str, Callable[[str], Any]] = {
    "run.name": lambda name: RunSettings(name=name),
    "recipe": lambda name: Recipe(name=name),
    "tracking.registered_model": lambda name: TrackingSettings(registered_model=name),
    "sweep": lambda name: SweepSettings(name=name, storage="s3://x"),
    "registry": lambda name: Registry("http://127.0.0.1:9", name),
    "folder of a run": lambda name: run_folder("s3://bucket", name if len(name) <= LONGEST else name * 2),
    "folder of a sweep": lambda name: sweep_folder("s3://bucket", name if len(name) <= LONGEST else name * 2),
    "register.py --tracking.registered-model": lambda name: check(
        RollbackCommand("champion", RegistryAddress(ADDRESS.uri, name if len(name) <= LONGEST else name * 2))
    ),
}


@pytest.mark.parametrize("place", GIVEN)
def test_what_is_no_name_is_refused_wherever_it_is_given(place: str) -> None:
    for name in HOSTILE:
        if place == "registry" and len(name) > LONGEST:
            continue
        with pytest.raises(ValueError, match=r"letters, digits, '\.', '_' and '-'"):
            GIVEN[place](name)
    for name in NAMES:
        GIVEN[place](name)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=12) | st.text("abA0._-/\\ .~", max_size=12))
def test_a_name_is_one_part_of_every_path(name: str) -> None:
    if not is_name(name):
        with pytest.raises(NamingError):
            require_name(name, "run")
        return
    url = run_folder("s3://bucket/root", name).url
    assert split_run_url(url) == ("s3://bucket/root", name)
    assert PurePosixPath(url).name == name
    assert (Path("/root") / name).resolve() == Path("/root") / name
    _validate_model_name(name)
    RunSettings(name=name)


@settings(max_examples=300, deadline=None)
@given(
    st.text(max_size=8)
    | st.text("vLatest0123_-./@", max_size=8)
    | st.sampled_from(["latest", "v1", "V2", "7", "Latest"])
)
def test_an_alias_is_one_for_mlflow_and_no_version(alias: str) -> None:
    try:
        require_alias(alias)
    except NamingError:
        return
    _validate_model_alias_name(alias)
    assert not alias.isdigit()


def test_an_alias_is_checked_before_anything_is_asked() -> None:
    for alias in ("a/b", "latest", "v3", "12", "a.b", "../x"):
        with pytest.raises(NamingError, match=f"{alias!r} is no alias"):
            move_alias(Registry("http://127.0.0.1:9", "meteor"), alias, 1)
        with pytest.raises(NamingError, match="is no alias"):
            check(PromoteCommand(version=1, to=alias, tracking=ADDRESS))
        with pytest.raises(NamingError, match="is no alias"):
            check(RollbackCommand(alias, ADDRESS))


@pytest.mark.parametrize("url", ["s3://bucket/../x", "s3://bucket/a/..", "s3://bucket/./a", "s3://bucket/a/../../b"])
def test_a_prefix_of_storage_does_not_go_up(url: str) -> None:
    with pytest.raises(storage.StorageError, match="go up"):
        storage.split_s3(url)
    with pytest.raises(storage.StorageError, match="go up"):
        arrow_filesystem(url)
    with pytest.raises(storage.StorageError, match="go up"):
        storage.read_bytes(url)
