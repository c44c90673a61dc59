"""Published pruners, and trivial ones, by name: each turns a model's configuration into one that prunes as it does.

`with_pruner(config, "fastv", keep=256)` is that configuration. It is a `MeteorConfig` like any other, so that whatever
knows configurations (generate, evaluation, serving, sweeps, a registered version) runs the pruner. A pruner begins from
the model with nothing pruned; `keep` is what an image keeps at the end.

Layers are given for the 32 layers that the papers use and are scaled to the language model at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from meteor_model.checks import nearest, whole_number
from meteor_model.configuration_meteor import DecodePruning, EncodePruning, FusePruning, MeteorConfig, PruningConfig
from meteor_model.pruners.smaller_image import reachable, resized

PUBLISHED_LAYERS = 32
Configure = Callable[..., MeteorConfig]


@dataclass(frozen=True)
class Pruner:
    """One entry.

    Attributes:
        name: of the pruner.
        configure: (configuration with nothing pruned, keep, **settings) -> the configuration that prunes.
        acts: where: "nowhere", "pixels", "projected tokens", "language model".
        needs: what it looks at.
        source: the paper, or "trivial".
    """

    name: str
    configure: Configure
    acts: str
    needs: str
    source: str

    @property
    def about(self) -> str:
        """The first line of its docstring."""
        return (self.configure.__doc__ or "").partition("\n")[0]


PRUNERS: dict[str, Pruner] = {}


def pruner(name: str, acts: str, needs: str, source: str) -> Callable[[Configure], Configure]:
    """Decorator: enter a pruner. Raises ValueError for a name that is taken."""
    if name in PRUNERS:
        raise ValueError(f"pruner {name!r} is registered already")

    def enter(configure: Configure) -> Configure:
        PRUNERS[name] = Pruner(name, configure, acts, needs, source)
        return configure

    return enter


def with_pruner(config: MeteorConfig, name: str, keep: int, **settings: Any) -> MeteorConfig:
    """The model of `config` under a pruner that leaves `keep` visual tokens an image.

    Args:
        config: any model; how it is pruned now is not looked at.
        name: of `PRUNERS`.
        keep: visual tokens of an image in the last layer of the language model.
        settings: the pruner's own.

    Raises:
        ValueError: for an unknown pruner or setting, or what the model does not allow.
    """
    chosen = _known(name)
    dense = unpruned(config)
    most = dense.tokens_per_image
    whole_number("keep", keep, least=1)
    if keep > most:
        raise ValueError(f"pruner {name!r} cannot keep {keep} of the {most} visual tokens of an image")
    try:
        return chosen.configure(dense, keep, **settings)
    except TypeError as error:
        raise ValueError(f"pruner {name!r} does not take these settings: {error}") from None


def numbers_of(config: MeteorConfig, name: str) -> Sequence[int]:
    """The numbers of tokens that a pruner can keep of an image of this model, ascending. ValueError if unknown."""
    dense = unpruned(config)
    if name == "none":
        return [dense.tokens_per_image]
    if name == "smaller_image":
        return reachable(dense)
    _known(name)
    return range(1, dense.tokens_per_image + 1)


def _known(name: str) -> Pruner:
    if name in REFUSED:
        raise ValueError(f"pruner {name!r} cannot run here: {REFUSED[name]}")
    if name not in PRUNERS:
        raise ValueError(f"pruner {name!r} is unknown; known: {', '.join(PRUNERS)}{nearest(name, PRUNERS)}")
    return PRUNERS[name]


def unpruned(config: MeteorConfig) -> MeteorConfig:
    """The same model with nothing pruned."""
    off = PruningConfig(EncodePruning(enabled=False), FusePruning(enabled=False), DecodePruning(enabled=False))
    return config.with_pruning(off)


def pruned_pool(dense: MeteorConfig, criterion: str, keep: int, **options: float) -> MeteorConfig:
    """Stage 2 alone, by this criterion."""
    off = dense.pruning
    fuse = FusePruning(keep=keep, criterion=criterion, options=options)
    return dense.with_pruning(PruningConfig(off.encode, fuse, off.decode))


def pruned_layers(dense: MeteorConfig, layers: tuple[int, ...], keep: tuple[int, ...], **decode: Any) -> MeteorConfig:
    """Stage 3 alone: after each of `layers` so many tokens an image stay."""
    settings = DecodePruning(
        layer=layers[0],
        target_mean=float(keep[0]),
        budget="fixed",
        later_layers=layers[1:],
        later_keep=keep[1:],
        **decode,
    )
    return dense.with_pruning(PruningConfig(dense.pruning.encode, dense.pruning.fuse, settings))


def scaled_layers(config: MeteorConfig, published: tuple[int, ...]) -> tuple[int, ...]:
    """Layers of a model of 32, in this one: at the same share of its depth, at least one apart.

    Raises:
        ValueError: where the language model has too few layers.
    """
    depth, layers = config.text_config.num_hidden_layers, list[int]()
    for layer in published:
        least = layers[-1] + 1 if layers else 1
        layers.append(max(round(layer * depth / PUBLISHED_LAYERS), least))
    if layers[-1] >= depth:
        raise ValueError(f"{len(published)} prunings need more than the language model's {depth} layers")
    return tuple(layers)


def _layers(config: MeteorConfig, given: tuple[int, ...] | None, published: tuple[int, ...]) -> tuple[int, ...]:
    return scaled_layers(config, published) if given is None else tuple(given)


def _shares(dense: MeteorConfig, keep: int, shares: tuple[float, ...]) -> tuple[int, ...]:
    """Tokens after each pruning, in the proportion of `shares`, `keep` after the last; no more than there are."""
    return tuple(min(round(keep * share / shares[-1]), dense.tokens_per_image) for share in shares)


# ------------------------------------------------------------------------------------------------------- trivial rows


@pruner("none", "nowhere", "nothing", "trivial")
def none(dense: MeteorConfig, keep: int) -> MeteorConfig:
    """Nothing is pruned; `keep` must be all the tokens there are."""
    if keep != dense.tokens_per_image:
        raise ValueError(f"pruner 'none' keeps all {dense.tokens_per_image} visual tokens, not {keep}")
    return dense


@pruner("random", "projected tokens", "nothing", "trivial")
def random(dense: MeteorConfig, keep: int, *, seed: int = 0) -> MeteorConfig:
    """Projected tokens drawn at random, the same places in every image."""
    return pruned_pool(dense, "random", keep, seed=seed)


@pruner("stride", "projected tokens", "nothing", "trivial")
def stride(dense: MeteorConfig, keep: int) -> MeteorConfig:
    """Projected tokens at even distances on the grid."""
    return pruned_pool(dense, "stride", keep)


@pruner("average_pooling", "projected tokens", "nothing", "trivial")
def average_pooling(dense: MeteorConfig, keep: int) -> MeteorConfig:
    """Projected tokens averaged over near equal rectangles of the grid."""
    return pruned_pool(dense, "average_pooling", keep)


@pruner("smaller_image", "pixels", "positions that can be interpolated", "trivial")
def smaller_image(dense: MeteorConfig, keep: int) -> MeteorConfig:
    """Every tower sees a smaller image, so that exactly `keep` tokens come out.

    Towers keep their weights: positions are interpolated as their library does it. Ours: the grids of all towers shrink
    by one factor (a joint grid by its own), so only some numbers can be met; others are refused with the nearest two.
    """
    return resized(dense, keep)


# ------------------------------------------------------------------------------------------- inside the language model


@pruner("random_in_llm", "language model", "nothing", "trivial")
def random_in_llm(dense: MeteorConfig, keep: int, *, layer: int | None = None, seed: int = 0) -> MeteorConfig:
    """Visual tokens drawn at random after layer 2: FastV's cost without FastV's choice."""
    layers = _layers(dense, None if layer is None else (layer,), (2,))
    return pruned_layers(dense, layers, (keep,), criterion="random", options={"seed": seed})


@pruner("fastv", "language model", "one row of attention", "arXiv 2403.06764")
def fastv(dense: MeteorConfig, keep: int, *, layer: int | None = None) -> MeteorConfig:
    """FastV: after layer K = 2 the tokens stay that the last token attends to most, heads averaged.

    Ours: a prompt of several images keeps `keep` times as many, chosen among all of them. The row of attention is
    recomputed from the layer's query and keys; the published code needs the whole map.
    """
    layers = _layers(dense, None if layer is None else (layer,), (2,))
    return pruned_layers(dense, layers, (keep,), criterion="all_heads")


@pruner("pyramiddrop", "language model", "one row of attention at each of three layers", "arXiv 2410.17247")
def pyramiddrop(dense: MeteorConfig, keep: int, *, layers: tuple[int, ...] | None = None) -> MeteorConfig:
    """PyramidDrop: half of the tokens go after each of layers 8, 16, 24, by the last instruction token's attention.

    `keep` is what is left at the end: published, an eighth. With another number the stages before keep 2 and 4 times as
    many, and all where there are fewer. Ours: the last token of the prompt asks, with the template's words for the
    reply in it; heads are averaged. The paper trains with the same prunings; here they run at inference.
    """
    kept = _shares(dense, keep, (0.5, 0.25, 0.125))
    return pruned_layers(dense, _layers(dense, layers, (8, 16, 24)), kept, criterion="all_heads")


@pruner("sparsevlm", "language model", "attention of the text after the images at three layers", "arXiv 2410.04417")
def sparsevlm(dense: MeteorConfig, keep: int, *, layers: tuple[int, ...] | None = None) -> MeteorConfig:
    """SparseVLM: after layers 2, 6, 15 by the attention of the text that rates the image; part of the rest is merged.

    `keep` is what is left at the end; the stages before keep 300/110 and 200/110 times as many, the proportion of the
    public code. What is ours beyond that: `meteor_model.pruners.sparsevlm`.
    """
    kept = _shares(dense, keep, (300, 200, 110))
    chosen = _layers(dense, layers, (2, 6, 15))
    return pruned_layers(dense, chosen, kept, criterion="sparsevlm", query="all_text")


@pruner("feather", "language model", "one row of attention, the grid", "ICCV 2025")
def feather(dense: MeteorConfig, keep: int, *, layers: tuple[int, ...] | None = None, stride: int = 3) -> MeteorConfig:
    """FEATHER: after layers 8 and 16 by attention without rotary positions; every third row and column stays at first.

    `keep` is what is left at the end: published, 9%; after layer 8 the published 30% with the grid's share of the rest
    are 4.2 times as many.
    """
    kept = _shares(dense, keep, (0.378, 0.09))
    chosen = _layers(dense, layers, (8, 16))
    return pruned_layers(dense, chosen, kept, criterion="feather", options={"stride": stride})


@pruner("ivc_prune", "language model", "one layer's values, the question's rows", "ICLR 2026")
def ivc_prune(dense: MeteorConfig, keep: int, *, layer: int | None = None) -> MeteorConfig:
    """IVC-Prune: after layer 16 of 32, by values; the same tokens stay in all layers, at their original positions.

    Published: 30% stay. What is ours: `meteor_model.pruners.decode_published.ivc_prune`.
    """
    layers = _layers(dense, None if layer is None else (layer,), (16,))
    return pruned_layers(dense, layers, (keep,), criterion="ivc_prune", query="all_text", equal_layers=True)


@pruner("dart", "language model", "one layer's keys", "EMNLP 2025")
def dart(dense: MeteorConfig, keep: int, *, layer: int | None = None) -> MeteorConfig:
    """DART: after layer 5, the tokens whose keys are least similar to eight pivots."""
    layers = _layers(dense, None if layer is None else (layer,), (5,))
    return pruned_layers(dense, layers, (keep,), criterion="dart")


@pruner("e_adaprune", "language model", "one row of attention, singular values of the tokens", "arXiv 2603.05950")
def e_adaprune(dense: MeteorConfig, keep: int, *, layer: int | None = None, share: float = 0.99) -> MeteorConfig:
    """E-AdaPrune on FastV's ranking: as many tokens as hold a share of the spectral energy of the prompt's images.

    `keep` is the mean that is expected, by which cost is counted; the share decides. Inside the language model, and not
    before it: a prompt is written with the same number of placeholders for every image.
    """
    layers = _layers(dense, None if layer is None else (layer,), (2,))
    settings = DecodePruning(
        layer=layers[0],
        target_mean=float(keep),
        criterion="all_heads",
        budget="spectral_energy",
        options={"share": share},
    )
    return dense.with_pruning(PruningConfig(dense.pruning.encode, dense.pruning.fuse, settings))


# -------------------------------------------------------------------------------- among the projected tokens, published


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
    layers = _layers(dense, None if layer is None else (layer,), (16,))
    settings = DecodePruning(layer=layers[0], target_mean=float(keep), criterion="all_heads", budget="fixed")
    return before.with_pruning(PruningConfig(before.pruning.encode, before.pruning.fuse, settings))


# ------------------------------------------------------------------------------------------------------ not to be had

#: Published rules that cannot run here, and why.
REFUSED: dict[str, str] = {
    "autoprune": "it prunes after every layer, by a curve that is bisected for every sample: not built yet",
    "oc_vtp": "its pruner is a network of its own that has to be trained first: not built yet",
    "comp": "it prunes parameters and tokens together while a model is fine-tuned: not built yet",
    "pixelprune": "it drops pixel patches before the tower, by image: the towers here see whole grids of one size",
}
