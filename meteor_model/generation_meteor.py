"""`generate` with all three stages, and what a prompt tells about stage 3 before anything is generated.

Legend: B samples, T prompt tokens, M images of all prompts, S travelling image size, C LLM width, H heads.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.generation import GenerationMode

from meteor_model.compat import CACHE, accepts_either_cache_name
from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.decoder.cache import Decision, MeteorCache, RecordingCache
from meteor_model.decoder.loop import decode_pruned
from meteor_model.decoder.scores import attention_mass, visual_attention_by_head
from meteor_model.inputs import check_padding, inferred_mask
from meteor_model.outputs import PruningStats
from meteor_model.positions import original_places, position_ids_of, prompt_positions

#: Any of these makes `generate` guess tokens and check several at once.
ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")

UNSOLVED = (
    "stage 3 is enabled but its lambda is not known, so nothing is pruned in the LLM: solve it for a target_mean on a "
    "calibration batch (meteor_model.pruners.counts.solve_lambda) and set pruning.decode.lam"
)
UNMARKED = (
    "stage 3 finds no placeholder in inputs_embeds, so it drops nothing: say with image_mask (B, T) where the visual "
    "tokens are (all False for text alone)"
)
UNCARRIED = (
    "stage 3 is enabled and this call's {cache} does not carry it, so nothing is pruned in the LLM: leave it out "
    "or give model.new_cache(), or set pruning.decode.enabled to false if the dense LLM is meant"
)
UNCACHED = (
    "stage 3 is enabled and needs a cache, so with use_cache=False nothing is pruned in the LLM: leave use_cache out, "
    "or set pruning.decode.enabled to false if the dense LLM is meant"
)
STACK = 5  # the caller of `generate`, seen from a helper of it: its two decorators lie between


class MeteorGenerationMixin(GenerationMixin):
    """The part of `MeteorForConditionalGeneration` that generates."""

    _supported_generation_modes = (
        GenerationMode.GREEDY_SEARCH,
        GenerationMode.SAMPLE,
        GenerationMode.BEAM_SEARCH,
        GenerationMode.BEAM_SAMPLE,
        GenerationMode.ASSISTED_GENERATION,
    )

    if TYPE_CHECKING:
        config: MeteorConfig
        language_model: PreTrainedModel

        def embed_prompts(
            self,
            input_ids: torch.Tensor | None,
            pixel_values: torch.Tensor | None,
            inputs_embeds: torch.Tensor | None = None,
            attention_mask: torch.Tensor | None = None,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """Of the model."""
            ...

        def read_prompts(
            self,
            input_ids: torch.Tensor | None,
            pixel_values: torch.Tensor | None,
            inputs_embeds: torch.Tensor | None = None,
            attention_mask: torch.Tensor | None = None,
        ) -> tuple[torch.Tensor, torch.Tensor, PruningStats | None]:
            """Of the model."""
            ...

    @accepts_either_cache_name
    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers: greedy, sampling and beam search, with streamers and several sequences a prompt.

        The towers run once, before beams or samples multiply the batch; the result goes on as embeddings. Stage 3
        needs its own cache: with `use_cache=False` or another cache nothing is pruned in the LLM. Pass a `MeteorCache`
        (`new_cache()`) to read afterwards what each sample kept (`decision`) and what stages 1 and 2 kept of each image
        (`pruning_stats`), or to go on with the conversation: give the next call the same cache,
        the ids of everything so far and the new turn's, and the attention mask of all of it. A later turn is text
        (images that the cache has seen may come again); a new image needs a new cache and the whole conversation.

        Args:
            inputs: (B, T) prompt ids, left-padded; or `input_ids` by name. `inputs_embeds` without `pixel_values` hold
                the visual tokens already: say with `image_mask` (B, T) where, or stage 3 sees none and drops none.
            pixel_values: (M, 3, S, S) uint8, the images of all prompts in order.
            past_key_values: a cache, also by the name `cache`; by default one that prunes, where
                `config.pruning.decode` says so.
            kwargs: what `GenerationMixin.generate` takes.

        Raises:
            ValueError: where images and placeholders do not fit, for images on a used cache, for `prefill_chunk_size`,
                for padding on the right, also where only the padding token says so, and for what stage 3 cannot serve:
                `cache_implementation`, assisted decoding.

        Warns:
            UserWarning: where stage 3 is enabled and cannot act: its lambda is not solved, embeddings came without
                `image_mask`, or the call brought a cache that does not carry it, or none.
        """
        if inputs is not None and "input_ids" in kwargs:
            raise ValueError("the prompt is given twice, as inputs and as input_ids: give one of them")
        input_ids = kwargs.pop("input_ids", inputs)
        if kwargs.get("image_mask") is not None and kwargs.get("inputs_embeds") is None:
            raise ValueError("image_mask goes with inputs_embeds: input_ids say themselves where images are")
        cache = self._cache(kwargs, past_key_values)
        assisted = [name for name in ASSISTED if self._generation_setting(kwargs, name)]
        self._check_settings(kwargs, cache, assisted)
        used = cache.get_seq_length() if isinstance(cache, Cache) else 0
        self._check_mask(input_ids, kwargs, used)
        if cache is not None:
            kwargs[CACHE] = cache
        if assisted and self.config.keeps_positions:
            raise ValueError(
                f"{assisted[0]} is not supported with pruning.fuse.positions 'original': assisted decoding counts "
                "positions itself; leave it out, or set them to 'renumbered'"
            )
        if assisted:  # guessed tokens and prompt come in one pass, so ids and images go on as they are
            return super().generate(inputs=input_ids, pixel_values=pixel_values, **kwargs)
        if used and input_ids is not None:
            self._check_next_turn(input_ids, kwargs.get("attention_mask"), pixel_values, used)
            kwargs["input_ids"] = input_ids
            if self.config.keeps_positions and kwargs.get("position_ids") is None:
                kwargs["position_ids"] = _next_positions(cache, kwargs.get("attention_mask"))
        elif "image_mask" not in kwargs and (input_ids is not None or "inputs_embeds" in kwargs):
            # (A mask says that the embeddings with it hold their visual tokens.)
            kwargs.update(self._embedded(input_ids, pixel_values, kwargs.pop("inputs_embeds", None), kwargs))
        with cache.appending() if isinstance(cache, MeteorCache) else nullcontext():
            return super().generate(**kwargs)

    def _cache(self, kwargs: Mapping[str, Any], given: Any) -> Any:
        """The call's own cache, or one that prunes, where caching is on and stage 3 acts; it warns where it cannot."""
        cached = self._generation_setting(kwargs, "use_cache") is not False
        if given is not None and not cached:
            raise ValueError("use_cache=False and a cache contradict one another: leave one of them out")
        cache: Any = given if given is not None else (self.new_cache() if cached else None)
        decode = self.config.pruning.decode
        if decode.enabled and not isinstance(cache, MeteorCache):
            if not decode.acts:
                warnings.warn(UNSOLVED, stacklevel=STACK)
            elif not cached:
                warnings.warn(UNCACHED, stacklevel=STACK)
            elif not (isinstance(cache, Cache) and cache.get_seq_length()):  # later turns have been warned of
                warnings.warn(UNCARRIED.format(cache=type(cache).__name__), stacklevel=STACK)
        return cache

    def _check_mask(self, input_ids: Any, kwargs: Mapping[str, Any], used: int) -> None:
        """Refuse padding on the right, also where transformers would infer it from the padding token."""
        mask = kwargs.get("attention_mask")
        if mask is None:
            special = (self._generation_setting(kwargs, name) for name in ("pad_token_id", "eos_token_id"))
            mask = inferred_mask(input_ids, *special)
        check_padding(mask)
        prompt = kwargs.get("inputs_embeds") if input_ids is None else input_ids
        if mask is not None and prompt is not None and not used and mask.shape != prompt.shape[:2]:
            raise ValueError(f"the attention mask is {tuple(mask.shape)}, the prompt is {tuple(prompt.shape[:2])}")

    def _check_settings(self, kwargs: Mapping[str, Any], cache: Any, assisted: Sequence[str]) -> None:
        """Refuse what stage 3 cannot serve. Raises ValueError."""
        if self._generation_setting(kwargs, "prefill_chunk_size") is not None:
            raise ValueError("prefill_chunk_size is not supported: stage 3 decides on the whole prompt at once")
        if not isinstance(cache, MeteorCache):
            return
        implementation = self._generation_setting(kwargs, "cache_implementation")
        if implementation is not None:
            raise ValueError(
                f"cache_implementation {implementation!r} is not supported: stage 3 needs a MeteorCache, whose "
                "upper layers are shorter; leave it out, or set pruning.decode.enabled to false"
            )
        if assisted:
            raise ValueError(
                f"{assisted[0]} is not supported: assisted decoding guesses tokens in the pass in which stage 3 "
                "decides on the prompt; leave it out, or set pruning.decode.enabled to false"
            )

    def _embedded(
        self,
        input_ids: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        kwargs: Mapping[str, Any],
    ) -> dict[str, Any]:
        """The arguments for transformers' `generate` that stand for the prompt, its visual tokens in place."""
        embeds_BTC, is_image_BT, stats = self.read_prompts(
            input_ids, pixel_values, inputs_embeds, kwargs.get("attention_mask")
        )
        cache = kwargs.get(CACHE)
        if isinstance(cache, MeteorCache | RecordingCache):
            cache.pruning_stats = stats
        if isinstance(cache, MeteorCache) and input_ids is None and not bool(is_image_BT.any()):
            warnings.warn(UNMARKED, stacklevel=STACK)
        if self._generation_setting(kwargs, "is_assistant") and input_ids is not None:
            # Transformers drops an assistant's embeddings and pixels, so its prompt goes into the cache here.
            cache = DynamicCache(config=self.config.text_config)
            self(inputs_embeds=embeds_BTC[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
            return {"input_ids": input_ids, CACHE: cache}
        # Transformers caches whatever starts from inputs_embeds; without a cache every step gets the prompt again.
        caches = input_ids is None or self._generation_setting(kwargs, "use_cache") is not False
        name = "inputs_embeds" if caches else "prompt_embeds"
        found = {"input_ids": input_ids, name: embeds_BTC, "image_mask": is_image_BT}
        if stats is not None and self.config.keeps_positions and kwargs.get("position_ids") is None:
            found["position_ids"] = self.positions_of_prompts(is_image_BT, kwargs.get("attention_mask"), stats)
        return found

    def _generation_setting(self, kwargs: Mapping[str, Any], name: str) -> Any:
        """A setting of `generate`, from where it is given: by name, in a generation configuration, in the model's."""
        if kwargs.get(name) is not None:
            return kwargs[name]
        given = kwargs.get("generation_config")
        found = [getattr(source, name, None) for source in (given, self.generation_config)]  # not all in all releases
        return next((value for value in found if value is not None), None)

    def _check_next_turn(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        used: int,
    ) -> None:
        """Only text may come on a used cache; images that it has seen may be given again. Raises ValueError."""
        # As in transformers: the ids are of everything so far, unless the mask is longer than they are.
        whole = attention_mask is None or attention_mask.shape[1] == input_ids.shape[1]
        is_image_BL = input_ids == self.config.image_token_id
        new_BQ = is_image_BL[:, used:] if whole else is_image_BL
        if new_BQ.shape[1] == 0:
            raise ValueError(f"the cache holds {used} tokens and the {input_ids.shape[1]} ids bring no new one")
        for sample, count in enumerate(new_BQ.sum(dim=1).tolist()):
            if count >= self.config.tokens_per_image:  # fewer are no image: the model has said the token itself
                raise ValueError(
                    f"sample {sample} of the batch has {count} image placeholders after the {used} tokens of its "
                    "cache: start a new cache with the whole conversation"
                )
        images = 0 if pixel_values is None else len(pixel_values)
        if images and int((is_image_BL.sum(dim=1) // self.config.tokens_per_image).sum()) != images:
            raise ValueError(
                f"{images} images on a cache that already holds {used} tokens, and they are not those of the ids: "
                "start a new cache with the whole conversation"
            )

    def new_cache(self, k_max: int | None = None) -> MeteorCache | None:
        """A cache for `generate`: one that prunes where `config.pruning.decode` acts (lambda, if needed, is known).

        With `k_max` no sample of it keeps more visual tokens than so many. None where stage 3 does not act.
        """
        decode = self.config.pruning.decode
        if not decode.acts:
            return None
        config = self.config
        return MeteorCache(
            config.text_config, decode, config.decode_heads, k_max, config.tokens_per_image, self._cells()
        )

    def _cells(self) -> torch.Tensor | None:
        """Row and column of each visual token of an image, for a criterion of stage 3 that looks at the grid."""
        return torch.tensor(self.config.visual_cells()) if self.config.pruning.decode.wants_grid else None

    def recording_cache(self, k_max: int | None = None) -> MeteorCache | RecordingCache:
        """A cache for `generate` that says afterwards what every stage kept (`pruning_stats`, and `decision`).

        It prunes where `new_cache` gives one that does, and is a plain one elsewhere.
        """
        cache = self.new_cache(k_max)
        return RecordingCache(config=self.config.text_config) if cache is None else cache

    def positions_of_prompts(
        self, is_image_BT: torch.Tensor, attention_mask: torch.Tensor | None, stats: PruningStats | None
    ) -> torch.Tensor | None:
        """Positions (B, T) of prompts that are read; None where they are counted from 0 and nothing is padded."""
        config = self.config
        if stats is None or not config.keeps_positions:
            return None if attention_mask is None else position_ids_of(attention_mask)
        return prompt_positions(is_image_BT, attention_mask, original_places(config, stats), config.whole_span)

    @torch.no_grad()
    def prune_prompts(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
    ) -> Decision:
        """What stage 3 decides on each prompt, without generating. No mask: no padding.

        `Decision.kept_visual()` says which of its visual tokens each sample keeps, `heads_Bk` who was listened to.

        Raises:
            ValueError: where stage 3 is disabled or lambda is not known.
        """
        cache = self.new_cache()
        if cache is None:
            raise ValueError(
                "pruning.decode.enabled is false or pruning.decode.lam is not set, so stage 3 does not act: solve lam "
                "for a target_mean on a calibration batch (meteor_model.pruners.counts.solve_lambda)"
            )
        embeds_BTC, is_image_BT, stats = self.read_prompts(input_ids, pixel_values, None, attention_mask)
        position_ids = self.positions_of_prompts(is_image_BT, attention_mask, stats)
        decided = decode_pruned(
            self.language_model, embeds_BTC, attention_mask, position_ids, is_image_BT, cache, use_cache=False
        ).decision
        assert decided is not None
        return decided

    @torch.no_grad()
    def visual_attention_by_head(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        layers: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """VAV of every head, (B, layers, H) fp32: its attention mass on visual tokens, nothing pruned in the LLM.

        `config.pruning.decode.query` says which token asks. `layers` count from 0; None is all of them.
        """
        embeds_BTC, is_image_BT, stats = self.read_prompts(input_ids, pixel_values, None, attention_mask)
        query = self.config.pruning.decode.query
        position_ids = self.positions_of_prompts(is_image_BT, attention_mask, stats)
        return visual_attention_by_head(
            self.language_model, embeds_BTC, attention_mask, position_ids, is_image_BT, query, layers
        )

    @torch.no_grad()
    def visual_attention_mass(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What lambda is solved from: attention mass on visual tokens (B,) and their number (B,), prompt by prompt."""
        embeds_BTC, is_image_BT, stats = self.read_prompts(input_ids, pixel_values, None, attention_mask)
        position_ids = self.positions_of_prompts(is_image_BT, attention_mask, stats)
        mass_B = self.embedded_attention_mass(embeds_BTC, is_image_BT, attention_mask, position_ids)
        return mass_B, is_image_BT.sum(dim=1)

    @torch.no_grad()
    def embedded_attention_mass(
        self,
        embeds_BTC: torch.Tensor,
        is_image_BT: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """`visual_attention_mass` (B,) of prompts that hold their visual tokens, at `positions_of_prompts`."""
        return attention_mass(
            self.language_model,
            embeds_BTC,
            attention_mask,
            position_ids,
            is_image_BT,
            self.config.pruning.decode,
            self.config.decode_heads,
            self._cells(),
        )


def _next_positions(cache: Any, attention_mask: Any) -> torch.Tensor:
    """Positions (B, L) of a later turn, and of what came before it, where images keep the places of the dense model."""
    skipped_B = cache.skipped_B if isinstance(cache, MeteorCache | RecordingCache) else None
    if skipped_B is None or attention_mask is None:
        raise ValueError(
            "a later turn with pruning.fuse.positions 'original' needs the attention mask of everything so far and the "
            "cache of the first (new_cache() or recording_cache()), which knows where its positions stand; or give "
            "position_ids"
        )
    return position_ids_of(attention_mask) + skipped_B.to(attention_mask.device)[:, None]
