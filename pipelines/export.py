"""From a trained model to a registered one, and back.

1. `export_model`    config, processor, safetensors and a README in one folder, sealed by `checksums.json`
2. `check_parity`    the folder alone, loaded again, gives the logits that the training model gave
3. `register_model`  the folder, with the code that answers, becomes a version of a registered model, under an alias
4. `pull_model`      `models:/NAME@ALIAS` -> the same folder, every byte checked, through MLflow alone

1 and 2 are in `pipelines/model_folder.py`, which knows nothing of MLflow.
"""

import base64
import importlib.metadata
import io
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.pyfunc import PythonModelContext
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
from PIL import Image

import meteor_model
from meteor_model.configuration_meteor import MeteorConfig
from pipelines import pyfunc_model
from pipelines.model_folder import (
    CHECKSUMS_FILE,
    ExportError,
    ParityError,
    check_parity,
    export_model,
    tokens_by_stage,
    verify_checksums,
)
from pipelines.tracking import TrackingError, patiently, redact, require_tracking, use_tracking

__all__ = [
    "ExportError",
    "ParityError",
    "RegisteredVersion",
    "check_parity",
    "export_model",
    "pull_model",
    "register_model",
    "resolve_model",
]

# What answers in another process; meteor_model itself travels as code.
REQUIREMENTS = (
    "mlflow",
    "torch",
    "torchvision",
    "transformers",
    "timm",
    "tokenizers",
    "safetensors",
    "pillow",
    "numpy",
    "pandas",
)

SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("string", "image", required=False), ColSpec("string", "prompt")]),
    outputs=Schema([ColSpec("string")]),
    params=ParamSchema([ParamSpec("max_new_tokens", "long", pyfunc_model.DEFAULT_NEW_TOKENS)]),
)


@dataclass(frozen=True)
class RegisteredVersion:
    """A version of a registered model."""

    name: str
    version: int
    alias: str
    run_id: str
    model_id: str

    @property
    def uri(self) -> str:
        """`models:/NAME/VERSION`: this version for good; the alias may move on."""
        return f"models:/{self.name}/{self.version}"


def example_input(image_size: int) -> pd.DataFrame:
    """One small real row of the signature: a picture of `image_size` pixels in base64, and a question."""
    picture = Image.new("RGB", (image_size, image_size), (200, 30, 30))
    picture.paste((30, 30, 200), (0, 0, image_size // 2, image_size // 2))
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return pd.DataFrame({"image": [base64.b64encode(stream.getvalue()).decode()], "prompt": ["What is this?"]})


def register_model(
    folder: Path, *, uri: str, name: str, alias: str, run_id: str, tags: Mapping[str, str]
) -> RegisteredVersion:
    """Log the exported folder as a model of the run and register it as a new version, to which the alias moves.

    The model answers its own input example first, so that none is registered that cannot. Nothing is pickled: MLflow
    gets the folder, the source of `pipelines/pyfunc_model.py` and of meteor_model, and pinned requirements.

    Args:
        folder: written by `export_model`.
        uri: of the tracking server, which is the registry too.
        name: of the registered model; made if there is none.
        alias: e.g. latest-pretrain.
        run_id: the run that trained it.
        tags: of the version, beside those of `tokens_by_stage`.

    Raises:
        ExportError: a folder that is not whole.
        TrackingError: a server that is away or refuses.
    """
    use_tracking(uri)
    verify_checksums(folder)
    config = MeteorConfig.from_pretrained(folder)
    example = example_input(config.image_size)
    _answer_example(folder, example)
    client = MlflowClient(uri)
    all_tags = {**tokens_by_stage(config), **redact(tags)}
    experiment_id = patiently(f"run {run_id}", lambda: client.get_run(run_id)).info.experiment_id
    logged = patiently(f"model {name}", lambda: client.create_logged_model(experiment_id, name, run_id, all_tags))
    with tempfile.TemporaryDirectory(prefix="meteor-register-") as scratch:
        packed = Path(scratch) / "model"
        metadata = Model(artifact_path=logged.artifact_location, run_id=run_id, model_id=logged.model_id)
        _pack(folder, packed, example, metadata)
        patiently(f"the files of model {name}", lambda: client.log_model_artifacts(logged.model_id, str(packed)))
    patiently(f"model {name}", lambda: client.finalize_logged_model(logged.model_id, "READY"))
    patiently(f"run {run_id}", lambda: client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)]))
    version = _create_version(client, name, alias, run_id, logged.model_id, all_tags)
    return RegisteredVersion(name, version, alias, run_id, logged.model_id)


