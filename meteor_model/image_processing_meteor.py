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
from meteor_model.images import ImageError, decode_image, fit_square, pillow_to_rgb

ImageInput = bytes | str | Path | Image.Image | np.ndarray | torch.Tensor
_DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,")
SHOWN_SOURCE = 200  # characters of a path in an error
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

        Arrays are uint8 (H, W, 3), (H, W, 4), (H, W, 1) or (H, W), tensors the same with the channels first: RGB, RGBA
        (laid over white) or grey.

        Raises:
            ImageError: for a file, bytes or a lazily opened Pillow image that cannot be decoded; a file's names it.
            FileNotFoundError: for a path without a file.
            ValueError: for a URL (fetch it yourself: a conversation may come from anyone), a folder, an image without
                pixels, and an array or a tensor of another shape or dtype.
        """
        if isinstance(image, str | Path):
            return self._load_file(image)
        if isinstance(image, bytes):
            return decode_image(image, self.size)
        if isinstance(image, Image.Image):
            return fit_square(_decoded(image), self.size)
        if isinstance(image, np.ndarray | torch.Tensor):
            return fit_square(_array_to_rgb(image), self.size)
        raise ValueError(f"an image is bytes, a path, PIL, numpy or torch; got {type(image).__name__}")

    def _load_file(self, source: str | Path) -> torch.Tensor:
        data = _read(source)
        try:
            return decode_image(data, self.size)
        except ImageError as error:
            name = str(source)[:SHOWN_SOURCE]
            raise ImageError(error.reason, f"{name}: {error.detail}") from error

    def load_images(self, images: Sequence[ImageInput]) -> list[torch.Tensor]:
        """Each (3, S, S) uint8. Errors as in `load_image`, with the image's place in the list."""
        loaded = []
        for index, image in enumerate(images):
            try:
                loaded.append(self.load_image(image))
            except ImageError as error:
                raise ImageError(error.reason, f"image {index}: {error.detail}") from error
            except ValueError as error:
                raise ValueError(f"image {index}: {error}") from error
        return loaded

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
        loaded = self.load_images(flatten_images(images))
        if not loaded:
            raise ValueError("there is no image to preprocess: give at least one")
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
    try:
        return Path(source).read_bytes()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # a folder, a name that is too long or holds a zero byte
        raise ValueError(f"{str(source)[:SHOWN_SOURCE]!r} is no file that can be read: {error!s:.100}") from error


def _decoded(image: Image.Image) -> torch.Tensor:
    """`pillow_to_rgb` of a user's image, whose file may be read only now. Raises ImageError where that fails."""
    if 0 in image.size:
        raise ValueError(f"an image of {image.height} rows and {image.width} columns has no pixels")
    try:
        return pillow_to_rgb(image)
    except (ValueError, MemoryError):
        raise
    except Exception as error:  # as in decode_image: decoders of foreign bytes raise anything
        name = getattr(image, "filename", "") or "a Pillow image"
        raise ImageError("undecodable_image", f"{name}: {type(error).__name__}: {error}"[:300]) from error


def _array_to_rgb(image: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Uint8 (3, H, W) of an array (channels last) or a tensor (channels first): RGB, RGBA over white, or grey."""
    refusal = (
        "image tensors are uint8 (3, H, W), arrays uint8 (H, W, 3), of 3 channels (RGB), 4 (RGBA), 1 or none (grey); "
        f"got {image.dtype} {tuple(image.shape)}"
    )
    if image.dtype not in (np.uint8, torch.uint8) or image.ndim not in (2, 3):
        raise ValueError(refusal)
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.ascontiguousarray(image))  # torch knows no negative strides
        image = image if image.ndim == 2 else image.movedim(-1, 0)
    image_CHW = image[None] if image.ndim == 2 else image
    if len(image_CHW) not in (1, 3, 4):
        raise ValueError(refusal)
    if len(image_CHW) == 4 and image_CHW.numel():
        return pillow_to_rgb(Image.fromarray(image_CHW.movedim(0, -1).cpu().contiguous().numpy()))
    return image_CHW[:3].expand(3, -1, -1)


def decode_base64(text: str) -> bytes:
    """The bytes that a base64 text holds. Raises ValueError where it is none."""
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"an image's base64 text is broken: {error}") from None


AutoImageProcessor.register(MeteorConfig, image_processor_classes={"torchvision": MeteorImageProcessor}, exist_ok=True)
