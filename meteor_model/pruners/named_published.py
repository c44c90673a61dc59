"""Published pruners as configurations: inside the language model, before the towers, among the projected tokens."""

from __future__ import annotations

from meteor_model.configuration_meteor import DecodePruning, EncodePruning, MeteorConfig, PruningConfig
from meteor_model.pruners.autoprune import GAMMA, K0, X0, nominal_counts
from meteor_model.pruners.entries import in_shares, layers_of, pruned_layers, pruned_pool, pruner


@pruner("fastv", "language model", "one row of attention", "arXiv 2403.06764")
def fastv(dense: MeteorConfig, keep: int, *, layer: int | None = None) -> MeteorConfig:
    """FastV: after layer K = 2 the tokens stay that the last token attends to most, heads averaged.

    Ours: a prompt of several images keeps `keep` times as many, chosen among all of them. The row of attention is
    recomputed from the layer's query and keys; the published code needs the whole map.
    """
    layers = layers_of(dense, None if layer is None else (layer,), (2,))
    return pruned_layers(dense, layers, (keep,), criterion="all_heads")


@pruner("pyramiddrop", "language model", "one row of attention at each of three layers", "arXiv 2410.17247")
def pyramiddrop(dense: MeteorConfig, keep: int, *, layers: tuple[int, ...] | None = None) -> MeteorConfig:
    """PyramidDrop: half of the tokens go after each of layers 8, 16, 24, by the last instruction token's attention.

    `keep` is what is left at the end: published, an eighth. With another number the stages before keep 2 and 4 times as
    many, and all where there are fewer. Ours: the last token of the prompt asks, with the template's words for the
    reply in it; heads are averaged. The paper trains with the same prunings; here they run at inference.
    """
    kept = in_shares(dense, keep, (0.5, 0.25, 0.125))
    return pruned_layers(dense, layers_of(dense, layers, (8, 16, 24)), kept, criterion="all_heads")


@pruner("sparsevlm", "language model", "attention of the text after the images at three layers", "arXiv 2410.04417")
def sparsevlm(dense: MeteorConfig, keep: int, *, layers: tuple[int, ...] | None = None) -> MeteorConfig:
    """SparseVLM: after layers 2, 6, 15 by the attention of the text that rates the image; part of the rest is merged.

    `keep` is what is left at the end; the stages before keep 300/110 and 200/110 times as many, the proportion of the
    public code. What is ours beyond that: `meteor_model.pruners.sparsevlm`.
    """
    kept = in_shares(dense, keep, (300, 200, 110))
    chosen = layers_of(dense, layers, (2, 6, 15))
    return pruned_layers(dense, chosen, kept, criterion="sparsevlm", query="all_text")


@pruner("feather", "language model", "one row of attention, the grid", "ICCV 2025")
def feather(dense: MeteorConfig, keep: int, *, layers: tuple[int, ...] | None = None, stride: int = 3) -> MeteorConfig:
    """FEATHER: after layers 8 and 16 by attention without rotary positions; every third row and column stays at first.

    `keep` is what is left at the end: published, 9%; after layer 8 the published 30% with the grid's share of the rest
    are 4.2 times as many.
    """
    kept = in_shares(dense, keep, (0.378, 0.09))
    chosen = layers_of(dense, layers, (8, 16))
    return pruned_layers(dense, chosen, kept, criterion="feather", options={"stride": stride})


@pruner("ivc_prune", "language model", "one layer's values, the question's rows", "ICLR 2026")
def ivc_prune(dense: MeteorConfig, keep: int, *, layer: int | None = None) -> MeteorConfig:
    """IVC-Prune: after layer 16 of 32, by values; the same tokens stay in all layers, at their original positions.

    Published: 30% stay. What is ours: `meteor_model.pruners.decode_published.ivc_prune`.
    """
    layers = layers_of(dense, None if layer is None else (layer,), (16,))
    return pruned_layers(dense, layers, (keep,), criterion="ivc_prune", query="all_text", equal_layers=True)


@pruner("dart", "language model", "one layer's keys", "EMNLP 2025")
def dart(dense: MeteorConfig, keep: int, *, layer: int | None = None) -> MeteorConfig:
    """DART: after layer 5, the tokens whose keys are least similar to eight pivots."""
    layers = layers_of(dense, None if layer is None else (layer,), (5,))
    return pruned_layers(dense, layers, (keep,), criterion="dart")


@pruner("e_adaprune", "language model", "one row of attention, singular values of the tokens", "arXiv 2603.05950")
def e_adaprune(dense: MeteorConfig, keep: int, *, layer: int | None = None, share: float = 0.99) -> MeteorConfig:
    """E-AdaPrune on FastV's ranking: as many tokens as hold a share of the spectral energy of the prompt's images.

    `keep` is the mean that is expected, by which cost is counted; the share decides. Inside the language model, and not
    before it: a prompt is written with the same number of placeholders for every image.
    """
    layers = layers_of(dense, None if layer is None else (layer,), (2,))
    settings = DecodePruning(
        layer=layers[0],
        target_mean=float(keep),
        criterion="all_heads",
        budget="spectral_energy",
        options={"share": share},
    )
    return dense.with_pruning(PruningConfig(dense.pruning.encode, dense.pruning.fuse, settings))


