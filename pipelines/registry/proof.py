"""What parity found, and how much may differ. Imports no torch.

Three things are compared between an export, loaded again, and the model that it was made of:

    weights   every parameter bit by bit, in the format that both share (`pipelines.checkpoint.weight_sums`)
    tokens    of those that the model kept in stages 1 and 2, the share that the export would keep, too
    logits    given the tokens that the model kept (`meteor_model.replay`)

The weights are exact. Logits and scores are rounded on the way, by another kernel or device otherwise, so they have a
tolerance by format; docs/LOG.md has the distances of right and wrong exports that it is chosen between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipelines.io import codec
from pipelines.registry.tags import (
    LARGEST_LOGIT_TAG,
    PARITY_TAG,
    PARITY_TOLERANCE_TAG,
    PRECISION_TAG,
    WEIGHTS_TAG,
)

PARITY_TOLERANCE = 1e-3
"""Largest difference of a logit in fp32."""
BF16_UNITS = 16.0
"""Largest difference of a logit in bf16, in roundings of the largest logit. Right exports under other kernels and at
other precisions: up to 2; wrong ones: 15 and more."""
BF16_ROUNDING = 2.0**-8
"""Largest relative error of one rounding to bf16."""
LEAST_AGREEMENT = {"fp32": 0.999, "bf16": 0.98}
"""Least share of the kept tokens that the export's own scores keep, too. Right exports: 1 in fp32, 0.998 and more in
bf16; with scores of another kind at one boundary: 0.85."""


def allowed_difference(precision: str, largest_logit: float) -> float:
    """Largest difference of a logit between two computations of the same weights.

    1e-3 in fp32; in bf16 16 * 2^-8 of the largest logit, as numbers of that size are rounded to 2^-8 of themselves.
    """
    return PARITY_TOLERANCE if precision == "fp32" else BF16_UNITS * BF16_ROUNDING * largest_logit


@dataclass(frozen=True)
class Parity:
    """An export that was compared and holds.

    Attributes:
        difference: largest difference of a logit.
        allowed: the difference that was allowed.
        exported: number format of the exported weights.
        precision: format that both were compared in: the coarser one of training and export.
        largest_logit: of the training model, absolute.
        agreement: share of the kept tokens that the export's own scores keep; None where the tokens were not recorded.
        weights: parameters that were compared bit by bit.
    """

    difference: float
    allowed: float = PARITY_TOLERANCE
    exported: Literal["fp32", "bf16"] = "fp32"
    precision: Literal["fp32", "bf16"] = "fp32"
    largest_logit: float = 0.0
    agreement: float | None = None
    weights: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | float, where: str) -> Parity:
        """What `to_dict` gave, or the difference alone, as earlier versions stored it. Raises ValueError."""
        return codec.from_plain(cls, data if isinstance(data, Mapping) else {"difference": data}, where)

    def tags(self) -> dict[str, str]:
        """Of a version."""
        return {
            PARITY_TAG: f"{self.difference:.3g}",
            PARITY_TOLERANCE_TAG: f"{self.allowed:.3g}",
            PRECISION_TAG: self.precision,
            WEIGHTS_TAG: self.exported,
            LARGEST_LOGIT_TAG: f"{self.largest_logit:.3g}",
        }
