"""What projectors learn alone, before a language model learns with them: minutes, as no language model runs.

A dense model's joint projector is aligned with words (`align`). METEOR's, one an encoder, learn to say of their own
channels what the joint one says of all: they begin in the language that the language model has learned to understand.

Legend: M images, N tokens of one encoder, G x G cells of the joint grid, C width of the language model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality.maps import Maps
from benchmarks.quality.questions import images_of_step
from meteor_model.fusion import concat_channels
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.vision_meteor import JOINT

IMAGES = 64
"""Of a step."""
RATE = 2e-3
"""Peak of AdamW's, before half a cosine."""
REPORT_EVERY = 100
PROJECTORS_FILE = "projectors.safetensors"


def fit_projectors(
    parameters: Sequence[nn.Parameter],
    loss_of: Callable[[Sequence[int]], Tensor],
    total: int,
    steps: int,
    seed: int,
    say: Callable[[str], None],
) -> None:
    """Lower a loss by AdamW.

    Args:
        parameters: what is learned.
        loss_of: the loss of these images.
        total: images that there are; a step has IMAGES of them, in an order that is a function of the seed.
        steps: optimizer steps.
        seed: of the order.
        say: is told about progress.
    """
    optimizer = torch.optim.AdamW(parameters, RATE, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = loss_of(images_of_step(step, min(IMAGES, total), total, seed))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == steps:
            say(f"projectors alone {step + 1}/{steps}, loss {float(loss.detach()):.3f}")


def fit_once(
    folder: Path, model: MeteorForConditionalGeneration, settings: Mapping[str, str], fit: Callable[[], None]
) -> None:
    """Run `fit`, which changes the model's projectors, and keep them in a folder; there already, they are only read.

    Raises:
        ValueError: where those that are there are of other settings.
    """
    path = folder / PROJECTORS_FILE
    if path.is_file():
        with safe_open(path, "pt") as file:
            if file.metadata() != settings:
                raise ValueError(f"{path} is of {file.metadata()}, not of {settings}: give the run another name")
        model.projectors.load_state_dict(load_file(path))
        return
    fit()
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in model.projectors.state_dict().items()}
    save_file(tensors, path, dict(settings))


def imitate(
    model: MeteorForConditionalGeneration,
    dense: MeteorForConditionalGeneration,
    maps: Maps,
    steps: int,
    seed: int,
    say: Callable[[str], None],
) -> None:
    """Teach every encoder's projector to say of its own map what the dense model's joint one says of all maps.

    The loss of an encoder is its mean squared difference to the joint tokens, over their variance; a token of a
    coarser grid is held against the mean of the cells that it covers.

    Args:
        model: METEOR, whose projectors are changed.
        dense: the model that it is made from, on the same device.
        maps: of the training images.
        steps: optimizer steps.
        seed: of the order of images.
        say: is told about progress.
    """
    grids = dense.config.encoder_grids
    side, device = dense.config.concat_grid, model.device

    def loss_of(images: Sequence[int]) -> Tensor:
        found = maps.of(images, device)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                joined_MND = concat_channels(found, list(grids.values()), [1] * len(grids), side)
                wanted_MNC = dense.projectors[JOINT](joined_MND).float()
            said = {name: model.projectors[name](map_MND) for name, map_MND in zip(grids, found, strict=True)}
        variance = wanted_MNC.var()
        losses = [F.mse_loss(said[name].float(), _pooled(wanted_MNC, side, grids[name])) for name in grids]
        return torch.stack(losses).mean() / variance

    fit_projectors(list(model.projectors.parameters()), loss_of, len(maps), steps, seed, say)


def _pooled(tokens_MNC: Tensor, side: int, grid: tuple[int, int]) -> Tensor:
    """Tokens of a square grid of `side`, averaged to another grid."""
    cells_MCGG = tokens_MNC.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    return F.adaptive_avg_pool2d(cells_MCGG, grid).flatten(2).transpose(1, 2)
