"""MeteorForConditionalGeneration: several vision encoders, one projector each, one language model, three prunings.

The forward reads like the paper:

    1. encode   every tower runs segment by segment; tokens are pruned between segments to the budget its rank earned
    2. project  each encoder's tokens go through their own MLP into the LLM's width
    3. fuse     the tokens of all encoders are pooled; those that another encoder already says are dropped
    4. scatter  the survivors replace the placeholders in the text embeddings, counted sample by sample
    5. decode   the LLM; in `generate`, text-guided pruning after one early layer (meteor_model/decoder/)
    6. predict  logits of every token, or straight the loss of those that are supervised (meteor_model/language_head.py)

Legend: B samples, M images of the batch, N tokens of one encoder, K visual tokens per image, T sequence length,
D encoder width, C LLM width, V vocabulary, S travelling image size.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, DynamicCache
from transformers.modeling_outputs import ModelOutput
from transformers.utils.generic import can_return_tuple
from typing_extensions import override

from meteor_model.chat import IGNORE_INDEX
from meteor_model.compat import CACHE, accepts_either_cache_name, cache_of
from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.decoder.cache import MeteorCache, RecordingCache
from meteor_model.decoder.families import softcap_logits
from meteor_model.decoder.loop import decode_pruned
from meteor_model.decoder.packed import Packed, check_packed_images, read_packed
from meteor_model.decoder.prompt import check_not_empty
from meteor_model.encoders import build_encoder
from meteor_model.fusion import MeteorProjector, concat_width
from meteor_model.generation_meteor import MeteorGenerationMixin
from meteor_model.inputs import (
    at_least_one,
    check_arguments,
    check_image_mask,
    check_images,
    check_no_images,
    check_outputs,
    check_pixels,
    check_placeholders,
    check_tokens,
    mean_text_of_images,
    scatter_visual,
)
from meteor_model.language_head import LanguageHead
from meteor_model.logits import (
    LogitsToKeep,
    check_logits_to_keep,
    logits_of,
    logits_of_kept,
    supervised_rows,
    token_loss,
)
from meteor_model.outputs import MeteorOutput, PruningStats, with_decision
from meteor_model.positions import position_ids_of, skipped_positions
from meteor_model.pretrained import MeteorPreTrainedModel
from meteor_model.vision_meteor import JOINT, MeteorVisionMixin


class MeteorForConditionalGeneration(MeteorVisionMixin, MeteorPreTrainedModel, MeteorGenerationMixin):
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
        self.lm_head: nn.Linear = LanguageHead(width, config.text_config.vocab_size, bias=False)
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

    @override
    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    @override
    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @override
    def get_decoder(self) -> nn.Module:
        return self.language_model

    @override
    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    @override
    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    # ------------------------------------------------------------------------------------------------------- the model

    @accepts_either_cache_name
    @can_return_tuple
    def forward(  # noqa: PLR0913 (the arguments of transformers' models of this kind, and five of ours)
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
        document_ids: torch.Tensor | None = None,
        branch_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: LogitsToKeep = 0,
        num_items_in_batch: torch.Tensor | float | None = None,
        loss_chunk: int | None = None,
        **kwargs: Any,
    ) -> MeteorOutput:
        """One pass.

        Args:
            input_ids: (B, T) with `config.image_token_id` once per visual token.
            attention_mask: (B, T) of 0 and 1; padding on either side.
            pixel_values: (M, 3, S, S) uint8, the images of all samples in order; M = 0 runs the towers on a blank one.
            labels: (B, T) token ids, -100 where not supervised.
            position_ids: (B, T); counted from the attention mask where None.
            past_key_values: a cache, also by the name `cache`. With a `MeteorCache`, stage 3 prunes at prefill.
            inputs_embeds: (B, T, C) instead of `input_ids`; `image_mask` then says where visual tokens are.
            image_mask: (B, T) bool, see above; with `pixel_values` by default where the placeholder's embedding is.
            prompt_embeds: (B, P, C) embeddings of the first P of `input_ids`, with the visual tokens in place.
            document_ids: (B, T), instead of an attention mask, for packed rows: which sample each token is of, counting
                up along a row, -1 on padding (`meteor_model/packing.py`).
            branch_ids: (B, T), which branch of it: 0 for what all its branches see, then 1, 2, ...; None: no branches.
            use_cache: as in transformers; by default not in training.
            logits_to_keep: compute only the last so many logits (0: all), or those of these columns, (n,). Columns are
                those of the call, also where stage 3 has dropped some: of all, dropped ones are NaN.
            num_items_in_batch: divisor of the summed loss; None: the supervised tokens of this batch.
            loss_chunk: with labels, run the head on the supervised tokens alone, so many at a time, and return no
                logits: the same loss and gradients to rounding, in far less memory. None: all logits, and return them.
            kwargs: `output_hidden_states`, `output_attentions` (kernel "eager") of the LLM, `return_dict`.

        Raises:
            ValueError: where placeholders and visual tokens differ, naming the sample and both counts, also for ids of
                images that did not come; for a mask, positions or labels of another shape than the tokens; for labels,
                hidden states or attentions of a decoder that stage 3 prunes; for labels with `logits_to_keep`, and
                columns of it that were dropped; for `loss_chunk` without labels, or with another head; for packed rows
                out of order, with a cache, with a stage 2 that reads the text, or in a decoder that cannot keep them
                apart; for an argument that other models have and this one does not.
        """
        check_arguments(input_ids, inputs_embeds, labels, logits_to_keep, loss_chunk, past_key_values, kwargs)
        check_image_mask(image_mask, input_ids, prompt_embeds, past_key_values)
        embeds_BTC, is_image_BT = self._embed(input_ids, inputs_embeds, prompt_embeds, image_mask)
        marked_BT = None if inputs_embeds is None else image_mask
        check_tokens(embeds_BTC, attention_mask, past_key_values, position_ids, labels, marked_BT)
        check_logits_to_keep(logits_to_keep, embeds_BTC.shape[1])
        instead: dict[str, Any] = {"attention_mask": attention_mask, "position_ids": position_ids}
        instead |= {CACHE: past_key_values, "use_cache": use_cache, "prompt_embeds": prompt_embeds}
        packed = read_packed(document_ids, branch_ids, labels, embeds_BTC.shape[:2], instead)
        visual_MKC, stats = None, None
        if pixel_values is not None:
            is_image_BT = self._placeholders(embeds_BTC) if is_image_BT is None else is_image_BT
            check_images(pixel_values, is_image_BT, self.config.tokens_per_image)
            if packed is not None:
                check_packed_images(packed, is_image_BT, self.config)
            # 1. encode, 2. project, 3. fuse, 4. scatter
            pixels = at_least_one(pixel_values, self.config.image_size)
            text_MC = self.text_of_images(embeds_BTC, is_image_BT, attention_mask, labels, len(pixels))
            features_MKC, stats = self.encode_images(pixels, text_MC=text_MC)
            embeds_BTC = scatter_visual(embeds_BTC, is_image_BT, features_MKC)
            visual_MKC = features_MKC[: len(pixel_values)]
            if position_ids is None and packed is None and self.config.keeps_positions:
                position_ids = self.positions_of_prompts(is_image_BT, attention_mask, stats)
        elif is_image_BT is not None and inputs_embeds is None and prompt_embeds is None:  # bare ids
            check_no_images(is_image_BT, self.config.tokens_per_image, labels, past_key_values)
            is_image_BT = None  # a placeholder that came without its image is text
        # 5. decode
        learned = self._prunes_in_training(labels, packed)
        if learned is not None:
            check_outputs(self.config.text_config, kwargs)
            reply_BT = (learned != IGNORE_INDEX).cumsum(dim=1) > 0
            if position_ids is None and attention_mask is not None:
                position_ids = position_ids_of(attention_mask)
            prompt = (embeds_BTC, attention_mask, position_ids, is_image_BT)
            decoded: ModelOutput = decode_pruned(
                self.language_model, *prompt, self._cache_of_training(), use_cache=False, reply_BQ=reply_BT
            )
        else:
            decoded = self._decode(
                embeds_BTC, attention_mask, position_ids, is_image_BT, past_key_values, use_cache, packed, kwargs
            )
        stats = with_decision(stats, decoded)
        if isinstance(past_key_values, MeteorCache | RecordingCache) and stats is not None:
            past_key_values.pruning_stats = stats
        # 6. predict
        if packed is not None and labels is not None:
            labels = packed.learned_labels(labels)
        if labels is None or loss_chunk is None:
            logits = self._logits(decoded, logits_to_keep)
            loss = None if labels is None else token_loss(logits, labels, num_items_in_batch)
        else:
            logits, loss = None, self._loss_in_chunks(decoded, labels, num_items_in_batch, loss_chunk)
        return MeteorOutput(
            loss=loss,
            logits=logits,
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
            image_hidden_states=visual_MKC,
            pruning_stats=stats,
            **{CACHE: cache_of(decoded)},
        )

    def _prunes_in_training(self, labels: torch.Tensor | None, packed: Packed | None) -> torch.Tensor | None:
        """The labels, where stage 3 prunes what they are learned from."""
        decode = self.config.pruning.decode
        if labels is None or not (decode.enabled and decode.train):
            return None
        if not decode.acts:
            raise ValueError(
                "pruning.decode.train needs to know how many tokens stay before anything is learned: set "
                "pruning.decode.budget to 'fixed' with target_mean, or give pruning.decode.lam"
            )
        if packed is not None:
            raise ValueError(
                "pruning.decode.train prunes by the first question of a sample, and packed rows hold several: give one "
                "sample a row, or set it to false"
            )
        return labels

    def _cache_of_training(self) -> MeteorCache:
        cache = self.new_cache()
        assert cache is not None, "stage 3 acts"
        return cache

    def _embed(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        prompt_embeds: torch.Tensor | None,
        image_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings (B, T, C) of the text, and where it has room for visual tokens (B, T); None where nobody says."""
        if inputs_embeds is not None:
            return inputs_embeds, image_mask
        assert input_ids is not None, "check_arguments wants one of them"
        done = 0 if prompt_embeds is None else prompt_embeds.shape[1]
        embeds_BTC = self.get_input_embeddings()(input_ids[:, done:])
        if prompt_embeds is not None:
            embeds_BTC = torch.cat([prompt_embeds, embeds_BTC], dim=1)
        return embeds_BTC, input_ids == self.config.image_token_id

    def text_of_images(
        self,
        embeds_BTC: torch.Tensor,
        is_image_BT: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        images: int,
    ) -> torch.Tensor | None:
        """Of each image's prompt, (M, C), where stage 2 looks at it: without replies that are learned."""
        fuse = self.config.pruning.fuse
        if not (fuse.enabled and fuse.wants_text):
            return None
        is_text_BT = ~is_image_BT
        if attention_mask is not None:
            is_text_BT = is_text_BT & attention_mask.bool()
        if labels is not None:
            is_text_BT = is_text_BT & (labels == IGNORE_INDEX)
        return mean_text_of_images(embeds_BTC, is_text_BT, is_image_BT, self.config.tokens_per_image, images)

    def _placeholders(self, embeds_BTC: torch.Tensor) -> torch.Tensor:
        """Where embedded text (B, T, C) holds the placeholder's embedding, (B, T) bool."""
        token = torch.tensor(self.config.image_token_id, device=embeds_BTC.device)
        is_image_BT: torch.Tensor = (embeds_BTC == self.get_input_embeddings()(token)).all(dim=-1)
        return is_image_BT

    def _decode(
        self,
        embeds_BTC: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        is_image_BT: torch.Tensor | None,
        cache: Any,
        use_cache: bool | None,
        packed: Packed | None,
        options: Mapping[str, Any],
    ) -> ModelOutput:
        """5. decode: the LLM; with stage 3 where the cache carries it."""
        config = self.config.text_config
        if packed is not None:
            own = packed.decoder_arguments(config, embeds_BTC.dtype)
            return self.language_model(inputs_embeds=embeds_BTC, **own, **options)
        carries = isinstance(cache, MeteorCache | RecordingCache)
        if attention_mask is None and self.config.keeps_positions:
            # Without a mask the library takes gaps between positions for the ends of packed sequences.
            seen = embeds_BTC.shape[1] + (cache.get_seq_length() if isinstance(cache, DynamicCache) else 0)
            attention_mask = embeds_BTC.new_ones(len(embeds_BTC), seen, dtype=torch.long)
        if position_ids is None and self.config.keeps_positions and isinstance(cache, DynamicCache):
            past = cache.get_seq_length()
            if past and not carries:
                raise ValueError(
                    "pruning.fuse.positions 'original': a step on a cache that does not know where its positions stand "
                    "needs position_ids; or begin with new_cache() or recording_cache()"
                )
        if position_ids is None and isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            position_ids = position_ids_of(attention_mask)[:, -embeds_BTC.shape[1] :]
            if carries and cache.skipped_B is not None:
                position_ids = position_ids + cache.skipped_B.to(position_ids.device)[:, None]
        elif carries and self.config.keeps_positions and position_ids is not None and not cache.get_seq_length():
            cache.skipped_B = skipped_positions(position_ids.expand(len(embeds_BTC), -1), attention_mask)
        if isinstance(cache, MeteorCache):
            check_outputs(config, options)
            prompt = (embeds_BTC, attention_mask, position_ids, is_image_BT)
            return decode_pruned(self.language_model, *prompt, cache, use_cache=use_cache is not False)
        return self.language_model(
            inputs_embeds=embeds_BTC,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=config.use_cache and not self.training if use_cache is None else use_cache,
            **{CACHE: cache},
            **options,
        )

    def _logits(self, decoded: ModelOutput, logits_to_keep: LogitsToKeep) -> torch.Tensor:
        """Logits (B, n, V) of the columns of this call that are asked for."""

        def head(hidden_BnC: torch.Tensor) -> torch.Tensor:
            return softcap_logits(self.config.text_config, self.lm_head(hidden_BnC))

        hidden_BWC = decoded.last_hidden_state
        if getattr(decoded, "prefill", None):
            return logits_of_kept(hidden_BWC, decoded.decision, logits_to_keep, head)
        return logits_of(hidden_BWC, logits_to_keep, head)

    def _loss_in_chunks(
        self, decoded: ModelOutput, labels: torch.Tensor, divisor: torch.Tensor | float | None, chunk: int
    ) -> torch.Tensor:
        """`token_loss` without the logits of all tokens."""
        if not isinstance(self.lm_head, LanguageHead):
            raise ValueError(
                f"loss_chunk needs the head that the model was built with, and this one is a "
                f"{type(self.lm_head).__name__}: leave loss_chunk out, or save and load the model where the head was "
                "only resized"
            )
        decision = decoded.decision if getattr(decoded, "prefill", None) else None
        hidden_nC, labels_n = supervised_rows(decoded.last_hidden_state, labels, decision)
        total: torch.Tensor = self.lm_head(hidden_nC, labels_n, chunk, partial(softcap_logits, self.config.text_config))
        return total / (max(1, len(labels_n)) if divisor is None else divisor)

    def embed_prompts(
        self,
        input_ids: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stages 1 and 2 for prompts: embeddings (B, T, C) with the visual tokens in place, and where they are (B, T).

        Args:
            input_ids: (B, T), or None with `inputs_embeds`.
            pixel_values: (M, 3, S, S) uint8, the images of all prompts in order.
            inputs_embeds: (B, T, C) instead of the embeddings of `input_ids`; without `pixel_values` they hold the
                visual tokens already.
            attention_mask: (B, T) of 0 and 1; None where nothing is padded.

        Raises:
            ValueError: where placeholders and visual tokens differ, naming the sample and both counts.
        """
        embeds_BTC, is_image_BT, _ = self.read_prompts(input_ids, pixel_values, inputs_embeds, attention_mask)
        return embeds_BTC, is_image_BT

    def embed_dense(
        self, input_ids: torch.Tensor, dense: Mapping[str, torch.Tensor], attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, PruningStats]:
        """`read_prompts` from every tower's map instead of pixels (`encode_dense`), the same to the bit.

        Raises:
            ValueError: where placeholders and images differ in number.
        """
        images = len(next(iter(dense.values())))
        embeds_BTC, is_image_BT = self.get_input_embeddings()(input_ids), input_ids == self.config.image_token_id
        check_placeholders(is_image_BT, images, self.config.tokens_per_image)
        visual_MKC, stats = self.encode_dense(
            dense, self.text_of_images(embeds_BTC, is_image_BT, attention_mask, None, images)
        )
        return scatter_visual(embeds_BTC, is_image_BT, visual_MKC), is_image_BT, stats

    def read_prompts(
        self,
        input_ids: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, PruningStats | None]:
        """`embed_prompts`, and what stages 1 and 2 kept of the images; None without images."""
        embeds_BTC = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        check_not_empty(embeds_BTC)
        is_image_BT = self._placeholders(embeds_BTC) if input_ids is None else input_ids == self.config.image_token_id
        if pixel_values is not None:
            check_pixels(pixel_values, empty=True)
        stats = None
        if pixel_values is not None and len(pixel_values):
            check_images(pixel_values, is_image_BT, self.config.tokens_per_image)
            text_MC = self.text_of_images(embeds_BTC, is_image_BT, attention_mask, None, len(pixel_values))
            visual_MKC, stats = self.encode_images(pixel_values, text_MC=text_MC)
            embeds_BTC = scatter_visual(embeds_BTC, is_image_BT, visual_MKC)
        elif inputs_embeds is None:
            check_no_images(is_image_BT, self.config.tokens_per_image, None, None)
            is_image_BT = torch.zeros_like(is_image_BT)  # a placeholder that came without its image is text
        return embeds_BTC, is_image_BT, stats


AutoConfig.register(MeteorConfig.model_type, MeteorConfig, exist_ok=True)
AutoModelForImageTextToText.register(MeteorConfig, MeteorForConditionalGeneration, exist_ok=True)
