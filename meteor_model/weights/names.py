"""From the names of a checkpoint to those of a part.

The libraries' own loaders and filters do it; what each family's checkpoints hold beside the tower is listed here.
Nothing is judged: what did not fit is listed in `Read`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import timm
import timm.models.convnext
import timm.models.eva
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from meteor_model.encoders import VisionEncoder
from meteor_model.weights.checkpoints import WeightsError

StateDict = dict[str, Tensor]
#: Tensors that timm's filter for Eva resizes silently.
RESAMPLED = ("pos_embed", "patch_embed.proj.weight")


@dataclass(frozen=True)
class FamilyWeights:
    """What the checkpoints of one encoder family hold beside the tower.

    Attributes:
        unused: tensors, or modules where the name ends in a dot, that the tower has no place for.
        prefix: what stands before the tower's names in a checkpoint of a larger model; removed where `whole` is found.
        whole: how some name begins in a checkpoint of the larger model, and none in one of the tower alone.
        optional: last part of the names that a checkpoint may lack, because the value that the tower starts with is
            right for every checkpoint.
    """

    unused: tuple[str, ...] = ()
    prefix: str = ""
    whole: str = ""
    optional: tuple[str, ...] = ()


_TEXT_HALF = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")
FAMILIES: dict[str, FamilyWeights] = {
    "clip": FamilyWeights(
        (*_TEXT_HALF, "text_model.embeddings.position_ids", "vision_model.embeddings.position_ids", "classifier.")
    ),
    "siglip": FamilyWeights((*_TEXT_HALF, "head.", "vision_model.head.", "classifier.")),
    "siglip2": FamilyWeights((*_TEXT_HALF, "head.", "vision_model.head.", "classifier.")),
    "dinov2": FamilyWeights(("classifier.",)),
    "dinov2_registers": FamilyWeights(("classifier.",)),
    "vit": FamilyWeights(("classifier.", "pooler.")),
    "convnext": FamilyWeights(("classifier.",)),
    "pix2struct": FamilyWeights(("decoder.",), prefix="encoder.", whole="encoder.encoder."),
    "sam": FamilyWeights(("mask_decoder.", "prompt_encoder.", "shared_image_embedding.")),
    # Its nets differ, so what they have after the chosen feature map is asked of timm (`whole_net`).
    "timm_conv": FamilyWeights(optional=("num_batches_tracked",)),
    "eva02": FamilyWeights(("head.", "fc_norm.", "mask_token", "lm_head.", "rope.")),
    "eva02_det": FamilyWeights(
        (
            *("proposal_generator.", "roi_heads.", "backbone.simfp_2.", "backbone.simfp_3.", "backbone.simfp_4."),
            *("backbone.simfp_5.", "rope_win.", "rope_glb."),
        ),
        prefix="backbone.net.",
        whole="backbone.net.",
    ),
}


@dataclass(frozen=True)
class Read:
    """Tensors by the part's own names, their floating dtype at the source, and what did not fit."""

    state: StateDict
    stored: torch.dtype
    missing: list[str]
    unexpected: list[str]
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]]


def stored_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Floating dtype of a checkpoint: the widest, where it mixes several."""
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    return max(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32)


def read_with_transformers(
    kind: type[PreTrainedModel], config: PreTrainedConfig, tensors: StateDict, arguments: Mapping[str, Any]
) -> Read:
    """A checkpoint as transformers' own loader maps its names: old ones, and those of larger models.

    Nothing that the loader initialises is kept: whatever it could not fill is reported.
    """
    stored = stored_dtype(tensors)
    with quiet():
        loaded, info = kind.from_pretrained(
            None,
            config=copy.deepcopy(config),
            state_dict=tensors,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused with the others
            dtype=stored,
            **arguments,
        )
    missing, mismatched = sorted(info["missing_keys"]), sorted(info["mismatched_keys"])
    absent = {*missing, *(item for item, _, _ in mismatched)}
    state = {item: tensor for item, tensor in loaded.state_dict().items() if item not in absent}
    shapes = [(item, tuple(theirs), tuple(ours)) for item, theirs, ours in mismatched]
    unexpected = sorted(info["unexpected_keys"])
    prefix = f"{kind.base_model_prefix}."
    if not any(name.startswith(prefix) for name in loaded.state_dict()):  # a larger model's prefix, which ours has not
        unexpected = [name.removeprefix(prefix) for name in unexpected]
    return Read(state, stored, missing, unexpected, shapes)


def own_arguments(tower: PreTrainedModel) -> dict[str, Any]:
    """What the tower's class is built with besides its configuration."""
    if "add_pooling_layer" in inspect.signature(type(tower).__init__).parameters:
        return {"add_pooling_layer": tower.pooler is not None}
    return {}


