"""The contract of a vision encoder: a library's tower, driven block by block so that tokens can be pruned in between.

Legend: M images, N patch tokens present, P prefix tokens (CLS, registers), T = P + N, D width, H heads, d head width,
S travelling image size (uint8), R the encoder's own resolution.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from meteor_model.checks import nearest, whole_number
from meteor_model.encoders.at_hand import whole_weight
from meteor_model.encoders.pixels import HALF_MEAN, HALF_STD, PIXELS, check_images, eagle_pixels, own_pixels
from meteor_model.pruners.tower_scores import (
    absorbed_prefix_attention,
    evenly_spaced,
    prefix_attention,
    received_attention,
)

ConfigT = TypeVar("ConfigT", bound=PreTrainedConfig)


@dataclass(frozen=True)
class EncoderConfig:
    """One tower of the model.

    Attributes:
        name: unique within the model; part of parameter names, so letters, digits and underscores.
        family: key of the encoder registry (`meteor_model.encoders.ENCODERS`).
        image_size: side in pixels of the square image that the tower sees.
        tower: arguments of the library's own configuration class.
        fold: cells per side that are folded into one token's channels (pixel unshuffle) where maps are joined on the
            channels; EAGLE-X5 folds SAM's 64 x 64 map by 2.
        pixels: how images become this tower's pixels: "own", as the family was trained, or "eagle", as EAGLE does it
            for all its towers (`meteor_model.encoders.pixels`).
    """

    name: str
    family: str
    image_size: int
    tower: dict[str, Any] = field(default_factory=dict)
    fold: int = 1
    pixels: str = "own"

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and self.name.isidentifier()):
            raise ValueError(f"encoder name {self.name!r} must be letters, digits and underscores: it names parameters")
        if hasattr(nn.ModuleDict(), self.name):
            raise ValueError(f"encoder name {self.name!r} is taken by torch.nn.ModuleDict, which holds the encoders")
        whole_number(f"encoder {self.name!r}: image_size", self.image_size, least=1)
        whole_number(f"encoder {self.name!r}: fold", self.fold, least=1)
        if self.pixels not in PIXELS:
            raise ValueError(f"encoder {self.name!r}: pixels must be one of {', '.join(PIXELS)}, got {self.pixels!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for config.json."""
        return asdict(self)


class VisionTokens(NamedTuple):
    """The currency between stages.

    Attributes:
        hidden: (M, N, D) patch tokens; prefix tokens are apart.
        positions: (M, N) int64, ascending, index of each token into the encoder's full grid (row * width + column).
        prefix: (M, P, D) CLS and register tokens, never pruned.
    """

    hidden: torch.Tensor
    positions: torch.Tensor
    prefix: torch.Tensor


class ScoreProjections(NamedTuple):
    """What one block's attention scores are recomputed from: its own modules, called on its own input."""

    norm: nn.Module
    query: nn.Module
    key: nn.Module
    num_heads: int
    scaling: float


