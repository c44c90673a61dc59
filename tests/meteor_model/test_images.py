"""The guarded decoder: every format and colour mode against a plain reference, every refusal with its reason."""

import contextlib
import importlib.util
import io
import os
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps

from meteor_model import images, libjpeg
from meteor_model.images import ImageError, ImageLimits, decode_image, fit_square

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
    monkeypatch.setattr(images, "_to_rgb", lambda image: pytest.fail("the pixels were decoded"))
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
    for function in ("_to_rgb", "_decode_jpeg"):
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
    assert decode_image(data, SIZE, ImageLimits(pixels=1600)).shape == (3, SIZE, SIZE)
    with pytest.raises(ImageError, match="40 x 40 pixels, the limit is 1599") as caught:
        decode_image(data, SIZE, ImageLimits(pixels=1599))
    assert caught.value.reason == "image_too_large"
    with pytest.raises(ImageError, match=f"{len(data)} bytes, the limit is 10") as caught:
        decode_image(data, SIZE, ImageLimits(bytes=10))
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


# ------------------------------------------------------------------------------------------------ damage and its limits


def scene(**options: Any) -> bytes:
    """A JPEG with something to see in every block, so that what is missing is missed."""
    noise = np.random.default_rng(7).integers(0, 255, (50, 50, 3), dtype=np.uint8)
    return saved(Image.fromarray(noise).resize((400, 400), Image.Resampling.BICUBIC), "JPEG", quality=90, **options)


