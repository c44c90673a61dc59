"""From the bytes of one image file to the one square uint8 tensor in which images travel.

Everything that is foreign about a file (format, colour mode, orientation, bit depth, absurd sizes) ends here:

1. metadata are left out, of JPEG and PNG; the orientation is noted (`image_files.py`);
2. the header is read, never the pixels, and what would cost too much is refused (`limits.py`);
3. JPEG goes through libjpeg, which must have nothing to say against it (`libjpeg.py`), everything else through Pillow;
4. EXIF orientation is applied, alpha is laid over white, the first frame of an animation is taken;
5. the longer side is resized to the travelling size (bilinear, antialiased, uint8) and the shorter one is padded with
   neutral grey on both sides. Padding keeps the aspect ratio: squashed letters and circles are harder to read.

Which damage is seen depends on the format: PNG has checksums, which are compared, over all of its bytes; JPEG and GIF
must come out exactly at their end; WebP has neither, so bytes that were overwritten within its length are not seen.

Shape legend: H, W source rows and columns; S travelling size.
"""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as functional
from PIL import Image, ImageOps, UnidentifiedImageError

from meteor_model.foreign import foreign
from meteor_model.image_files import IMAGE_REASONS, ImageError, ImageFile, orientation_of, strip_metadata
from meteor_model.libjpeg import JpegDamageError, decode_whole_jpeg
from meteor_model.limits import ImageLimits

__all__ = [
    "FORMATS", "IMAGE_REASONS", "ImageError", "ImageLimits", "OpenedImage", "decode_image", "fit_square", "open_image",
    "pillow_to_rgb",
]  # fmt: skip

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
PADDING_GREY = 127
BAND_PIXELS = 2**22
"""Pixels that are brought to RGB at a time: a large picture is never in memory in several colour modes at once."""


@dataclass(frozen=True)
class OpenedImage:
    """An image file whose header is read and whose pixels are not.

    Attributes:
        image: Pillow's, of the file.
        file: what is left of it without metadata.
    """

    image: Image.Image
    file: ImageFile

    @property
    def num_pixels(self) -> int:
        """Of the whole picture; what decoding costs goes by them."""
        return self.image.width * self.image.height

    def decode(self, size: int, out_3SS: torch.Tensor | None = None) -> torch.Tensor:
        """Uint8 (3, size, size), as `decode_image`. Raises ImageError `undecodable_image`."""
        with foreign(_undecodable, keep=(ImageError,)):
            image_3HW = _decode_jpeg(self.file.data) if self.image.format == "JPEG" else _to_rgb(self.image)
            return fit_square(_upright(image_3HW, self.file.orientation), size, out_3SS)


def open_image(data: bytes, limits: ImageLimits = ImageLimits()) -> OpenedImage:  # noqa: B008 - frozen
    """Read the header of a JPEG, PNG, WebP or GIF file, never the pixels.

    Raises ImageError with reason `image_too_large` (above one of the limits) or `undecodable_image`.
    """
    if len(data) > limits.bytes:
        raise ImageError("image_too_large", f"{len(data)} bytes, the limit is {limits.bytes}")
    with foreign(_undecodable, keep=(ImageError,)):
        file = strip_metadata(data, limits.scans)
        image = _open(file.data)
        _check_size(*image.size, limits)
        if image.format == "WEBP":
            orientation = orientation_of(image.info.get("exif", b""), image.info.get("xmp", b""))
            file = replace(file, orientation=orientation)
        return OpenedImage(image, file)