class VisionEncoder(nn.Module, ABC):
    """A library's vision tower as embed -> blocks -> finish. A subclass names the pieces; nothing is copied or patched.

    Run without pruning, `embed`, every `run_block` in order and `finish` equal the library's own forward.
    """

    #: Whether tokens may be dropped between blocks. A convolutional tower says False: it runs dense and is pruned at
    #: its output only.
    prunes_between_blocks: ClassVar[bool] = True
    #: Whether the same weights run at any image size that its cells divide.
    any_size: ClassVar[bool] = False
    #: Prefix tokens (CLS first, then registers) in front of the patch tokens.
    num_prefix_tokens: int = 0
    #: Channel mean and standard deviation of the pixels in [0, 1].
    mean: tuple[float, float, float] = HALF_MEAN
    std: tuple[float, float, float] = HALF_STD
    #: Parameters of the tower, by the start of their names, on which no token depends: they never get a gradient.
    idle: tuple[str, ...] = ()
    #: The library's module, whole; weights are loaded into it by its own names.
    tower: Any

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        #: Rows and columns of the full token grid; kept, for reading a library's configuration in every pass costs time
        #: and cannot be compiled.
        self.grid = self.grid_size(config)
        # The names that `gradient_checkpointing_enable` of transformers looks for and sets.
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., torch.Tensor] | None = None

    @classmethod
    @abstractmethod
    def grid_size(cls, config: EncoderConfig) -> tuple[int, int]:
        """Rows and columns of the full token grid, from the configuration alone."""

    @classmethod
    @abstractmethod
    def num_blocks(cls, config: EncoderConfig) -> int:
        """Number of blocks, from the configuration alone."""

    @property
    @abstractmethod
    def embed_dim(self) -> int:
        """Width D of the finished tokens."""

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The library's blocks, in order."""

    @abstractmethod
    def embed(self, pixels_MCRR: torch.Tensor) -> torch.Tensor:
        """Normalised pixels (M, 3, R, R) -> (M, P + N, D), prefix tokens first."""

    def run_block(self, index: int, hidden_MTD: torch.Tensor, positions_MN: torch.Tensor) -> torch.Tensor:
        """Block `index` on the tokens present. `positions_MN` is for towers whose blocks depend on position."""
        output: torch.Tensor = self.blocks[index](hidden_MTD)
        return output

    def checkpointed_block(self, index: int, hidden_MTD: torch.Tensor, positions_MN: torch.Tensor) -> torch.Tensor:
        """`run_block`, recomputed in the backward pass where the model's gradient checkpointing is on.

        The layers of transformers checkpoint themselves; every other block is checkpointed here, so that each block is
        recomputed exactly once.
        """
        recompute = self._gradient_checkpointing_func
        if recompute is None or not (self.gradient_checkpointing and self.training):
            return self.run_block(index, hidden_MTD, positions_MN)
        if self.checkpoints_itself(index, positions_MN):
            return self.run_block(index, hidden_MTD, positions_MN)
        return recompute(partial(self.run_block, index), hidden_MTD, positions_MN)

    def checkpointed_input(self, hidden_MTD: torch.Tensor) -> torch.Tensor:
        """What the first block is given, with a gradient of its own where blocks are recomputed.

        The reentrant kind of checkpointing gives gradients to a block's parameters only where its input has one, and
        behind frozen embeddings it has none: adapters in the blocks would not learn.
        """
        recomputes = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if recomputes and not hidden_MTD.requires_grad and any(p.requires_grad for p in self.parameters()):
            hidden_MTD.requires_grad_()
        return hidden_MTD

    def resize(self, config: EncoderConfig) -> None:
        """Follow a configuration of another image size. ValueError where the weights belong to theirs."""
        if config == self.config:
            return
        if not self.any_size or replace(config, image_size=self.config.image_size) != self.config:
            raise ValueError(
                f"encoder {self.config.name!r} is built already and cannot become {config}: build a model of that "
                "configuration and load the weights into it"
            )
        self.config, self.grid = config, self.grid_size(config)

    def freeze_idle(self) -> None:
        """Parameters that never get a gradient ask for none, so that DistributedDataParallel does not wait for them."""
        for name, parameter in self.tower.named_parameters():
            if name.startswith(self.idle):
                parameter.requires_grad_(False)

    def checkpoints_itself(self, index: int, positions_MN: torch.Tensor) -> bool:
        """Whether `run_block` calls a layer of transformers, which does its own gradient checkpointing."""
        return isinstance(self.blocks[index], GradientCheckpointingLayer)

    def finish(self, hidden_MTD: torch.Tensor, positions_MN: torch.Tensor) -> torch.Tensor:
        """What the library does after the last block. `positions_MN` is for towers whose neck mixes neighbours."""
        return hidden_MTD

    def score_block(self, end: int) -> int:
        """The block whose attention scores the boundary after block `end - 1`: an absolute index within the segment.

        A tower that mixes window and global attention answers its last global block before `end`.
        """
        return end - 1

    def score_projections(self, index: int) -> ScoreProjections:
        """The modules of block `index` from which its attention scores are recomputed."""
        raise NotImplementedError(f"{type(self).__name__} does not score tokens by attention")

    def importance(
        self, index: int, input_MTD: torch.Tensor, positions_MN: torch.Tensor, queries: int | None
    ) -> torch.Tensor:
        """Attention-based importance of the patch tokens in block `index`, given that block's input.

        CLS attention where there is a CLS token, else the attention received from `queries` evenly spaced tokens (None:
        from all); heads averaged. Only these rows are computed; the block itself keeps its fused attention.

        Returns: (M, N) fp32, high = keep.
        """
        parts = self.score_projections(index)
        normed_MTD = parts.norm(input_MTD)
        if self.num_prefix_tokens:
            query_MH1d = split_heads(parts.query(normed_MTD[:, :1]), parts.num_heads)
            key_weight = whole_weight(parts.key, normed_MTD)
            if key_weight is not None:
                return absorbed_prefix_attention(
                    query_MH1d[:, :, 0], normed_MTD, key_weight, parts.scaling, self.num_prefix_tokens
                )
            key_MHTd = split_heads(parts.key(normed_MTD), parts.num_heads)
            return prefix_attention(query_MH1d, key_MHTd, scaling=parts.scaling, num_prefix=self.num_prefix_tokens)
        key_MHNd = split_heads(parts.key(normed_MTD), parts.num_heads)
        pick_Q = evenly_spaced(normed_MTD.shape[1], queries, normed_MTD.device)
        query_MHQd = split_heads(parts.query(normed_MTD[:, pick_Q]), parts.num_heads)
        return received_attention(query_MHQd, key_MHNd, scaling=parts.scaling)

    def normalize(self, pixels_MCSS: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """uint8 images (M, 3, S, S) -> this tower's resolution and value range, on the images' device."""
        check_images(pixels_MCSS)
        size = self.config.image_size
        if self.config.pixels == "eagle":
            return eagle_pixels(pixels_MCSS, size).to(dtype)
        return own_pixels(pixels_MCSS, size, self.mean, self.std).to(dtype)


def split_heads(hidden_BTD: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(B, T, H * d) -> (B, H, T, d)."""
    return hidden_BTD.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def flatten_patches(pixels_MCRR: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """(M, 3, R, R) -> (M, rows * columns, p * p * 3): patches in raster order, each with its channels last."""
    patches = pixels_MCRR.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(1, 2).flatten(2)


def square_grid(config: EncoderConfig, patch_size: Any) -> tuple[int, int]:
    """Grid of a square image cut into square patches; ValueError where the patch does not divide the image."""
    if not isinstance(patch_size, int):
        raise ValueError(f"encoder {config.name!r}: patch_size must be one number (square patches), got {patch_size!r}")
    if config.image_size % patch_size:
        raise ValueError(
            f"encoder {config.name!r}: image_size {config.image_size} is not a multiple of patch size {patch_size}"
        )
    side = config.image_size // patch_size
    return side, side


def library_config(config: EncoderConfig, kind: type[ConfigT], **defaults: Any) -> ConfigT:
    """The library's configuration of a tower: `defaults`, then `config.tower`.

    Raises ValueError for a key of `config.tower` that the configuration class does not have: it would be ignored.
    """
    known = set(kind().to_dict()) | {"attn_implementation"}
    for key in config.tower:
        if key not in known:
            raise ValueError(f"encoder {config.name!r}: {kind.__name__} has no setting {key!r}{nearest(key, known)}")
    return kind(**{**defaults, **config.tower})
