"""From a trained model to a registered one, and back.

1. `export_model`    config, processor, safetensors and a README in one folder, sealed by `checksums.json`
2. `check_parity`    the folder alone, loaded again, gives the logits that the training model gave
3. `register_model`  the folder, with the code that answers, becomes a version of a registered model, under aliases
4. `pull_model`      a version -> the same folder, every byte checked, through MLflow alone

`publish_version` is 3 with the evidence: card, version, score, and the aliases last.
1 and 2 are in `pipelines/registry/folder.py`, which knows nothing of MLflow; versions and aliases in
`pipelines/registry/versions.py`.
"""

import base64
import importlib.metadata
import io
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import mlflow
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus
from mlflow.models import Model, ModelSignature
from mlflow.pyfunc import PythonModelContext
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
from PIL import Image

import meteor_model
from meteor_model.configuration_meteor import MeteorConfig
from pipelines.evaluation.scores import Score
from pipelines.evaluation.suite import Suite
from pipelines.io.redact import redact
from pipelines.registry import pyfunc_model
from pipelines.registry.aliases import move_alias
from pipelines.registry.card import card
from pipelines.registry.folder import (
    CARD_FILE,
    ExportError,
    tokens_by_stage,
    verify_checksums,
    write_card,
)
from pipelines.registry.model_files import begin_model, content_of, discard_model, pull_files
from pipelines.registry.scores import store_score, suite_name
from pipelines.registry.tags import COMMIT_TAG
from pipelines.registry.versions import PinnedModel, RegisteredVersion, Registry
from pipelines.tracking.artifacts import upload_model_files
from pipelines.tracking.server import TrackingAwayError, TrackingError, call_mlflow

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
    params=ParamSchema(
        [
            ParamSpec("max_new_tokens", "long", pyfunc_model.DEFAULT_NEW_TOKENS),
            ParamSpec("visual_tokens", "long", None),
        ]
    ),
)


def example_input(image_size: int) -> pd.DataFrame:
    """One small real row of the signature: a picture of `image_size` pixels in base64, and a question."""
    picture = Image.new("RGB", (image_size, image_size), (200, 30, 30))
    picture.paste((30, 30, 200), (0, 0, image_size // 2, image_size // 2))
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return pd.DataFrame({"image": [base64.b64encode(stream.getvalue()).decode()], "prompt": ["What is this?"]})


def register_model(
    folder: Path, registry: Registry, *, aliases: Sequence[str], run_id: str, tags: Mapping[str, str]
) -> RegisteredVersion:
    """Log the exported folder as a model of the run and register it as a new version, to which the aliases move.

    Its README.md, the model card, becomes the version's description.

    The model answers its own input example first, so that none is registered that cannot. Nothing is pickled: MLflow
    gets the folder, the source of `pipelines/registry/pyfunc_model.py` and of meteor_model, and pinned requirements.

    Args:
        folder: written by `export_model`.
        registry: of the registered model, which is made if there is none.
        aliases: e.g. latest-pretrain; at least one.
        run_id: the run that trained it.
        tags: of the version, beside those of `tokens_by_stage`.

    Raises:
        ExportError: a folder that is not whole.
        TrackingError: a server that is away or refuses.
    """
    client, name = registry.client, registry.name
    verify_checksums(folder)
    config = MeteorConfig.from_pretrained(folder)
    example = example_input(config.image_size)
    _answer_example(folder, example)
    all_tags = {**tokens_by_stage(config), **redact(tags)}
    logged = begin_model(registry, run_id, content_of(folder), all_tags)
    if logged.status != LoggedModelStatus.READY:
        _upload(folder, registry, logged, example, run_id)
    call_mlflow(f"run {run_id}", lambda: _link(client, run_id, logged.model_id))
    description = (folder / CARD_FILE).read_text()
    version = registry.create_version(run_id=run_id, model_id=logged.model_id, tags=all_tags, description=description)
    for alias in aliases:
        move_alias(registry, alias, version)
    return RegisteredVersion(name, version, tuple(aliases), run_id, logged.model_id)


def _link(client: MlflowClient, run_id: str, model_id: str) -> None:
    """Name the model as an output of the run; MLflow refuses to be told twice, by an earlier try, too."""
    outputs = client.get_run(run_id).outputs
    if outputs is None or model_id not in {output.model_id for output in outputs.model_outputs}:
        client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])


def _upload(folder: Path, registry: Registry, logged: LoggedModel, example: pd.DataFrame, run_id: str) -> None:
    """Bring the folder to the logged model and call it ready; where that is refused, nothing of it stays."""
    client = registry.client
    try:
        with tempfile.TemporaryDirectory(prefix="meteor-register-") as scratch:
            packed = Path(scratch) / "model"
            metadata = Model(artifact_path=logged.artifact_location, run_id=run_id, model_id=logged.model_id)
            _pack(folder, packed, example, metadata)
            upload_model_files(client, logged.model_id, packed)
        call_mlflow(
            f"model {registry.name}",
            lambda: client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY),
        )
    except TrackingAwayError as error:
        raise TrackingAwayError(f"{error}. What arrived is kept: the same command sends the rest") from error
    except BaseException:
        discard_model(registry, logged)
        raise


def publish_version(
    folder: Path,
    registry: Registry,
    *,
    run_id: str,
    tags: Mapping[str, str],
    score: Score | None,
    suite: Suite | None,
    aliases: Sequence[str],
) -> RegisteredVersion:
    """An exported folder that is proven becomes a version with its card and its score.

    The aliases move last, so that none points to a version without its evidence.

    Args:
        folder: written by `export_model`; its README.md becomes the card.
        registry: of the registered model.
        run_id: the run that it is filed under.
        tags: of the version: where it comes from, its parity.
        score: with its questions; None where there was none to ask.
        suite: that the score is of; None where only its digest is known.
        aliases: that move to it.

    Raises:
        ScoringError, ExportError, TrackingError: as `store_score` and `register_model`.
    """
    scores = {} if score is None else {suite_name(suite): score}
    write_card(folder, card(MeteorConfig.from_pretrained(folder), tags, scores))
    version = register_model(folder, registry, aliases=(), run_id=run_id, tags=tags)
    if score is not None:
        store_score(registry, version.version, score, suite, {"git_commit": tags.get(COMMIT_TAG, "")})
    for alias in aliases:
        move_alias(registry, alias, version.version)
    return replace(version, aliases=tuple(aliases))


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


def pull_model(model: PinnedModel, destination: Path) -> Path:
    """The exported folder of a registered model, downloaded through MLflow alone and checked byte by byte.

    Args:
        model: `pin_model`; a folder that `export_model` wrote is used where it is.
        destination: an empty or new folder, or what an earlier pull of this version left.

    Raises:
        TrackingError: a version that is gone, or a server that is away.
        ExportError: files that are missing or changed, or a model of another kind.
    """
    if model.registry is None:
        verify_checksums(_existing_folder(model.address))
        return Path(model.address)
    try:
        return pull_files(model, destination)
    except TrackingError as error:
        raise type(error)(
            f"version {model.version} of {model.registry.name} cannot be downloaded as a METEOR model: {error}"
        ) from error


def _existing_folder(model: str) -> Path:
    if not Path(model).is_dir():
        raise ExportError(
            f"{model!r} is neither a folder nor a registered model: write models:/NAME@ALIAS or models:/NAME/VERSION"
        )
    return Path(model)
