"""Vision encoders: one short adapter per family, and the registry that names them."""

from __future__ import annotations

from meteor_model.checks import nearest
from meteor_model.encoders.base import EncoderConfig, VisionEncoder, VisionTokens
from meteor_model.encoders.clip import ClipEncoder
from meteor_model.encoders.convnext import ConvNextEncoder
from meteor_model.encoders.dinov2 import Dinov2Encoder, Dinov2RegistersEncoder
from meteor_model.encoders.eva02 import Eva02DetEncoder, Eva02Encoder
from meteor_model.encoders.pix2struct import Pix2StructEncoder
from meteor_model.encoders.sam import SamEncoder
from meteor_model.encoders.siglip import Siglip2Encoder, SiglipEncoder
from meteor_model.encoders.timm_conv import TimmConvEncoder
from meteor_model.encoders.vit import VitEncoder

ENCODERS: dict[str, type[VisionEncoder]] = {
    "clip": ClipEncoder,
    "convnext": ConvNextEncoder,
    "dinov2": Dinov2Encoder,
    "dinov2_registers": Dinov2RegistersEncoder,
    "eva02": Eva02Encoder,
    "eva02_det": Eva02DetEncoder,
    "pix2struct": Pix2StructEncoder,
    "sam": SamEncoder,
    "siglip": SiglipEncoder,
    "siglip2": Siglip2Encoder,
    "timm_conv": TimmConvEncoder,
    "vit": VitEncoder,
}


def encoder_class(family: str) -> type[VisionEncoder]:
    """The adapter of a family. Raises ValueError that names the known families and the nearest one."""
    if family not in ENCODERS:
        raise ValueError(
            f"unknown encoder family {family!r}; known: {', '.join(sorted(ENCODERS))}{nearest(family, ENCODERS)}"
        )
    return ENCODERS[family]


def build_encoder(config: EncoderConfig) -> VisionEncoder:
    """A tower with random weights from its configuration; what none of its tokens depends on is frozen."""
    encoder = encoder_class(config.family)(config)
    encoder.freeze_idle()
    return encoder


__all__ = ["ENCODERS", "EncoderConfig", "VisionEncoder", "VisionTokens", "build_encoder", "encoder_class"]
