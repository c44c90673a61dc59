"""From pixels to the visual tokens that enter the language model: stages 1 and 2.

Legend: M images, N tokens of one encoder, K visual tokens per image, D encoder width, C LLM width, S travelling image
size, R an encoder's resolution.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers.utils.generic import can_return_tuple

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.encode import beyond_maps, dense_depth, dense_map, dense_maps, encode_looking, encode_pruned
from meteor_model.encoders import VisionEncoder
from meteor_model.encoders.at_hand import runs_at
from meteor_model.fusion import concat_channels, pooled_attention, prune_pool
from meteor_model.inputs import check_pixels
from meteor_model.options import refuse_options
from meteor_model.outputs import MeteorImageFeatures, PruningStats
from meteor_model.pruners.fuse_criteria import Pool, floors_of
from meteor_model.pruners.spectra import singular_values, spectrum_rank
from meteor_model.replay import GivenTokens, best_scored

JOINT = "joint"  # the one projector of channel_concat


class MeteorVisionMixin:
    """The part of `MeteorForConditionalGeneration` that sees."""

    if TYPE_CHECKING:
        config: MeteorConfig
        encoders: nn.ModuleDict
        projectors: nn.ModuleDict

    def follow(self, config: MeteorConfig) -> None:
        """Run under another configuration of the same modules, in place: other prunings, other image sizes of towers.

        A processor has to follow, too: `processor.tokens_per_image = config.tokens_per_image`.

        Raises:
            ValueError: for a configuration of other modules; nothing is changed then.
        """
        before = {name: encoder.config for name, encoder in self._towers()}
        items = {item.name: item for item in config.encoders}
        if list(items) != list(before) or config.fusion != self.config.fusion:
            raise ValueError("the configuration is of other encoders or another fusion: build a model of it")
        try:
            for name, encoder in self._towers():
                encoder.resize(items[name])
        except ValueError:
            for name, encoder in self._towers():
                encoder.resize(before[name])
            raise
        self.config = config

    def _towers(self) -> Iterator[tuple[str, VisionEncoder]]:
        for name, encoder in self.encoders.items():
            yield name, cast(VisionEncoder, encoder)

    def _pixels_of(self, name: str, pixel_values: torch.Tensor) -> torch.Tensor:
        """Normalised pixels (M, 3, R, R) for one tower, where it is and in its dtype."""
        encoder = cast(VisionEncoder, self.encoders[name])
        device, dtype = runs_at(encoder)
        return encoder.normalize(pixel_values.to(device), dtype)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> MeteorImageFeatures:
        """Stages 1 and 2, as VLMs of transformers give them; `encode_images` gives the same as a plain pair.

        Args:
            pixel_values: (M, 3, S, S) uint8, M >= 1.
            kwargs: `return_dict`. Hidden states and attentions of the towers are not given: tokens are dropped between
                their blocks, so there is nothing to stack.

        Raises:
            ValueError: for any other argument, naming it.
        """
        refuse_options("get_image_features", kwargs)
        visual_MKC, stats = self.encode_images(pixel_values)
        return MeteorImageFeatures(visual_MKC, visual_MKC, pruning_stats=stats)

    def encode_images(
        self, pixel_values: torch.Tensor, given: GivenTokens | None = None, text_MC: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, PruningStats]:
        """Stages 1 and 2.

        Args:
            pixel_values: (M, 3, S, S) uint8, M >= 1.
            given: the tokens to keep (`meteor_model.replay`); None keeps those with the best scores.
            text_MC: of each image's prompt (`inputs.mean_text_of_images`), for a criterion of stage 2 that looks at it.

        Raises:
            ValueError: where the criterion of stage 2 looks at the text and there is none.

        Returns:
            (M, K, C) visual tokens in encoder order, then raster order; and what was kept.
        """
        check_pixels(pixel_values)
        return self._fused(*self._encode(pixel_values, given), given, text_MC)

    def dense_depths(self) -> dict[str, int]:
        """For each tower, the blocks that run before this pruning touches a token (`meteor_model.encode.dense_depth`).

        Raises:
            ValueError: where a criterion reads more than the maps (`meteor_model.encode.beyond_maps`).
        """
        settings = self.config.pruning.encode
        if (beyond := beyond_maps(self.config.pruning)) is not None:
            raise ValueError(f"{beyond} looks into the towers: their maps do not say it")
        return {
            name: dense_depth(
                encoder, self.config.encode_budgets[name], settings.first_deep_segment, settings.criterion
            )
            for name, encoder in self._towers()
            if self.config.runs(name)
        }

    def dense_map(self, name: str, pixel_values: torch.Tensor, depth: int) -> torch.Tensor:
        """The map of one tower after so many of its blocks, nothing pruned; pixels (M, 3, S, S) uint8, M >= 1."""
        check_pixels(pixel_values)
        return dense_map(cast(VisionEncoder, self.encoders[name]), self._pixels_of(name, pixel_values), depth)

    def encode_dense(
        self, dense: Mapping[str, torch.Tensor], text_MC: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, PruningStats]:
        """`encode_images` from every tower's `dense_map` after `dense_depths` blocks: the same to the bit."""
        return self._fused(*self._encode(None, None, dense), None, text_MC)

    def _fused(
        self,
        maps: dict[str, torch.Tensor],
        kept: dict[str, tuple[torch.Tensor, ...]],
        attention: list[dict[float, torch.Tensor] | None],
        given: GivenTokens | None,
        text_MC: torch.Tensor | None,
    ) -> tuple[torch.Tensor, PruningStats]:
        """2. project, 3. fuse."""
        choose = best_scored if given is None else given.of_fusion()
        positions = [kept[name][-1] for name in maps]
        pool = self.pool_of(self._project(maps), positions, attention, text_MC)
        visual_MKC, keep_MK = prune_pool(pool, self.config.pruning.fuse, choose)
        return visual_MKC, PruningStats(kept, dict(self.config.encoder_tokens), keep_MK)

    def _encode(
        self,
        pixel_values: torch.Tensor | None,
        given: GivenTokens | None,
        dense: Mapping[str, torch.Tensor] | None = None,
    ) -> tuple[dict[str, torch.Tensor], dict[str, tuple[torch.Tensor, ...]], list[dict[float, torch.Tensor] | None]]:
        """1. encode: each tower's pruned map (M, N, D), and the positions that it kept at every boundary.

        And its attention by the looks of stage 2's criterion; none without any. Towers whose `dense_map` is given do
        not see the pixels, which may be None where all of them are.
        """
        settings, looks = self.config.pruning.encode, self.config.pruning.fuse.looks
        dense = dense or {}
        maps: dict[str, torch.Tensor] = {}
        kept: dict[str, tuple[torch.Tensor, ...]] = {}
        attention: list[dict[float, torch.Tensor] | None] = []
        images = len(next(iter(dense.values())) if pixel_values is None else pixel_values)
        for name, encoder in self._towers():
            if not self.config.runs(name):
                kept[name], blank = self._not_run(name, images)
                if blank is not None:
                    maps[name] = blank
                    attention.append(None)
                continue
            pixels = None if pixel_values is None else self._pixels_of(name, pixel_values)
            if looks:
                assert pixels is not None, "refused by dense_depths"
                tokens, found = encode_looking(encoder, pixels, looks, settings.score_queries)
                maps[name], kept[name] = tokens.hidden, (tokens.positions,)
                attention.append(found)
                continue
            budgets = self.config.encode_budgets[name]
            choose = best_scored if given is None else given.of_encoder(name)
            tokens, kept[name] = encode_pruned(
                encoder,
                pixels,
                budgets,
                settings.first_deep_segment,
                settings.score_queries,
                choose,
                settings.criterion,
                settings.options,
                dense.get(name),
            )
            maps[name] = tokens.hidden
        return maps, kept, attention

    def _not_run(self, name: str, images: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        """What an encoder without a budget keeps at every boundary: nothing. Where maps are joined, its is zero."""
        config, encoder = self.config, cast(VisionEncoder, self.encoders[name])
        device, dtype = runs_at(encoder)
        if config.fusion != "channel_concat":
            none_M0 = torch.zeros(images, 0, dtype=torch.int64, device=device)
            return tuple(none_M0 for _ in config.encode_budgets[name]), None
        tokens = config.encoder_tokens[name]
        cells_MN = torch.arange(tokens, device=device).expand(images, -1)
        return (cells_MN,), torch.zeros(images, tokens, encoder.embed_dim, dtype=dtype, device=device)

    def _project(self, maps: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """2. project: maps in the LLM's width; one joint map where they are joined on the channels."""
        config = self.config
        if config.fusion == "channel_concat":
            grids, folds = list(config.encoder_grids.values()), [item.fold for item in config.encoders]
            return [self.projectors[JOINT](concat_channels(list(maps.values()), grids, folds, config.concat_grid))]
        return [self.projectors[name](hidden_MND) for name, hidden_MND in maps.items()]

    def pool_of(
        self,
        projected: Sequence[torch.Tensor],
        positions: Sequence[torch.Tensor],
        attention: Sequence[Mapping[float, torch.Tensor] | None] = (),
        text_MC: torch.Tensor | None = None,
    ) -> Pool:
        """What stage 2 is given.

        Args:
            projected: maps (M, N_l, C): one an encoder, or the joint one.
            positions: (M, N_l) where the encoders' tokens stand in their grids.
            attention: of the encoders, by the looks of the criterion. Of all three, encoders that are run.
            text_MC: see `encode_images`.
        """
        config, fuse = self.config, self.config.pruning.fuse
        if fuse.enabled and fuse.wants_text and text_MC is None:
            raise ValueError(
                f"pruning.fuse.criterion {fuse.criterion!r} looks at the text of the prompt, which is not given here: "
                "run the whole prompt (forward, generate), or choose another criterion"
            )
        joined = config.fusion == "channel_concat"
        grids = [grid for name, grid in config.encoder_grids.items() if joined or config.runs(name)]
        side = config.concat_grid if joined else None
        looked = {
            look: pooled_attention([None if item is None else item[look] for item in attention], grids, side)
            for look in fuse.looks
        }
        if side is not None:
            cells_MN = torch.arange(side * side, device=projected[0].device).expand(len(projected[0]), -1)
            grids, positions = [(side, side)], [cells_MN]
        text_MC = None if text_MC is None else text_MC.to(projected[0].device)
        keep = config.tokens_per_image
        floors = floors_of([tokens.shape[1] for tokens in projected], keep, fuse.floor) if fuse.enabled else ()
        return Pool(tuple(projected), tuple(grids), tuple(positions), keep, looked, text_MC, floors)

    @torch.no_grad()
    def measure_ranks(self, pixel_values: torch.Tensor, estimators: tuple[str, ...]) -> dict[str, dict[str, Any]]:
        """Rank of every encoder's unpruned feature map at each boundary, image by image.

        Args:
            pixel_values: (M, 3, S, S) uint8.
            estimators: keys of `meteor_model.pruners.spectra.RANK_ESTIMATORS`.

        Returns:
            estimator -> encoder -> float array (M, boundaries).

        Raises:
            ValueError: for no image.
        """
        check_pixels(pixel_values)
        segments = len(self.config.pruning.encode.totals) or 1
        ranks: dict[str, dict[str, Any]] = {estimator: {} for estimator in estimators}
        for name, encoder in self._towers():
            maps = dense_maps(encoder, self._pixels_of(name, pixel_values), segments)
            spectra = [singular_values(hidden_MND) for hidden_MND in maps]
            for estimator in estimators:
                values = [spectrum_rank(spectrum_MR, estimator) for spectrum_MR in spectra]
                ranks[estimator][name] = torch.stack(values, dim=1).float().cpu().numpy()
        return ranks
