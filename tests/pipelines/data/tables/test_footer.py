"""The nesting of a footer is found before pyarrow has it, and what pyarrow writes is walked to its end."""

import io
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.tables.footer import MAX_NESTING, check_nesting
from tests.pipelines.data.tables import made


def footer(body: bytes) -> bytes:
    return body[-8 - int.from_bytes(body[-8:-4], "little") :]


def test_what_pyarrow_reads_of_a_footer_made_by_hand() -> None:
    """So the one below is refused for its depth alone."""
    kind = pq.read_metadata(io.BytesIO(made.nested_footer(5))).schema.to_arrow_schema().field("a").type
    for _ in range(5):
        kind = kind.field("a").type
    assert kind == pa.int32()


@pytest.mark.parametrize("levels", [MAX_NESTING, MAX_NESTING + 1, 100_000])
def test_columns_within_one_another(levels: int) -> None:
    body = footer(made.nested_footer(levels - 1))  # the root is a level, too
    if levels == MAX_NESTING:
        check_nesting(body)
        return
    with pytest.raises(ValueError, match="nested more than 64 levels deep"):
        check_nesting(body)


def test_a_second_schema_is_walked_too() -> None:
    """Thrift's reader takes the last one."""
    deep = footer(made.nested_footer(100))[:-8]
    shallow = footer(made.nested_footer(1))[:-8]
    second = deep[2:]  # without the version; 0x09 and the number say field 2 again
    with pytest.raises(ValueError, match="nested more than"):
        check_nesting(shallow[:-1] + b"\x09\x04" + second[1:])


def test_every_footer_of_pyarrow_is_walked_to_its_end() -> None:
    nested = pa.array([{"a": [{"b": 1.5, "c": [b"x"]}]}, None, {"a": []}])
    table = pa.table({"n": nested, "d": pa.array(["a", "b", None]).dictionary_encode(), "t": [True, None, False]})
    for options in ({}, {"use_dictionary": False, "store_schema": False}, {"write_page_index": True, "version": "1.0"}):
        pq.write_table(table.replace_schema_metadata({"k": "v" * 300}), buffer := io.BytesIO(), 1, **options)
        body = footer(buffer.getvalue())
        check_nesting(body)
        for cut in range(len(body) - 8):
            with pytest.raises((ValueError, IndexError)):
                check_nesting(body[:cut])


def test_any_bytes_end_in_an_error_or_in_nothing() -> None:
    draw = random.Random(0)
    body = footer(made.nested_footer(3))
    refused = 0
    for _ in range(3000):
        changed = bytearray(body)
        for _ in range(draw.randint(1, 6)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        try:
            check_nesting(bytes(changed))
        except (ValueError, IndexError):
            refused += 1
    assert 0 < refused < 3000
