"""The registry as a value: the versions of one registered model, found by number, alias or run, made and described.

Where aliases point, and where they pointed before, is in `pipelines.registry.aliases`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from pipelines.io.names import require_name
from pipelines.io.redact import redact
from pipelines.registry.tags import MANIFEST_TAG
from pipelines.tracking.server import TrackingError, call_mlflow, require_tracking, use_tracking

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
class Registry:
    """One registered model on one MLflow server.

    Making it asks no server; every method does, waits out a short absence, and raises TrackingError naming what it
    wanted, or TrackingAwayError where the server does not come back.

    Attributes:
        uri: address of the MLflow server.
        name: of the registered model.
    """

    uri: str
    name: str

    def __post_init__(self) -> None:
        require_name(self.name, "registered model")

    @property
    def client(self) -> MlflowClient:
        """A client of the server, which becomes the process's own for the parts of MLflow that take it from there."""
        use_tracking(self.uri)
        return MlflowClient(self.uri)

    def address(self, version: int) -> str:
        """`models:/NAME/VERSION`, as MLflow and the jobs take it."""
        return f"models:/{self.name}/{version}"

    def registered_model(self) -> RegisteredModel:
        """The registered model with its tags and aliases. Raises TrackingError, listing the names there are."""
        client = self.client
        found = call_mlflow(
            f"the question for {self.name}", lambda: _get_or_none(client.get_registered_model, self.name)
        )
        if found is None:
            known = call_mlflow("the list of models", lambda: [item.name for item in client.search_registered_models()])
            raise TrackingError(f"there is no registered model {self.name!r}; there are: {listing(known)}")
        return found

    def versions(self, run_id: str | None = None) -> list[ModelVersion]:
        """All versions, or those that one run made, oldest first; none where the model is not registered."""
        client = self.client
        which = f"name = '{self.name}'" + (f" and run_id = '{run_id}'" if run_id is not None else "")

        def every_page() -> list[ModelVersion]:
            found: list[ModelVersion] = []
            token = None
            while True:
                page = client.search_model_versions(which, page_token=token)
                found += page
                token = page.token
                if not token:
                    return found

        return sorted(call_mlflow(f"the versions of {self.name}", every_page), key=lambda item: int(item.version))

    def version(self, number: int) -> ModelVersion:
        """One version with its tags. Raises TrackingError for one that is not there."""
        client = self.client
        return call_mlflow(f"version {number} of {self.name}", lambda: client.get_model_version(self.name, str(number)))

    def target(self, alias: str) -> int:
        """The version that an alias points to. Raises TrackingError, listing the aliases there are."""
        registered = self.registered_model()
        if alias not in registered.aliases:
            pairs = [f"{known} (version {version})" for known, version in sorted(registered.aliases.items())]
            raise TrackingError(f"model {self.name!r} has no alias {alias!r}; it has: {listing(pairs)}")
        return int(registered.aliases[alias])

    def resolve(self, which: str) -> int:
        """The version that an alias or a number names, where it is there. Raises TrackingError, listing what is."""
        if not which.isdigit():
            return self.target(which)
        self.registered_model()
        numbers = [int(item.version) for item in self.versions()]
        if int(which) not in numbers:
            raise TrackingError(f"model {self.name!r} has no version {which}; it has: {listing(numbers)}")
        return int(which)

    def create_version(self, *, run_id: str, model_id: str, tags: Mapping[str, str], description: str) -> int:
        """A new version; its number. The registered model is made if there is none of this name.

        Args:
            run_id: the run that made it.
            model_id: of the logged model that holds its files.
            tags: of the version.
            description: shown with it; cut to what MLflow's databases hold.
        """
        client = self.client

        def create_name() -> None:
            try:
                client.create_registered_model(self.name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise

        call_mlflow(f"registered model {self.name}", create_name)
        created = call_mlflow(
            f"a version of {self.name}",
            lambda: client.create_model_version(
                self.name,
                f"models:/{model_id}",
                run_id=run_id,
                tags=dict(tags),
                description=shortened(description),
                model_id=model_id,
            ),
        )
        return int(created.version)

    def describe_version(self, version: int, *, tags: Mapping[str, str], description: str | None = None) -> None:
        """Set tags of a version, and its description unless that is None."""
        client = self.client
        for key, value in redact(tags).items():
            call_mlflow(
                f"tag {key} of {self.name}/{version}",
                partial(client.set_model_version_tag, self.name, str(version), key, value),
            )
        if description is not None:
            call_mlflow(
                f"the description of {self.name}/{version}",
                lambda: client.update_model_version(self.name, str(version), shortened(description)),
            )


def _get_or_none(get: Callable[[str], RegisteredModel], name: str) -> RegisteredModel | None:
    try:
        return get(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def listing(items: Sequence[Any]) -> str:
    """The last 20 of what there is, for an error; `none` where there is nothing."""
    return ", ".join(str(item) for item in items[-20:]) or "none"


def shortened(description: str) -> str:
    """A description that MLflow's databases hold."""
    if len(description) <= DESCRIPTION_LENGTH:
        return description
    note = "\n\n(cut; the whole card is the model's README.md)"
    return description[: DESCRIPTION_LENGTH - len(note)] + note


# ----------------------------------------------------------------------------------------------------------- addresses

_MODEL_ADDRESS = re.compile(r"models:/(?P<name>[^/@:]+)(?:@(?P<alias>[^/@:]+)|/(?P<version>\d+))")


def find_version(model: str, uri: str) -> tuple[Registry, int]:
    """Registry and version number behind `models:/NAME@ALIAS` or `models:/NAME/VERSION` on the server at `uri`.

    Raises:
        TrackingError: another form, or an unknown name, alias or version, listing those there are.
    """
    parts = _MODEL_ADDRESS.fullmatch(model)
    if parts is None:
        raise TrackingError(
            f"{model!r} does not name a registered model: write models:/NAME@ALIAS or models:/NAME/VERSION"
        )
    registry = Registry(uri, parts["name"])
    return registry, registry.resolve(parts["version"]) if parts["version"] else registry.target(parts["alias"])


@dataclass(frozen=True)
class PinnedModel:
    """What a model's address names now: a version for good, or a folder.

    Attributes:
        address: models:/NAME/VERSION, or a folder (also s3://).
        registry: that holds the version; None for a folder.
        version: its number; 0 for a folder.
    """

    address: str
    registry: Registry | None = None
    version: int = 0


def pin_model(model: str, uri: str | None = None) -> PinnedModel:
    """The version that `models:/...` names now, since an alias may move while a job runs; a folder stays what it is.

    Args:
        model: models:/NAME@ALIAS, models:/NAME/VERSION, or a folder.
        uri: of the MLflow server; None takes MLFLOW_TRACKING_URI.

    Raises:
        TrackingError: as `find_version`, or where no server is set or answers.
    """
    if not model.startswith("models:"):
        return PinnedModel(model.rstrip("/"))
    uri = os.environ.get("MLFLOW_TRACKING_URI", "") if uri is None else uri
    require_tracking(uri)
    registry, version = find_version(model, uri)
    return PinnedModel(registry.address(version), registry, version)


def training_manifest(model: PinnedModel) -> str:
    """The manifest that a version's tags name, or those of its run; empty where neither does, and for a folder."""
    if model.registry is None:
        return ""
    registry, found = model.registry, model.registry.version(model.version)
    if MANIFEST_TAG in found.tags or not found.run_id:
        return str(found.tags.get(MANIFEST_TAG, ""))
    run = call_mlflow(f"run {found.run_id}", lambda: registry.client.get_run(found.run_id))
    return str(run.data.tags.get(MANIFEST_TAG, ""))
