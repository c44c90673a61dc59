"""EVA-02 (timm's Eva): 2-D rotary positions, and the detector layout with window attention.

`tower` holds the arguments of `timm.models.eva.Eva`. Its `img_size` is the size that the positions were trained at; at
another `image_size` they are interpolated. The detector layout takes two more: `window_size` and `global_blocks`.

Legend: M images, N patch tokens present, P prefix tokens, T = P + N, D width, H heads, d head width, C = 2 d (sine and
cosine), R the encoder's own resolution, Q query tokens of a score.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from timm.layers import apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from meteor_model.encoders.at_hand import own_tensors, project_part, whole_weight
from meteor_model.encoders.base import EncoderConfig, VisionEncoder, square_grid
from meteor_model.encoders.pixels import OPENAI_MEAN, OPENAI_STD
from meteor_model.encoders.windows import (
    Memo,
    Sink,
    WindowLayout,
    attend_in_windows,
    blocked,
    local_cells,
    partition,
    unpartition,
    window_extent,
    window_layout,
)
from meteor_model.pruners.tower_scores import evenly_spaced, prefix_attention, received_attention

#: What both layouts are: pre-norm blocks, axial rotary positions, every patch present at the start.
_EVA02: dict[str, Any] = {
    "num_classes": 0,
    "use_rot_pos_emb": True,
    "rope_type": "cat",
    "attn_type": "eva",
    "use_post_norm": False,
    "num_reg_tokens": 0,
    "patch_drop_rate": 0.0,
    "dynamic_img_pad": False,
    "rope_shift_coords": None,
    "rope_jitter_coords": None,
    "rope_rescale_coords": None,
}
_WITH_CLS: dict[str, Any] = {**_EVA02, "class_token": True}
#: The detector's backbone has neither CLS nor a norm after its last block.
_DETECTOR: dict[str, Any] = {
    **_EVA02,
    "class_token": False,
    "qk_norm": False,
    "use_fc_norm": False,
    "use_post_transformer_norm": False,
}


def _arguments(config: EncoderConfig, fixed: Mapping[str, Any], own: Sequence[str] = ()) -> dict[str, Any]:
    """Eva's arguments: its defaults, then `tower`, then what the layout fixes.

    Raises ValueError for an argument that Eva does not have, and for one that contradicts the layout.
    """
    known = {name: value.default for name, value in inspect.signature(Eva.__init__).parameters.items()}
    del known["self"]
    for key, value in config.tower.items():
        if key not in known and key not in own:
            raise ValueError(f"encoder {config.name!r}: timm's Eva has no argument {key!r}")
        if key in fixed and value != fixed[key]:
            raise ValueError(
                f"encoder {config.name!r}: family {config.family!r} needs {key}={fixed[key]!r}, not {value!r}"
            )
    given = {key: value for key, value in config.tower.items() if key not in own}
    return {**known, **given, **{key: value for key, value in fixed.items() if key in known}}


def _project(attention: EvaAttention, hidden_MTD: Tensor, part: int) -> Tensor:
    """Query (0), key (1) or value (2) of the block's own projections, fused or not: (M, T, H, d)."""
    linear = (attention.q_proj, attention.k_proj, attention.v_proj)[part]
    if linear is None:
        with own_tensors(attention):
            bias = (attention.q_bias, attention.k_bias, attention.v_bias)[part]
            projected_MTD = project_part(attention.qkv, hidden_MTD, part, bias)
    else:
        projected_MTD = linear(hidden_MTD)
    heads_MTHd = projected_MTD.unflatten(2, (attention.num_heads, -1))
    if part == 2:
        return heads_MTHd
    normed_MTHd: Tensor = (attention.q_norm, attention.k_norm)[part](heads_MTHd)
    return normed_MTHd


def _call_projection(attention: EvaAttention, hidden_MTD: Tensor) -> None:
    """Have timm's own forward call a fused projection that something stands around.

    Where a bias goes with it, timm multiplies by the layer's weight itself, past adapters and offloading.
    """
    if attention.qkv is not None and attention.q_bias is not None:
        attention.qkv_bias_separate = whole_weight(attention.qkv, hidden_MTD) is None


