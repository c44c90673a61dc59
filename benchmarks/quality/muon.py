"""Muon for many matrices of one shape at once.

The rule is `torch.optim.Muon`'s with `adjust_lr_fn="match_rms_adamw"` (K. Jordan 2024; J. Liu et al., arXiv
2502.16982). torch's own steps matrix by matrix, which costs more where matrices are small.

Legend: P matrices of one shape, (m, n) their shape.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration."""


def orthogonalised(matrices_Pmn: Tensor, steps: int) -> Tensor:
    """The nearest matrices with all singular values near 1, by Newton-Schulz steps in bf16. (P, m, n) bf16."""
    wide = matrices_Pmn.shape[1] <= matrices_Pmn.shape[2]
    x = (matrices_Pmn if wide else matrices_Pmn.transpose(1, 2)).to(torch.bfloat16)
    x = x / torch.linalg.vector_norm(x.float(), dim=(1, 2), keepdim=True).clamp_min(1e-7).to(torch.bfloat16)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = torch.bmm(x, x.transpose(1, 2))
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.transpose(1, 2)


class BatchedMuon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, matrices of one shape together.

    Args:
        matrices: parameters of two dimensions.
        lr: learning rate, on AdamW's scale.
        weight_decay: decoupled.
        momentum: of the gradient.
        steps: of Newton-Schulz.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        lr: float,
        weight_decay: float = 0.05,
        momentum: float = 0.95,
        steps: int = 5,
    ) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "steps": steps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nothing here calls back
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(matrix.shape, []).append(matrix)
            for matrices in by_shape.values():
                self._step(matrices, group)

    def _step(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        updates = []
        for matrix in matrices:
            assert matrix.grad is not None
            averaged = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
            averaged.lerp_(matrix.grad, 1 - group["momentum"])
            updates.append(matrix.grad.lerp(averaged, group["momentum"]))
        turned_Pmn = orthogonalised(torch.stack(updates), group["steps"])
        scale = group["lr"] * 0.2 * max(matrices[0].shape) ** 0.5
        for matrix, turned_mn in zip(matrices, turned_Pmn, strict=True):
            matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(turned_mn.to(matrix.dtype), alpha=-scale)
