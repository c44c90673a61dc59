"""The registry: versions of registered models, the aliases by which they are pulled, and the way back.

An alias is moved by `move_alias` and `roll_back` alone. Both keep the versions that it pointed to in a tag of the
registered model, `alias_history.ALIAS`, oldest first and the present one last. The order of their two writes is such
that a process that dies in between leaves a history which the next reader puts right: what the alias points to now is
always the last entry. An alias that somebody moved by other means is taken up in the same way.

MLflow has no compare-and-set: two processes that move one alias at the same moment are not told from one another.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from pipelines.tracking.mlflow_run import TrackingError, patiently, redact, require_tracking, use_tracking

HISTORY_TAG = "alias_history."
ROLLED_BACK_TAG = "rolled_back."
"""Tag of a version that an alias was rolled back from: when, and to what."""
HISTORY_LENGTH = 200
"""Versions of an alias's history that are kept; a tag of a registered model holds 5,000 characters."""
DESCRIPTION_LENGTH = 5000
"""Characters of a version's description in MLflow's databases."""


@dataclass(frozen=True)
class RegisteredVersion:
    """A version of a registered model, and the aliases that were moved to it."""

    name: str
    version: int
    aliases: tuple[str, ...]
    run_id: str
    model_id: str

    @property
    def uri(self) -> str:
        """`models:/NAME/VERSION`: this version for good; an alias may move on."""
        return f"models:/{self.name}/{self.version}"

    @property
    def alias(self) -> str:
        """The first of its aliases."""
        return self.aliases[0]


@dataclass(frozen=True)
class Move:
    """An alias went from a version (None: it was new) to another."""

    alias: str
    before: int | None
    after: int


# ------------------------------------------------------------------------------------------------------------- reading

_MODEL_URI = re.compile(r"models:/(?P<name>[^/@:]+)(?:@(?P<alias>[^/@:]+)|/(?P<version>\d+))")


def resolve_model(model: str, uri: str) -> tuple[str, int]:
    """Name and version number behind `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises:
        TrackingError: another form, or an unknown name, alias or version, listing those there are.
    """
    parts = _MODEL_URI.fullmatch(model)
    if parts is None:
        raise TrackingError(
            f"{model!r} does not name a registered model: write models:/NAME@ALIAS or models:/NAME/VERSION"
        )
    name = parts["name"]
    registered = registered_model(name, uri)
    if parts["alias"] is not None:
        return name, _alias_target(registered, parts["alias"])
    version = int(parts["version"])
    numbers = [int(item.version) for item in list_versions(name, uri)]
    if version not in numbers:
        raise TrackingError(f"model {name!r} has no version {version}; it has: {_listing(numbers)}")
    return name, version


@dataclass(frozen=True)
class PinnedModel:
    """What a model's address names now: a version for good, or a folder (then without a name)."""

    address: str
    name: str = ""
    version: int = 0


def pin_model(model: str, uri: str) -> PinnedModel:
    """The version that `models:/...` names now, since an alias may move while a job runs; a folder stays what it is.

    Raises:
        TrackingError: as `resolve_model`, or where no server is set or answers.
    """
    if not model.startswith("models:"):
        return PinnedModel(model.rstrip("/"))
    require_tracking(uri)
    use_tracking(uri)
    name, version = resolve_model(model, uri)
    return PinnedModel(f"models:/{name}/{version}", name, version)


def trained_on(model: PinnedModel, uri: str) -> str:
    """The manifest that a version's tags name, or those of its run; empty where neither does, and for a folder."""
    if not model.name:
        return ""
    found = get_version(model.name, model.version, uri)
    if "manifest" in found.tags or not found.run_id:
        return str(found.tags.get("manifest", ""))
    run = patiently(f"run {found.run_id}", lambda: MlflowClient(uri).get_run(found.run_id))
    return str(run.data.tags.get("manifest", ""))


def _alias_target(registered: RegisteredModel, alias: str) -> int:
    if alias not in registered.aliases:
        pairs = [f"{known} (version {version})" for known, version in sorted(registered.aliases.items())]
        raise TrackingError(f"model {registered.name!r} has no alias {alias!r}; it has: {_listing(pairs)}")
    return int(registered.aliases[alias])


def registered_model(name: str, uri: str) -> RegisteredModel:
    """The registered model with its tags and aliases. Raises TrackingError, listing the names there are."""
    use_tracking(uri)
    client = MlflowClient(uri)
    registered = patiently(f"the question for {name}", lambda: _get_or_none(client.get_registered_model, name))
    if registered is None:
        known = patiently("the list of models", lambda: [item.name for item in client.search_registered_models()])
        raise TrackingError(f"there is no registered model {name!r}; there are: {_listing(known)}")
    return registered


def list_versions(name: str, uri: str, run_id: str | None = None) -> list[ModelVersion]:
    """The versions of a registered model, or those that one run made, oldest first; none for an unknown name."""
    client = MlflowClient(uri)
    which = f"name = '{name}'" + (f" and run_id = '{run_id}'" if run_id is not None else "")

    def every_page() -> list[ModelVersion]:
        found: list[ModelVersion] = []
        token = None
        while True:
            page = client.search_model_versions(which, page_token=token)
            found += page
            token = page.token
            if not token:
                return found

    return sorted(patiently(f"the versions of {name}", every_page), key=lambda item: int(item.version))


