"""What a device can do: the data sheet's number for a GPU that is known, else what products reach."""

import time

import pytest
import torch

from pipelines.training.peak import BF16_TERA, measured, of_data_sheet, peak_flops

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_a_gpu_is_known_by_the_words_of_its_name(name: str, tera: float) -> None:
    assert of_data_sheet(name) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize("name", ["NVIDIA A100-SXM4-80GB MIG 1g.10gb", "NVIDIA L40", "NVIDIA GH200 480GB", "Tesla T4"])
def test_a_part_of_a_gpu_and_one_of_another_name_are_not_known(name: str) -> None:
    assert of_data_sheet(name) is None


def test_variants_stand_beside_the_gpu_that_they_are_of() -> None:
    assert all((key[0],) in BF16_TERA for key in BF16_TERA), "a new variant would be known by its last word alone"


def test_measuring_takes_little_time_and_finds_what_a_product_reaches() -> None:
    start = time.perf_counter()
    found = measured(CPU, torch.float32, seconds=0.05)
    matrix = torch.ones(128, 128)
    begin = time.perf_counter()
    matrix @ matrix
    assert found > 0.1 * 2 * 128**3 / (time.perf_counter() - begin)
    assert 1e8 < found < 1e14
    assert time.perf_counter() - start < 5.0, "a fifth of a second on cores that nobody else uses"


def test_a_cpu_is_measured_in_the_format_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {(CPU, torch.bfloat16): 2.0, (CPU, torch.float32): 1.0}
    monkeypatch.setattr("pipelines.training.peak.measured", lambda *device: asked[device])
    assert (peak_flops(CPU, torch.bfloat16), peak_flops(CPU, torch.float32)) == (2.0, 1.0)
