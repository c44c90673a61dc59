"""A tar is read to its last byte or refused by name and offset: never a part of it that looks like the whole."""

import io
import re
import struct
import tarfile
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipelines.data.tar_format import ShardError, parse_shard

BLOCK = 512
Files = list[tuple[str, bytes]]


def tar_of(files: Files, tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def body_of(tar: bytes) -> bytes:
    """A tar without the zeros behind its last member, which end in none here."""
    return tar[: -(-len(tar.rstrip(b"\0")) // BLOCK) * BLOCK]


def read_all(data: bytes) -> Files:
    """Every member that Python's tarfile finds when it is told to go on behind zeros and damage: the oracle."""
    with tarfile.open(fileobj=io.BytesIO(data), ignore_zeros=True) as archive:
        return [(entry.name, data[entry.offset_data : entry.offset_data + entry.size]) for entry in archive]


def parsed(data: bytes) -> Files:
    samples = parse_shard(data, "s3://b/x.tar").samples
    return [(f"{key}.{extension}", body) for key, members in samples for extension, body in members.items()]


A, B = [("a.json", b"{}"), ("a.jpg", b"\xff\xd8" + b"j" * 700)], [("b.json", b"[]"), ("b.jpg", b"\xff\xd8" * 300)]
WHOLE = tar_of(A + B)
SECOND = WHOLE.index(b"a.jpg")
LAST = WHOLE.index(b"b.jpg")


def wiped(offset: int, length: int = BLOCK) -> bytes:
    return WHOLE[:offset] + b"\0" * length + WHOLE[offset + length :]


def patched(offset: int, field: int, value: bytes) -> bytes:
    """The tar with a header's field set, and a checksum that fits."""
    header = bytearray(WHOLE[offset : offset + BLOCK])
    header[field : field + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return WHOLE[:offset] + bytes(header) + WHOLE[offset + BLOCK :]


def with_type(file: tuple[str, bytes], kind: bytes) -> bytes:
    """A member of some type, padded, without an end mark."""
    info = tarfile.TarInfo(file[0])
    info.type, info.size = kind, len(file[1])
    return info.tobuf(tarfile.USTAR_FORMAT) + file[1] + b"\0" * (-len(file[1]) % BLOCK)


def base256(number: int) -> bytes:
    return struct.pack(">q", number).rjust(12, b"\xff" if number < 0 else b"\x80")


READ_ON: dict[str, tuple[bytes, Files]] = {
    "two archives": (tar_of(A) + tar_of(B), A + B),
    "two archives with bare end marks": (body_of(tar_of(A)) + b"\0" * 1024 + body_of(tar_of(B)) + b"\0" * 1024, A + B),
    "the first without an end": (body_of(tar_of(A)) + tar_of(B), A + B),
    "an empty archive in front": (tar_of([]) + tar_of(A), A),
    "an empty archive behind": (tar_of(A) + tar_of([]), A),
    "three formats": (
        tar_of(A) + tar_of(B, tarfile.PAX_FORMAT) + tar_of([("c.json", b"")], tarfile.GNU_FORMAT),
        [*A, *B, ("c.json", b"")],
    ),
    "one end block": (body_of(WHOLE) + b"\0" * BLOCK, A + B),
    "zeros that are no whole block": (WHOLE + b"\0" * 100, A + B),
}


@pytest.mark.parametrize("case", READ_ON)
def test_appended_archives_are_read_on(case: str) -> None:
    data, files = READ_ON[case]
    assert parsed(data) == files == read_all(data)


DAMAGED: dict[str, tuple[bytes, int]] = {
    "a wiped header in the middle": (wiped(SECOND), SECOND),
    "a wiped last header": (wiped(LAST), LAST),
    "a wiped header and its content's first block": (wiped(SECOND, 2 * BLOCK), SECOND + 2 * BLOCK),
    "a wiped header of an empty member": (tar_of([("a.json", b"{}")])[:1024] + b"\0" * BLOCK + tar_of(B), 1024),
    "a bad checksum": (WHOLE[: SECOND + 5] + b"!" + WHOLE[SECOND + 6 :], SECOND),
    "no header": (WHOLE[:SECOND] + b"\x07" * BLOCK + WHOLE[SECOND + BLOCK :], SECOND),
    "garbage behind the end": (WHOLE + b"garbage" * 200, len(WHOLE)),
    "a little garbage behind the end": (WHOLE + b"x", len(WHOLE)),
    "a second archive that breaks off": (WHOLE + tar_of([("c.jpg", b"c" * 3000)])[:2048], len(WHOLE)),
    "a second archive without an end": (WHOLE + body_of(tar_of([("c.jpg", b"c")])), len(WHOLE) + 1024),
    "a short header": (WHOLE[: SECOND + 100], SECOND),
    "a member cut in its content": (WHOLE[: SECOND + BLOCK + 300], SECOND),
    "a member cut in its padding": (WHOLE[: LAST + BLOCK + 600 + 10], LAST),
    "no end mark": (body_of(WHOLE), len(body_of(WHOLE))),
    "half an end mark": (body_of(WHOLE) + b"\0" * 200, len(body_of(WHOLE))),
    "a negative size": (patched(SECOND, 124, base256(-1)), SECOND),
    "a very negative size": (patched(SECOND, 124, base256(-(2**62))), SECOND),
    "a huge size": (patched(SECOND, 124, base256(2**62)), SECOND),
    "a size past the end": (patched(SECOND, 124, b"%011o\0" % (1 << 20)), SECOND),
    "a long name without its member": (patched(LAST, 156, b"L"), LAST),
    "a pax record of a length of 5,000 digits": (with_type(("x", b"9" * 5000 + b" size=1\n"), b"x") + WHOLE, 0),
    "a pax size that is negative": (with_type(("x", b"12 size=-99\n"), b"x") + WHOLE, 0),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named_with_file_and_offset(case: str) -> None:
    data, offset = DAMAGED[case]
    with pytest.raises(
        ShardError, match=rf"^s3://b/x\.tar: the tar breaks off or is damaged at byte {offset} of "
    ) as caught:
        parse_shard(data, "s3://b/x.tar")
    assert caught.value.fault == "truncated"


def test_thousands_of_long_names_are_a_fault_of_the_shard() -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 5
    chain = (header.tobuf(tarfile.GNU_FORMAT) + b"a.jpg".ljust(BLOCK, b"\0")) * 3000
    with pytest.raises(ShardError, match=r"at byte 0 of .*more than 16 extended headers"):
        parse_shard(chain + WHOLE, "s3://b/x.tar")


@st.composite
def archives(draw: st.DrawFn, prefix: str) -> bytes:
    """A random tar of any of tarfile's formats, with short and long names."""
    names = draw(st.lists(st.sampled_from(["json", "jpg", "txt", "0.png"]), max_size=4, unique=True))
    key = prefix + draw(st.sampled_from(["k", "k" * 90, "k" * 150, "d/" * 60 + "k"]))
    tar_format = draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
    sizes = st.sampled_from([0, 1, 511, 512, 513, 1500])
    fills = st.sampled_from([b"\0", b"x", b"\xff\xd8"])
    files = [(f"{key}.{name}", (draw(fills) * 1500)[: draw(sizes)]) for name in names]
    return tar_of(files, tar_format)


Change = Callable[[bytes], bytes]


@st.composite
def changes(draw: st.DrawFn) -> Change:
    """One of: nothing, a cut, zeroed or overwritten blocks, a lost block, garbage in front of a block or at the end."""
    kind = draw(st.sampled_from(["none", "cut", "zero", "overwrite", "lose", "insert", "append"]))
    at, blocks = draw(st.integers(0, 200)), draw(st.integers(1, 3))
    byte = draw(st.integers(0, BLOCK - 1))

    def change(data: bytes) -> bytes:
        offset = at * BLOCK % max(BLOCK, len(data))
        end = offset + blocks * BLOCK
        match kind:
            case "cut":
                return data[: offset + byte]
            case "zero":
                return data[:offset] + b"\0" * len(data[offset:end]) + data[end:]
            case "overwrite":
                return data[:offset] + b"\x07" * len(data[offset:end]) + data[end:]
            case "lose":
                return data[:offset] + data[end:]
            case "insert":
                return data[:offset] + b"garbage!" * (blocks * BLOCK // 8) + data[offset:]
            case "append":
                return data + b"\0" * byte + b"x" * blocks
        return data

    return change


@settings(deadline=None, max_examples=400)
@given(st.integers(1, 3).flatmap(lambda count: st.tuples(*(archives(f"p{n}/") for n in range(count)))), changes())
@example((tar_of(A), tar_of(B)), lambda data: data)
def test_the_members_of_all_appended_archives_or_an_error(parts: tuple[bytes, ...], change: Change) -> None:
    """Whatever is cut, wiped or appended: what tarfile finds when it ignores zeros, or file and offset."""
    data = change(b"".join(parts))
    found, told = [], ""
    try:
        found = parsed(data)
    except ShardError as error:
        told = str(error)
    if told:
        assert re.match(r"s3://b/x\.tar: (.*damaged at byte \d+ of \d+: .|not an \(uncompressed\) tar|the key )", told)
        return
    # A wiped header of a long name leaves a short one, maybe without an extension: such members are counted apart.
    assert found == [(name, body) for name, body in read_all(data) if "." in name.rpartition("/")[2]]


DOTTED: dict[str, tuple[str, ...]] = {
    "versions": ("a.v1.jpg", "a.v1.json", "a.v2.jpg", "a.v2.json"),
    "one sample": ("a.v1.jpg", "a.v1.json"),
    "numbers": ("1.5.jpg", "1.5.json", "1.6.jpg", "1.6.json"),
    "beside an undotted one": ("a.jpg", "a.json", "a.1.jpg", "a.1.json"),
    "captions": ("a.v1.jpg", "a.v1.txt"),
    "file names": ("photo.jpg.jpg", "photo.jpg.json"),
    "a second record": ("a.jpg", "a.json", "a.v2.json"),
}


@pytest.mark.parametrize("case", DOTTED)
def test_keys_with_dots_are_refused(case: str) -> None:
    body = b'{"conversations": []}'
    with pytest.raises(ShardError, match="has a dot in it: a key ends at the first dot") as caught:
        parse_shard(tar_of([(name, body) for name in DOTTED[case]]), "s3://b/x.tar")
    assert caught.value.fault == "dotted_key"


def test_further_members_of_a_sample_are_no_keys_with_dots() -> None:
    names = ["a.json", "a.0.jpg", "a.1.jpg", "a.meta.json", "a.mask.png", "a.ocr.txt", "b.txt", "b.jpg"]
    samples = parse_shard(tar_of([(name, b"{}") for name in names]), "x").samples
    assert [(key, len(members)) for key, members in samples] == [("a", 6), ("b", 2)]
