"""SigLIP's vision transformers (transformers): no CLS token, learned positions, a final norm on every token."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers import Siglip2VisionConfig, Siglip2VisionModel, SiglipVisionConfig, SiglipVisionModel
from typing_extensions import override

from meteor_model.encoders.base import flatten_patches
from meteor_model.encoders.transformers_vit import TransformersVit


class SiglipEncoder(TransformersVit):
    """`transformers.SiglipVisionModel` without its pooling head. SigLIP2 at a fixed resolution is this model, too."""

    config_class, model = SiglipVisionConfig, SiglipVisionModel
    defaults: ClassVar[dict[str, Any]] = {"vision_use_head": False}

    @override
    def finish(self, hidden_MTD: torch.Tensor, positions_MN: torch.Tensor) -> torch.Tensor:
        return self.tower.post_layernorm(hidden_MTD)


class Siglip2Encoder(SiglipEncoder):
    """`transformers.Siglip2VisionModel` (NaFlex) on a fixed square grid, to which it resizes its positions."""

    config_class, model = Siglip2VisionConfig, Siglip2VisionModel

    @override
    def embed(self, pixels_MCRR: torch.Tensor) -> torch.Tensor:
        embeddings = self.tower.embeddings
        rows, columns = self.grid
        side = embeddings.position_embedding_size
        patches_MNE = flatten_patches(pixels_MCRR, rows, columns)
        # The library resizes positions image by image; here all images have the same grid.
        shape_12 = torch.tensor([[rows, columns]], device="cpu")
        cells_RR = torch.arange(side * side, device=patches_MNE.device).view(side, side)
        positions_RRD = embeddings.position_embedding(cells_RR)
        positions_1ND = embeddings.resize_positional_embeddings(positions_RRD, shape_12, max_length=rows * columns)
        return embeddings.patch_embedding(patches_MNE) + positions_1ND
