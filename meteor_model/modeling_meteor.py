"""MeteorForConditionalGeneration: several vision encoders, one projector each, one language model, three prunings.

The forward reads like the paper:

    1. encode   every tower runs segment by segment; tokens are pruned between segments to the budget its rank earned
    2. project  each encoder's tokens go through their own MLP into the LLM's width
    3. fuse     the tokens of all encoders are pooled; those that another encoder already says are dropped
    4. scatter  the survivors replace the placeholders in the text embeddings, counted sample by sample
    5. decode   the LLM; in `generate`, text-guided pruning after one early layer (meteor_model/decoder/)

Legend: B samples, M images of the batch, N tokens of one encoder, K visual tokens per image, T sequence length,
D encoder width, C LLM width, V vocabulary, S travelling image size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
from transformers.utils.generic import can_return_tuple

from meteor_model.chat import IGNORE_INDEX
from meteor_model.compat import CACHE, accepts_either_cache_name, cache_of
from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.decoder.cache import MeteorCache
from meteor_model.decoder.families import softcap_logits
from meteor_model.decoder.loop import decode_pruned
from meteor_model.decoder.prompt import check_not_empty
from meteor_model.encode import dense_maps, encode_pruned
from meteor_model.encoders import VisionEncoder, build_encoder
from meteor_model.fusion import MeteorProjector, concat_channels, concat_width, fuse_cooperatively
from meteor_model.generation_meteor import MeteorGenerationMixin, position_ids_of
from meteor_model.inputs import check_no_images, check_pixels, check_placeholders, check_tokens
from meteor_model.outputs import MeteorImageFeatures, MeteorOutput, PruningStats
from meteor_model.pretrained import MeteorPreTrainedModel
from meteor_model.pruning import singular_values, spectrum_rank

JOINT = "joint"  # the one projector of channel_concat


class MeteorForConditionalGeneration(MeteorPreTrainedModel, MeteorGenerationMixin):
    """Image(s) and text to text, with visual tokens pruned in three stages.

    Args:
        config: see `MeteorConfig`.
    """

    _tied_weights_keys = {"lm_head.weight": "language_model.embed_tokens.weight"}  # noqa: RUF012 (transformers' form)

    def __init__(self, config: MeteorConfig) -> None:
        super().__init__(config)
        config.check()
        width = config.text_config.hidden_size
        towers = {item.name: build_encoder(item) for item in config.encoders}
        self.encoders = nn.ModuleDict(towers)
        self.projectors = self._build_projectors({name: tower.embed_dim for name, tower in towers.items()})
        self.language_model = AutoModel.from_config(config.text_config)
        self.lm_head = nn.Linear(width, config.text_config.vocab_size, bias=False)
        undecided = [item.name for item in config.encoders if "attn_implementation" not in item.tower]
        self._set_tower_kernels(config._attn_implementation, undecided)
        self.post_init()

    def _build_projectors(self, widths: Mapping[str, int]) -> nn.ModuleDict:
        """One projector per encoder, or a joint one where maps are joined on the channels."""
        config = self.config
        if config.fusion == "channel_concat":
            widths = {JOINT: concat_width(list(widths.values()), [item.fold for item in config.encoders])}
        llm_width = config.text_config.hidden_size
        return nn.ModuleDict({name: MeteorProjector(width, llm_width) for name, width in widths.items()})

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.language_model

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    # ---------------------------------------------------------------------------------------------------------- vision

    def _towers(self) -> Iterator[tuple[str, VisionEncoder]]:
        for name, encoder in self.encoders.items():
            yield name, cast(VisionEncoder, encoder)

    def _pixels_of(self, name: str, pixel_values: torch.Tensor) -> torch.Tensor:
        """Normalised pixels (M, 3, R, R) for one tower, where it is and in its dtype."""
        encoder = cast(VisionEncoder, self.encoders[name])
        weight = next(p for p in encoder.parameters() if p.is_floating_point())
        return encoder.normalize(pixel_values.to(weight.device), weight.dtype)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor) -> MeteorImageFeatures:
        """Stages 1 and 2, as VLMs of transformers give them; `encode_images` gives the same as a plain pair.

        Args:
            pixel_values: (M, 3, S, S) uint8, M >= 1.
        """
        visual_MKC, stats = self.encode_images(pixel_values)
        return MeteorImageFeatures(visual_MKC, visual_MKC, pruning_stats=stats)

    def encode_images(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, PruningStats]:
        """Stages 1 and 2.

        Args:
            pixel_values: (M, 3, S, S) uint8, M >= 1.

        Returns:
            (M, K, C) visual tokens in encoder order, then raster order; and what was kept.
        """
        check_pixels(pixel_values)
        config = self.config
        encode = config.pruning.encode
        maps, kept = [], {}
        for name, encoder in self._towers():
            pixels = self._pixels_of(name, pixel_values)
            budgets = config.encode_budgets[name]
            tokens, kept[name] = encode_pruned(
                encoder, pixels, budgets, encode.first_deep_segment, encode.score_queries
            )
            maps.append(tokens.hidden)
        if config.fusion == "channel_concat":
            grids, folds = list(config.encoder_grids.values()), [item.fold for item in config.encoders]
            visual_MKC = self.projectors[JOINT](concat_channels(maps, grids, folds, config.concat_grid))
            keep_MK = torch.arange(visual_MKC.shape[1], device=visual_MKC.device).expand(len(visual_MKC), -1)
        else:
            projected = [self.projectors[name](hidden) for name, hidden in zip(kept, maps, strict=True)]
            visual_MKC, keep_MK = fuse_cooperatively(projected, config.tokens_per_image)
        return visual_MKC, PruningStats(kept, dict(config.encoder_tokens), keep_MK)

    @torch.no_grad()
    def measure_ranks(self, pixel_values: torch.Tensor, estimators: tuple[str, ...]) -> dict[str, dict[str, Any]]:
        """Rank of every encoder's unpruned feature map at each boundary, image by image.

        Args:
            pixel_values: (M, 3, S, S) uint8.
            estimators: keys of `meteor_model.pruning.RANK_ESTIMATORS`.

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

    def _scatter(
        self, embeds_BTC: torch.Tensor, is_image_BT: torch.Tensor, pixel_values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, PruningStats]:
        """Visual tokens into the placeholders; the visual tokens; what was kept.

        A batch without images runs the towers on a zero image, times 0, so that every rank of a distributed run
        executes every module.
        """
        check_pixels(pixel_values, empty=True)
        num_images = len(pixel_values)
        check_placeholders(is_image_BT, num_images, self.config.tokens_per_image)
        if num_images == 0:
            size = self.config.image_size
            features_MKC, stats = self.encode_images(pixel_values.new_zeros(1, 3, size, size))
            return embeds_BTC + 0.0 * features_MKC.sum().to(embeds_BTC), None, stats
        features_MKC, stats = self.encode_images(pixel_values)
        visual_MKC = features_MKC.to(embeds_BTC)
        is_image_BTC = is_image_BT.to(embeds_BTC.device).unsqueeze(-1).expand_as(embeds_BTC)
        return embeds_BTC.masked_scatter(is_image_BTC, visual_MKC), visual_MKC, stats

    # ------------------------------------------------------------------------------------------------------- the model

    @accepts_either_cache_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | float | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> MeteorOutput:
        """One pass.

        Args:
            input_ids: (B, T) with `config.image_token_id` once per visual token.
            attention_mask: (B, T) of 0 and 1; padding on either side.
            pixel_values: (M, 3, S, S) uint8, the images of all samples in order; M = 0 runs the towers on a dummy.
            labels: (B, T) token ids, -100 where not supervised.
            position_ids: (B, T); counted from the attention mask where None.
            past_key_values: a cache, also by the name `cache`. With a `MeteorCache`, stage 3 prunes at prefill.
            inputs_embeds: (B, T, C) instead of `input_ids`; `image_mask` then says where visual tokens are.
            image_mask: (B, T) bool, see above; with `pixel_values` by default where the placeholder's embedding is.
            prompt_embeds: (B, P, C) embeddings of the first P of `input_ids`, with the visual tokens in place.
            use_cache: as in transformers; by default not in training.
            logits_to_keep: compute only the last so many logits (0: all), or those of these positions.
            num_items_in_batch: divisor of the summed loss; None: the supervised tokens of this batch.
            output_attentions: also return the LLM's attention maps; its kernel must be "eager".
            output_hidden_states: also return the LLM's hidden states.
            kwargs: for the LLM's own forward.

        Raises:
            ValueError: where placeholders and visual tokens differ, naming the sample and both counts, also for ids of
                images that did not come; for a mask of another shape than the tokens; for labels, hidden states or
                attentions of a decoder that stage 3 prunes; for labels with `logits_to_keep`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if labels is not None and isinstance(past_key_values, MeteorCache):
            raise ValueError("labels go with an unpruned decoder: stage 3 leaves no logits for dropped tokens")
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("labels need the logits of every token: leave logits_to_keep out")
        visual_MKC, stats = None, None
        if inputs_embeds is None:
            assert input_ids is not None
            image_mask = input_ids == self.config.image_token_id
            if prompt_embeds is None:
                inputs_embeds = self.get_input_embeddings()(input_ids)
                if pixel_values is None:
                    check_no_images(image_mask, self.config.tokens_per_image, labels, past_key_values)
            else:
                later_embeds = self.get_input_embeddings()(input_ids[:, prompt_embeds.shape[1] :])
                inputs_embeds = torch.cat([prompt_embeds, later_embeds], dim=1)
        check_tokens(inputs_embeds, attention_mask, past_key_values)
        if pixel_values is not None:
            image_mask = self.placeholders_of(inputs_embeds) if image_mask is None else image_mask
            inputs_embeds, visual_MKC, stats = self._scatter(inputs_embeds, image_mask, pixel_values)
        if position_ids is None and attention_mask is not None:
            position_ids = position_ids_of(attention_mask)[:, -inputs_embeds.shape[1] :]
        config = self.config.text_config
        wanted = {
            "output_attentions": config.output_attentions if output_attentions is None else output_attentions,
            "output_hidden_states": config.output_hidden_states
            if output_hidden_states is None
            else output_hidden_states,
        }
        if isinstance(past_key_values, MeteorCache):
            if any(wanted.values()):
                raise ValueError(
                    f"{[name for name, on in wanted.items() if on]} cannot be given where stage 3 prunes: layers hold "
                    "different tokens. Pass past_key_values=DynamicCache(), or set pruning.decode.enabled to false"
                )
            decoded = decode_pruned(
                self.language_model,
                inputs_embeds,
                attention_mask,
                position_ids,
                image_mask,
                past_key_values,
                use_cache=use_cache is not False,
            )
            if stats is not None and decoded.decision is not None:
                stats.decode = decoded.decision.kept_counts_B
        else:
            decoded = self.language_model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=config.use_cache and not self.training if use_cache is None else use_cache,
                **{CACHE: past_key_values},
                **wanted,
                **kwargs,
            )
        rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = softcap_logits(config, self.lm_head(decoded.last_hidden_state[:, rows]))
        return MeteorOutput(
            loss=None if labels is None else token_loss(logits, labels, num_items_in_batch),
            logits=logits,
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
            image_hidden_states=visual_MKC,
            pruning_stats=stats,
            **{CACHE: cache_of(decoded)},
        )

    def placeholders_of(self, embeds_BTC: torch.Tensor) -> torch.Tensor:
        """Where embedded text (B, T, C) holds the placeholder's embedding, (B, T) bool."""
        token = torch.tensor(self.config.image_token_id, device=embeds_BTC.device)
        is_image_BT: torch.Tensor = (embeds_BTC == self.get_input_embeddings()(token)).all(dim=-1)
        return is_image_BT

    def embed_prompts(
        self,
        input_ids: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stages 1 and 2 for prompts: embeddings (B, T, C) with the visual tokens in place, and where they are (B, T).

        Args:
            input_ids: (B, T), or None with `inputs_embeds`.
            pixel_values: (M, 3, S, S) uint8, the images of all prompts in order.
            inputs_embeds: (B, T, C) instead of the embeddings of `input_ids`; without `pixel_values` they hold the
                visual tokens already.

        Raises:
            ValueError: where placeholders and visual tokens differ, naming the sample and both counts.
        """
        embeds_BTC = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        check_not_empty(embeds_BTC)
        if pixel_values is not None:
            check_pixels(pixel_values, empty=True)
        is_image_BT = self.placeholders_of(embeds_BTC) if input_ids is None else input_ids == self.config.image_token_id
        if pixel_values is not None and len(pixel_values):
            embeds_BTC, _, _ = self._scatter(embeds_BTC, is_image_BT, pixel_values)
        elif inputs_embeds is None:
            check_placeholders(is_image_BT, 0, self.config.tokens_per_image)
        return embeds_BTC, is_image_BT


def token_loss(
    logits_BTV: torch.Tensor, labels_BT: torch.Tensor, num_items_in_batch: torch.Tensor | float | None = None
) -> torch.Tensor:
    """Next-token cross entropy, summed over supervised tokens in fp32 and divided by `num_items_in_batch`.

    With None the divisor is this batch's own count of supervised tokens (at least 1): the mean. A distributed run
    passes global tokens / (world * accumulation), so that averaging gradients gives the mean over the global batch.
    """
    shifted_BT = labels_BT[:, 1:].to(logits_BTV.device)
    total = F.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).float(), shifted_BT.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    if num_items_in_batch is None:
        num_items_in_batch = (shifted_BT != IGNORE_INDEX).sum().clamp_min(1)
    return total / num_items_in_batch


def supervised_tokens(labels_BT: torch.Tensor) -> int:
    """Tokens of a batch that `token_loss` counts."""
    return int((labels_BT[:, 1:] != IGNORE_INDEX).sum())


AutoConfig.register(MeteorConfig.model_type, MeteorConfig, exist_ok=True)
AutoModelForImageTextToText.register(MeteorConfig, MeteorForConditionalGeneration, exist_ok=True)
