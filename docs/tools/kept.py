"""Draw docs/images/pruners.png, a scene under every pruner: `python -m docs.tools.kept`, after `make parts`.

The scene is of the validation split. The model is benchmarks/models/dense-0, which joins the maps of its encoders; what
needs them apart runs on METEOR's layout made from it, whose projectors are cut out of the joint one and not trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.models import (
    MODELS,
    Trained,
    build,
    cut_projector,
    load_trained,
    make_processor,
    measured_ranks,
    open_trained,
    trained_tensors,
)
from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.pruners.cost import solve_share
from meteor_model.pruners.named import PRUNERS, with_pruner
from meteor_model.pruners.spectra import singular_values
from meteor_model.visualize.compare import Under, draw_pruners, look_under, where_they_act
from pipelines.data.sources.scenes import compose
from pipelines.parts import default_parts_dir

PAGE = Path(__file__).resolve().parents[2] / "docs" / "images" / "pruners.png"
DENSE = "dense-0"
SCENE, QUESTION = 26, "what does the upper sign say?"
KEEP = 36
COLOURS = 256
"""Of the file."""


def apart(dense: Trained, pixels_13SS: torch.Tensor) -> Trained:
    """The model with one projector an encoder; its ranks are those of the scene."""
    config = MeteorConfig(**{**dense.model.config.to_dict(), "fusion": "post_projection"})
    model, _ = build(config, default_parts_dir())
    widths = {name: tower.embed_dim for name, tower in model._towers()}
    load_trained(model, cut_projector(trained_tensors(dense.model), widths))
    model.follow(with_pruner(config, "meteor", KEEP))  # ranks belong to its boundaries
    model.follow(model.config.with_pruning(model.config.pruning, measured_ranks(model, pixels_13SS)))
    return Trained("apart", model.eval(), make_processor(config, dense.processor.tokenizer), {})


def settings_of(pruner: str, dense: Trained, pixels_13SS: torch.Tensor) -> dict[str, Any]:
    """A pruner's own numbers.

    METEOR prunes in its first two stages alone, since a third one asks a language model that understands the tokens;
    E-AdaPrune's share is the one for which it keeps as many as the others.
    """
    if pruner == "meteor":
        return {"fused": KEEP}
    if pruner != "e_adaprune":
        return {}
    visual_1KC, _ = dense.model.encode_images(pixels_13SS)
    return {"share": solve_share(singular_values(visual_1KC), KEEP)}


@torch.no_grad()
def found() -> Iterator[Under]:
    """The scene under every pruner, on the first of the two models on which it can run."""
    dense = open_trained(MODELS / DENSE, default_parts_dir())
    pixels_13SS = torch.from_numpy(compose("validation", 0, SCENE).pixels).permute(2, 0, 1)[None]
    split = apart(dense, pixels_13SS)
    for pruner in PRUNERS:
        keep = dense.model.config.tokens_per_image if pruner == "none" else KEEP
        settings = settings_of(pruner, dense, pixels_13SS)
        under = look_under(dense.model, dense.processor, pixels_13SS[0], QUESTION, pruner, keep, **settings)
        if under.refusal:
            under = look_under(split.model, split.processor, pixels_13SS[0], QUESTION, pruner, keep, **settings)
            under = replace(under, answer="")  # of projectors that have learned nothing
        yield under


def main() -> None:
    """Write the picture."""
    pixels_3SS = torch.from_numpy(compose("validation", 0, SCENE).pixels).permute(2, 0, 1)
    note = (
        f"{KEEP} of 144 visual tokens stay (autoprune: on average); in quotes, what one small model answers. "
        "Last row: encoders apart, projectors not trained; meteor's stages 1 and 2."
    )
    sheet = draw_pruners(pixels_3SS, f"One image under every pruner: {QUESTION}", note, where_they_act(list(found())))
    sheet.quantize(COLOURS).save(PAGE, optimize=True)


if __name__ == "__main__":
    main()
