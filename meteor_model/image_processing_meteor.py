"""MeteorImageProcessor: any usual image to the square uint8 tensor in which images travel; transformers' form of it.

Legend: M images, S travelling size.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.images import decode_image, fit_square, pillow_to_rgb

ImageInput = bytes | str | Path | Image.Image | np.ndarray | torch.Tensor
_DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class MeteorImageProcessor(BaseImageProcessor):
    """Decodes, squares and stacks images. Values stay uint8: every encoder resizes and normalises on its own device.

    Args:
        size: S, rows and columns of the square image that travels.

    Raises:
        ValueError: for a size below 1.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values"]

    def __init__(self, size: int = 336, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {size}")
        self.size = size

    def load_image(self, image: ImageInput) -> torch.Tensor:
        """Any usual image -> (3, S, S) uint8. Files and bytes are decoded under guard (`meteor_model.images`).

        Raises:
            ImageError: for a file or bytes that cannot be decoded.
            ValueError: for a URL (fetch it yourself: a conversation may come from anyone), an array of another shape
                than (H, W, 3) or a tensor of another than (3, H, W).
        """
        if isinstance(image, str | Path):
            return decode_image(_read(image), self.size)
        if isinstance(image, bytes):
            return decode_image(image, self.size)
        if isinstance(image, Image.Image):
            return fit_square(pillow_to_rgb(image), self.size)
        if isinstance(image, np.ndarray):
            image = torch.from_numpy(image).movedim(-1, 0)
        if not isinstance(image, torch.Tensor):
            raise ValueError(f"an image is bytes, a path, PIL, numpy or torch; got {type(image).__name__}")
        if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
            shape = tuple(image.shape)
            raise ValueError(f"image tensors are uint8 (3, H, W), arrays uint8 (H, W, 3); got {image.dtype} {shape}")
        return fit_square(image, self.size)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Images, nested as they came, loaded. Overrides the library's, which follows URLs."""
        if isinstance(image_url_or_urls, list | tuple):
            return [self.fetch_images(item) for item in image_url_or_urls]
        return self.load_image(image_url_or_urls)

    def preprocess(
        self, images: ImageInput | Sequence[ImageInput], return_tensors: str = "pt", **kwargs: Any
    ) -> BatchFeature:
        """One image or several -> `pixel_values` (M, 3, S, S) uint8."""
        if kwargs:
            raise ValueError(f"{type(self).__name__} has no settings {sorted(kwargs)}: images travel as uint8 squares")
        loaded = [self.load_image(image) for image in flatten_images(images)]
        return BatchFeature({"pixel_values": torch.stack(loaded)}, tensor_type=return_tensors)


def flatten_images(images: Any) -> list[ImageInput]:
    """Images nested in lists, or in one (M, 3, H, W) tensor or (M, H, W, 3) array, as one flat list."""
    if isinstance(images, list | tuple):
        return [image for item in images for image in flatten_images(item)]
    if isinstance(images, torch.Tensor | np.ndarray) and images.ndim == 4:
        return list(images)
    return [] if images is None else [images]


def _read(source: str | Path) -> bytes:
    """The bytes of a file or of a base64 data URI."""
    if isinstance(source, str):
        if match := _DATA_URI.match(source):
            return decode_base64(source[match.end() :])
        if _URL.match(source):
            raise ValueError(
                f"{source[:100]!r} is a URL, and images are not fetched from URLs: a conversation may come from "
                "anyone. Download it where you trust it and give bytes or a path"
            )
    return Path(source).read_bytes()


def decode_base64(text: str) -> bytes:
    """The bytes that a base64 text holds. Raises ValueError where it is none."""
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"an image's base64 text is broken: {error}") from None


AutoImageProcessor.register(MeteorConfig, image_processor_classes={"torchvision": MeteorImageProcessor}, exist_ok=True)
