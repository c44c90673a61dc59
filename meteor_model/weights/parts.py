"""Pretrained weights of a model's parts: read, named as the library names them, checked tensor by tensor, checksummed.

A part is one tower (by its encoder's name) or the LLM ("llm"). Its source is written

    FOLDER                              a folder with config.json and safetensors, whole or in shards
    FILE.safetensors                    one file; .bin, .pth and .pt are read with torch.load(weights_only=True)
    OWNER/NAME[@REVISION][:FILE]        a repository of the Hugging Face hub, or one file of it

and may end in `#sha256=HEX`, the checksum that the loaded part must have. Nothing stays silently random: a tensor that
is missing, unexpected or of another shape is an error. What a checkpoint holds beside the part (CLIP's text half, a
classifier) is declared in `names.FAMILIES`; blocks beyond those that the tower has are dropped and listed in the
report.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from meteor_model.encoders import VisionEncoder
from meteor_model.weights.checkpoints import (
    Checkpoint,
    Source,
    WeightsError,
    parse_source,
    read_checkpoint,
    read_config,
)
from meteor_model.weights.names import (
    FAMILIES,
    Read,
    StateDict,
    beyond,
    declared,
    own_arguments,
    own_names,
    quiet,
    read_with_timm,
    read_with_transformers,
    stored_dtype,
    timm_names,
)

if TYPE_CHECKING:
    from meteor_model.modeling_meteor import MeteorForConditionalGeneration

LLM = "llm"
SHOWN = 12
"""Tensors that an error lists by name before it only counts the rest."""


@dataclass(frozen=True)
class LoadedPart:
    """What was loaded into one part.

    Attributes:
        name: the encoder's name, or "llm".
        source: where it came from, as it was written.
        tensors: number of tensors loaded.
        bytes: their size, in the numbers they are stored in at the source.
        sha256: see `checksum`.
        dropped: names of blocks that the source has and the tower has not.
    """

    name: str
    source: str
    tensors: int
    bytes: int
    sha256: str
    dropped: tuple[str, ...] = ()


def checksum(tensors: Mapping[str, Tensor], stored: torch.dtype) -> str:
    """sha256 of named tensors, in the order of their names.

    Each contributes its name, dtype as torch writes it and shape as "2x3", each followed by a zero byte, then its
    elements in row-major order, little-endian. Floating tensors count in the dtype `stored`, so a part that was loaded
    into wider numbers (bf16 into fp32) has the checksum of what is stored; one that was loaded into narrower numbers
    has another, because something was lost.

    Args:
        tensors: as they stand in the model.
        stored: floating dtype of the source.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        tensor = (tensor.to(stored) if tensor.is_floating_point() else tensor).contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{'x'.join(map(str, tensor.shape))}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_parts(model: MeteorForConditionalGeneration, weights: Mapping[str, str]) -> list[LoadedPart]:
    """Load pretrained weights into the named parts of a model, in place.

    Args:
        model: any; its other parts stay as they are.
        weights: source by part name, an encoder's or "llm".

    Raises:
        WeightsError: as `load_encoder` and `load_llm` do, or for a part that the model does not have.
    """
    known = [*model.encoders, LLM]
    if unknown := sorted(set(weights) - set(known)):
        raise WeightsError(f"weights name the part {unknown[0]!r}; the model has {', '.join(known)}")
    return [
        load_llm(model, weights[name])
        if name == LLM
        else load_encoder(cast(VisionEncoder, model.encoders[name]), weights[name])
        for name in known
        if name in weights
    ]


# ------------------------------------------------------------------------------------------------------------- towers