JPEGS = {
    "baseline": lambda: scene(),
    "optimised": lambda: scene(optimize=True),
    "progressive": lambda: scene(progressive=True),
    "restarts": lambda: scene(restart_marker_rows=1),
    "cmyk": lambda: saved(Image.open(io.BytesIO(scene())).convert("CMYK"), "JPEG"),
    "grey": lambda: saved(Image.open(io.BytesIO(scene())).convert("L"), "JPEG"),
}
EOI = b"\xff\xd9"
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[: len(data) // 2],
    "cut_with_end": lambda data: data[: len(data) // 2] + EOI,
    "zeros": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "zeros_with_end": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2 - 2) + EOI,
    "many_zeros": lambda data: data[: len(data) // 2] + bytes(300_000),
    "many_zeros_with_end": lambda data: data[: len(data) // 2] + bytes(300_000) + EOI,
    "hole": lambda data: data[: len(data) // 2] + data[len(data) // 2 + 4000 :],
    "no_end": lambda data: data[:-2],
    "ones": lambda data: data[: len(data) // 2] + b"\xff" * 5000 + data[len(data) // 2 :],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", JPEGS)
def test_half_a_jpeg_is_no_picture_whatever_lies_behind_it(kind: str, damage: str) -> None:
    whole = JPEGS[kind]()
    assert decode_image(whole, SIZE).shape == (3, SIZE, SIZE)
    with pytest.raises(ImageError, match="libjpeg") as caught:
        decode_image(DAMAGE[damage](whole), SIZE)
    assert caught.value.reason == "undecodable_image"


def test_what_follows_the_end_of_a_jpeg_is_no_damage() -> None:
    whole = scene()
    assert torch.equal(decode_image(whole + b"\0" * 5000 + whole, SIZE), decode_image(whole, SIZE))


def test_other_words_on_standard_error_are_passed_on(capfd: pytest.CaptureFixture[str]) -> None:
    words = "from another thread: Corrupt JPEG data: is no beginning of a line\n"

    def decode(encoded: torch.Tensor) -> torch.Tensor:
        os.write(2, words.encode() + b"Corrupt JPEG data: bad Huffman code\n")
        return torch.zeros(3, 4, 4, dtype=torch.uint8)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(libjpeg, "_decoder", lambda: decode)
        with pytest.raises(libjpeg.JpegDamageError, match=r"^Corrupt JPEG data: bad Huffman code$"):
            libjpeg.decode_whole_jpeg(scene())
    assert capfd.readouterr().err == words


def test_the_library_alone_decodes_as_the_package_does() -> None:
    data = scene()
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    assert torch.equal(libjpeg.decode_whole_jpeg(data), torchvision.io.decode_jpeg(encoded, "RGB"))
    with pytest.MonkeyPatch.context() as patched:  # a package whose library is elsewhere
        patched.setattr(importlib.util, "find_spec", lambda name: None)
        libjpeg._decoder.cache_clear()
        assert torch.equal(libjpeg.decode_whole_jpeg(data), torchvision.io.decode_jpeg(encoded, "RGB"))
    libjpeg._decoder.cache_clear()


def test_threads_hear_the_warnings_of_their_own_pictures() -> None:
    good, bad = scene(), DAMAGE["cut_with_end"](scene())

    def fault(data: bytes) -> bool:
        try:
            decode_image(data, SIZE)
        except ImageError:
            return True
        return False

    order = [bool(n % 3) for n in range(60)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(fault, [bad if one else good for one in order])) == order


def test_a_forked_process_decodes_while_its_parent_does() -> None:
    """As a loader's workers do: the lock that another thread held at the fork is not theirs."""
    with libjpeg._hearing:
        child = os.fork()
        if child == 0:
            os._exit(0 if decode_image(scene(), SIZE).shape == (3, SIZE, SIZE) else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("place", [0.2, 0.5, 0.9])
def test_a_flipped_bit_in_a_png_is_seen(place: float) -> None:
    broken = bytearray(GOOD_PNG)
    broken[int(len(broken) * place)] ^= 0x10
    with pytest.raises(ImageError, match="wrong checksum"):
        decode_image(bytes(broken), SIZE)


def exif_block(orientation: int, order: str = "<") -> bytes:
    mark = b"II" if order == "<" else b"MM"
    entry = struct.pack(f"{order}HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"Exif\0\0" + mark + struct.pack(f"{order}HIH", 42, 8, 1) + entry + bytes(4)


def segment(kind: int, body: bytes) -> bytes:
    return b"\xff" + bytes([kind]) + struct.pack(">H", len(body) + 2) + body


XMP = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta>%s</x:xmpmeta>"
TURNED = XMP % b'<rdf:Description tiff:Orientation="6"/>'
NO_EXIF = segment(0xE1, XMP % b"")
ORIENTED: dict[str, list[bytes]] = {
    "alone": [segment(0xE1, exif_block(6))],
    "big_endian": [segment(0xE1, exif_block(6, ">"))],
    "behind_another_app1": [NO_EXIF, segment(0xE1, exif_block(6))],
    "behind_many": [segment(0xE0, b"JFIF\0\1\1" + bytes(7)), NO_EXIF, NO_EXIF, segment(0xFE, b"hello"),
                    segment(0xE2, b"MPF\0" + bytes(50)), segment(0xE1, exif_block(6))],
    "in_two_segments": [segment(0xE1, exif_block(6)[:20]), segment(0xE1, b"Exif\0\0" + exif_block(6)[20:])],
    "in_xmp": [segment(0xE1, TURNED)],
}  # fmt: skip


@pytest.mark.parametrize("name", ORIENTED)
def test_the_orientation_of_a_jpeg_is_found_wherever_it_stands(name: str) -> None:
    plain = scene()
    data = plain[:2] + b"".join(ORIENTED[name]) + plain[2:]
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(data))).tobytes() != Image.open(io.BytesIO(plain)).tobytes()
    difference = decode_image(data, SIZE).int() - decode_image(plain, SIZE).rot90(-1, (1, 2)).int()
    assert difference.abs().max() <= 1  # rows are resized before columns


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt"])
def test_the_orientation_that_imagemagick_writes_into_a_png_is_found(kind: bytes) -> None:
    lines = b"\nexif\n      32\n" + exif_block(6).hex().encode() + b"\n"
    text = b"Raw profile type exif\0" + (b"\0" + zlib.compress(lines) if kind == b"zTXt" else lines)
    data = GOOD_PNG[:33] + chunk(kind, text) + GOOD_PNG[33:]
    assert torch.equal(decode_image(data, 64), decode_image(GOOD_PNG, 64).rot90(-1, (1, 2)))


@pytest.mark.parametrize(
    "block", [b"", b"II", b"II*\0\xff\xff\xff\xff", exif_block(0), exif_block(9), exif_block(6)[:-7]]
)
def test_an_exif_block_that_says_nothing_turns_nothing(block: bytes) -> None:
    plain = scene()
    data = plain[:2] + segment(0xE1, b"Exif\0\0" + block.removeprefix(b"Exif\0\0")) + plain[2:]
    assert torch.equal(decode_image(data, SIZE), decode_image(plain, SIZE))


# ---------------------------------------------------------------------------------------------------------------- costs


def exif_bomb() -> bytes:
    """A block of 64 kB whose 5,300 entries are 60 kB each, of the same bytes: Pillow reads 300 MB as it opens it."""
    entries = b"".join(struct.pack("<HHII", 0x8000 + number, 7, 60_000, 8) for number in range(5300))
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 5300) + entries + bytes(4)


def test_metadata_cost_nothing(recwarn: pytest.WarningsRecorder) -> None:
    plain = scene()
    segments = segment(0xE1, exif_bomb()) * 20 + segment(0xE2, b"MPF\0" + exif_bomb()[6:]) + segment(0xFE, b"") * 9000
    started = time.process_time()
    tracemalloc.start()
    tensor = decode_image(plain[:2] + segments + plain[2:], SIZE)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert torch.equal(tensor, decode_image(plain, SIZE))
    assert peak < 20 * 2**20
    assert time.process_time() - started < 2
    assert not [one for one in recwarn.list if issubclass(one.category, UserWarning)]


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scene(progressive=True)
    assert decode_image(whole, SIZE, ImageLimits(scans=10)).shape == (3, SIZE, SIZE)
    monkeypatch.setattr(images, "_decode_jpeg", lambda data: pytest.fail("the pixels were decoded"))
    with pytest.raises(ImageError, match="more than 9 scans, the limit") as caught:
        decode_image(whole, SIZE, ImageLimits(scans=9))
    assert caught.value.reason == "image_too_large"
    last = whole.rindex(b"\xff\xda")
    with pytest.raises(ImageError, match="more than 64 scans"):
        decode_image(whole[:-2] + whole[last:-2] * 1000 + EOI, SIZE)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
@pytest.mark.parametrize(("width", "height"), [(513, 1), (1, 513), (3, 1537)])
def test_a_strip_is_refused(kind: str, width: int, height: int) -> None:
    data = saved(Image.new("RGB", (width, height)), kind)
    with pytest.raises(ImageError, match="the limit is 512 to 1") as caught:
        decode_image(data, SIZE)
    assert caught.value.reason == "image_too_large"
    assert decode_image(data, SIZE, ImageLimits(aspect=513)).shape == (3, SIZE, SIZE)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "L", "I;16"])
def test_bands_make_the_same_picture(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(8).integers(0, 255, (37, 21, 4), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode) if mode != "I;16" else Image.fromarray(noise[..., 0].astype(np.uint16))
    data = saved(image, "PNG", **({"transparency": 3} if mode == "P" else {}))
    whole = decode_image(data, SIZE)
    monkeypatch.setattr(images, "BAND_PIXELS", 50)
    assert torch.equal(decode_image(data, SIZE), whole)
