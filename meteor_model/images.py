"""From the bytes of one image file to the one square uint8 tensor in which images travel.

Everything that is foreign about a file (format, colour mode, orientation, bit depth, absurd sizes) ends here:

1. the header is read, never the pixels, and what is too large is refused;
2. JPEG goes through torchvision's decoder, everything else, and what that decoder refuses, through Pillow;
3. EXIF orientation is applied, alpha is laid over white, the first frame of an animation is taken;
4. the longer side is resized to the travelling size (bilinear, antialiased, uint8) and the shorter one is padded with
   neutral grey on both sides. Padding keeps the aspect ratio: squashed letters and circles are harder to read.

Shape legend: H, W source rows and columns; S travelling size.
"""

import io
import warnings

import numpy as np
import torch
import torch.nn.functional as functional
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_jpeg

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
MAX_PIXELS = 64 * 2**20
MAX_BYTES = 64 * 2**20
PADDING_GREY = 127
IMAGE_REASONS = ("undecodable_image", "image_too_large")


class ImageError(ValueError):
    """One image that cannot be used: `reason` is one of IMAGE_REASONS, `detail` says what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in IMAGE_REASONS, reason
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def decode_image(data: bytes, size: int, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> torch.Tensor:
    """Decode one JPEG, PNG, WebP or GIF file to uint8 (3, size, size), RGB, aspect kept, padded with grey.

    Raises ImageError with reason `image_too_large` (more than `max_bytes` bytes or, by its header, more than
    `max_pixels` pixels; the pixels are then never decoded) or `undecodable_image`; ValueError for a size below 1.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    if len(data) > max_bytes:
        raise ImageError("image_too_large", f"{len(data)} bytes, the limit is {max_bytes}")
    try:
        # Pillow's own bomb warning lies above our limit, which speaks first; the error lies above both.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError("image_too_large", f"{width} x {height} pixels, the limit is {max_pixels} in all")
        image_3HW = _decode_jpeg(data) if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L") else None
        if image_3HW is None:
            image_3HW = pillow_to_rgb(image)
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("image_too_large", str(error)) from error
    except UnidentifiedImageError as error:  # its own text holds an address in memory
        raise ImageError("undecodable_image", f"no image that can be read as {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders of foreign bytes raise anything; nothing is swallowed, it becomes a reason
        raise ImageError("undecodable_image", f"{type(error).__name__}: {error}"[:300]) from error
    return fit_square(image_3HW, size)


def fit_square(image_3HW: torch.Tensor, size: int) -> torch.Tensor:
    """Resize uint8 (3, H, W) so that its longer side is `size`, and pad with grey to uint8 (3, size, size), centred.

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
    top, left = (size - new_height) // 2, (size - new_width) // 2
    if (new_height, new_width) != (size, size):
        margins = (left, size - new_width - left, top, size - new_height - top)
        image_3HW = functional.pad(image_3HW, margins, value=PADDING_GREY)
    return image_3HW.contiguous()


def _decode_jpeg(data: bytes) -> torch.Tensor | None:
    """Uint8 (3, H, W) by torchvision, orientation applied; None where it refuses, so that Pillow has the last word."""
    encoded = torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())
    try:
        return decode_jpeg(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=True)
    except RuntimeError:
        return None


def pillow_to_rgb(image: Image.Image) -> torch.Tensor:
    """Uint8 (3, H, W) of the first frame of any Pillow image, orientation applied, alpha over white.

    16-bit grey (modes I;16, and I of a PNG file) is brought to 8 bits by 255/65535. Raises ValueError for the modes F
    and I from elsewhere: what their numbers mean, white at 1, 255 or 65535, only their maker knows.
    """
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if image.mode in ("I", "F") and not is_16_bit:
        raise ValueError(
            f"a Pillow image of mode {image.mode!r} does not say which number is white: bring it to 0..255 and make it "
            "8-bit, e.g. Image.fromarray(levels.astype('uint8'))"
        )
    image.seek(0)
    image = ImageOps.exif_transpose(image)
    if is_16_bit:  # Pillow's own conversion would clip it
        levels_HW = np.asarray(image).astype(np.float64)
        grey_HW = np.clip(np.rint(levels_HW / 257), 0, 255).astype(np.uint8)
        return torch.from_numpy(grey_HW)[None].expand(3, -1, -1)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        image.alpha_composite(layer)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