def decode_image(
    data: bytes,
    size: int,
    limits: ImageLimits = ImageLimits(),  # noqa: B008 - frozen
    out_3SS: torch.Tensor | None = None,
) -> torch.Tensor:
    """Decode one JPEG, PNG, WebP or GIF file to uint8 (3, size, size), RGB, aspect kept, padded with grey.

    `out_3SS` is where to write it, contiguous uint8 (3, size, size); None: memory of its own.

    Raises ImageError with reason `image_too_large` (above one of the limits; the pixels are then never decoded) or
    `undecodable_image`; ValueError for a size below 1.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    return open_image(data, limits).decode(size, out_3SS)


def _undecodable(what: str) -> ImageError:
    return ImageError("undecodable_image", what)


def _open(data: bytes) -> Image.Image:
    try:
        # Pillow's own bomb warning lies above our limit, which speaks first; the error lies above both.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError("image_too_large", str(error)) from error
    except UnidentifiedImageError as error:  # its own text holds an address in memory
        raise ImageError("undecodable_image", f"no image that can be read as {', '.join(FORMATS)}") from error


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    if width * height > limits.pixels:
        raise ImageError("image_too_large", f"{width} x {height} pixels, the limit is {limits.pixels} in all")
    if max(width, height) > limits.aspect * max(1, min(width, height)):
        raise ImageError("image_too_large", f"{width} x {height} pixels, the limit is {limits.aspect} to 1")


def fit_square(image_3HW: torch.Tensor, size: int, out_3SS: torch.Tensor | None = None) -> torch.Tensor:
    """Resize uint8 (3, H, W) so that its longer side is `size`, and pad with grey to uint8 (3, size, size), centred.

    The result is contiguous; it is `out_3SS` where that is given.

    Raises ValueError for an image without pixels.
    """
    height, width = image_3HW.shape[-2:]
    if not height or not width:
        raise ValueError(f"an image of {height} rows and {width} columns has no pixels")
    longer = max(height, width)
    new_height, new_width = (max(1, round(side * size / longer)) for side in (height, width))
    if (new_height, new_width) != (height, width):
        # Native uint8, what torchvision's own resize calls (its import alone costs a data worker more than a second).
        resized = functional.interpolate(image_3HW[None], (new_height, new_width), mode="bilinear", antialias=True)
        image_3HW = resized[0]
    square_3SS = torch.empty((3, size, size), dtype=torch.uint8) if out_3SS is None else out_3SS
    top, left = (size - new_height) // 2, (size - new_width) // 2
    bottom, right = top + new_height, left + new_width
    # The margins alone: whatever is written twice is paid twice.
    square_3SS[:, :top] = PADDING_GREY
    square_3SS[:, bottom:] = PADDING_GREY
    square_3SS[:, top:bottom, :left] = PADDING_GREY
    square_3SS[:, top:bottom, right:] = PADDING_GREY
    square_3SS[:, top:bottom, left:right] = image_3HW
    return square_3SS


def _decode_jpeg(data: bytes) -> torch.Tensor:
    try:
        return decode_whole_jpeg(data)
    except JpegDamageError as error:
        raise ImageError("undecodable_image", f"a damaged JPEG, by libjpeg: {error}") from error


def _upright(image_3HW: torch.Tensor, orientation: int) -> torch.Tensor:
    """The picture that EXIF's orientation means: 5 to 8 swap rows and columns, then it is mirrored."""
    if orientation >= 5:
        image_3HW = image_3HW.transpose(-1, -2)
    mirrored = {2: (-1,), 3: (-1, -2), 4: (-2,), 6: (-1,), 7: (-1, -2), 8: (-2,)}.get(orientation, ())
    return image_3HW.flip(mirrored) if mirrored else image_3HW


def pillow_to_rgb(image: Image.Image) -> torch.Tensor:
    """Uint8 (3, H, W) of the first frame of any Pillow image, orientation applied, alpha over white.

    16-bit grey (modes I;16, and I of a PNG file) is brought to 8 bits by 255/65535. Raises ValueError for the modes F
    and I from elsewhere: what their numbers mean, white at 1, 255 or 65535, only their maker knows.
    """
    image.seek(0)
    kind, turned = image.format, ImageOps.exif_transpose(image)
    return _to_rgb(turned, kind)


def _to_rgb(image: Image.Image, kind: str | None = None) -> torch.Tensor:
    """Uint8 (3, H, W) of the first frame, not turned; `kind` is the format of the file, where the image forgot it."""
    image.seek(0)
    convert = _to_rgb_bands(image, kind or image.format)
    rows = max(1, BAND_PIXELS // max(1, image.width))
    rgb_HW3 = np.empty((image.height, image.width, 3), dtype=np.uint8)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        rgb_HW3[top:bottom] = convert(image.crop((0, top, image.width, bottom)))
    return torch.from_numpy(rgb_HW3).permute(2, 0, 1)


def _to_rgb_bands(image: Image.Image, kind: str | None) -> Callable[[Image.Image], np.ndarray]:
    """What brings bands of an image to uint8 (rows, W, 3), or (rows, W, 1) for grey. Raises ValueError for its mode."""
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and kind == "PNG")
    if is_16_bit:
        return _grey_of_16_bits
    if image.mode in ("I", "F"):
        raise ValueError(
            f"a Pillow image of mode {image.mode!r} does not say which number is white: bring it to 0..255 and make it "
            "8-bit, e.g. Image.fromarray(levels.astype('uint8'))"
        )
    return _over_white if image.has_transparency_data else lambda band: np.asarray(band.convert("RGB"))


def _grey_of_16_bits(band: Image.Image) -> np.ndarray:
    levels = np.asarray(band).astype(np.float64)  # Pillow's own conversion would clip it
    return np.clip(np.rint(levels / 257), 0, 255).astype(np.uint8)[..., None]


def _over_white(band: Image.Image) -> np.ndarray:
    layer = band.convert("RGBA")
    paper = Image.new("RGBA", layer.size, (255, 255, 255, 255))
    paper.alpha_composite(layer)
    return np.asarray(paper.convert("RGB"))