def _rotate(attention: EvaAttention, heads: Tensor, rope: Tensor) -> Tensor:
    """2-D rotation of (..., d) by `rope` (..., C), whose other axes fit or broadcast."""
    rotated: Tensor = apply_rot_embed_cat(heads, rope, half=attention.rotate_half)
    return rotated


def _rope_of(table_NC: Tensor, cells_MN: Tensor, all_present: bool) -> Tensor:
    """Rotations of the cells that are left: (M, 1, N, C); the table itself, (N, C), where every cell is."""
    return table_NC if all_present else table_NC[cells_MN][:, None]


def _add_branches(block: EvaBlock, hidden_MND: Tensor, attended_MND: Tensor) -> Tensor:
    """What `EvaBlock` does with the output of its attention."""
    with own_tensors(block):
        if block.gamma_1 is not None:
            attended_MND = block.gamma_1 * attended_MND
        hidden_MND = hidden_MND + block.drop_path1(attended_MND)
        fed_MND: Tensor = block.mlp(block.norm2(hidden_MND))
        if block.gamma_2 is not None:
            fed_MND = block.gamma_2 * fed_MND
    return hidden_MND + block.drop_path2(fed_MND)


class _EvaEncoder(VisionEncoder):
    """What both layouts share: where the parts of timm's Eva are."""

    mean, std = OPENAI_MEAN, OPENAI_STD
    idle = ("fc_norm",)
    #: What the layout fixes of Eva's arguments.
    fixed: ClassVar[Mapping[str, Any]]
    #: Settings of `tower` that are the layout's own, not Eva's.
    own: ClassVar[tuple[str, ...]] = ()
    tower: Eva

    @classmethod
    def arguments(cls, config: EncoderConfig) -> dict[str, Any]:
        """Eva's arguments for this encoder. Raises ValueError as `_arguments`."""
        return _arguments(config, cls.fixed, cls.own)

    @classmethod
    def grid_size(cls, config: EncoderConfig) -> tuple[int, int]:
        return square_grid(config, cls.arguments(config)["patch_size"])

    @classmethod
    def num_blocks(cls, config: EncoderConfig) -> int:
        depth: int = cls.arguments(config)["depth"]
        return depth

    @property
    def embed_dim(self) -> int:
        return self.tower.embed_dim

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.tower.blocks


class Eva02Encoder(_EvaEncoder):
    """`timm.models.eva.Eva` with a CLS token, block by block; the rotations follow the kept tokens."""

    num_prefix_tokens = 1
    fixed = _WITH_CLS

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        arguments = self.arguments(config)
        # A static model is what timm builds, with its rotations stored; at another size timm computes them as it runs.
        self.tower = Eva(**{**arguments, "dynamic_img_size": config.image_size != arguments["img_size"]})

    @override
    def embed(self, pixels_MCRR: Tensor) -> Tensor:
        patches = self.tower.patch_embed(pixels_MCRR)
        with own_tensors(self.tower):
            hidden, _ = self.tower._pos_embed(patches)
        return self.tower.norm_pre(hidden)

    def _rope(self, positions_MN: Tensor) -> Tensor:
        table_NC = self.tower.rope.get_embed(shape=self.grid)
        return _rope_of(table_NC, positions_MN, positions_MN.shape[1] == math.prod(self.grid))

    @override
    def run_block(self, index: int, hidden_MTD: Tensor, positions_MN: Tensor) -> Tensor:
        block = self.tower.blocks[index]
        _call_projection(block.attn, hidden_MTD)
        output: Tensor = block(hidden_MTD, rope=self._rope(positions_MN))
        return output

    @override
    def finish(self, hidden_MTD: Tensor, positions_MN: Tensor) -> Tensor:
        return self.tower.norm(hidden_MTD)

    def importance(self, index: int, input_MTD: Tensor, positions_MN: Tensor, queries: int | None) -> Tensor:
        """Attention from CLS. CLS has no position: only the keys are rotated, so they have to be computed."""
        block = self.tower.blocks[index]
        normed_MTD = block.norm1(input_MTD)
        key_MHTd = _project(block.attn, normed_MTD, 1).transpose(1, 2)
        patches_MHNd = _rotate(block.attn, key_MHTd[:, :, 1:], self._rope(positions_MN))
        return prefix_attention(
            _project(block.attn, normed_MTD[:, :1], 0).transpose(1, 2),
            torch.cat([key_MHTd[:, :, :1], patches_MHNd], dim=2),
            scaling=block.attn.scale,
            num_prefix=1,
        )


