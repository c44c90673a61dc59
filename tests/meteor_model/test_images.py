"""The guarded decoder: every format and colour mode against a plain reference, every refusal with its reason."""

import contextlib
import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from meteor_model import images
from meteor_model.images import ImageError, decode_image, fit_square

SIZE = 32
RED, BLUE, WHITE = (220, 20, 30), (20, 40, 200), (255, 255, 255)


def halves(width: int = 40, height: int = 40, left: Any = RED, right: Any = BLUE, mode: str = "RGB") -> Image.Image:
    image = Image.new(mode, (width, height), left)
    image.paste(right, (width // 2, 0, width, height))
    return image


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def colours(tensor: torch.Tensor) -> list[tuple[int, ...]]:
    """The colours at the middle of the left and of the right half."""
    middle = tensor.shape[1] // 2
    return [tuple(tensor[:, middle, column].tolist()) for column in (middle // 2, middle + middle // 2)]


def close(got: list[tuple[int, ...]], wanted: list[tuple[int, ...]], tolerance: int) -> bool:
    return bool(np.abs(np.array(got) - np.array(wanted)).max() <= tolerance)


def grey16() -> Image.Image:
    levels = np.full((40, 40), 20 * 257, dtype=np.uint16)
    levels[:, 20:] = 200 * 257
    return Image.fromarray(levels)


def palette_with_transparency() -> bytes:
    image = halves().convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    return saved(image, "PNG", transparency=image.getpixel((0, 0)))


FILES: dict[str, tuple[Callable[[], bytes], list[tuple[int, ...]], int]] = {
    "jpeg": (lambda: saved(halves(), "JPEG", quality=95), [RED, BLUE], 6),
    "jpeg_progressive": (lambda: saved(halves(), "JPEG", quality=95, progressive=True), [RED, BLUE], 6),
    "jpeg_grey": (lambda: saved(halves(left=20, right=200, mode="L"), "JPEG"), [(20,) * 3, (200,) * 3], 4),
    "jpeg_cmyk": (lambda: saved(halves().convert("CMYK"), "JPEG", quality=95), [RED, BLUE], 6),
    "jpeg_two_pictures": (lambda: saved(halves(), "MPO", save_all=True, append_images=[halves()]), [RED, BLUE], 10),
    "png": (lambda: saved(halves(), "PNG"), [RED, BLUE], 0),
    "png_bilevel": (lambda: saved(halves(left=0, right=1, mode="1"), "PNG"), [(0,) * 3, WHITE], 0),
    "png_grey": (lambda: saved(halves(left=20, right=200, mode="L"), "PNG"), [(20,) * 3, (200,) * 3], 0),
    "png_grey16": (lambda: saved(grey16(), "PNG"), [(20,) * 3, (200,) * 3], 0),
    "png_grey_alpha": (lambda: saved(halves(left=(9, 0), right=(200, 255), mode="LA"), "PNG"), [WHITE, (200,) * 3], 0),
    "png_alpha": (lambda: saved(halves(left=(*RED, 0), right=(*BLUE, 255), mode="RGBA"), "PNG"), [WHITE, BLUE], 0),
    "png_half_alpha": (
        lambda: saved(halves(left=(0, 0, 0, 128), right=(*BLUE, 255), mode="RGBA"), "PNG"),
        [(127,) * 3, BLUE],
        1,
    ),
    "png_palette": (lambda: saved(halves().convert("P", palette=Image.Palette.ADAPTIVE), "PNG"), [RED, BLUE], 3),
    "png_palette_transparent": (palette_with_transparency, [WHITE, BLUE], 3),
    "webp": (lambda: saved(halves(), "WEBP", lossless=True), [RED, BLUE], 0),
    "webp_alpha": (
        lambda: saved(halves(left=(*RED, 0), right=(*BLUE, 255), mode="RGBA"), "WEBP", lossless=True),
        [WHITE, BLUE],
        0,
    ),
    "gif_first_frame": (
        lambda: saved(halves(), "GIF", save_all=True, append_images=[halves(left=BLUE, right=RED)], duration=100),
        [RED, BLUE],
        6,
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_and_mode_keeps_its_colours(name: str) -> None:
    make, wanted, tolerance = FILES[name]
    tensor = decode_image(make(), SIZE)
    assert tensor.shape == (3, SIZE, SIZE)
    assert tensor.dtype == torch.uint8
    assert tensor.is_contiguous()
    assert close(colours(tensor), wanted, tolerance), (colours(tensor), wanted)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_on_both_paths(kind: str, orientation: int) -> None:
    image = halves(48, 32)
    image.paste((20, 200, 40), (0, 16, 24, 32))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {"quality": 97}))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    wanted = fit_square(torch.from_numpy(np.array(upright)).permute(2, 0, 1), SIZE)
    difference = (decode_image(data, SIZE).int() - wanted.int()).abs().float()
    assert difference.mean() < 1.5, f"orientation {orientation}: mean difference {difference.mean()}"


def test_the_jpeg_path_agrees_with_pillow() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (9, 9, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise).resize((200, 200), Image.Resampling.BICUBIC), "JPEG", quality=92)
    reference = np.array(Image.open(io.BytesIO(data)).convert("RGB").resize((64, 64), Image.Resampling.BILINEAR))
    difference = (decode_image(data, 64).int() - torch.from_numpy(reference).permute(2, 0, 1).int()).abs()
    assert difference.float().mean() < 1
    assert difference.max() <= 4


def test_what_torchvision_refuses_is_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("refused")

    monkeypatch.setattr(images, "decode_jpeg", refuse)
    assert close(colours(decode_image(saved(halves(), "JPEG", quality=95), SIZE)), [RED, BLUE], 6)


@pytest.mark.parametrize(("width", "height"), [(64, 16), (16, 64), (400, 1), (1, 400), (33, 31), (1, 1)])
def test_the_aspect_ratio_survives_by_padding(width: int, height: int) -> None:
    tensor = decode_image(saved(Image.new("RGB", (width, height), RED), "PNG"), SIZE)
    is_picture_HW = (tensor == torch.tensor(RED, dtype=torch.uint8)[:, None, None]).all(dim=0)
    is_grey_HW = (tensor == images.PADDING_GREY).all(dim=0)
    assert (is_picture_HW | is_grey_HW).all()
    longer = max(width, height)
    rows, columns = max(1, round(height * SIZE / longer)), max(1, round(width * SIZE / longer))
    assert is_picture_HW.sum() == rows * columns
    assert is_picture_HW.any(dim=1).sum() == rows
    assert is_picture_HW.any(dim=0).sum() == columns
    top, bottom = is_grey_HW.all(dim=1)[: SIZE // 2].sum(), is_grey_HW.all(dim=1)[SIZE // 2 :].sum()
    assert abs(int(top) - int(bottom)) <= 1


def test_a_picture_of_the_travelling_size_is_untouched() -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
    assert torch.equal(
        decode_image(saved(Image.fromarray(pixels), "PNG"), SIZE), torch.from_numpy(pixels).permute(2, 0, 1)
    )


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels: decoding it would fail, refusing it by its header must not."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("width", "height"), [(8193, 8192), (10_000, 10_000), (50_000, 50_000), (2**31 - 1, 2**31 - 1)]
)
def test_absurd_sizes_are_refused_from_the_header(
    width: int, height: int, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(images, "pillow_to_rgb", lambda image: pytest.fail("the pixels were decoded"))
    with pytest.raises(ImageError) as caught:
        decode_image(png_header(width, height), SIZE)
    assert caught.value.reason == "image_too_large"
    assert not recwarn.list


def huge_claims() -> dict[str, bytes]:
    """Small files of each other format whose header claims a huge picture."""
    jpeg, gif = bytearray(saved(halves(), "JPEG")), bytearray(saved(halves(), "GIF"))
    webp = bytearray(saved(halves(), "WEBP", exif=b"Exif\0\0" + b"\0" * 10))
    frame, canvas = jpeg.index(b"\xff\xc0"), webp.index(b"VP8X") + 12
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65000, 65000)
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    webp[canvas : canvas + 6] = b"\xff\xff\x3f" * 2
    return {"jpeg": bytes(jpeg), "gif": bytes(gif), "webp": bytes(webp)}


@pytest.mark.parametrize("name", ["jpeg", "gif", "webp"])
def test_absurd_sizes_are_refused_in_every_format(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for function in ("pillow_to_rgb", "_decode_jpeg"):
        monkeypatch.setattr(images, function, lambda image: pytest.fail("the pixels were decoded"))
    with pytest.raises(ImageError) as caught:
        decode_image(huge_claims()[name], SIZE)
    assert caught.value.reason == "image_too_large"


@pytest.mark.parametrize(
    ("kind", "head"),
    [(b"zTXt", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0"), (b"iCCP", b"k\0\0")],
    ids=["zTXt", "iTXt", "iCCP"],
)
@pytest.mark.parametrize("behind_the_pixels", [False, True])
def test_a_text_that_unpacks_to_200_mb_is_never_held(kind: bytes, head: bytes, behind_the_pixels: bool) -> None:
    packer = zlib.compressobj(9)
    bomb = b"".join([*(packer.compress(bytes(2**20)) for _ in range(200)), packer.flush()])
    png = saved(halves(), "PNG")
    place = len(png) - 12 if behind_the_pixels else png.index(b"IDAT") - 4
    data = png[:place] + chunk(kind, head + bomb) + png[place:]
    tracemalloc.start()
    with contextlib.suppress(ImageError):
        decode_image(data, SIZE)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * 2**20


def test_pixel_data_beyond_the_claimed_size_are_not_unpacked() -> None:
    header = png_header(100, 100)
    pixels = chunk(b"IDAT", zlib.compress(bytes(50 * 2**20), 9))
    tensor = decode_image(header[:33] + pixels + chunk(b"IEND", b""), SIZE)
    assert set(tensor.unique().tolist()) == {0}


def test_limits_can_be_set() -> None:
    data = saved(halves(40, 40), "JPEG")
    assert decode_image(data, SIZE, max_pixels=1600).shape == (3, SIZE, SIZE)
    with pytest.raises(ImageError, match="40 x 40 pixels, the limit is 1599") as caught:
        decode_image(data, SIZE, max_pixels=1599)
    assert caught.value.reason == "image_too_large"
    with pytest.raises(ImageError, match=f"{len(data)} bytes, the limit is 10") as caught:
        decode_image(data, SIZE, max_bytes=10)
    assert caught.value.reason == "image_too_large"


GOOD_JPEG = saved(halves(400, 400), "JPEG", quality=95)
GOOD_PNG = saved(Image.fromarray(np.random.default_rng(2).integers(0, 255, (64, 64, 3), dtype=np.uint8)), "PNG")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 100,
        b"hello, I am a caption",
        GOOD_JPEG[: len(GOOD_JPEG) // 2],
        GOOD_JPEG[:20],
        GOOD_PNG[: len(GOOD_PNG) // 2],
        GOOD_PNG[:2000] + b"\xff" * 4000 + GOOD_PNG[6000:],
        png_header(0, 5),
        b"GIF89a" + b"\x00" * 3,
        b"RIFF\x10\x00\x00\x00WEBPVP8 ",
        saved(halves(), "BMP"),
    ],
    ids=["empty", "zeros", "text", "jpeg_cut", "jpeg_head", "png_cut", "png_broken", "png_0", "gif", "webp", "bmp"],
)
def test_what_is_no_image_has_a_reason(data: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(data, SIZE)
    assert caught.value.reason == "undecodable_image"
    assert len(caught.value.detail) > 10


@pytest.mark.parametrize("kept", [0.02, 0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("kind", ["JPEG", "progressive", "CMYK", "PNG", "WEBP", "lossless", "GIF"])
def test_a_file_that_breaks_off_is_no_picture(kind: str, kept: float) -> None:
    image = Image.fromarray(np.random.default_rng(4).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    makers: dict[str, Callable[[], bytes]] = {
        "progressive": lambda: saved(image, "JPEG", progressive=True),
        "CMYK": lambda: saved(image.convert("CMYK"), "JPEG"),
        "lossless": lambda: saved(image, "WEBP", lossless=True),
    }
    data = makers.get(kind, lambda: saved(image, kind))()
    with pytest.raises(ImageError) as caught:
        decode_image(data[: int(len(data) * kept)], SIZE)
    assert caught.value.reason == "undecodable_image"


def test_an_animation_is_its_first_frame_also_where_a_later_one_is_broken() -> None:
    frames = [halves(left=BLUE, right=RED), *(halves(left=WHITE) for _ in range(20))]
    data = saved(halves(), "GIF", save_all=True, append_images=frames, duration=100)
    assert close(colours(decode_image(data[: int(len(data) * 0.8)], SIZE)), [RED, BLUE], 6)
    webp = saved(halves(), "WEBP", save_all=True, append_images=frames, lossless=True)
    assert close(colours(decode_image(webp, SIZE)), [RED, BLUE], 0)


def test_cmyk_is_read_as_adobe_stores_it_with_its_marker_or_without() -> None:
    """Adobe stores the four inks inverted, and files without its marker follow it too often to be told apart."""
    data = saved(halves().convert("CMYK"), "JPEG", quality=95)
    marker = data.index(b"\xff\xee")
    length = struct.unpack(">H", data[marker + 2 : marker + 4])[0]
    assert data[marker + 4 : marker + 9] == b"Adobe"
    plain = data[:marker] + data[marker + 2 + length :]
    assert close(colours(decode_image(data, SIZE)), [RED, BLUE], 6)
    assert close(colours(decode_image(plain, SIZE)), [RED, BLUE], 6)


def test_random_damage_never_escapes_as_another_error() -> None:
    generator = np.random.default_rng(3)
    sources = [make() for make, _, _ in FILES.values()]
    outcomes = set()
    for trial in range(400):
        broken = bytearray(sources[trial % len(sources)])
        for position in generator.integers(0, len(broken), 6):
            broken[position] = generator.integers(0, 256)
        try:
            tensor = decode_image(bytes(broken), SIZE)
        except ImageError as error:
            outcomes.add(error.reason)
        else:
            outcomes.add("decoded")
            assert tensor.shape == (3, SIZE, SIZE)
    assert outcomes >= {"decoded", "undecodable_image"}


def test_the_error_survives_a_process_boundary() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(ImageError("image_too_large", "9 x 9")))
    assert (error.reason, error.detail, str(error)) == ("image_too_large", "9 x 9", "image_too_large: 9 x 9")


def test_a_size_below_one_is_the_callers_error() -> None:
    with pytest.raises(ValueError, match="size must be at least 1"):
        decode_image(GOOD_JPEG, 0)


@pytest.mark.parametrize(
    ("mode", "kind", "wanted"),
    [
        ("I;16", None, (50,) * 3),  # 50 * 257 of 65535
        ("I;16B", None, (50,) * 3),
        ("I", "PNG", (50,) * 3),  # how older Pillow opens 16-bit PNG files
        ("I", None, "mode 'I' does not say which number is white"),
        ("F", None, "mode 'F' does not say which number is white"),
        ("F", "TIFF", "mode 'F' does not say which number is white"),
    ],
)
def test_numbers_of_unknown_range_are_refused_and_16_bits_become_8(
    mode: str, kind: str | None, wanted: tuple[int, ...] | str
) -> None:
    image = Image.new(mode, (8, 8), 50 * 257)
    image.format = kind
    if isinstance(wanted, str):
        with pytest.raises(ValueError, match=wanted):
            images.pillow_to_rgb(image)
    else:
        assert set(colours(images.pillow_to_rgb(image))) == {wanted}


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_an_image_without_pixels_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{shape[0]} rows and {shape[1]} columns has no pixels"):
        fit_square(torch.zeros(3, *shape, dtype=torch.uint8), SIZE)
