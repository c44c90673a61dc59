"""METEOR itself by name, so that it stands in the same tables as its rivals."""

from __future__ import annotations

from meteor_model.configuration_meteor import DecodePruning, EncodePruning, FusePruning, MeteorConfig, PruningConfig
from meteor_model.encoders import encoder_class
from meteor_model.pruners.entries import layers_of, pruner

#: Of METEOR on EAGLE-X4's towers: tokens that the first two boundaries leave (ours: benchmarks/flops.py), that leave
#: the encoders, that enter the language model, and that stay on average.
SHALLOW, LEAVE, FUSED, KEPT = (2600, 1300), 1193, 576, 242


@pruner("meteor", "towers, projected tokens, language model", "ranks, attention, other encoders", "arXiv 2507.20842")
def meteor(
    dense: MeteorConfig,
    keep: int,
    *,
    fused: int | None = None,
    leave: int | None = None,
    layer: int | None = None,
    lam: float | None = None,
    rank_exponent: float = 1.0,
) -> MeteorConfig:
    """METEOR: inside the towers by rank budgets, among the encoders by mutual redundancy, after layer 2 by the text.

    `keep` is what is left at the end. `fused` tokens enter the language model and `leave` leave the towers; where they
    are not given, in the published proportion of 1,193, 576 and 242, and no more than there are. With `lam` each prompt
    keeps lambda times its attention mass, and `keep` is the mean that is expected; without, every image keeps `keep`,
    for lambda belongs to a model and is solved on prompts. Three segments; where no ranks are measured, towers share
    evenly.
    """
    most, towers = dense.tokens_per_image, len(dense.encoders)
    fused = min(max(round(keep * FUSED / KEPT), keep), most) if fused is None else fused
    leave = min(max(round(fused * LEAVE / FUSED), fused, towers), most) if leave is None else leave
    prunes = {item.name: encoder_class(item.family).prunes_between_blocks for item in dense.encoders}
    between = sum(tokens for name, tokens in dense.encoder_tokens.items() if prunes[name])
    shallow = tuple(min(round(leave * total / LEAVE), between) for total in SHALLOW) if between else ()
    return dense.with_pruning(
        PruningConfig(
            EncodePruning(totals=(*shallow, leave), rank_exponent=rank_exponent),
            FusePruning(keep=fused),
            DecodePruning(
                layer=layers_of(dense, None if layer is None else (layer,), (2,))[0],
                target_mean=float(keep),
                lam=lam,
                budget="fixed" if lam is None else "attention_mass",
            ),
        )
    )
