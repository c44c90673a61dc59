"""The paper's settings on a model at hand, and the line of them at falling budgets: what a search begins with.

METEOR (arXiv 2507.20842) shares budgets by rank to the power 1 and asks the last text token of layer 2 through a
quarter of the heads. Its budgets are the model's own. The line multiplies all of them, stage by stage, by one factor:
it is the search that anybody would do by hand, and what another search must beat.
"""

from __future__ import annotations

from typing import Any

from tune.space import LEAST_SHARE, LEAST_TARGET, Space

OWN = {"encode": "meteor", "fuse": "mutual_redundancy", "decode": "top_heads"}
"""The paper's criteria."""
LINE = (1.0, 0.85, 0.7, 0.55, 0.4, 0.3)
"""Factors of the paper's budgets; the first are the paper's settings."""
TARGET_SHARE = 242 / 576
"""Share of the tokens that enter the LLM which stage 3 keeps in the published model, for a model without a target."""
LAYER = 2


def paper_line(space: Space) -> list[dict[str, Any]]:
    """The paper's settings as choices of a space, at each factor of LINE; without repeats.

    Empty where lambda itself is chosen: the paper's is unknown. What lies outside of the space is moved to its nearest
    end.
    """
    if space.decode_by == "lambda":
        return []
    line: list[dict[str, Any]] = []
    for factor in LINE:
        choices = _scaled(space, factor)
        line += [] if choices in line else [choices]
    return line


def _scaled(space: Space, factor: float) -> dict[str, Any]:
    config, choices = space.config, space.all_towers
    left = factor  # later boundaries and stages keep shares of what is there: they shrink with the first that can
    if space.prunes_encoders:
        totals = config.pruning.encode.totals if config.pruning.encode.enabled else ()
        present = space.present
        for boundary in range(space.segments):
            total = totals[boundary] if totals else present
            choices[f"encode.share.{boundary}"], left = _share(left * total / present, left)
            present = total
        if space.ranks:
            choices["encode.rank_exponent"] = 1.0
        if config.pruning.encode.rank_estimator in space.ranks:
            choices["encode.rank_estimator"] = config.pruning.encode.rank_estimator
        choices["fuse.share"], left = _share(left * config.tokens_per_image / present, left)
    choices |= {
        f"{stage}.criterion": OWN[stage]
        for stage, names in space.criteria.items()
        if len(names) > 1 and OWN[stage] in names
    }
    if not space.can_decode:
        choices.pop("decode.criterion", None)
        return choices
    own = config.pruning.decode.target_mean if config.pruning.decode.enabled else None
    kept = TARGET_SHARE if own is None else own / config.tokens_per_image
    return {
        **choices,
        "decode.enabled": True,
        "decode.layer": min(LAYER, max(1, config.text_config.num_hidden_layers // 2)),
        "decode.num_heads": max(1, config.text_config.num_attention_heads // 4),
        "decode.query": "last",
        "decode.target_share": min(1.0, max(LEAST_TARGET, left * kept)),
    }


def _share(wanted: float, left: float) -> tuple[float, float]:
    """A share within the space, and what of the factor is left for the next stage."""
    share = min(1.0, max(LEAST_SHARE, wanted))
    return share, 1.0 if left == 1.0 else min(1.0, wanted / share)
