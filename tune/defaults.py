"""The paper's settings on a model at hand: what a search must beat.

METEOR (arXiv 2507.20842) shares budgets by rank to the power 1, asks the last text token of layer 2 through a quarter
of the heads, and turns one knob, the mean number of tokens that stage 3 keeps.
"""

from __future__ import annotations

from dataclasses import replace

from meteor_model.configuration_meteor import DecodePruning, MeteorConfig, PruningConfig
from tune.space import Space

TARGET_SHARES = (0.75, 0.5, 0.25, 0.125)
"""Mean tokens after stage 3, as shares of those that enter the LLM; the published model keeps 242 of 576."""
LAYER = 2


def paper_settings(config: MeteorConfig) -> list[MeteorConfig]:
    """The model's own stages 1 and 2 with exponent 1; stage 3 off, then on with the paper's layer, heads and query at
    falling targets. A model that stage 3 cannot run has the first alone."""
    base = config.pruning
    encode = replace(base.encode, rank_exponent=1.0)
    off = PruningConfig(encode, base.fuse, DecodePruning(enabled=False))
    prunings = [off]
    if Space(config, {}).can_decode:
        layer = min(LAYER, config.text_config.num_hidden_layers - 1)
        for share in TARGET_SHARES:
            target = max(1.0, share * config.tokens_per_image)
            prunings.append(replace(off, decode=DecodePruning(layer=layer, target_mean=target)))
    return [MeteorConfig(**{**config.to_dict(), "pruning": pruning}) for pruning in prunings]
