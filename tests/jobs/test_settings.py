"""Settings that jobs share: addresses, files and devices that cannot be are refused before anything is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
import torch

from jobs.settings import (
    Device,
    RegistryAddress,
    Tracking,
    check_gpus,
    check_manifest,
    check_model,
    cluster_gpus,
    torch_device,
)

MLFLOW = Tracking("http://127.0.0.1:9")


def test_addresses_of_models(tmp_path: Path) -> None:
    for model in ("models:/meteor@champion", "models:/meteor/7", "s3://bucket/runs/x/export", str(tmp_path)):
        check_model(model, MLFLOW)


@pytest.mark.parametrize(
    ("model", "tracking", "message"),
    [
        ("models:/meteor", MLFLOW, "models:/meteor is no address: write models:/NAME@ALIAS"),
        ("models:/meteor/latest", MLFLOW, "models:/meteor/latest is no address"),
        ("models:/meteor@champion", Tracking(""), "tracking.uri is not set"),
        ("https://host/model", MLFLOW, "https://host/model is of an unknown kind"),
        ("facebook/dinov2-small", MLFLOW, "facebook/dinov2-small is no folder on this machine"),
    ],
)
def test_what_names_no_model_is_refused(model: str, tracking: Tracking, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_model(model, tracking)


def test_datasets(tmp_path: Path) -> None:
    for address in ("", "s3://bucket/data", str(tmp_path)):
        check_manifest(address)
    with pytest.raises(ValueError, match=r"data\.mixture http://x is of an unknown kind"):
        check_manifest("http://x", "data.mixture")
    with pytest.raises(ValueError, match="manifest nowhere does not exist"):
        check_manifest("nowhere")


def test_the_address_of_mlflow_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there")
    assert RegistryAddress().uri == Tracking().uri == "http://there"
    assert RegistryAddress().registered_model == "meteor"


@pytest.mark.parametrize(
    ("device", "there", "found"), [("auto", True, "cuda"), ("auto", False, "cpu"), ("cpu", True, "cpu")]
)
def test_the_device_of_a_machine(monkeypatch: pytest.MonkeyPatch, device: Device, there: bool, found: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert torch_device(device) == found


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch finds no CUDA device"):
        torch_device("cuda")


@pytest.mark.parametrize(
    ("device", "gpus", "of_cluster", "reserved"),
    [
        ("auto", 0.0, 2, 1.0),
        ("auto", 0.0, 0, 0.0),
        ("auto", 0.25, 2, 0.25),
        ("cuda", 0.0, 2, 1.0),
        ("cpu", 0.0, 2, 0.0),
    ],
)
def test_gpus_of_a_cluster(
    monkeypatch: pytest.MonkeyPatch, device: Device, gpus: float, of_cluster: int, reserved: float
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": float(of_cluster)})
    assert cluster_gpus(device, gpus) == reserved


def test_contradictions_of_device_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"device is cpu, but gpus is 1"):
        check_gpus("cpu", 1.0)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0})
    with pytest.raises(ValueError, match="Ray's cluster has no GPU"):
        cluster_gpus("cuda", 0.0)