def _answer_example(folder: Path, example: pd.DataFrame) -> None:
    context = PythonModelContext({"model": str(folder)}, None)
    answering = pyfunc_model.MeteorPyfunc()
    answering.load_context(context)
    answering.predict(context, example, {"max_new_tokens": 4})


def _pack(folder: Path, target: Path, example: pd.DataFrame, metadata: Model) -> None:
    """MLflow's form of the model in `target`. Requirements are given, or MLflow would run the model to guess them."""
    mlflow.pyfunc.save_model(
        path=str(target),
        python_model=pyfunc_model.__file__,
        artifacts={"model": str(folder)},
        code_paths=[str(Path(meteor_model.__file__).parent)],
        signature=SIGNATURE,
        input_example=example,
        pip_requirements=requirements(),
        mlflow_model=metadata,
    )
    for cache in list(target.rglob("__pycache__")):
        shutil.rmtree(cache)


def requirements() -> list[str]:
    """The packages that the registered model needs, pinned to what is installed here."""
    return [f"{package}=={importlib.metadata.version(package).split('+')[0]}" for package in REQUIREMENTS]


def _create_version(
    client: MlflowClient, name: str, alias: str, run_id: str, model_id: str, tags: Mapping[str, str]
) -> int:
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
            name, f"models:/{model_id}", run_id=run_id, tags=dict(tags), model_id=model_id
        ),
    )
    version = int(created.version)
    patiently(f"alias {alias}", lambda: client.set_registered_model_alias(name, alias, str(version)))
    return version


_MODEL_URI = re.compile(r"models:/(?P<name>[^/@:]+)(?:@(?P<alias>[^/@:]+)|/(?P<version>\d+))")


def pull_model(model: str, destination: Path, uri: str | None = None) -> Path:
    """The exported folder of a registered model, downloaded through MLflow alone and checked byte by byte.

    Args:
        model: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or a folder that `export_model` wrote (used where it is).
        destination: an empty or new folder.
        uri: of the tracking server; None takes MLFLOW_TRACKING_URI.

    Raises:
        TrackingError: an unknown model, alias or version (says which there are), or a server that is away.
        ExportError: files that are missing or changed, or a model of another kind.
    """
    if not model.startswith("models:"):
        verify_checksums(_existing_folder(model))
        return Path(model)
    uri = os.environ.get("MLFLOW_TRACKING_URI", "") if uri is None else uri
    require_tracking(uri)
    use_tracking(uri)
    name, version = resolve_model(model, uri)
    if destination.exists() and any(destination.iterdir()):
        raise ExportError(f"{destination} is not empty: pull into a new folder")
    source = f"models:/{name}/{version}/artifacts"
    try:
        patiently(
            f"the download of {source}",
            lambda: mlflow.artifacts.download_artifacts(source, dst_path=str(destination), tracking_uri=uri),
        )
    except TrackingError as error:
        raise TrackingError(f"version {version} of {name} cannot be downloaded as a METEOR model: {error}") from error
    (folder,) = list(destination.rglob(CHECKSUMS_FILE))[:1] or [destination / CHECKSUMS_FILE]
    verify_checksums(folder.parent)
    return folder.parent


def _existing_folder(model: str) -> Path:
    if not Path(model).is_dir():
        raise ExportError(
            f"{model!r} is neither a folder nor a registered model: write models:/NAME@ALIAS or models:/NAME/VERSION"
        )
    return Path(model)


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
    client, name = MlflowClient(uri), parts["name"]
    registered = patiently(f"the question for {name}", lambda: _get_or_none(client.get_registered_model, name))
    if registered is None:
        known = patiently("the list of models", lambda: [item.name for item in client.search_registered_models()])
        raise TrackingError(f"there is no registered model {name!r}; there are: {_listing(known)}")
    versions = patiently(
        f"the versions of {name}",
        lambda: sorted(int(item.version) for item in client.search_model_versions(f"name = '{name}'")),
    )
    if parts["alias"] is not None:
        if parts["alias"] not in registered.aliases:
            pairs = [f"{alias} (version {version})" for alias, version in sorted(registered.aliases.items())]
            raise TrackingError(f"model {name!r} has no alias {parts['alias']!r}; it has: {_listing(pairs)}")
        return name, int(registered.aliases[parts["alias"]])
    version = int(parts["version"])
    if version not in versions:
        raise TrackingError(f"model {name!r} has no version {version}; it has: {_listing(versions)}")
    return name, version


def _get_or_none(get: Any, name: str) -> Any:
    try:
        return get(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _listing(items: Sequence[Any]) -> str:
    return ", ".join(str(item) for item in items[-20:]) or "none"
