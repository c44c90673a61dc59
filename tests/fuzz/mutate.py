"""Mutations of well-formed files: some know the format and keep its lengths and checksums right, some know nothing."""

from __future__ import annotations

import base64
import json
import random
import re
import struct
import zlib
from collections.abc import Callable, Sequence

Mutator = Callable[[random.Random, bytes], bytes]

NUMBERS = (0, 1, 2, 127, 128, 255, 256, 511, 512, 513, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
LITERALS = (
    *("9" * 5000, "-" + "9" * 5000, "1e999", "NaN", "-Infinity", "null", "true", "-1", "0", "1.5", "1e300", str(2**64)),
    *('""', r'"\ud800"', r'"\u0000"', '"<image>"', '"<image><image>"', '"../../etc/passwd"', r'"\n\u001b[2J"'),
    *('"' + "x" * 70_000 + '"', "[]", "{}", "[" * 2000, "[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900),
    *('{"a": 1, "a": 2}', "[[], {}, 7]"),
)
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*|true|false|null|[{}\[\],:]')


# ----------------------------------------------------------------------------------------------------------- any bytes


def any_bytes(rng: random.Random, data: bytes) -> bytes:
    """A few blind changes: bits, numbers, cuts, holes, repeats."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        if not changed:
            break
        place = rng.randrange(len(changed))
        length = min(rng.choice((1, 2, 4, 16, 512, 4096)), len(changed) - place)
        kind = rng.randrange(8)
        if kind == 0:
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[place] = rng.choice((0, 0xFF, 0x7F, 0x80, 0x20, 0x0A, rng.randrange(256)))
        elif kind == 2:
            number = rng.choice(NUMBERS).to_bytes(8, rng.choice(("big", "little")))[: rng.choice((2, 4, 8))]
            changed[place : place + len(number)] = number
        elif kind == 3:
            del changed[place:]
        elif kind == 4:
            del changed[place : place + length]
        elif kind == 5:
            changed[place:place] = changed[place : place + length] * rng.choice((1, 2, 50))
        elif kind == 6:
            changed[place : place + length] = bytes(length)
        else:
            changed[place:place] = rng.randbytes(length)
    return bytes(changed)


# ---------------------------------------------------------------------------------------------------------------- json


def json_tokens(rng: random.Random, data: bytes) -> bytes:
    """Tokens replaced by values that readers stumble over, doubled, dropped or swapped."""
    tokens = _TOKEN.findall(data.decode("utf-8", "replace"))
    for _ in range(rng.choice((1, 1, 2, 3))):
        if not tokens:
            break
        place = rng.randrange(len(tokens))
        kind = rng.randrange(8)
        if kind <= 4:
            ends = (*tokens[1:], "")
            values = [at for at, token in enumerate(tokens) if token not in "{}[],:" and ends[at] != ":"]
            tokens[rng.choice(values or [place])] = rng.choice(LITERALS)
        elif kind == 5:
            length = rng.choice((1, 3, 20))
            tokens[place:place] = tokens[place : place + length] * rng.choice((1, 1, 300))
        elif kind == 6:
            del tokens[place]
        else:
            other = rng.randrange(len(tokens))
            tokens[place], tokens[other] = tokens[other], tokens[place]
    return "".join(tokens).encode("utf-8", "surrogatepass")


def request_images(change: Mutator) -> Mutator:
    """Changes the images within a request by `change`."""

    def mutate(rng: random.Random, data: bytes) -> bytes:
        content = json.loads(data)
        for row in content["dataframe_records"]:
            if row.get("image"):
                row["image"] = base64.b64encode(change(rng, base64.b64decode(row["image"]))).decode()
        return json.dumps(content).encode()

    return mutate


# ----------------------------------------------------------------------------------------------------------------- tar

_BLOCK = 512
_FIELDS = ((0, 100), (100, 8), (108, 8), (124, 12), (136, 12), (148, 8), (156, 1), (157, 100), (257, 8), (345, 155))


def tar_headers(rng: random.Random, data: bytes) -> bytes:
    """Fields of headers changed under a right checksum, blocks doubled, dropped, moved; extended headers put in."""
    blocks = [data[start : start + _BLOCK] for start in range(0, len(data), _BLOCK)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        headers = [index for index, block in enumerate(blocks) if block[257:262] == b"ustar"]
        place = rng.choice(headers) if headers and rng.random() < 0.8 else rng.randrange(len(blocks))
        kind = rng.randrange(6)
        if kind <= 2:
            blocks[place] = _changed_header(rng, blocks[place].ljust(_BLOCK, b"\0"))
        elif kind == 3:
            blocks[place:place] = blocks[place : place + rng.choice((1, 2, 4))] * rng.choice((1, 1, 40))
        elif kind == 4:
            del blocks[place : place + rng.choice((1, 2))]
        else:
            blocks[place:place] = [_extended_header(rng)] * rng.choice((1, 1, 2, 1500))
        if not blocks:
            break
    return b"".join(blocks)


def _summed(header: bytearray) -> bytes:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % (sum(header) % 8**6)
    return bytes(header)


def _changed_header(rng: random.Random, block: bytes) -> bytes:
    header = bytearray(block)
    start, length = rng.choice(_FIELDS)
    value = rng.choice(
        (
            b"\xff" * length,
            b"\x80" + rng.randbytes(length),
            b"\xff" + (rng.choice((-512, -1, -1024)) % 256**11).to_bytes(11, "big"),
            b"7" * length,
            b"%011o\0" % rng.choice(NUMBERS[:14]),
            b"caf\xe9.json\0",
            b"../../x.json\0",
            b"a.b.c.d.jpg\0",
            rng.choice([b"0", b"1", b"5", b"7", b"D", b"K", b"L", b"S", b"X", b"g", b"x", b"Z", b"\0"]),
            rng.randbytes(length),
        )
    )[:length]
    header[start : start + len(value)] = value
    return _summed(header) if rng.random() < 0.9 else bytes(header)


def _extended_header(rng: random.Random) -> bytes:
    body = rng.choice(
        (
            b"%d path=%s\n" % (12 + 9, b"caf\xe9.json1"),
            b"20 size=-0000000512\n",
            b"5013 size=" + b"9" * 5000 + b"\n\n\n",
            b"9" * 5000 + b" size=1\n",
            b"22 GNU.sparse.map=a,b\n",
            b"27 GNU.sparse.numblocks=99\n",
            b"19 hdrcharset=\xff\xff\xff\xff\n",
            b"2 " * 200,
            b"x" * rng.choice((1, 100, 5000)),
        )
    )
    header = bytearray(_BLOCK)
    header[:4] = b"head"
    header[124:136] = b"%011o\0" % len(body)
    header[156:157] = rng.choice([b"L", b"K", b"x", b"g", b"X"])
    header[257:265] = b"ustar\x0000"
    return _summed(header) + body + bytes(-len(body) % _BLOCK)


# -------------------------------------------------------------------------------------------------------------- images


def image_parts(rng: random.Random, data: bytes) -> bytes:
    """Segments of a JPEG or chunks of a PNG changed, doubled, dropped, moved, under right lengths and checksums."""
    if data.startswith(b"\x89PNG"):
        return _png_chunks(rng, data)
    return _jpeg_segments(rng, data) if data.startswith(b"\xff\xd8") else any_bytes(rng, data)


def _rearranged(rng: random.Random, parts: list[bytes], change: Mutator) -> list[bytes]:
    for _ in range(rng.choice((1, 1, 2, 3))):
        place = rng.randrange(len(parts))
        kind = rng.randrange(5)
        if kind <= 1:
            parts[place] = change(rng, parts[place])
        elif kind == 2:
            parts[place:place] = [parts[place]] * rng.choice((1, 2, 100, 2000))
        elif kind == 3 and len(parts) > 1:
            del parts[place]
        else:
            other = rng.randrange(len(parts))
            parts[place], parts[other] = parts[other], parts[place]
    return parts


def _png_chunks(rng: random.Random, data: bytes) -> bytes:
    parts, position = [], 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        parts.append(data[position + 4 : position + 8 + length])
        position += 12 + length
    exif = b"eXIf" + rng.choice([b"II*\0", b"MM\0*"]) + rng.randbytes(rng.choice((4, 60, 900)))
    parts.insert(1, rng.choice([exif, b"zTXtk\0\0" + zlib.compress(bytes(10**6)), b"acTL" + rng.randbytes(8)]))

    def change(rng: random.Random, part: bytes) -> bytes:
        return part[:4] + any_bytes(rng, part[4:])

    mixed = _rearranged(rng, parts, change)
    chunks = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in mixed]
    return data[:8] + b"".join(chunks)


def _jpeg_segments(rng: random.Random, data: bytes) -> bytes:
    parts, position = [], 2
    while data[position : position + 1] == b"\xff" and data[position + 1] != 0xDA:
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        parts.append(data[position : position + 2 + length])
        position += 2 + length
    scans = re.split(rb"(?=\xff[\xda\xc4\xd9])", data[position:])
    exif = b"Exif\0\0" + rng.choice([b"II*\0", b"MM\0*"]) + rng.randbytes(rng.choice((4, 60, 900)))
    kind = bytes([0xFF, rng.choice((0xE0, 0xE1, 0xE2, 0xEE, 0xFE))])
    parts.insert(0, kind + struct.pack(">H", len(exif) + 2) + exif)
    return data[:2] + b"".join(_rearranged(rng, parts + [scan for scan in scans if scan], any_bytes))


def one_of(mutators: Sequence[Mutator]) -> Mutator:
    """One or two of them, after each other."""

    def mutate(rng: random.Random, data: bytes) -> bytes:
        for _ in range(rng.choice((1, 1, 2))):
            data = rng.choice(mutators)(rng, data) or data
        return data

    return mutate
