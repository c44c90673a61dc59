"""Where the aliases of a registered model point, where they pointed before, and the way back.

An alias is moved by `move_alias` and `roll_back` alone. Both keep the versions that it pointed to in a tag of the
registered model, `alias_history.ALIAS`, oldest first and the present one last. The order of their two writes is such
that a process that dies in between leaves a history which the next reader puts right: what the alias points to now is
always the last entry. An alias that somebody moved by other means is taken up in the same way.

MLflow has no compare-and-set: two processes that move one alias at the same moment are not told from one another.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

from mlflow.entities.model_registry import RegisteredModel

from meteor_model.foreign import JsonError, parse_json
from pipelines.io.names import require_alias
from pipelines.registry.tags import HISTORY_TAG, ROLLED_BACK_TAG
from pipelines.registry.versions import Registry, listing
from pipelines.tracking.server import TrackingError, call_mlflow

HISTORY_LENGTH = 200
"""Versions of an alias's history that are kept; a tag of a registered model holds 5,000 characters."""


@dataclass(frozen=True)
class Move:
    """An alias went from a version (None: it was new) to another."""

    alias: str
    before: int | None
    after: int


def alias_history(registered: RegisteredModel, alias: str) -> list[int]:
    """The versions that an alias pointed to, oldest first; the last is where it points now, if it exists.

    Raises:
        TrackingError: a tag that is no history.
    """
    text = registered.tags.get(HISTORY_TAG + alias, "[]")
    try:
        history = parse_json(text)
    except JsonError:
        history = None
    if not isinstance(history, list) or not all(type(item) is int for item in history):
        raise TrackingError(
            f"tag {HISTORY_TAG}{alias} of model {registered.name!r} is no list of versions ({text[:80]!r}): repair or "
            "delete the tag in MLflow"
        )
    current = _target(registered, alias)
    if current is not None and (not history or history[-1] != current):
        history.append(current)
    return history


def move_alias(registry: Registry, alias: str, version: int) -> Move:
    """Let an alias point to a version, and keep where it pointed before. Raises TrackingError, NamingError."""
    require_alias(alias)
    registered = registry.registered_model()
    history, before = alias_history(registered, alias), _target(registered, alias)
    if before != version:
        _keep_history(registry, registered, alias, history)
        _point(registry, alias, version)
        if not history or history[-1] != version:
            history.append(version)
    _keep_history(registry, registered, alias, history)
    return Move(alias, before, version)


def roll_back(registry: Registry, alias: str) -> Move:
    """Let an alias point to the version before, as an undo: rolled back twice it is two moves back.

    Versions of its history that were deleted meanwhile are passed over. The version that is left gets a tag.

    Raises:
        TrackingError: an alias without a version before.
    """
    registered = registry.registered_model()
    history, before = alias_history(registered, alias), _target(registered, alias)
    there = {int(item.version) for item in registry.versions()}
    earlier = [version for version in history if version in there]
    if before is not None:
        earlier.pop()
    while earlier and earlier[-1] == before:
        earlier.pop()
    if not earlier:
        now = f"points to version {before}" if before is not None else "points nowhere"
        raise TrackingError(
            f"alias {alias!r} of model {registry.name!r} {now} and there is no version before (its history: "
            f"{listing(history)}); promote one:\n"
            f"  python jobs/register.py promote --tracking.registered-model {registry.name} --version N --to {alias}"
        )
    after = earlier[-1]
    _keep_history(registry, registered, alias, earlier)
    _point(registry, alias, after)
    if before is not None:
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        registry.describe_version(before, tags={ROLLED_BACK_TAG + alias: f"{when} to version {after}"})
    return Move(alias, before, after)


def _target(registered: RegisteredModel, alias: str) -> int | None:
    return int(registered.aliases[alias]) if alias in registered.aliases else None


def _point(registry: Registry, alias: str, version: int) -> None:
    client = registry.client
    call_mlflow(f"alias {alias}", lambda: client.set_registered_model_alias(registry.name, alias, str(version)))


def _keep_history(registry: Registry, registered: RegisteredModel, alias: str, history: Sequence[int]) -> None:
    key, text = HISTORY_TAG + alias, json.dumps(history[-HISTORY_LENGTH:])
    if history and registered.tags.get(key) != text:
        client = registry.client
        call_mlflow(f"tag {key}", lambda: client.set_registered_model_tag(registry.name, key, text))
        registered.tags[key] = text
