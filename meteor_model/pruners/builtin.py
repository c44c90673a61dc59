"""The registries with everything of this package entered: what settings are checked against."""

from __future__ import annotations

from meteor_model.pruners import autoprune, decode_published, fuse_coverage, fuse_published, pixels, sparsevlm
from meteor_model.pruners.decode_criteria import DECODE_BUDGETS, DECODE_CRITERIA
from meteor_model.pruners.encode_criteria import ENCODE_BUDGETS, ENCODE_CRITERIA
from meteor_model.pruners.fuse_criteria import FUSE_CRITERIA

__all__ = ["DECODE_BUDGETS", "DECODE_CRITERIA", "ENCODE_BUDGETS", "ENCODE_CRITERIA", "FUSE_CRITERIA", "PUBLISHED"]

#: Modules whose import enters criteria.
PUBLISHED = (fuse_coverage, fuse_published, decode_published, sparsevlm, autoprune, pixels)
