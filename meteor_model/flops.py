"""Cost by stage and part of any `MeteorConfig`, counted by dispatch on the meta device: no weights, no real memory.

The modules themselves run on shape-only tensors under torch's `FlopCounterMode`; no formula here knows an architecture.

Convention, the one that reproduces METEOR's published table: 2 FLOPs per multiply-add; matrix products, convolutions
and attention count, elementwise work, norms, softmax, resizing and sorting do not; causal attention counts its full
square; all encoders + projectors + LLM prefill of one image and `text_tokens` (about 40) text tokens. The
language-model head is reported apart and is not in the total. Papers on FastV and PyramidDrop count otherwise
(two-matrix feed-forward, no factor 2): never mix the two.

Legend: R resolution of an encoder, T tokens of a sequence, C LLM width, K visual tokens of one image.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from meteor_model.compat import CACHE
from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.decoder.scores import attention_mass
from meteor_model.encode import encode_looking, encode_pruned, segment_ends
from meteor_model.encoders import VisionEncoder
from meteor_model.encoders.base import VisionTokens
from meteor_model.fusion import concat_channels, prune_pool
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.vision_meteor import JOINT

T = TypeVar("T")

TEXT_TOKENS = 40
META = torch.device("meta")


@dataclass(frozen=True)
class TowerFlops:
    """One encoder: FLOPs per image.

    Attributes:
        name: of the encoder.
        tokens: patch tokens of the full grid, then those kept at each boundary.
        tower: embedding, blocks and final norm, on the tokens present.
        selection: scores at the boundaries.
        projector: this encoder's own projector; 0 where all encoders share one.
    """

    name: str
    tokens: tuple[int, ...]
    tower: int
    selection: int
    projector: int


@dataclass(frozen=True)
class LayersFlops:
    """LLM layers [first, end) at prefill, which see the text and `visual_tokens`; and the same for one new token."""

    first: int
    end: int
    visual_tokens: int
    prefill: int
    step: int


@dataclass(frozen=True)
class FlopReport:
    """FLOPs of one image and one prompt up to the first token.

    Attributes:
        encoders: encoder by encoder.
        joint_projector: the one projector of channel_concat, else 0.
        fusion: scores of stage 2; where encoders share a projector they are counted with it.
        text_tokens: text tokens of the prompt.
        layers: runs of LLM layers that see the same tokens.
        decode_selection: scores of stage 3.
        lm_head: the head on one token; not in `total`.
    """

    encoders: tuple[TowerFlops, ...]
    joint_projector: int
    fusion: int
    text_tokens: int
    layers: tuple[LayersFlops, ...]
    decode_selection: int
    lm_head: int

    @property
    def encoding(self) -> int:
        """Towers and the scores at their boundaries."""
        return sum(item.tower + item.selection for item in self.encoders)

    @property
    def projection(self) -> int:
        """All projectors."""
        return self.joint_projector + sum(item.projector for item in self.encoders)

    @property
    def llm(self) -> int:
        """Prefill of all LLM layers, with the scores of stage 3."""
        return self.decode_selection + sum(item.prefill for item in self.layers)

    @property
    def selection(self) -> int:
        """Scores of all three stages, contained in the other sums."""
        return self.fusion + self.decode_selection + sum(item.selection for item in self.encoders)

    @property
    def total(self) -> int:
        """Everything up to the first token but the head."""
        return self.encoding + self.projection + self.fusion + self.llm

    @property
    def step(self) -> int:
        """One generated token: all LLM layers and the head."""
        return self.lm_head + sum(item.step for item in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionary with the parts and their sums, for JSON."""
        sums = ("encoding", "projection", "llm", "selection", "total", "step")
        return {**asdict(self), **{name: getattr(self, name) for name in sums}}

    def table(self) -> str:
        """One line per part: tokens, TFLOPs, share of the total."""
        rows = [(f"encoder {e.name}", " > ".join(map(str, e.tokens)), e.tower) for e in self.encoders]
        rows += [("  scores at boundaries", "", sum(e.selection for e in self.encoders))]
        rows += [("projection", "", self.projection), ("fusion scores", "", self.fusion)]
        rows += [
            (f"LLM layers {run.first}-{run.end - 1}", f"{self.text_tokens} + {run.visual_tokens}", run.prefill)
            for run in self.layers
        ]
        rows += [("  stage 3 scores", "", self.decode_selection), ("total", "", self.total)]
        lines = [f"{'part':<28}{'tokens':>30}{'TFLOPs':>12}{'share':>8}"]
        lines += [f"{name:<28}{tokens:>30}{n / 1e12:>12.4f}{n / self.total:>8.1%}" for name, tokens, n in rows]
        return "\n".join([*lines, f"{'(head, one token)':<58}{self.lm_head / 1e12:>12.4f}"])