def _outside_sink(attention: EvaAttention, outside_MN: Tensor, value_MNHd: Tensor, width: int) -> Sink:
    """The zero cells of a window beyond the grid's edge, D `width`: key zero (there is no key bias), value the bias."""
    logit_MN = outside_MN.clamp(min=1).log().to(value_MNHd.dtype)
    logit_MN = logit_MN.masked_fill(outside_MN == 0, blocked(value_MNHd.dtype))
    zero_Hd = value_MNHd.new_zeros(value_MNHd.shape[2:])
    value_Hd = _project(attention, value_MNHd.new_zeros(1, 1, width), 2)[0, 0]
    return Sink(zero_Hd, value_Hd, logit_MN[..., None])


class _Places(NamedTuple):
    """What the detector's blocks need to know of the kept cells, the same for all blocks of a segment.

    Attributes:
        global_rope: rotations in the grid, as `_rope_of` gives them.
        window_rope: rotations within the windows: (n, C) of all cells of one, or (M, N, 1, C) of the kept ones.
        layout: the windows of the kept tokens; None where every token is present.
        outside_MN: int64, cells of each token's window that lie beyond the grid; None where windows fit the grid.
    """

    global_rope: Tensor
    window_rope: Tensor
    layout: WindowLayout | None
    outside_MN: Tensor | None


