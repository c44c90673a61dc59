"""Settings that several jobs have in common, under one name each, and what is checked before anything is asked."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Device = Literal["auto", "cpu", "cuda"]
"""Where a model runs; auto takes a GPU where there is one."""

_REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


@dataclass(frozen=True)
class Tracking:
    """MLflow: where models are registered."""

    uri: str = field(default_factory=lambda: os.environ.get("MLFLOW_TRACKING_URI", ""))
    """Address of the MLflow server; by default the environment's MLFLOW_TRACKING_URI."""

    def require(self) -> str:
        """The address. Raises ValueError where there is none."""
        if not self.uri:
            raise ValueError(
                "tracking.uri is not set, so there is no registry to ask: give --tracking.uri, or set "
                "MLFLOW_TRACKING_URI to the address of the MLflow server (`make status` shows the local one)"
            )
        return self.uri


@dataclass(frozen=True)
class RegistryAddress(Tracking):
    """MLflow: where models are registered, and under which name."""

    registered_model: str = "meteor"
    """Name of the registered model."""


@dataclass(frozen=True)
class OtherPruner:
    """Another pruner than the model's own (docs/pruners.md), for this command."""

    name: str = ""
    """Its name, e.g. fastv; empty: the model's own."""
    keep: int = 0
    """Visual tokens that an image keeps in the language model's last layer."""
    options: dict[str, float] = field(default_factory=dict)
    """The pruner's own numbers, by name."""

    @property
    def chosen(self) -> tuple[str, int, dict[str, float]]:
        """As `pipelines.registry.open.apply_pruner` takes it."""
        return self.name, self.keep, self.options

    def check(self) -> None:
        """What can be wrong before a model is there. Raises ValueError."""
        if bool(self.name) != bool(self.keep):
            raise ValueError(
                "give pruner.name and pruner.keep together: the pruner, and the tokens that an image keeps"
            )
        if self.keep < 0:
            raise ValueError(f"pruner.keep is {self.keep}; it must be at least 1")


def check_model(model: str, tracking: Tracking, setting: str = "model") -> None:
    """Refuse an address that names no model. Raises ValueError that says which forms there are."""
    if model.startswith("models:"):
        if not _REGISTERED.fullmatch(model):
            raise ValueError(f"{setting} {model} is no address: write models:/NAME@ALIAS or models:/NAME/VERSION")
        tracking.require()
    elif "://" in model and not model.startswith("s3://"):
        raise ValueError(f"{setting} {model} is of an unknown kind; {_FORMS}")
    elif "://" not in model and not Path(model).is_dir():
        raise ValueError(f"{setting} {model} is no folder on this machine; {_FORMS}")


_FORMS = "give models:/NAME@ALIAS, models:/NAME/VERSION, s3://BUCKET/PREFIX, or the folder of an exported model"


def check_manifest(address: str, setting: str = "manifest") -> None:
    """Refuse a dataset that cannot be: a folder that is not there, an unknown kind of address. Raises ValueError."""
    if "://" in address and not address.startswith("s3://"):
        raise ValueError(f"{setting} {address} is of an unknown kind; give s3://BUCKET/PREFIX or a folder")
    if address and "://" not in address and not Path(address).exists():
        raise ValueError(f"{setting} {address} does not exist; give s3://BUCKET/PREFIX or a folder")


def check_files(files: tuple[Path, ...], setting: str) -> None:
    """Refuse files that are not there. Raises ValueError."""
    for file in files:
        if not file.is_file():
            raise ValueError(f"{setting} {file} does not exist")


def check_device(device: Device) -> None:
    """Refuse a device that this machine does not have. Raises ValueError."""
    if device == "cuda":
        torch_device(device)


def torch_device(device: Device) -> str:
    """The device of this machine that a model runs on. Raises ValueError where it is not there."""
    import torch  # here: seconds, which --help does not need

    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ValueError("device is cuda, but torch finds no CUDA device on this machine; use --device cpu or auto")
    return "cuda" if device != "cpu" and available else "cpu"


def check_gpus(device: Device, gpus: float) -> None:
    """Refuse a contradiction between the device and the GPUs to reserve. Raises ValueError."""
    if device == "cpu" and gpus:
        raise ValueError(f"device is cpu, but gpus is {gpus:g}: give one of them")


def cluster_gpus(device: Device, gpus: float) -> float:
    """GPUs that a copy of the model reserves in Ray's cluster. Raises ValueError where it has none."""
    import ray  # here: a second, which --help does not need

    if gpus or device == "cpu":
        return gpus
    there = ray.cluster_resources().get("GPU", 0) > 0
    if device == "cuda" and not there:
        raise ValueError("device is cuda, but Ray's cluster has no GPU; use --device cpu or auto")
    return 1.0 if there else 0.0
