"""A model wherever it is kept, on the machine and the device that are to run it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from meteor_model.loading import load_model_and_processor
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from meteor_model.pruners.named import with_pruner
from pipelines.checkpoint.local import local_copy
from pipelines.config.settings import SettingsError
from pipelines.io import sealed, storage
from pipelines.registry.folder import CHECKSUMS_FILE, ExportError, verify_checksums
from pipelines.registry.versions import PinnedModel, pin_model


@contextmanager
def open_model(model: PinnedModel) -> Iterator[Path]:
    """The files of a model on this machine; those with checksums are checked byte by byte.

    Args:
        model: `pin_model`; a folder may be in object storage, too.

    Raises:
        ExportError: no model there, or files that are missing or changed.
        TrackingError, StorageError: of what is read.
    """
    if model.registry is not None:
        from pipelines.registry.publish import pull_model  # here: it loads pandas and MLflow's models

        with TemporaryDirectory(prefix="meteor-pull-") as scratch:
            yield pull_model(model, Path(scratch) / "model")
        return
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(local_copy(model.address))
        except (sealed.DamagedFileError, storage.ObjectMissingError) as error:
            raise ExportError(f"{model.address} holds no whole model: {error}") from error
        if (folder / CHECKSUMS_FILE).is_file():
            verify_checksums(folder)
        elif not (folder / "config.json").is_file():
            raise ExportError(f"{model.address} holds no model: there is no config.json")
        yield folder


def load_model(model: PinnedModel, device: str = "cpu") -> tuple[MeteorForConditionalGeneration, MeteorProcessor]:
    """Model (in the number format of its export, eval mode) and processor.

    Args:
        model: as for `open_model`.
        device: where the model goes.

    Raises:
        ExportError, TrackingError, StorageError: as `open_model`.
    """
    with open_model(model) as folder:
        loaded, processor = load_model_and_processor(folder)
    return loaded.to(device), processor


def apply_pruner(
    model: MeteorForConditionalGeneration,
    processor: MeteorProcessor,
    name: str,
    keep: int,
    options: Mapping[str, float],
) -> None:
    """Put a model and its processor under a named pruner (`meteor_model.pruners.named`), in place.

    Args:
        model: any; how it is pruned now is not looked at.
        processor: the model's.
        name: of the pruner; empty leaves both as they are.
        keep: visual tokens that an image keeps at the end.
        options: the pruner's own numbers; whole ones are passed as such.

    Raises:
        ValueError: for an unknown pruner, or what the model does not allow; nothing is changed then.
    """
    if not name:
        return
    whole = {key: int(value) if float(value).is_integer() else value for key, value in options.items()}
    model.follow(with_pruner(model.config, name, keep, **whole))
    processor.tokens_per_image = model.config.tokens_per_image


def load_registered(
    model: str, uri: str | None = None, device: str = "cpu"
) -> tuple[MeteorForConditionalGeneration, MeteorProcessor]:
    """Model (in the number format of its export, eval mode) and processor behind an address.

    Args:
        model: models:/NAME@ALIAS, models:/NAME/VERSION, or a folder that `export_model` wrote (also s3://).
        uri: of the MLflow server; None takes MLFLOW_TRACKING_URI.
        device: where the model goes.

    Raises:
        TrackingError: an unknown model, alias or version (says which there are), or a server that is away.
        ExportError, StorageError: as `open_model`.
    """
    return load_model(pin_model(model, uri), device)


def device_for(gpus: float) -> str:
    """Where a process that reserves so many GPUs computes. Raises SettingsError where there is none to be had."""
    if gpus and not torch.cuda.is_available():
        raise SettingsError(f"gpus is {gpus:g}, but torch finds no CUDA device where the model is to run")
    return "cuda" if gpus else "cpu"