def get_version(name: str, version: int, uri: str) -> ModelVersion:
    """One version with its tags. Raises TrackingError for one that is not there."""
    client = MlflowClient(uri)
    return patiently(f"version {version} of {name}", lambda: client.get_model_version(name, str(version)))


def _get_or_none(get: Callable[[str], RegisteredModel], name: str) -> RegisteredModel | None:
    try:
        return get(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _listing(items: Sequence[Any]) -> str:
    return ", ".join(str(item) for item in items[-20:]) or "none"


# ------------------------------------------------------------------------------------------------------------- writing


def create_version(
    uri: str, name: str, *, run_id: str, model_id: str, tags: Mapping[str, str], description: str
) -> int:
    """A new version of a registered model, which is made if there is none of this name; the version's number.

    Args:
        uri: of the registry.
        name: of the registered model.
        run_id: the run that made it.
        model_id: of the logged model that holds its files.
        tags: of the version.
        description: shown with it; cut to what MLflow's databases hold.
    """
    use_tracking(uri)
    client = MlflowClient(uri)

    def create_name() -> None:
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    patiently(f"registered model {name}", create_name)
    created = patiently(
        f"a version of {name}",
        lambda: client.create_model_version(
            name,
            f"models:/{model_id}",
            run_id=run_id,
            tags=dict(tags),
            description=shortened(description),
            model_id=model_id,
        ),
    )
    return int(created.version)


def describe_version(uri: str, name: str, version: int, *, tags: Mapping[str, str], description: str | None) -> None:
    """Set tags of a version, and its description unless that is None."""
    use_tracking(uri)
    client = MlflowClient(uri)
    for key, value in redact(tags).items():
        patiently(
            f"tag {key} of {name}/{version}", partial(client.set_model_version_tag, name, str(version), key, value)
        )
    if description is not None:
        patiently(
            f"the description of {name}/{version}",
            lambda: client.update_model_version(name, str(version), shortened(description)),
        )


def shortened(description: str) -> str:
    """A description that MLflow's databases hold."""
    if len(description) <= DESCRIPTION_LENGTH:
        return description
    note = "\n\n(cut; the whole card is the model's README.md)"
    return description[: DESCRIPTION_LENGTH - len(note)] + note


# ------------------------------------------------------------------------------------------------------------- aliases


def alias_history(registered: RegisteredModel, alias: str) -> list[int]:
    """The versions that an alias pointed to, oldest first; the last is where it points now, if it exists.

    Raises:
        TrackingError: a tag that is no history.
    """
    text = registered.tags.get(HISTORY_TAG + alias, "[]")
    try:
        history = json.loads(text)
    except ValueError:
        history = None
    if not isinstance(history, list) or not all(type(item) is int for item in history):
        raise TrackingError(
            f"tag {HISTORY_TAG}{alias} of model {registered.name!r} is no list of versions ({text[:80]!r}): repair or "
            "delete the tag in MLflow"
        )
    current = registered.aliases.get(alias)
    if current is not None and (not history or history[-1] != int(current)):
        history.append(int(current))
    return history


def move_alias(name: str, alias: str, version: int, uri: str) -> Move:
    """Let an alias point to a version, and keep where it pointed before. Raises TrackingError."""
    registered, client = registered_model(name, uri), MlflowClient(uri)
    history = alias_history(registered, alias)
    before = int(registered.aliases[alias]) if alias in registered.aliases else None
    if before != version:
        _keep_history(client, registered, alias, history)
        patiently(f"alias {alias}", lambda: client.set_registered_model_alias(name, alias, str(version)))
        if not history or history[-1] != version:
            history.append(version)
    _keep_history(client, registered, alias, history)
    return Move(alias, before, version)


def roll_back(name: str, alias: str, uri: str) -> Move:
    """Let an alias point to the version before, as an undo: rolled back twice it is two moves back.

    Versions of its history that were deleted meanwhile are passed over. The version that is left gets a tag.

    Raises:
        TrackingError: an alias without a version before.
    """
    registered, client = registered_model(name, uri), MlflowClient(uri)
    history = alias_history(registered, alias)
    before = int(registered.aliases[alias]) if alias in registered.aliases else None
    there = {int(item.version) for item in list_versions(name, uri)}
    earlier = [version for version in history if version in there]
    if before is not None:
        earlier.pop()
    while earlier and earlier[-1] == before:
        earlier.pop()
    if not earlier:
        now = f"points to version {before}" if before is not None else "points nowhere"
        raise TrackingError(
            f"alias {alias!r} of model {name!r} {now} and there is no version before (its history: "
            f"{_listing(history)}); promote one:\n"
            f"  python jobs/register.py promote --model {name} --version N --to {alias}"
        )
    after = earlier[-1]
    _keep_history(client, registered, alias, earlier)
    patiently(f"alias {alias}", lambda: client.set_registered_model_alias(name, alias, str(after)))
    if before is not None:
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        describe_version(
            uri, name, before, tags={ROLLED_BACK_TAG + alias: f"{when} to version {after}"}, description=None
        )
    return Move(alias, before, after)


def _keep_history(client: MlflowClient, registered: RegisteredModel, alias: str, history: Sequence[int]) -> None:
    key, text = HISTORY_TAG + alias, json.dumps(history[-HISTORY_LENGTH:])
    if history and registered.tags.get(key) != text:
        patiently(f"tag {key}", lambda: client.set_registered_model_tag(registered.name, key, text))
        registered.tags[key] = text