@pruner("autoprune", "language model", "attention of the text after the images at every layer", "arXiv 2509.23931")
def autoprune(
    dense: MeteorConfig,
    keep: int,
    *,
    layer: int | None = None,
    x0: float = X0,
    k0: float = K0,
    gamma: float = GAMMA,
) -> MeteorConfig:
    """AutoPrune: after every layer, by a logistic curve that is steep where text and image share little information.

    `keep` is the mean of the layers behind the first pruning, as the published budget is: every prompt keeps that many
    in all, and its curve says in which layers. Cost is counted at half of the steepest slope. What is ours:
    `meteor_model.pruners.autoprune`.
    """
    depth = dense.text_config.num_hidden_layers
    first = layers_of(dense, None if layer is None else (layer,), (1,))[0]
    layers = tuple(range(first, depth))
    most = dense.tokens_per_image
    kept = nominal_counts(layers, depth, keep, most, x0=x0, slope=k0 / 2) if layers else [keep]
    settings = DecodePruning(
        layer=first,
        target_mean=float(kept[0]),
        criterion="all_heads",
        budget="information_curve",
        query="all_text",
        options={"x0": x0, "k0": k0, "gamma": gamma},
        later_layers=layers[1:],
        later_keep=tuple(kept[1:]),
    )
    return dense.with_pruning(PruningConfig(dense.pruning.encode, dense.pruning.fuse, settings))


# ------------------------------------------------------------------------------------------------ before the towers


@pruner("pixelprune", "pixels", "neighbouring patches of the tower's pixels", "arXiv 2604.00886")
def pixelprune(dense: MeteorConfig, keep: int) -> MeteorConfig:
    """PixelPrune: patches that their left or upper neighbour foretells are dropped before the first block of a tower.

    `keep` is shared among the towers by their tokens. What is ours: `meteor_model.pruners.pixels`.
    """
    encode = EncodePruning(totals=(keep,), criterion="pixel_prediction", budget="tokens")
    pruned = PruningConfig(encode, dense.pruning.fuse, dense.pruning.decode)
    return MeteorConfig(**{**dense.to_dict(), "pruning": pruned, "ranks": None, "calibrated": None})


# ---------------------------------------------------------------------------------------------- among the projected


@pruner("divprune", "projected tokens", "nothing else", "arXiv 2503.02175")
def divprune(dense: MeteorConfig, keep: int) -> MeteorConfig:
    """DivPrune: greedy max-min cosine distance."""
    return pruned_pool(dense, "divprune", keep)


@pruner("cdpruner", "projected tokens", "the prompt's text", "NeurIPS 2025")
def cdpruner(dense: MeteorConfig, keep: int, *, theta: float = 0.0) -> MeteorConfig:
    """CDPruner: greedy MAP of a determinantal point process weighted by relevance to the text."""
    return pruned_pool(dense, "cdpruner", keep, theta=theta)


@pruner("scope", "projected tokens", "a tower's attention", "NeurIPS 2025")
def scope(dense: MeteorConfig, keep: int, *, alpha: float = 1.0) -> MeteorConfig:
    """SCOPE: coverage of the other tokens times attention."""
    return pruned_pool(dense, "scope", keep, alpha=alpha)


@pruner("otprune", "projected tokens", "nothing else", "CVPR 2026")
def otprune(dense: MeteorConfig, keep: int, *, gamma: float = 0.01) -> MeteorConfig:
    """OTPrune: greedy log-determinant of the Gram matrix's rows."""
    return pruned_pool(dense, "otprune", keep, gamma=gamma)


@pruner("svd_prune", "projected tokens", "singular vectors of the tokens", "arXiv 2604.11530")
def svd_prune(dense: MeteorConfig, keep: int, *, share: float = 0.9) -> MeteorConfig:
    """SVD-Prune: leverage in the leading subspace."""
    return pruned_pool(dense, "svd_prune", keep, share=share)


@pruner("visionzip", "projected tokens", "a tower's attention", "arXiv 2412.04467")
def visionzip(dense: MeteorConfig, keep: int, *, dominant: float = 54 / 64) -> MeteorConfig:
    """VisionZip: dominant tokens by attention, the others merged into targets."""
    return pruned_pool(dense, "visionzip", keep, dominant=dominant)


@pruner("vispruner", "projected tokens", "a tower's attention", "ICCV 2025")
def vispruner(dense: MeteorConfig, keep: int, *, ratio: float = 0.5) -> MeteorConfig:
    """VisPruner: half by attention, half without near duplicates."""
    return pruned_pool(dense, "vispruner", keep, ratio=ratio)


@pruner("vscan", "projected tokens, language model", "a tower's attention at two depths", "TMLR 2026")
def vscan(dense: MeteorConfig, keep: int, *, layer: int | None = None, share: float = 1 / 3) -> MeteorConfig:
    """VScan: local and global tokens by attention with the rest merged in; a third of these after layer 16 of 32.

    `keep` is what is left at the end, by the last prompt token's attention, heads averaged.
    """
    entering = min(round(keep / share), dense.tokens_per_image)
    before = pruned_pool(dense, "vscan", entering)
    layers = layers_of(dense, None if layer is None else (layer,), (16,))
    settings = DecodePruning(layer=layers[0], target_mean=float(keep), criterion="all_heads", budget="fixed")
    return before.with_pruning(PruningConfig(before.pruning.encode, before.pruning.fuse, settings))