def read_with_timm(tower: nn.Module, tensors: StateDict, stored: torch.dtype) -> Read:
    """A checkpoint whose names are those of timm's module, held against it."""
    own = tower.state_dict()
    mismatched = [
        (name, tuple(tensor.shape), tuple(own[name].shape))
        for name, tensor in sorted(tensors.items())
        if name in own and tensor.shape != own[name].shape
    ]
    wrong = {name for name, _, _ in mismatched}
    state = {name: tensor for name, tensor in tensors.items() if name in own and name not in wrong}
    return Read(state, stored, sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own)), mismatched)


def timm_names(encoder: VisionEncoder, tower: nn.Module, tensors: StateDict) -> StateDict:
    """Names of a checkpoint as timm's module has them, by timm's own filter of the tower's kind.

    The filter drops silently what it does not want and resizes positions and patches, so what is declared unused is
    taken out before it, and those of another size stay as they are, to be refused.

    Raises:
        WeightsError: where timm's filter does not know a name.
    """
    family = encoder.config.family
    if family == "eva02_det":  # the detector keeps the CLS position of its pre-training, which its backbone skips
        tensors = {key: value for key, value in tensors.items() if ".rope." not in key}
        if "pos_embed" in tensors:
            tensors["pos_embed"] = tensors["pos_embed"][:, 1:]
    own = tower.state_dict()
    kept = {key: value for key, value in tensors.items() if key in own or not declared(key, FAMILIES[family].unused)}
    if family in ("eva02", "eva02_det"):
        renamed: StateDict = timm.models.eva.checkpoint_filter_fn(kept, tower)
        resampled = {name: key for name in RESAMPLED for key in kept if f".{key}".endswith(f".{name}")}
        return {**renamed, **{name: kept[key] for name, key in resampled.items()}}
    if isinstance(tower, timm.models.convnext.ConvNeXt):
        try:
            return timm.models.convnext.checkpoint_filter_fn(kept, whole_net(encoder))
        except KeyError as error:
            raise WeightsError(f"part {encoder.config.name!r}: timm's ConvNeXt has no tensor {error}") from None
    return kept


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings of the library's loader: what it would warn about is an error here."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def own_names(tensors: StateDict, family: FamilyWeights) -> StateDict:
    """The tensors by the names of a checkpoint of the tower alone."""
    if not family.whole or not any(name.startswith(family.whole) for name in tensors):
        return dict(tensors)
    return {name.removeprefix(family.prefix): tensor for name, tensor in tensors.items()}


def declared(name: str, unused: Iterable[str]) -> bool:
    """Whether a family declares a tensor unused: by its name, or under a prefix that ends in a dot."""
    return any(name.startswith(item) if item.endswith(".") else name == item for item in unused)


def beyond(encoder: VisionEncoder, tower: nn.Module, names: list[str]) -> list[str]:
    """Those of the names that belong to blocks, or what follows them, which the library's net has and the tower not."""
    if encoder.config.family == "timm_conv":
        whole = whole_net(encoder).state_dict()
        return [name for name in names if name in whole]
    prefix = next((f"{name}." for name, module in tower.named_modules() if module is encoder.blocks), None)
    return [name for name in names if prefix is not None and _is_beyond(name, prefix, len(encoder.blocks))]


def whole_net(encoder: VisionEncoder) -> nn.Module:
    """The net of timm that a convolutional tower is the front of, on the meta device."""
    with torch.device("meta"):
        return timm.create_model(encoder.config.tower["model_name"])


def _is_beyond(name: str, prefix: str, count: int) -> bool:
    """Whether a tensor belongs to a block of index `count` or above."""
    index = name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else ""
    return index.isdecimal() and int(index) >= count
