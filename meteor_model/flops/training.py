"""FLOPs of a training step, part by part: forward, backward, and what is recomputed between them.

Which products a backward pass has hangs on what learns. A frozen part has none for the gradients of its weights; where
nothing that learns lies below it, it has no backward pass at all. So every part runs as it trains, on shape-only
tensors, with a leaf in the place of what comes in, which asks for a gradient where the part below does.

A tower and a projector cost the same for every image, on the tokens that the prunings before them have left. The
language model costs a T + b T^2 on a sequence of T tokens; both numbers follow from two lengths. Its head costs the
same for every token that it runs on: all of them, or, where the loss is taken in chunks, those that are supervised.

Legend: N tokens of a tower, D its width, K visual tokens of one image, C language model width, T tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from meteor_model.flops.counter import flop_counter
from meteor_model.flops.language import full_mask
from meteor_model.flops.vision import encode, fuse, towers_of
from meteor_model.modeling_meteor import MeteorForConditionalGeneration

T = TypeVar("T")

LENGTH = 64
"""Tokens of the shorter of the two sequences that are counted."""


@dataclass(frozen=True)
class PassFlops:
    """FLOPs of a forward and a backward pass.

    Attributes:
        forward: the forward pass, scores of stages 1 and 2 included.
        backward: gradients of inputs and weights, as far as they are asked for.
        recomputed: of the forward pass, once more in the backward pass (activation checkpointing).
    """

    forward: int = 0
    backward: int = 0
    recomputed: int = 0

    @property
    def model(self) -> int:
        """What the model asks for, whatever is kept or recomputed: the numerator of MFU."""
        return self.forward + self.backward

    @property
    def hardware(self) -> int:
        """What the device computes: the numerator of HFU."""
        return self.model + self.recomputed

    def __add__(self, other: PassFlops) -> PassFlops:
        return PassFlops(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: int) -> PassFlops:
        return PassFlops(*(one * times for one in astuple(self)))


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs of training a model, by what a batch holds.

    Attributes:
        towers: of an image, all towers.
        projector: of an image, with the scores of stage 2.
        llm_token: of each token of a sequence, without the head.
        llm_pair: of each pair of its tokens, T^2 in a sequence of T: causal attention counts its full square.
        head: of each token that the head runs on.
        whole_head: whether it runs on every token, as the plain loss has it, or on supervised ones (`loss_chunk`).
    """

    towers: PassFlops
    projector: PassFlops
    llm_token: PassFlops
    llm_pair: PassFlops
    head: PassFlops
    whole_head: bool = True

    def by_part(self, images: int, lengths: Sequence[int], supervised: int) -> dict[str, PassFlops]:
        """FLOPs of each part for so many images, and sequences of these lengths with so many supervised tokens."""
        tokens, pairs = sum(lengths), sum(length * length for length in lengths)
        named = tokens if self.whole_head else supervised
        llm = self.llm_token * tokens + self.llm_pair * pairs + self.head * named
        return {"towers": self.towers * images, "projector": self.projector * images, "llm": llm}

    def of(self, images: int, lengths: Sequence[int], supervised: int) -> PassFlops:
        """FLOPs of all parts for so many images in sequences of these lengths, visual tokens included.

        Args:
            images: of all sequences.
            lengths: of the sequences, visual tokens included.
            supervised: tokens of all sequences that the loss counts.
        """
        parts = self.by_part(images, lengths, supervised)
        return parts["towers"] + parts["projector"] + parts["llm"]


def count_training(model: MeteorForConditionalGeneration, *, whole_head: bool = True) -> TrainingFlops:
    """FLOPs of training `model` as it stands.

    Args:
        model: on the meta device (`meta_model`). What learns is what requires a gradient, adapters included; blocks
            recompute where activation checkpointing is enabled.
        whole_head: see `TrainingFlops`.

    Raises:
        ValueError: where stage 3 prunes in training: what it keeps, and so what the layers above cost, is known batch
            by batch alone.
    """
    decode = model.config.pruning.decode
    if decode.enabled and decode.train:
        raise ValueError("pruning.decode.train: the FLOPs of a training that stage 3 prunes depend on its data")
    parts = [PassFlops(*one) for one in _passes(model.eval())]
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        # Blocks recompute in training mode alone: the difference is what they do.
        again = [backward for _, backward in _passes(model.train())]
        parts = [replace(one, recomputed=more - one.backward) for one, more in zip(parts, again, strict=True)]
    towers, projector, short, long, head = parts
    token, pair = zip(*map(_coefficients, astuple(short), astuple(long)), strict=True)
    return TrainingFlops(towers, projector, PassFlops(*token), PassFlops(*pair), head, whole_head)


def _passes(model: MeteorForConditionalGeneration) -> list[tuple[int, int]]:
    """Forward and backward FLOPs: towers, projector, LLM on `LENGTH` and on twice as many tokens, head on one."""
    encoded, towers = [], (0, 0)
    for encoder in towers_of(model):
        (tokens, attention), spent = _counted(partial(encode, encoder, model.config), lambda result: result[0].hidden)
        encoded.append((tokens._replace(hidden=_leaf(tokens.hidden, tokens.hidden.requires_grad)), attention))
        towers = (towers[0] + spent[0], towers[1] + spent[1])
    visual_1KC, projector = _counted(partial(fuse, model, encoded), lambda result: result)
    learns = visual_1KC.requires_grad or any(one.requires_grad for one in model.get_input_embeddings().parameters())
    width, llm = visual_1KC.shape[2], []
    for length in (LENGTH, 2 * LENGTH):
        embeds_1TC = _leaf(visual_1KC.new_empty(1, length, width), learns)
        hidden_1TC, spent = _counted(partial(_decode, model, embeds_1TC), lambda result: result)
        llm.append(spent)
    hidden_11C = _leaf(hidden_1TC.new_empty(1, 1, width), hidden_1TC.requires_grad)
    _, head = _counted(partial(model.lm_head, hidden_11C), lambda result: result)
    return [towers, projector, *llm, head]


def _decode(model: MeteorForConditionalGeneration, embeds_1TC: Tensor) -> Tensor:
    mask_1T = full_mask(embeds_1TC.shape[1])
    hidden_1TC: Tensor = model.language_model(
        inputs_embeds=embeds_1TC, attention_mask=mask_1T, use_cache=False
    ).last_hidden_state
    return hidden_1TC


def _leaf(hidden: Tensor, learns: bool) -> Tensor:
    """What comes into a part: of this shape, and its gradient is asked for where something below it learns."""
    return torch.empty_like(hidden).requires_grad_(learns)


def _counted(run: Callable[[], T], output: Callable[[T], Tensor]) -> tuple[T, tuple[int, int]]:
    """What `run` gives, and the FLOPs of it and of the backward pass from its `output`, where that has one."""
    with flop_counter() as counter:
        result = run()
        forward = counter.get_total_flops()
        if (hidden := output(result)).requires_grad:
            hidden.sum().backward()
    return result, (forward, counter.get_total_flops() - forward)


def _coefficients(short: int, long: int) -> tuple[int, int]:
    """The a and b of a T + b T^2, from its values at `LENGTH` and at twice of that."""
    token, no_rest = divmod(4 * short - long, 2 * LENGTH)
    pair, rest = divmod(long - 2 * short, 2 * LENGTH**2)
    assert no_rest == rest == 0, "the language model costs something else than a T + b T^2"
    return token, pair
