"""HTTP/1.1 as `infra.fault_proxy` forwards it: heads kept as they came, bodies piece by piece."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass

from infra.faults import Status

PIECE_BYTES = 1 << 16
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER with no time: closing sends RST instead of FIN


@dataclass(frozen=True)
class Head:
    """The first lines of a request or an answer, as they came."""

    raw: bytes
    start: tuple[str, str, str]
    headers: dict[str, str]

    @classmethod
    async def read(cls, reader: asyncio.StreamReader) -> Head:
        """The next head of a connection."""
        raw = await reader.readuntil(b"\r\n\r\n")
        first, *lines = raw.decode("latin-1").rstrip().split("\r\n")
        one, two, rest = [*first.split(" ", 2), ""][:3]
        pairs = (line.split(":", 1) for line in lines)
        return cls(raw, (one, two, rest), {name.strip().lower(): value.strip() for name, value in pairs})

    @property
    def chunked(self) -> bool:
        """Whether the body comes in chunks."""
        return "chunked" in self.headers.get("transfer-encoding", "").lower()

    @property
    def length(self) -> int | None:
        """Bytes of the body, where they are stated."""
        text = self.headers.get("content-length")
        return None if text is None else int(text)

    def with_length(self, length: int) -> bytes:
        """The same head for a body that is sent in one piece."""
        lines = self.raw.split(b"\r\n")[:-2]
        kept = [line for line in lines if not line.lower().startswith((b"transfer-encoding:", b"content-length:"))]
        return b"\r\n".join([*kept, b"Content-Length: %d" % length, b"", b""])


async def pieces_of(reader: asyncio.StreamReader, length: int) -> AsyncIterator[bytes]:
    """A body of `length` bytes, as it comes. Raises ConnectionResetError where it is cut short."""
    left = length
    while left:
        piece = await reader.read(min(left, PIECE_BYTES))
        if not piece:
            raise ConnectionResetError(f"the other side closed {left} bytes before the end")
        left -= len(piece)
        yield piece


async def chunks_of(reader: asyncio.StreamReader) -> AsyncIterator[tuple[bytes, bytes]]:
    """The chunks of a body: as they came, with all framing, and their payload."""
    while True:
        line = await reader.readuntil(b"\r\n")
        size = int(line.split(b";")[0], 16)
        if size == 0:
            raw = line
            while (trailer := await reader.readuntil(b"\r\n")) != b"\r\n":
                raw += trailer
            yield raw + b"\r\n", b""
            return
        payload = await reader.readexactly(size + 2)
        yield line + payload, payload[:-2]


def request_body(reader: asyncio.StreamReader, head: Head) -> AsyncIterator[bytes]:
    """The body of a request as it came, framing included."""

    async def raw_chunks() -> AsyncIterator[bytes]:
        async for raw, _ in chunks_of(reader):
            yield raw

    return raw_chunks() if head.chunked else pieces_of(reader, head.length or 0)


def abort(writer: asyncio.StreamWriter) -> None:
    """Close with RST."""
    connection = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    writer.transport.abort()


def error_answer(fault: Status, method: str, path: str) -> bytes:
    """An answer of S3 that says this error."""
    body = (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f"<Error><Code>{fault.error}</Code><Message>{fault.message}</Message>"
        f"<Resource>{path.partition('?')[0]}</Resource><RequestId>injected</RequestId></Error>"
    ).encode()
    head = (
        f"HTTP/1.1 {fault.code} {fault.error}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + (b"" if method == "HEAD" else body)
