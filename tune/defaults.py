"""The paper's settings on a model at hand: what a search begins with, and must beat.

METEOR (arXiv 2507.20842) shares budgets by rank to the power 1, asks the last text token of layer 2 through a quarter
of the heads, and turns one knob, the mean number of tokens that stage 3 keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from meteor_model.configuration_meteor import DecodePruning, MeteorConfig, PruningConfig
from tune.space import LEAST_SHARE, Space

OWN = {"encode": "meteor", "fuse": "mutual_redundancy", "decode": "top_heads"}
"""The paper's criteria."""
TARGET_SHARES = (0.75, 0.5, 0.25, 0.125)
"""Mean tokens after stage 3, as shares of those that enter the LLM; the published model keeps 242 of 576."""
LAYER = 2
BELOW_BUDGET = 0.9
"""Target of the paper's settings in a token budget, as a share of it: the measured mean may miss it by a little."""


def paper_settings(config: MeteorConfig) -> list[MeteorConfig]:
    """The paper's settings of this model.

    The model's own stages 1 and 2 with exponent 1; stage 3 off, then on with the paper's layer, heads and query at
    falling targets. A model that stage 3 cannot run has the first alone.
    """
    base = config.pruning
    encode = replace(base.encode, rank_exponent=1.0)
    off = PruningConfig(encode, base.fuse, DecodePruning(enabled=False))
    prunings = [off]
    if Space(config, {}).can_decode:
        layer = min(LAYER, config.text_config.num_hidden_layers - 1)
        for share in TARGET_SHARES:
            target = max(1.0, share * config.tokens_per_image)
            prunings.append(replace(off, decode=DecodePruning(layer=layer, target_mean=target)))
    return [config.with_pruning(pruning) for pruning in prunings]


def paper_choices(space: Space, shares: Sequence[float]) -> list[dict[str, Any]]:
    """The same settings as choices of a space, one for each share.

    Of the tokens that enter the LLM, or of the space's cap, that stage 3 keeps on average. Empty where lambda itself is
    chosen: the paper's is unknown.

    What lies outside of the space is moved to its nearest end.
    """
    if space.decode_by == "lambda":
        return []
    config, choices = space.config, dict[str, Any]()
    if space.prunes_encoders:
        totals = config.pruning.encode.totals if config.pruning.encode.enabled else ()
        present = space.present
        for boundary in range(space.segments):
            total = totals[boundary] if totals else present
            choices[f"encode.share.{boundary}"], present = _share(total, present), total
        if space.ranks:
            choices["encode.rank_exponent"] = 1.0
        if config.pruning.encode.rank_estimator in space.ranks:
            choices["encode.rank_estimator"] = config.pruning.encode.rank_estimator
        choices["fuse.share"] = _share(config.tokens_per_image, present)
    choices |= {
        f"{stage}.criterion": OWN[stage]
        for stage, names in space.criteria.items()
        if len(names) > 1 and OWN[stage] in names
    }
    if not space.can_decode:
        choices.pop("decode.criterion", None)
        return [choices]
    choices |= {
        "decode.enabled": True,
        "decode.layer": min(LAYER, max(1, config.text_config.num_hidden_layers // 2)),
        "decode.num_heads": config.decode_heads,
        "decode.query": "last",
    }
    return [{**choices, "decode.target_share": share} for share in shares]


def _share(kept: int, present: int) -> float:
    return min(1.0, max(LEAST_SHARE, kept / present))