# ------------------------------------------------------------------------------------------------- the counting itself


def _matrix_vector(matrix: Sequence[int], vector: Sequence[int], **_: Any) -> int:
    return 2 * matrix[0] * matrix[1]


def _add_matrix_vector(bias: Sequence[int], matrix: Sequence[int], vector: Sequence[int], **_: Any) -> int:
    return 2 * matrix[0] * matrix[1]


def _inner_product(first: Sequence[int], second: Sequence[int], **_: Any) -> int:
    return 2 * first[0]


def _cpu_attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[2] * (width + value[3])


def _cpu_attention_backward(grad: Sequence[int], query: Sequence[int], *rest: Any, **options: Any) -> int:
    return 2 * _cpu_attention(
        query, *rest, **options
    )  # four products; what a kernel recomputes is no cost of the model


def _convolution_backward(
    grad: Sequence[int], pixels: Sequence[int], weight: Sequence[int], *rest: Any, **_: Any
) -> int:
    """As many products as forward, for each of the two gradients wanted: of the input and of the weight."""
    transposed, output_mask = rest[4], rest[7]
    places = pixels[2:] if transposed else grad[2:]
    forward = 2 * math.prod(weight) * grad[0] * math.prod(places)
    return forward * sum(output_mask[:2])


#: Products that torch's counter leaves out (attention on a CPU would count as nothing) or gets wrong (the gradient of a
#: depthwise convolution's weight, by a factor of its channels).
EXTRA_FORMULAS: dict[Any, Any] = {
    torch.ops.aten.mv: _matrix_vector,
    torch.ops.aten.addmv: _add_matrix_vector,
    torch.ops.aten.dot: _inner_product,
    torch.ops.aten.convolution_backward: _convolution_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


def flop_counter() -> FlopCounterMode:
    """Torch's counter with the products that it leaves out, for meta, CPU and CUDA alike."""
    return FlopCounterMode(display=False, custom_mapping=EXTRA_FORMULAS)


def counted(function: Callable[..., T], *args: Any, **kwargs: Any) -> tuple[T, int]:
    """The result of a call, and the FLOPs that it dispatched."""
    with flop_counter() as counter:
        result = function(*args, **kwargs)
    return result, counter.get_total_flops()


def count_flops(config: MeteorConfig, text_tokens: int = TEXT_TOKENS) -> FlopReport:
    """FLOPs of one image and a prompt of `text_tokens`, by stage and part.

    Args:
        config: any model.
        text_tokens: text tokens of the prompt.

    Stage 3 is counted at its `target_mean` and `later_keep`, with its scores.

    Raises:
        ValueError: where stage 3 is on without a target_mean.
    """
    schedule = _schedule(config)
    model = meta_model(config)
    with torch.no_grad():
        encoders, joint_projector, fusion = _count_vision(model)
        layers = _count_layers(model, text_tokens, schedule)
        decode_selection = _count_stage3(model, text_tokens, schedule)
        _, lm_head = counted(model.lm_head, torch.empty(1, 1, config.text_config.hidden_size, device=META))
    return FlopReport(encoders, joint_projector, fusion, text_tokens, layers, decode_selection, lm_head)


def count_training_flops(config: MeteorConfig, text_tokens: int = TEXT_TOKENS) -> int:
    """FLOPs of forward and backward of one image and `text_tokens`, everything trainable, head on every token.

    Stage 3 never trains, so the LLM sees every token that survives fusion.
    """
    model = meta_model(config).requires_grad_(True)
    length, width = text_tokens + config.tokens_per_image, config.text_config.hidden_size

    def vision() -> None:
        features = [_encode(encoder, config) for encoder in _towers(model)]
        _fuse(model, features).sum().backward()

    def llm() -> None:
        embeds_1TC = torch.empty(1, length, width, device=META, requires_grad=True)
        hidden_1TC = model.language_model(inputs_embeds=embeds_1TC, attention_mask=_full(length), use_cache=False)
        model.lm_head(hidden_1TC.last_hidden_state).sum().backward()

    return counted(vision)[1] + counted(llm)[1]


def meta_model(config: MeteorConfig) -> MeteorForConditionalGeneration:
    """The model on the meta device, in eval mode.

    Its LLM attends eagerly: the choice of a fused kernel reads masks, which hold no data here. The products are the
    same.
    """
    config = copy.deepcopy(config)
    config.text_config._attn_implementation = "eager"
    with META:
        return MeteorForConditionalGeneration(config).eval()


def _schedule(config: MeteorConfig) -> list[tuple[int, int]]:
    """Stage 3 as (layers that see what came before, visual tokens kept from there on) pairs; empty where it is off."""
    decode = config.pruning.decode
    if not decode.enabled:
        return []
    if decode.target_mean is None:
        raise ValueError("pruning.decode.target_mean is not set: FLOPs are counted at the mean number of tokens kept")
    schedule, present = [], config.tokens_per_image
    for cut in decode.cuts():
        present = min(present, round(cut.keep or 0))
        schedule.append((cut.layer, present))
    return schedule


def _full(length: int) -> Tensor:
    """A mask without padding."""
    return torch.ones(1, length, dtype=torch.long, device=META)


def _towers(model: MeteorForConditionalGeneration) -> Iterator[VisionEncoder]:
    for encoder in model.encoders.values():
        yield cast(VisionEncoder, encoder)


# ---------------------------------------------------------------------------------------------------------- the parts


def _pixels(encoder: VisionEncoder) -> Tensor:
    side = encoder.config.image_size
    return torch.empty(1, 3, side, side, device=META)


def _encode(encoder: VisionEncoder, config: MeteorConfig) -> tuple[VisionTokens, dict[float, Tensor] | None]:
    """Tokens of one encoder through stage 1, (1, N, D), and the attention that stage 2 asks for."""
    looks = config.pruning.fuse.looks
    if looks:
        return encode_looking(encoder, _pixels(encoder), looks, config.pruning.encode.score_queries)
    budgets, encode = config.encode_budgets[encoder.config.name], config.pruning.encode
    tokens, _ = encode_pruned(
        encoder,
        _pixels(encoder),
        budgets,
        encode.first_deep_segment,
        encode.score_queries,
        criterion=encode.criterion,
        options=encode.options,
    )
    return tokens, None


def _run_tower(encoder: VisionEncoder, budgets: Sequence[int]) -> Tensor:
    """The tower without scores: after each segment the first tokens stay. Prefix tokens come back as well."""
    hidden = encoder.embed(_pixels(encoder))
    rows, columns = encoder.grid_size(encoder.config)
    positions_1N = torch.arange(rows * columns, device=META)[None]
    if not encoder.prunes_between_blocks:
        for index in range(len(encoder.blocks)):
            hidden = encoder.run_block(index, hidden, positions_1N)
        return encoder.finish(hidden, positions_1N)
    start = 0
    for end, budget in zip(segment_ends(len(encoder.blocks), len(budgets)), budgets, strict=True):
        for index in range(start, end):
            hidden = encoder.run_block(index, hidden, positions_1N)
        hidden, positions_1N = hidden[:, : encoder.num_prefix_tokens + budget], positions_1N[:, :budget]
        start = end
    return encoder.finish(hidden, positions_1N)


def _count_vision(model: MeteorForConditionalGeneration) -> tuple[tuple[TowerFlops, ...], int, int]:
    """Encoders with their projectors; the joint projector; the scores of fusion, contained in a joint projector's."""
    config, towers, projected = model.config, [], []
    for encoder in _towers(model):
        name = encoder.config.name
        budgets = config.encode_budgets[name]
        (encoded, attention), everything = counted(_encode, encoder, config)
        _, tower = counted(_run_tower, encoder, budgets)
        projector = 0
        if config.fusion == "post_projection":
            hidden_1ND, projector = counted(model.projectors[name], encoded.hidden)
            encoded = encoded._replace(hidden=hidden_1ND)
        projected.append((encoded, attention))
        tokens = (config.encoder_tokens[name], *budgets)
        towers.append(TowerFlops(name, tokens, tower, everything - tower, projector))
    _, joined = counted(_fuse, model, projected, projected=True)
    if config.fusion == "channel_concat":
        return tuple(towers), joined, 0
    return tuple(towers), 0, joined


def _fuse(
    model: MeteorForConditionalGeneration,
    encoded: Sequence[tuple[VisionTokens, dict[float, Tensor] | None]],
    projected: bool = False,
) -> Tensor:
    """Tokens of all encoders -> visual tokens (1, K, C); with `projected` they have been through their projectors."""
    config, features = model.config, [tokens.hidden for tokens, _ in encoded]
    if config.fusion == "channel_concat":
        folds = [item.fold for item in config.encoders]
        joined = concat_channels(features, list(config.encoder_grids.values()), folds, config.concat_grid)
        features = [model.projectors[JOINT](joined)]
    elif not projected:
        features = [model.projectors[item.name](hidden) for item, hidden in zip(config.encoders, features, strict=True)]
    text_1C = torch.empty(1, config.text_config.hidden_size, device=META)
    attention = [found for _, found in encoded]
    pool = model.pool_of(features, [tokens.positions for tokens, _ in encoded], attention, text_1C)
    return prune_pool(pool, config.pruning.fuse)[0]


@contextmanager
def _layer_counts(layers: Sequence[nn.Module]) -> Iterator[tuple[FlopCounterMode, list[int]]]:
    """The counter of what runs inside, and the FLOPs of every layer in it."""
    with flop_counter() as counter:
        entered, spent = [0] * len(layers), [0] * len(layers)
        handles = []
        for index, layer in enumerate(layers):

            def enter(*_: Any, index: int = index) -> None:
                entered[index] = counter.get_total_flops()

            def leave(*_: Any, index: int = index) -> None:
                spent[index] += counter.get_total_flops() - entered[index]

            handles += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
        try:
            yield counter, spent
        finally:
            for handle in handles:
                handle.remove()


def _per_layer(model: MeteorForConditionalGeneration, length: int) -> tuple[list[int], list[int]]:
    """FLOPs of every LLM layer: prefill of `length` tokens, and one new token after them."""
    llm, width = model.language_model, model.config.text_config.hidden_size
    cache = DynamicCache(config=model.config.text_config)
    with _layer_counts(llm.layers) as (_, prefill):
        embeds_1TC = torch.empty(1, length, width, device=META)
        llm(inputs_embeds=embeds_1TC, attention_mask=_full(length), use_cache=True, **{CACHE: cache})
    with _layer_counts(llm.layers) as (_, step):
        embeds_11C = torch.empty(1, 1, width, device=META)
        llm(inputs_embeds=embeds_11C, attention_mask=_full(length + 1), use_cache=True, **{CACHE: cache})
    return prefill, step


def _count_layers(
    model: MeteorForConditionalGeneration, text_tokens: int, schedule: Sequence[tuple[int, int]]
) -> tuple[LayersFlops, ...]:
    """The LLM run by run: between two prunings every layer sees the same tokens."""
    equal = model.config.pruning.decode.equal_layers
    firsts = [0, *(layer for layer, _ in schedule)]
    ends = [*firsts[1:], model.config.text_config.num_hidden_layers]
    kept = [model.config.tokens_per_image, *(tokens for _, tokens in schedule)]
    runs = []
    for first, end, visual in zip(firsts, ends, kept, strict=True):
        prefill, step = _per_layer(model, text_tokens + visual)
        if equal:
            _, step = _per_layer(model, text_tokens + kept[-1])
        runs.append(LayersFlops(first, end, visual, sum(prefill[first:end]), sum(step[first:end])))
    return tuple(runs)


def _count_stage3(model: MeteorForConditionalGeneration, text_tokens: int, schedule: Sequence[tuple[int, int]]) -> int:
    """What stage 3 adds to the layers: the scores of the layers that are asked, each on the tokens it sees."""
    config, total = model.config, 0
    heads, width = config.decode_heads, config.text_config.hidden_size
    present = [config.tokens_per_image, *(kept for _, kept in schedule)]
    for (layer, _), visual in zip(schedule, present[:-1], strict=True):
        length = text_tokens + visual
        visual_1T = torch.ones(1, length, dtype=torch.bool, device=META)
        embeds_1TC = torch.empty(1, length, width, device=META)
        settings = replace(config.pruning.decode, layer=layer, later_layers=(), later_keep=())
        with _layer_counts(model.language_model.layers) as (counter, layers):
            attention_mass(model.language_model, embeds_1TC, None, None, visual_1T, settings, heads)
        total += counter.get_total_flops() - sum(layers)
    return total