def load_encoder(encoder: VisionEncoder, source: str) -> LoadedPart:
    """Load pretrained weights into a tower, in place.

    A tower with fewer blocks than the source takes the first ones; the others are listed as dropped.

    Args:
        encoder: its module `encoder.tower` is the library's.
        source: see the top of this module.

    Raises:
        WeightsError: naming the part, the source, and every tensor that is missing, unexpected or of another shape;
            settings of the source that differ and that no shape shows; or both checksums.
    """
    name, family = encoder.config.name, FAMILIES[encoder.config.family]
    where = parse_source(source)
    checkpoint = read_checkpoint(where)
    tower = encoder.get_submodule("tower")
    tensors = own_names(checkpoint.tensors, family)
    if isinstance(tower, PreTrainedModel):
        _check_settings(name, checkpoint, tower.config, "vision_config")
        read = read_with_transformers(type(tower), tower.config, tensors, own_arguments(tower))
    else:
        _check_architecture(encoder, checkpoint)
        read = read_with_timm(tower, timm_names(encoder, tower, tensors), stored_dtype(tensors))
    dropped = beyond(encoder, tower, read.unexpected)
    read = replace(
        read,
        missing=[item for item in read.missing if item.rpartition(".")[2] not in family.optional],
        unexpected=[item for item in read.unexpected if item not in dropped and not declared(item, family.unused)],
    )
    _refuse(name, checkpoint, read)
    tower.load_state_dict(read.state, strict=False)
    return _report(name, where, {key: tower.state_dict()[key] for key in read.state}, read.stored, dropped)


# ---------------------------------------------------------------------------------------------------------------- LLM


def load_llm(model: MeteorForConditionalGeneration, source: str) -> LoadedPart:
    """Load the weights of a causal language model into `model.language_model` and `model.lm_head`, in place.

    Where the model's vocabulary is larger than the source's (the image token, padding), the rows beyond are the mean of
    the source's rows: a new token then starts as an average one instead of an outlier. The checksum leaves them out.

    Args:
        model: built for the same LLM configuration; tied or not.
        source: see the top of this module.

    Raises:
        WeightsError: as `load_encoder`; or where the source has a larger vocabulary than the model.
    """
    where = parse_source(source)
    checkpoint = read_checkpoint(where)
    config: PreTrainedConfig = copy.deepcopy(model.config.text_config)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise WeightsError(f"part {LLM!r}: transformers has no causal language model for {config.model_type!r}")
    _check_settings(LLM, checkpoint, config, "text_config")
    rows = _stored_rows(checkpoint)
    if rows > config.vocab_size:
        raise WeightsError(
            f"part {LLM!r}: {checkpoint.described} has embeddings of {rows} tokens, the model of {config.vocab_size}: "
            f"build it with a vocabulary of at least {rows}"
        )
    config.vocab_size = rows
    read = read_with_transformers(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config, checkpoint.tensors, {})
    _refuse(LLM, checkpoint, read)
    own, loaded = _llm_tensors(model), _by_our_names(read.state, model)
    for name, tensor in loaded.items():
        _fill(own[name], tensor)
    standing = {name: own[name][: len(tensor)] if tensor.ndim else own[name] for name, tensor in loaded.items()}
    return _report(LLM, where, standing, read.stored, [])


def vocabulary_rows(source: str) -> int:
    """Rows of an LLM's embedding, from its config.json alone; often more than its tokenizer has tokens.

    Raises:
        WeightsError: where the source has no config.json that says so.
    """
    content = read_config(parse_source(source))
    rows = content.get("text_config", content).get("vocab_size")
    if not isinstance(rows, int):
        raise WeightsError(
            f"part {LLM!r}: {source!r} has no config.json with a vocab_size; give a folder or repository"
        )
    return rows


def _stored_rows(checkpoint: Checkpoint) -> int:
    rows = [len(tensor) for name, tensor in checkpoint.tensors.items() if name.endswith("embed_tokens.weight")]
    if len(rows) != 1:
        raise WeightsError(f"part {LLM!r}: {checkpoint.described} has {len(rows)} tensors embed_tokens.weight, not one")
    return rows[0]


def _llm_tensors(model: MeteorForConditionalGeneration) -> StateDict:
    """The LLM's tensors, as they are stored; a tied head is left out, for it is the embedding."""
    tensors = {f"language_model.{name}": tensor for name, tensor in model.language_model.state_dict().items()}
    if not model.config.text_config.tie_word_embeddings:
        tensors["lm_head.weight"] = model.lm_head.weight.data
    return tensors


