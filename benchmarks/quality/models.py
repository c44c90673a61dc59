"""The models of the experiment: towers, layouts, tokenizer, and where weights are.

Dense is EAGLE's layout: every map on one grid, joined on the channels, one projector, 144 visual tokens of a 192 px
image. METEOR's has one projector an encoder; made from a dense model it begins with that one's, cut by channels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AddedToken, PreTrainedTokenizerBase

from benchmarks.quality.sizes import LanguageModel, Size
from meteor_model.architectures import small
from meteor_model.configuration_meteor import (
    DecodePruning,
    EncodePruning,
    FusePruning,
    MeteorConfig,
    PruningConfig,
)
from meteor_model.encoders import EncoderConfig
from meteor_model.encoders.timm_conv import TimmConvEncoder
from meteor_model.image_processing_meteor import MeteorImageProcessor
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from meteor_model.pruners.named import unpruned
from meteor_model.tokenizer import train_tokenizer
from meteor_model.vision_meteor import JOINT
from meteor_model.weights.parts import LoadedPart, load_parts

SIDE = 192
GRID = 12
TOWER_PARTS = {"dinov2": "dinov2-small", "efficientnet": "efficientnet-lite0", "reader": "reader-conv"}
MODELS = Path(__file__).parents[1] / "models"
"""Weights that the repository holds."""
CARD_FILE = "card.json"
WEIGHTS_FILE = "model.safetensors"
POSITIONS = 1024
TOY_DINOV2 = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 168, "patch_size": 14}


@dataclass(frozen=True)
class Trained:
    """A model that is there to be asked.

    Attributes:
        name: of it.
        model: in eval mode.
        processor: its own.
        card: how it was made, as plain values.
    """

    name: str
    model: MeteorForConditionalGeneration
    processor: MeteorProcessor
    card: dict[str, Any]


def encoders(pretrained: bool) -> tuple[EncoderConfig, ...]:
    """DINOv2 ViT-S/14 with 12 x 12 tokens, EfficientNet-Lite0 with 6 x 6, and the reader with 12 x 12."""
    known = {item.name: item.tower for item in small().encoders}
    net = known["efficientnet"]
    return (
        EncoderConfig("dinov2", "dinov2", 14 * GRID, known["dinov2"] if pretrained else TOY_DINOV2),
        EncoderConfig("efficientnet", "timm_conv", SIDE, net),
        EncoderConfig("reader", "timm_conv", SIDE, {**net, "stage": -2}),
    )


def make_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerBase:
    """Byte BPE on lower-case texts, so that capitals and digits of signs stay one token each.

    What the template writes around a turn is one token, too: questions are short, and there are many.
    """
    tokenizer = train_tokenizer((text.lower() for text in texts), vocabulary)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("USER: ", " ASSISTANT:")])
    return tokenizer


def dense_config(tokenizer: PreTrainedTokenizerBase, llm: LanguageModel, pretrained: bool) -> MeteorConfig:
    """EAGLE's layout with nothing pruned."""
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    text = {
        "model_type": "llama",
        "hidden_size": llm.width,
        "intermediate_size": llm.hidden,
        "num_hidden_layers": llm.layers,
        "num_attention_heads": llm.heads,
        "num_key_value_heads": llm.heads,
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,  # what a visual token points to is what the head says
        "vocab_size": len(tokenizer),
        **ids,
    }
    off = PruningConfig(EncodePruning(enabled=False), FusePruning(enabled=False), DecodePruning(enabled=False))
    return MeteorConfig(
        encoders=encoders(pretrained),
        text_config=text,
        pruning=off,
        image_size=SIDE,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        fusion="channel_concat",
        concat_grid=GRID,
        **ids,
    )


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "paper": ({}, {}),
    "merge": ({}, {"merge": "nearest"}),
    "coverage": ({}, {"criterion": "coverage", "merge": "nearest"}),
    "random fusion": ({}, {"criterion": "random"}),
    "uniform budgets": ({"rank_exponent": 0.0}, {}),
    "inverse budgets": ({"rank_exponent": -1.0}, {}),
}
"""Other settings of stages 1 and 2 than the paper's, by name: options beyond it, and ablations."""


def meteor_config(
    dense: MeteorConfig, totals: tuple[int, ...], keep: int, ranks: Mapping[str, Any], variant: str = "paper"
) -> MeteorConfig:
    """METEOR's layout with stages 1 and 2 on; stage 3 acts in `generate` alone and is off.

    Args:
        dense: the layout that it is made from.
        totals: tokens that survive each boundary of stage 1.
        keep: visual tokens an image that enter the language model.
        ranks: expected ranks by encoder (`measure_ranks`).
        variant: of VARIANTS.
    """
    encode, fuse = VARIANTS[variant]
    pruning = PruningConfig(
        EncodePruning(totals=totals, **encode), FusePruning(keep=keep, **fuse), DecodePruning(enabled=False)
    )
    plain = {**unpruned(dense).to_dict(), "fusion": "post_projection", "pruning": pruning, "ranks": dict(ranks)}
    return MeteorConfig(**plain)


def make_processor(config: MeteorConfig, tokenizer: PreTrainedTokenizerBase) -> MeteorProcessor:
    return MeteorProcessor(MeteorImageProcessor(SIDE), tokenizer, config.tokens_per_image, template="short")


