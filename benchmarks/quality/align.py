"""Alignment: before the language model learns, the joint projector learns to say in its words what a patch shows.

The visual token of a patch is taught to point to the word vectors (the embedding's rows, which stay as they are) of the
drawing's category and name, or of the character, that is there. Labels are direct, one set a patch, and no language
model runs, so that it takes minutes; a language model with tied embeddings then finds words that it only has to copy,
and that a word of a question resembles. Without it, categories and names came slowly and looking for a thing that the
question names never did (docs/LOG.md).

Legend: M images, N patches in raster order, n labelled patches, W words, C width of the language model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from benchmarks.quality.maps import Maps
from benchmarks.quality.models import GRID, SIDE
from benchmarks.quality.projectors import IMAGES, fit_projectors
from benchmarks.quality.stored_scenes import Images
from meteor_model.fusion import concat_channels
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.vision_meteor import JOINT
from pipelines.data.sources.scenes import DrawnThing, compose
from pipelines.data.sources.scenes.drawings import CATEGORIES, names
from pipelines.parts.reader_conv import CHARACTERS, IGNORE, NONE, labels_of

SCALE = 10.0
"""Of the cosine between a token and a word, at the start."""
SETS = ("category", "name", "character")
"""What a patch may be labelled with."""


def words_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[list[int]]]:
    """The tokens of every word, by set: as an answer has them."""
    spelled: dict[str, Iterable[str]] = {
        "category": (f" {word}" for word in CATEGORIES),
        "name": (f" {word}" for word in names()),
        "character": CHARACTERS,
    }
    return {key: [tokenizer.encode(text, add_special_tokens=False) for text in texts] for key, texts in spelled.items()}


def patch_labels(images: Images) -> np.ndarray:
    """What is in each patch, (M, 3, N) int64 in the order of SETS; IGNORE where it is nothing."""
    return np.stack([_labels(index, images) for index in range(images.count)])


def _labels(index: int, images: Images) -> np.ndarray:
    scene = compose(images.split, images.seed, index)
    labels_3N = np.full((len(SETS), GRID * GRID), IGNORE, np.int64)
    for thing in scene.facts.drawings:
        labels_3N[:2, _patches(thing)] = [
            [CATEGORIES.index(thing.category)],
            [names().index(thing.name) if thing.name else IGNORE],
        ]
    characters_N = labels_of(scene.letters)[0]
    labels_3N[2] = np.where(characters_N == NONE, IGNORE, characters_N)
    return labels_3N


def _patches(thing: DrawnThing) -> np.ndarray:
    """The patches (n,) whose middle is inside the drawing's box."""
    middles = (np.arange(GRID) + 0.5) * SIDE / GRID
    left, top, right, bottom = thing.box
    inside = ((middles > top) & (middles < bottom))[:, None] & ((middles > left) & (middles < right))[None]
    return np.flatnonzero(inside)


@dataclass(frozen=True)
class Words:
    """The vectors of all words, (W, C) of each set, of length 1."""

    vectors: dict[str, Tensor]

    @classmethod
    def of(cls, model: MeteorForConditionalGeneration, tokenizer: PreTrainedTokenizerBase) -> Words:
        """The mean of a word's rows of the embedding."""
        table: Tensor = model.language_model.embed_tokens.weight.detach()
        means = {
            key: torch.stack([table[ids].mean(dim=0) for ids in words]) for key, words in words_of(tokenizer).items()
        }
        return cls({key: F.normalize(vectors, dim=-1) for key, vectors in means.items()})

    def cosines(self, tokens_nC: Tensor, key: str) -> Tensor:
        """Of tokens to all words of a set, (n, W)."""
        return F.normalize(tokens_nC.float(), dim=-1) @ self.vectors[key].T


class Aligner:
    """Teaches a model's joint projector.

    Args:
        model: dense; its embedding is read, its joint projector changed.
        tokenizer: its own.
        maps: of the images.
        labels_M3N: of the same images.
    """

    def __init__(
        self,
        model: MeteorForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        maps: Maps,
        labels_M3N: np.ndarray,
    ) -> None:
        self.model, self.maps, self.labels = model, maps, labels_M3N
        self.words = Words.of(model, tokenizer)
        self.grids = list(model.config.encoder_grids.values())

    def train(self, steps: int, seed: int, say: Callable[[str], None]) -> None:
        """Learn for `steps`."""
        scale = nn.Parameter(torch.tensor(math.log(SCALE), device=self.model.device))

        def loss_of(images: Sequence[int]) -> Tensor:
            found = self._cosines(images).values()
            losses = [F.cross_entropy(scale.exp() * cosines, truth) for cosines, truth in found if len(truth)]
            return torch.stack(losses).sum()

        learned = [*self.model.projectors[JOINT].parameters(), scale]
        fit_projectors(learned, loss_of, len(self.labels), steps, seed, say)

    def _cosines(self, images: Sequence[int]) -> dict[str, tuple[Tensor, Tensor]]:
        """Of labelled patches: cosines (n, W) to the words of each set, and which word is right (n,)."""
        device = self.model.device
        labels_M3N = torch.from_numpy(self.labels[images]).to(device)
        joined_MND = concat_channels(
            self.maps.of(images, device), self.grids, [1] * len(self.grids), self.model.config.concat_grid
        )
        shown_MN = (labels_M3N != IGNORE).any(dim=1)
        with torch.autocast(device.type, torch.bfloat16):
            tokens_nC = self.model.projectors[JOINT](joined_MND[shown_MN])
        labels_n3 = labels_M3N.transpose(1, 2)[shown_MN]
        found = {}
        for place, key in enumerate(SETS):
            has_n = labels_n3[:, place] != IGNORE
            found[key] = (self.words.cosines(tokens_nC[has_n], key), labels_n3[has_n, place])
        return found

    @torch.no_grad()
    def score(self) -> dict[str, float]:
        """Share of labelled patches whose nearest word is the right one, by set."""
        right, total = dict.fromkeys(SETS, 0), dict.fromkeys(SETS, 0)
        for begin in range(0, len(self.labels), IMAGES):
            found = self._cosines(range(begin, min(begin + IMAGES, len(self.labels))))
            for key, (cosines_nW, truth_n) in found.items():
                right[key] += int((cosines_nW.argmax(dim=-1) == truth_n).sum())
                total[key] += len(truth_n)
        return {key: round(right[key] / max(1, total[key]), 4) for key in SETS}
