"""A model's answers to the final questions under one pruner, generated greedily by the project's own `generate`.

The towers run once an image and not once a question: what a pruner makes of their maps is computed for every question
(it may look at the text), from the same numbers. Where a row changes nothing in the towers, their stored maps serve.

Legend: B questions, M images, K visual tokens of an image, T tokens of the longest prompt, C width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import BatchFeature

from benchmarks.quality.maps import Maps
from benchmarks.quality.models import Trained
from benchmarks.quality.questions import Asked
from benchmarks.quality.stored_scenes import Scenes
from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.decoder.cache import MeteorCache
from meteor_model.fusion import prune_pool
from meteor_model.inputs import scatter_visual
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor

BATCH = 48
NEW_TOKENS = 12
"""The longest answer has eight characters and an end; a name may take a few tokens."""


@dataclass(frozen=True)
class Answers:
    """What a row answered, in the order of the questions.

    Attributes:
        texts: of all questions.
        kept: visual tokens of each that the upper layers of the language model saw.
    """

    texts: list[str]
    kept: list[int]


@torch.inference_mode()
def answer(
    trained: Trained,
    config: MeteorConfig,
    asked: Sequence[Asked],
    scenes: Scenes,
    maps: Maps | None = None,
    say: Callable[[str], None] = lambda line: None,
    bf16: bool = True,
) -> Answers:
    """Answer all questions under a configuration of the model's.

    Args:
        trained: the model; it has its own configuration again afterwards.
        config: the pruner's.
        asked: the questions.
        scenes: what they are about.
        maps: dense maps of these scenes, used where the towers are as they were for them.
        say: is told about progress.
        bf16: under autocast, as models are trained; else in fp32.

    Raises:
        ValueError: for pruning.fuse.positions "original", which needs to know what stages 1 and 2 kept of each image.
    """
    if config.keeps_positions:
        raise ValueError('pruning.fuse.positions is "original", and these answers count positions anew: renumber them')
    model, processor, before = trained.model, trained.processor, trained.model.config
    model.follow(config)
    processor.tokens_per_image = config.tokens_per_image
    texts, kept = [""] * len(asked), [0] * len(asked)
    try:
        for number, places in enumerate(_batches(asked)):
            batch = [asked[place] for place in places]
            stored = maps if same_towers(config, before) else None
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                found = _answer(model, processor, batch, scenes, stored)
            for place, text, count in zip(places, *found, strict=True):
                texts[place], kept[place] = text, count
            if number % 20 == 19:
                say(f"{(number + 1) * BATCH}/{len(asked)} questions")
    finally:
        model.follow(before)
        processor.tokens_per_image = before.tokens_per_image
    return Answers(texts, kept)


def _batches(asked: Sequence[Asked]) -> Iterator[list[int]]:
    """Places of the questions, those of an image near each other: its towers run once a batch."""
    order = sorted(range(len(asked)), key=lambda place: asked[place].image)
    for begin in range(0, len(order), BATCH):
        yield order[begin : begin + BATCH]


def same_towers(config: MeteorConfig, before: MeteorConfig) -> bool:
    """Whether stored dense maps are what the towers would give: nothing pruned or asked there, no smaller image."""
    fuse = config.pruning.fuse
    return (
        config.fusion == "channel_concat" and config.encoders == before.encoders and not (fuse.enabled and fuse.looks)
    )


def _answer(
    model: MeteorForConditionalGeneration,
    processor: MeteorProcessor,
    batch: Sequence[Asked],
    scenes: Scenes,
    maps: Maps | None,
) -> tuple[list[str], list[int]]:
    prompts = _prompts(processor, batch)
    ids_BT, mask_BT = prompts["input_ids"].to(model.device), prompts["attention_mask"].to(model.device)
    numbers = sorted({item.image for item in batch})
    row_B = torch.tensor([numbers.index(item.image) for item in batch], device=model.device)
    embeds_BTC = model.get_input_embeddings()(ids_BT)
    is_image_BT = ids_BT == model.config.image_token_id
    text_BC = model.text_of_images(embeds_BTC, is_image_BT, mask_BT, None, len(batch))
    visual_BKC = _visual(model, numbers, row_B, text_BC, scenes, maps)
    embeds_BTC = scatter_visual(embeds_BTC, is_image_BT, visual_BKC)
    cache = model.recording_cache()
    output_Bn = model.generate(
        inputs_embeds=embeds_BTC,
        image_mask=is_image_BT,
        attention_mask=mask_BT,
        past_key_values=cache,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=processor.tokenizer.pad_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
    )
    decision = cache.decision if isinstance(cache, MeteorCache) else None
    kept_B = is_image_BT.sum(dim=1) if decision is None else decision.kept_counts_B
    return [processor.decode(ids_n).strip() for ids_n in output_Bn], kept_B.tolist()


def _visual(
    model: MeteorForConditionalGeneration,
    numbers: Sequence[int],
    row_B: Tensor,
    text_BC: Tensor | None,
    scenes: Scenes,
    maps: Maps | None,
) -> Tensor:
    """The visual tokens (B, K, C) of every question: towers once an image, stage 2 once a question."""
    attention: Sequence[Mapping[float, Tensor] | None] = ()
    positions: list[Tensor] = []
    if maps is None:
        found, kept, attention = model._encode(scenes.pixels(numbers).to(model.device), None)
        positions = [kept[name][-1][row_B] for name in found]
    else:
        found = dict(zip(maps.arrays, maps.of(numbers, model.device), strict=True))
    projected = [projected_MNC[row_B] for projected_MNC in model._project(found)]
    looked = [None if item is None else {look: scores[row_B] for look, scores in item.items()} for item in attention]
    pool = model.pool_of(projected, positions, looked, text_BC)
    return prune_pool(pool, model.config.pruning.fuse)[0]


def masses(
    trained: Trained, questions: Sequence[Asked], scenes: Scenes
) -> Callable[[MeteorConfig], tuple[Tensor, Tensor]]:
    """What lambda is solved from: attention mass and number of visual tokens of these prompts, by configuration."""
    model, processor = trained.model, trained.processor

    @torch.inference_mode()
    def measure(config: MeteorConfig) -> tuple[Tensor, Tensor]:
        before, found = model.config, []
        model.follow(config)
        try:
            for begin in range(0, len(questions), BATCH):
                batch = questions[begin : begin + BATCH]
                prompts = _prompts(processor, batch)
                pixels = scenes.pixels([item.image for item in batch])
                with torch.autocast(model.device.type, torch.bfloat16):
                    found.append(model.visual_attention_mass(**prompts.to(model.device), pixel_values=pixels))
        finally:
            model.follow(before)
        return torch.cat([mass.cpu() for mass, _ in found]), torch.cat([number.cpu() for _, number in found])

    return measure


def _prompts(processor: MeteorProcessor, batch: Sequence[Asked]) -> BatchFeature:
    """Left-padded ids and mask; what the placeholders stand for comes as embeddings."""
    encoded = [processor.encode_question(item.question.prompt, 1) for item in batch]
    return processor.batch_prompts(encoded, [[] for _ in batch])