def tower_folders(parts_dir: Path) -> dict[str, str]:
    """Where the weights of each tower are: made by `make parts`, or in the repository.

    Raises:
        FileNotFoundError: naming the part and the command that makes it.
    """
    found = {}
    for tower, part in TOWER_PARTS.items():
        folder = next((root / part for root in (parts_dir, MODELS) if (root / part / WEIGHTS_FILE).is_file()), None)
        if folder is None:
            raise FileNotFoundError(f'{parts_dir / part} is not there; make it with `make parts ARGS="{part}"`')
        found[tower] = str(folder)
    return found


def build(config: MeteorConfig, parts_dir: Path | None) -> tuple[MeteorForConditionalGeneration, list[LoadedPart]]:
    """A model with frozen towers; theirs are the pretrained weights, or random ones without `parts_dir`."""
    model = MeteorForConditionalGeneration(config)
    loaded = load_parts(model, tower_folders(parts_dir)) if parts_dir is not None else []
    model.encoders.requires_grad_(False).eval()
    for encoder in model.encoders.values():
        if isinstance(encoder, TimmConvEncoder):
            encoder.to(memory_format=torch.channels_last)  # several times as fast in bf16 on a CPU
    return model, loaded


def measured_ranks(model: MeteorForConditionalGeneration, pixels_MCSS: torch.Tensor) -> dict[str, list[float]]:
    """Expected effective rank of each encoder's map at its boundaries over these images."""
    ranks = model.measure_ranks(pixels_MCSS, ("effective",))["effective"]
    return {name: [float(value) for value in values.mean(axis=0)] for name, values in ranks.items()}


def trained_tensors(model: MeteorForConditionalGeneration) -> dict[str, torch.Tensor]:
    """All weights but the towers', and a head's that are the embedding's."""
    left_out = ("encoders.", *(("lm_head.",) if model.config.text_config.tie_word_embeddings else ()))
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(left_out)}


def cut_projector(tensors: Mapping[str, torch.Tensor], widths: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """The joint projector as one an encoder: each gets its channels of the first layer, and all else whole.

    A token then holds a share of what the joint one held, so each share is scaled by half more, as tried once.

    Args:
        tensors: of a dense model.
        widths: channels of each encoder, in the order in which they were joined.
    """
    out = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"projectors.{JOINT}.")}
    joint = {name: tensors[f"projectors.{JOINT}.{name}"] for name in ("input.weight", "input.bias")}
    last = {name: tensors[f"projectors.{JOINT}.{name}"] for name in ("output.weight", "output.bias")}
    start = 0
    for encoder, width in widths.items():
        out[f"projectors.{encoder}.input.weight"] = 1.5 * joint["input.weight"][:, start : start + width]
        out[f"projectors.{encoder}.input.bias"] = joint["input.bias"].clone()
        out |= {f"projectors.{encoder}.{name}": tensor.clone() for name, tensor in last.items()}
        start += width
    return out


def load_trained(model: MeteorForConditionalGeneration, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill everything but the towers. ValueError for a tensor that is missing or too many."""
    result = model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
    missing = sorted(set(result.missing_keys) & set(trained_tensors(model)))
    if missing or result.unexpected_keys:
        raise ValueError(f"weights do not fit: missing {missing[:4]}, too many {result.unexpected_keys[:4]}")


def save_trained(folder: Path, model: MeteorForConditionalGeneration, processor: MeteorProcessor, card: Any) -> None:
    """Write weights in bf16 without the towers', configuration, tokenizer and card."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().cpu().to(torch.bfloat16).contiguous() for name, tensor in trained_tensors(model).items()
    }
    save_file(tensors, folder / WEIGHTS_FILE)
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / CARD_FILE).write_text(json.dumps(card, indent=1) + "\n")
    (folder / "README.md").write_text(_card_text(card))


def _card_text(card: Mapping[str, Any]) -> str:
    """The card for people."""
    scores = card.get("validation", {})
    groups = [f"- {name}: {100 * share:.1f}%" for name, share in scores.items() if "/" not in name]
    return f"""# {card["name"]}

Trained by `python -m benchmarks.quality` from {card.get("start", "random weights")}. Towers were frozen and are not in
this folder: `make parts` makes them, the reader lies beside it. Weights in bf16. Apache-2.0.

Exact match on the validation split, which was watched while the recipe was chosen (the final part: docs/results.md):

{chr(10).join(groups)}

It answers questions on composed scenes of 192 px and nothing else. `card.json` holds the recipe, the scores by kind,
the losses, the hardware and the towers' checksums.
"""


def open_trained(folder: Path, parts_dir: Path | None) -> Trained:
    """A model that `save_trained` wrote, with its towers.

    Raises:
        FileNotFoundError: where there is none, or a tower is missing.
        ValueError: where a tower has other weights than those that the model was trained behind.
    """
    if not (folder / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS_FILE}; train it first (docs/results.md)")
    config = MeteorConfig.from_pretrained(folder)
    model, loaded = build(config, parts_dir)
    card = json.loads((folder / CARD_FILE).read_text())
    for part in loaded:
        if part.sha256 != card["towers"].get(part.name):
            raise ValueError(
                f"{folder}: tower {part.name!r} was trained with weights {card['towers'].get(part.name)}, those of "
                f"{part.source} are {part.sha256}: take the ones beside it in {MODELS}, or train the model again"
            )
    load_trained(model, load_file(folder / WEIGHTS_FILE))
    return Trained(folder.name, model.eval(), MeteorProcessor.from_pretrained(folder), card)


def describe(size: Size) -> dict[str, Any]:
    """A size as plain values."""
    return asdict(replace(size))