class Eva02DetEncoder(_EvaEncoder):
    """EVA-02's detector backbone on timm's Eva: window attention but for the global blocks, no CLS token.

    Conventions of the public EVA-02 detector: positions of the pre-training grid resized bicubically; the rotations of
    a window block are those of the cell within its window, those of a global block of the cell in the grid, both
    stretched to `ref_feat_shape`; cells beyond the grid's edge are zero after the first norm and take part.
    Tokens are scored by the attention they receive in the last global block of a segment.
    """

    fixed = _DETECTOR
    own = ("window_size", "global_blocks")

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.window, self.global_blocks = self._layout(config)
        self.tower = Eva(**{**self.arguments(config), "dynamic_img_size": True})
        self._known = Memo[_Places]()

    @classmethod
    def _layout(cls, config: EncoderConfig) -> tuple[int, tuple[int, ...]]:
        """Window size and global blocks; ValueError where one is missing or impossible."""
        missing = [key for key in cls.own if key not in config.tower]
        if missing:
            raise ValueError(f"encoder {config.name!r}: the tower of family {config.family!r} needs {missing[0]!r}")
        window, chosen, depth = config.tower["window_size"], config.tower["global_blocks"], cls.num_blocks(config)
        if window < 1:
            raise ValueError(f"encoder {config.name!r}: window_size must be at least 1, got {window}")
        if not chosen or not all(0 <= index < depth for index in chosen):
            raise ValueError(
                f"encoder {config.name!r}: global_blocks must be some of 0..{depth - 1}, got {list(chosen)}"
            )
        return window, tuple(sorted(set(chosen)))

    @classmethod
    @override
    def grid_size(cls, config: EncoderConfig) -> tuple[int, int]:
        cls._layout(config)  # refuses an impossible one
        return super().grid_size(config)

    @override
    def embed(self, pixels_MCRR: Tensor) -> Tensor:
        tower = self.tower
        hidden_MND = tower.patch_embed(pixels_MCRR).flatten(1, 2)
        with own_tensors(tower):
            position_1ND = tower.pos_embed
        if position_1ND is not None:
            if tower.patch_embed.grid_size != self.grid:
                grid_1Dhw = position_1ND.transpose(1, 2).unflatten(2, tower.patch_embed.grid_size)
                resized_1Dhw = F.interpolate(grid_1Dhw.float(), size=self.grid, mode="bicubic", align_corners=False)
                position_1ND = resized_1Dhw.to(position_1ND.dtype).flatten(2).transpose(1, 2)
            hidden_MND = hidden_MND + position_1ND
        return tower.norm_pre(tower.pos_drop(hidden_MND))

    def _all_present(self, positions_MN: Tensor) -> bool:
        return positions_MN.shape[1] == math.prod(self.grid)

    def _places(self, positions_MN: Tensor) -> _Places:
        window, rope = self.window, self.tower.rope
        global_rope = _rope_of(rope.get_embed(shape=self.grid), positions_MN, self._all_present(positions_MN))
        window_rope = rope.get_embed(shape=(window, window))
        if self._all_present(positions_MN):
            return _Places(global_rope, window_rope, None, None)
        row_MN, column_MN = local_cells(positions_MN, self.grid[1], window)
        window_rope = window_rope[row_MN * window + column_MN][:, :, None]
        rows_MN, columns_MN = window_extent(positions_MN, self.grid, window)
        fits = self.grid[0] % window == 0 and self.grid[1] % window == 0
        layout = window_layout(positions_MN, self.grid, window)
        return _Places(global_rope, window_rope, layout, None if fits else window**2 - rows_MN * columns_MN)

    @override
    def run_block(self, index: int, hidden_MTD: Tensor, positions_MN: Tensor) -> Tensor:
        block, places = self.tower.blocks[index], self._known(positions_MN, self._places)
        _call_projection(block.attn, hidden_MTD)
        if index in self.global_blocks:
            output: Tensor = block(hidden_MTD, rope=places.global_rope)
            return output
        normed_MND = block.norm1(hidden_MTD)
        if places.layout is None:
            windows_GnD = block.attn(partition(normed_MND, self.grid, self.window), rope=places.window_rope)
            attended_MND = unpartition(windows_GnD, self.grid, self.window)
        else:
            attended_MND = self._attend(block.attn, normed_MND, places, places.layout)
        return _add_branches(block, hidden_MTD, attended_MND)

    def _attend(self, attention: EvaAttention, normed_MND: Tensor, places: _Places, layout: WindowLayout) -> Tensor:
        """The block's attention on the kept tokens: its projections on the flat row, its core window by window."""
        value_MNHd = _project(attention, normed_MND, 2)
        attended_MND = attend_in_windows(
            _rotate(attention, _project(attention, normed_MND, 0), places.window_rope),
            _rotate(attention, _project(attention, normed_MND, 1), places.window_rope),
            value_MNHd,
            layout,
            sink=None
            if places.outside_MN is None
            else _outside_sink(attention, places.outside_MN, value_MNHd, normed_MND.shape[2]),
            dropout=attention.attn_drop.p if self.training else 0.0,
        )
        output: Tensor = attention.proj_drop(attention.proj(attention.norm(attended_MND)))
        return output

    def score_block(self, end: int) -> int:
        """The last global block before `end`: only there does a token receive attention from the whole image."""
        return max((index for index in self.global_blocks if index < end), default=-1)

    def importance(self, index: int, input_MTD: Tensor, positions_MN: Tensor, queries: int | None) -> Tensor:
        """Attention received in global block `index` from `queries` evenly spaced tokens (None: from all)."""
        if index not in self.global_blocks:
            raise ValueError(
                f"encoder {self.config.name!r}: block {index} attends within windows and cannot score tokens; "
                f"every scored segment needs one of the global blocks {list(self.global_blocks)}"
            )
        block = self.tower.blocks[index]
        normed_MND = block.norm1(input_MTD)
        rope = self._known(positions_MN, self._places).global_rope
        key_MHNd = _rotate(block.attn, _project(block.attn, normed_MND, 1).transpose(1, 2), rope)
        pick_Q = evenly_spaced(positions_MN.shape[1], queries, positions_MN.device)
        query_MHQd = _project(block.attn, normed_MND[:, pick_Q], 0).transpose(1, 2)
        return received_attention(_rotate(block.attn, query_MHQd, rope[..., pick_Q, :]), key_MHNd, block.attn.scale)