def _by_our_names(state: StateDict, model: MeteorForConditionalGeneration) -> StateDict:
    """A causal model's tensors by our names: its base model is our `language_model`."""
    prefix = f"{model.language_model.base_model_prefix}."
    named = {
        f"language_model.{name.removeprefix(prefix)}" if name.startswith(prefix) else name: tensor
        for name, tensor in state.items()
    }
    if model.config.text_config.tie_word_embeddings:
        del named["lm_head.weight"]
    return named


@torch.no_grad()
def _fill(target: Tensor, source: Tensor) -> None:
    """Copy; rows of `target` beyond those of `source` become the mean row."""
    if target.shape == source.shape:
        target.copy_(source)
        return
    target[: len(source)].copy_(source)
    target[len(source) :] = source.float().mean(dim=0).to(target.dtype)


# -------------------------------------------------------------------------------------------------------------- checks


#: Settings that decide what a tower or LLM computes and that no tensor's shape shows.
SILENT_SETTINGS = (
    *("hidden_act", "dense_act_fn", "hidden_activation", "layer_norm_eps", "rms_norm_eps", "num_attention_heads"),
    *("num_key_value_heads", "patch_size", "rope_parameters", "rope_theta", "sliding_window", "use_sliding_window"),
    *("layer_types", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "window_size"),
    *("global_attn_indexes", "use_rel_pos", "use_abs_pos", "tie_word_embeddings"),
)


def _names(items: Iterable[str]) -> str:
    listed = list(items)
    more = f", and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more


def _refuse(part: str, checkpoint: Checkpoint, read: Read) -> None:
    """One error for everything that does not fit. Raises WeightsError."""
    lines = []
    if read.missing:
        lines.append(f"missing ({len(read.missing)}): {_names(read.missing)}")
    if read.unexpected:
        lines.append(f"unexpected ({len(read.unexpected)}): {_names(read.unexpected)}")
    if read.mismatched:
        shapes = (f"{name} is {theirs} there and {ours} in the model" for name, theirs, ours in read.mismatched)
        lines.append(f"of another shape ({len(read.mismatched)}): {_names(shapes)}")
    if lines:
        raise WeightsError("\n  ".join([f"part {part!r}: {checkpoint.described} does not fit; tensors", *lines]))


def _check_settings(part: str, checkpoint: Checkpoint, ours: PreTrainedConfig, section: str) -> None:
    """Compare the settings that no tensor's shape shows with those of the config.json beside the weights.

    `section` is where the configuration of a larger model keeps those of such a part.
    """
    if checkpoint.folder is None or not checkpoint.config:
        return
    with quiet():
        theirs = type(ours).from_dict(checkpoint.config.get(section, checkpoint.config)).to_dict()
    mine = ours.to_dict()
    differ = [
        f"{name} is {theirs[name]!r} there and {mine[name]!r} in the model"
        for name in SILENT_SETTINGS
        if name in mine and name in theirs and not _same(mine[name], theirs[name])
    ]
    if differ:
        raise WeightsError(f"part {part!r}: the config.json of {checkpoint.described} differs: {'; '.join(differ)}")


def _same(ours: Any, theirs: Any) -> bool:
    """Equal; numbers up to the rounding of formats that store them in fp32."""
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-6)
    return bool(ours == theirs)


def _check_architecture(encoder: VisionEncoder, checkpoint: Checkpoint) -> None:
    """Nets of timm that differ in padding or activation alone have the same tensors: their config.json tells."""
    theirs, ours = checkpoint.config.get("architecture"), encoder.config.tower.get("model_name")
    if None not in (theirs, ours) and theirs != str(ours).partition(".")[0]:
        raise WeightsError(f"part {encoder.config.name!r}: {checkpoint.described} is of {theirs}, the tower of {ours}")


def _report(part: str, source: Source, standing: StateDict, stored: torch.dtype, dropped: list[str]) -> LoadedPart:
    found = checksum(standing, stored)
    if source.sha256 not in (None, found):
        raise WeightsError(f"part {part!r}: {source.text!r} was loaded with checksum {found}: other weights than meant")
    size = sum(
        tensor.numel() * (stored.itemsize if tensor.is_floating_point() else tensor.itemsize)
        for tensor in standing.values()
    )
    return LoadedPart(part, source.text, len(standing), size, found, tuple(dropped))
