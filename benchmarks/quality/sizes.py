"""How large the experiment is: the real one, and smaller ones for a first look and for tests."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LanguageModel:
    """A Llama that starts from random weights."""

    width: int = 320
    layers: int = 8
    heads: int = 5
    hidden: int = 704
    """Width of the MLP: so chosen that the weights in bf16 stay below 20 MB."""


@dataclass(frozen=True)
class Recipe:
    """One training.

    Attributes:
        steps: optimizer steps of the one cosine.
        images: of a step; each comes with several questions in one packed row.
        questions: most of an image.
        muon_rate: peak learning rate of matrices.
        adam_rate: peak learning rate of everything else.
        warmup: steps of a linear warm-up.
        seed: of weights and of the order.
        alignment: steps of the projectors alone before them, each of 64 images.
    """

    steps: int
    images: int = 12
    questions: int = 10
    muon_rate: float = 2.5e-3
    adam_rate: float = 2e-3
    warmup: int = 60
    seed: int = 0
    alignment: int = 0


@dataclass(frozen=True)
class Size:
    """The whole experiment.

    Attributes:
        train_images: of the split `train`, whose maps are cached.
        validation_images: on which recipes are watched.
        final_images: of the split `final`, from which questions are drawn.
        questions: of a group, drawn from these.
        dense: the dense model's training.
        pruned: the one that makes METEOR of it.
        llm: the language model.
        tokens: visual tokens of the rows, beside all of them; the worthiest first.
        vocabulary: most entries of the tokenizer.
        pretrained: whether towers have weights; random ones of a few blocks otherwise.
    """

    train_images: int
    validation_images: int
    final_images: int
    questions: int
    dense: Recipe
    pruned: Recipe
    llm: LanguageModel = field(default_factory=LanguageModel)
    tokens: tuple[int, ...] = (34, 72, 17)
    vocabulary: int = 2048
    pretrained: bool = True


def _pruned(steps: int, alignment: int, warmup: int = 30) -> Recipe:
    """Of METEOR from a dense model: gentler."""
    return Recipe(steps, muon_rate=1.5e-3, adam_rate=1e-3, warmup=warmup, alignment=alignment)


SIZES: dict[str, Size] = {
    "full": Size(16_000, 400, 1_600, 2_000, Recipe(2_000, alignment=1_000), _pruned(900, 500)),
    "hour": Size(8_000, 200, 400, 300, Recipe(1_500, alignment=500), _pruned(400, 250)),
    "quick": Size(3_000, 100, 120, 120, Recipe(300, alignment=200), _pruned(60, 100, 20), tokens=(34,)),
    "toy": Size(
        24,
        6,
        8,
        6,
        Recipe(4, images=4, warmup=2, alignment=3),
        Recipe(2, images=4, warmup=1, alignment=3),
        LanguageModel(width=32, layers=4, heads=2, hidden=48),
        tokens=(34, 17),
        vocabulary=400,
        pretrained=False,
    ),
}
"""By name: hours, about one, and some minutes on two quiet cores. `toy` proves that the code runs, nothing else."""
