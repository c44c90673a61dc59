"""From the square uint8 images that travel to the pixels that a tower sees: resizing and range of values.

Legend: M images, S travelling size, R the tower's own resolution.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tvf

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF_MEAN, HALF_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

#: own: resized with antialiasing, then the mean and standard deviation that the family was trained with.
#: eagle: what EAGLE does (github.com/NVlabs/EAGLE), for weights that were trained by it.
PIXELS = ("own", "eagle")

Triple = tuple[float, float, float]


def check_images(pixels_MCSS: Tensor) -> None:
    """ValueError unless images are uint8 squares (M, 3, S, S)."""
    if pixels_MCSS.dtype != torch.uint8:
        raise ValueError(f"images travel as uint8, got {pixels_MCSS.dtype}")
    shape = tuple(pixels_MCSS.shape)
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:  # one channel would broadcast, a strip be squashed
        raise ValueError(f"images travel as squares (M, 3, S, S), got {shape}")


def own_pixels(pixels_MCSS: Tensor, size: int, mean: Triple, std: Triple) -> Tensor:
    """Resized as uint8 with antialiasing, then (x / 255 - mean) / std: fp32 (M, 3, R, R)."""
    if pixels_MCSS.shape[-2:] != (size, size):
        pixels_MCSS = tvf.resize(pixels_MCSS, [size, size], antialias=True)
    return _scaled(pixels_MCSS, mean, std)


def eagle_pixels(pixels_MCSS: Tensor, size: int) -> Tensor:
    """EAGLE's: CLIP's mean and standard deviation at the travelling size, then bilinear with aligned corners.

    Without antialiasing, and the same for all towers but Pix2Struct. fp32 (M, 3, R, R).
    """
    pixels_MCSS = _scaled(pixels_MCSS, OPENAI_MEAN, OPENAI_STD)
    if pixels_MCSS.shape[-2:] == (size, size):
        return pixels_MCSS
    return F.interpolate(pixels_MCSS, size=(size, size), mode="bilinear", align_corners=True)


def eagle_pix2struct_pixels(pixels_MCSS: Tensor, size: int) -> Tensor:
    """EAGLE hands Pix2Struct's own processor the values 0..255: standardised as they travel, then resized as there."""
    standard_MCSS = standardised(pixels_MCSS.float())
    if standard_MCSS.shape[-2:] == (size, size):
        return standard_MCSS
    return tvf.resize(standard_MCSS, [size, size], antialias=True)


def standardised(pixels_MCRR: Tensor) -> Tensor:
    """Each image with mean 0 and standard deviation 1 over all its values, as Pix2Struct's own processor does it."""
    mean = pixels_MCRR.mean(dim=(1, 2, 3), keepdim=True)
    std = pixels_MCRR.std(dim=(1, 2, 3), keepdim=True)
    return (pixels_MCRR - mean) / std.clamp_min(pixels_MCRR[0].numel() ** -0.5)


def _scaled(pixels_MCSS: Tensor, mean: Triple, std: Triple) -> Tensor:
    mean_C11 = torch.tensor(mean, device=pixels_MCSS.device).view(3, 1, 1)
    std_C11 = torch.tensor(std, device=pixels_MCSS.device).view(3, 1, 1)
    return (pixels_MCSS.float() / 255 - mean_C11) / std_C11
