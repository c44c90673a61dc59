"""JPEG and PNG files down to what decides their pixels, and the orientation that they ask for.

Libraries read a file's metadata as they open it, at a cost that its maker chooses: an EXIF block of 64 kB whose entries
all point at each other takes 300 MB. So a file is taken apart here first, by its own lengths, and the decoders see
pictures and tables alone. Checksums that a format has are compared on the way.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass

from meteor_model.foreign import SHOWN_DETAIL, shown

IMAGE_REASONS = ("undecodable_image", "image_too_large")

JPEG_MARK = b"\xff\xd8"
PNG_MARK = b"\x89PNG\r\n\x1a\n"
MAX_PARTS = 2**14
"""Segments of a JPEG or chunks of a PNG; a file of 64 MiB in the usual chunks of 8 kB has half of them."""

_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # no stuffed zero, fill byte or restart mark
_SOI, _EOI, _SOS, _TEM = 0xD8, 0xD9, 0xDA, 0x01
_APP, _APP0, _APP1, _APP14, _COM = range(0xE0, 0xF0), 0xE0, 0xE1, 0xEE, 0xFE
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_EXIF_MARK = b"Exif\0\0"
_RAW_PROFILES = (b"Raw profile type exif", b"Raw profile type APP1")
_MAX_RAW_PROFILE = 2**18
_ORIENTATION_TAG = 0x0112
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=[\"']|>)([1-8])")


class ImageError(ValueError):
    """One image that cannot be used: `reason` is one of IMAGE_REASONS, `detail` says, bounded, what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in IMAGE_REASONS, reason
        detail = shown(detail, SHOWN_DETAIL)
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True)
class ImageFile:
    """A file without its metadata.

    Attributes:
        data: a file that has the same pixels, not turned.
        orientation: EXIF's, 1 to 8; 1 is upright.
    """

    data: bytes
    orientation: int = 1


def strip_metadata(data: bytes, max_scans: int) -> ImageFile:
    """A JPEG or PNG file without its metadata; bytes of any other kind as they are.

    Raises ImageError for a PNG that breaks off or whose checksums are wrong, and for a JPEG of more than `max_scans`
    scans.
    """
    if data.startswith(JPEG_MARK):
        return _strip_jpeg(data, max_scans)
    return _strip_png(data) if data.startswith(PNG_MARK) else ImageFile(data)


def _strip_jpeg(data: bytes, max_scans: int) -> ImageFile:
    """The first picture of the file; what follows its end is left out."""
    pieces, exif, xmp = [JPEG_MARK], b"", b""
    position, taken, scans = 2, 2, 0  # all before `taken` is in `pieces`, or left out
    for _ in range(MAX_PARTS):
        found = _MARKER.search(data, position)
        if found is None:  # it breaks off, which the decoder tells
            return ImageFile(b"".join([*pieces, data[taken:]]), orientation_of(exif, xmp))
        kind, start = data[found.start() + 1], found.end()
        if kind == _EOI:
            return ImageFile(b"".join([*pieces, data[taken:start]]), orientation_of(exif, xmp))
        if kind in (_SOI, _TEM):
            position = start
            continue
        position = start + max(2, int.from_bytes(data[start : start + 2], "big"))
        if kind == _SOS:
            scans += 1
            if scans > max_scans:
                raise ImageError("image_too_large", f"a JPEG of more than {max_scans} scans, the limit")
        elif kind == _COM or (kind in _APP and kind not in (_APP0, _APP14)):
            segment = data[start + 2 : position]
            if kind == _APP1 and segment.startswith(_EXIF_MARK):
                exif += segment[len(_EXIF_MARK) if exif else 0 :]  # a long block goes on in the next segment
            elif kind == _APP1 and not xmp:
                xmp = segment
            pieces.append(data[taken : found.start()])
            taken = position
    raise ImageError("undecodable_image", f"a JPEG of more than {MAX_PARTS} segments")


def _strip_png(data: bytes) -> ImageFile:
    pieces, exif, xmp = [PNG_MARK], b"", b""
    position = len(PNG_MARK)
    for _ in range(MAX_PARTS):
        if position + 12 > len(data):
            raise ImageError("undecodable_image", f"a PNG that breaks off at byte {position} of {len(data)}")
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            raise ImageError("undecodable_image", f"a PNG that breaks off in a chunk of {length} bytes at {position}")
        (stated,) = struct.unpack_from(">I", data, end - 4)
        if zlib.crc32(memoryview(data)[position + 4 : end - 4]) != stated:
            raise ImageError("undecodable_image", f"a PNG with a wrong checksum at byte {position} (chunk {kind!r})")
        if kind in _PNG_PIXELS:
            pieces.append(data[position:end])
        elif kind == b"eXIf":
            exif = data[position + 8 : end - 4]
        elif kind in (b"tEXt", b"zTXt") and not exif:
            exif = _raw_profile(data[position + 8 : end - 4], packed=kind == b"zTXt")
        elif kind == b"iTXt" and data[position + 8 : end - 4].startswith(b"XML:com.adobe.xmp\0"):
            xmp = data[position + 8 : end - 4]
        if kind == b"IEND":
            return ImageFile(b"".join(pieces), orientation_of(exif, xmp))
        position = end
    raise ImageError("undecodable_image", f"a PNG of more than {MAX_PARTS} chunks")


def _raw_profile(text: bytes, packed: bool) -> bytes:
    """The EXIF block that ImageMagick writes into a text chunk as hexadecimal lines; empty where there is none."""
    keyword, _, rest = text.partition(b"\0")
    if keyword not in _RAW_PROFILES:
        return b""
    try:
        lines = zlib.decompressobj().decompress(rest[1:], _MAX_RAW_PROFILE) if packed else rest[:_MAX_RAW_PROFILE]
        return bytes.fromhex(b"".join(lines.split(b"\n")[3:]).decode("ascii"))
    except (ValueError, zlib.error):
        return b""


def orientation_of(exif: bytes, xmp: bytes = b"") -> int:
    """EXIF's orientation, 1 to 8, from a block of EXIF or, where that has none, of XMP.

    A block that cannot be read says nothing, as in every viewer: 1, upright.
    """
    number = _exif_orientation(exif.removeprefix(_EXIF_MARK))
    if number is None and (found := _XMP_ORIENTATION.search(xmp)):
        number = int(found.group(1))
    return number if number is not None and 1 <= number <= 8 else 1


def _exif_orientation(tiff: bytes) -> int | None:
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return None
    try:
        (offset,) = struct.unpack_from(f"{order}I", tiff, 4)
        (entries,) = struct.unpack_from(f"{order}H", tiff, offset)
        for number in range(entries):
            tag, kind, count = struct.unpack_from(f"{order}HHI", tiff, offset + 2 + 12 * number)
            if tag == _ORIENTATION_TAG and count == 1 and kind in (3, 4):
                (value,) = struct.unpack_from(f"{order}{'H' if kind == 3 else 'I'}", tiff, offset + 10 + 12 * number)
                return int(value)
    except struct.error:
        return None
    return None
