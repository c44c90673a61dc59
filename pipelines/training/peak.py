"""How many FLOPs a second a worker's device can do: what MFU and HFU are shares of.

A GPU that is known by name has its data sheet's number. A CPU, a GPU that is not in the table and a format that has no
column there are measured, by matrix products for a fifth of a second: a sheet says nothing of the cores that a worker
was given, and a share of nothing would be none. What is measured is what a product reaches, which is less than what a
sheet promises, so shares of the two do not compare.
"""

import re
import time

import torch

BF16_TERA = {
    ("A10",): 125.0,
    ("A30",): 165.0,
    ("A40",): 149.7,
    ("A100",): 312.0,
    ("L4",): 121.0,
    ("L40S",): 362.0,
    ("H100",): 989.4,
    ("H100", "PCIe"): 756.0,
    ("H100", "NVL"): 835.0,
    ("H200",): 989.4,
    ("H200", "NVL"): 835.0,
    ("B200",): 2250.0,
    ("MI300X",): 1307.4,
}
"""Dense bf16 TFLOP/s by words of the device's name, without sparsity, from the vendors' data sheets."""

MEASURED_S = 0.2
SIDES = (256, 8192)
"""Rows and columns of the smallest and the largest matrix that is multiplied."""
REPEATS = 4
"""Products of one size before a larger one is tried."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a device in one number format."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        known = of_data_sheet(torch.cuda.get_device_name(device))
        if known is not None:
            return known
    return measured(device, dtype)


def of_data_sheet(name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its name; None for one that is not in the table, and for a part of one (MIG).

    >>> of_data_sheet("NVIDIA H100 PCIe") / 1e12
    756.0
    """
    words = set(re.findall(r"\w+", name))
    found = [key for key in BF16_TERA if words.issuperset(key)]
    if not found or "MIG" in words:
        return None
    return BF16_TERA[max(found, key=len)] * 1e12


def measured(device: torch.device, dtype: torch.dtype, seconds: float = MEASURED_S) -> float:
    """FLOP/s of the quickest of many square products, of growing size as long as there is time for a larger one.

    The quickest of them, for others may compute beside it.
    """
    end, side, best = time.perf_counter() + seconds, SIDES[0], 0.0
    while True:
        matrix = torch.ones(side, side, dtype=dtype, device=device)
        for _ in range(REPEATS):
            best = max(best, 2 * side**3 / _product_seconds(matrix))
        left, next_s = end - time.perf_counter(), REPEATS * 2 * (2 * side) ** 3 / best
        if left <= 0:
            return best
        if next_s < left and side < SIDES[1]:
            side *= 2


def _product_seconds(matrix: torch.Tensor) -> float:
    if matrix.device.type == "cuda":
        torch.cuda.synchronize(matrix.device)
    start = time.perf_counter()
    torch.mm(matrix, matrix)
    if matrix.device.type == "cuda":
        torch.cuda.synchronize(matrix.device)
    return time.perf_counter() - start
