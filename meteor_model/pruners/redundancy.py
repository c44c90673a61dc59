"""What one encoder's tokens repeat of the others'.

Legend: B images, E encoders, N tokens of one encoder, C language model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from meteor_model.pruners.select import in_full_precision, unit


@in_full_precision
def mutual_redundancy(tokens: Sequence[Tensor]) -> Tensor:
    """How much the OTHER encoders already say of each token. `tokens`: E tensors (B, N_l, C) -> (B, sum N_l) fp32.

    METEOR's R_i^j = sum over l != j and m of cos(z_i^j, z_m^l); high = drop first. Since cosine is a product of unit
    vectors, the double sum is one product with the sum of the other encoders' unit tokens: O(N C), no N x N matrix.
    One encoder alone has redundancy 0; a zero token has similarity 0.

    Raises ValueError when there is no encoder or batch or width differ.
    """
    if not tokens:
        raise ValueError("mutual redundancy needs the tokens of at least one encoder")
    shapes = [tuple(hidden.shape) for hidden in tokens]
    if len({(shape[0], shape[2]) for shape in shapes}) > 1:
        raise ValueError(f"the encoders' tokens differ in batch or width: {shapes}")
    units = [unit(hidden) for hidden in tokens]
    sums_EBC = torch.stack([unit_BNC.sum(dim=1) for unit_BNC in units])
    scores = []
    for j, unit_BNC in enumerate(units):
        others = [sums_EBC[i] for i in range(len(units)) if i != j]  # added up, not subtracted: no cancellation
        others_BC = torch.stack(others).sum(dim=0) if others else torch.zeros_like(sums_EBC[j])
        scores.append(torch.einsum("bnc,bc->bn", unit_BNC, others_BC))
    return torch.cat(scores, dim=1)
