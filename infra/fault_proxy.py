r"""A proxy before an S3 server that injects faults, so that the real client code meets them.

    with FaultProxy(server, [Rule(Reset(at=0.5), method="GET", path=r"\.tar$", times=3)]) as proxy:
        ...  # a client of proxy.endpoint
    assert len(proxy.injected) == 3

It forwards HTTP/1.1 byte by byte, the Host header too (S3 signatures cover it), over keep-alive connections; only an
answer in chunks is gathered first and passed on with its length. Each request is held against the rules in their order.
Rules count requests and draw from seeded generators, so the same requests meet the same faults.

In a process of its own: `python -m infra.fault_proxy --upstream URL --rules FILE.json`, where the file holds a list
like [{"fault": {"kind": "Reset", "at": 0.5}, "method": "GET", "times": 3}]; what is injected is printed as JSON lines.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from infra.faults import (
    DISK_FULL,
    INSUFFICIENT_STORAGE,
    INTERNAL_ERROR,
    SLOW_DOWN,
    Delay,
    Drip,
    Fault,
    Flip,
    Injected,
    Refuse,
    Reset,
    Rule,
    RuleCount,
    Status,
    Truncate,
    place,
    rules_from_json,
)
from infra.http_messages import Head, abort, chunks_of, error_answer, pieces_of, request_body
from infra.throttle import Link, Pace

__all__ = [
    "DISK_FULL",
    "INSUFFICIENT_STORAGE",
    "INTERNAL_ERROR",
    "SLOW_DOWN",
    "Delay",
    "Drip",
    "FaultProxy",
    "Flip",
    "Injected",
    "Refuse",
    "Reset",
    "Rule",
    "Status",
    "Truncate",
]

HOST = "127.0.0.1"
DRIP_STEP_S = 0.05


class _ResetHere(ConnectionError):
    """A rule resets the connection here."""


# -------------------------------------------------------------------------------------------------------------- proxy


class FaultProxy:
    """A running proxy before the server at `upstream` (http://HOST:PORT); a context manager. Its thread is its own.

    Rules may be added and cleared while it runs; `injected` lists what requests have met so far, `sent` and `received`
    are the bytes of all bodies to and from the server. `up` and `down` slow the bodies of requests and answers, all
    connections together.
    """

    def __init__(
        self, upstream: str, rules: Sequence[Rule] = (), *, up: Link | None = None, down: Link | None = None
    ) -> None:
        address = urlsplit(upstream)
        if address.scheme != "http" or address.hostname is None:
            raise ValueError(f"the upstream {upstream!r} must be written as http://HOST:PORT")
        self.upstream = (address.hostname, address.port or 80)
        self.injected: list[Injected] = []
        self.sent = self.received = 0
        self.up, self.down = Pace(up), Pace(down)
        self._lock = threading.Lock()
        self._counts = [RuleCount(rule) for rule in rules]
        self._clients: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._reopen: asyncio.TimerHandle | None = None
        # Never listens: it keeps the port, where connections are refused while the real listener is closed.
        self._holder = self._bound(0)
        self._port: int = self._holder.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._thread.start()
        self._run(self._open())

    def _bound(self, port: int) -> socket.socket:
        bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if self.up.link is not None:  # a slow network does not take megabytes at once
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((HOST, port))
        return bound

    def _run(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=30)

    @property
    def endpoint(self) -> str:
        """Address for clients."""
        return f"http://{HOST}:{self._port}"

    def add(self, *rules: Rule) -> None:
        """More rules, after those there are; their counts begin at zero."""
        with self._lock:
            self._counts += [RuleCount(rule) for rule in rules]

    def clear(self) -> None:
        """No rules any more; `injected` stays. A refusal under way ends."""
        with self._lock:
            self._counts = []
        self._run(self._open())

    def count(self, kind: type[Any]) -> int:
        """How many faults of a kind were injected."""
        return sum(isinstance(one.rule.fault, kind) for one in list(self.injected))

    def refuse(self, seconds: float) -> None:
        """Reset every connection now and refuse new ones for `seconds`."""

        async def work() -> None:
            self._refuse(seconds)

        self._run(work())

    def close(self) -> None:
        """Reset all connections and end the thread; a second call does nothing."""
        if self._loop.is_closed():
            return

        async def work() -> None:
            self._shut()
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._run(work())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=30)
        self._loop.close()
        self._holder.close()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -------------------------------------------------------------------------------------- inside the proxy's thread

    async def _open(self) -> None:
        if self._reopen is not None:
            self._reopen.cancel()
            self._reopen = None
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, sock=self._bound(self._port), backlog=128)

    def _shut(self) -> None:
        if self._reopen is not None:
            self._reopen.cancel()
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._clients):
            abort(writer)

    def _refuse(self, seconds: float) -> None:
        self._shut()
        self._reopen = self._loop.call_later(seconds, lambda: self._start(self._open()))

    def _start(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients.add(writer)
        self._start(self._serve(reader, writer))

    def _strike(self, method: str, path: str, body_length: int | None) -> Fault | None:
        """The fault that the first striking rule wants: before the answer for None, else in a body of that length."""
        with self._lock:
            for count in self._counts:
                rule, fault = count.rule, count.rule.fault
                if rule.in_body != (body_length is not None):
                    continue
                if body_length is not None:
                    first = 0 if isinstance(fault, Drip) else place(fault.at, body_length)  # type: ignore[union-attr]
                    if first >= body_length:
                        continue
                if count.strikes(method, path):
                    self.injected.append(Injected(rule, method, path, time.time()))
                    return fault
        return None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._exchange(reader, writer):
                pass
            writer.close()
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError):
            # A reset by rule, or a side that went away: the other side sees the connection reset.
            abort(writer)
        finally:
            self._clients.discard(writer)

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer; False when the connection is to be closed in good order."""
        try:
            request = await Head.read(reader)
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise
            return False
        method, path, _ = request.start
        fault = self._strike(method, path, None)
        if isinstance(fault, Refuse):
            self._refuse(fault.seconds)
            return False
        if isinstance(fault, Status):
            if "100-continue" in request.headers.get("expect", "").lower():
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            async for _ in request_body(reader, request):
                pass
            writer.write(error_answer(fault, method, path))
            await writer.drain()
            return True
        if isinstance(fault, Delay):
            await asyncio.sleep(fault.seconds)
        up_reader, up_writer = await asyncio.open_connection(*self.upstream)
        up_writer.write(request.raw)
        sending = self._loop.create_task(self._send_body(reader, up_writer, request, fault))
        answering = self._loop.create_task(self._answer(up_reader, writer, request, fault))
        try:
            await asyncio.wait({sending, answering}, return_when=asyncio.FIRST_EXCEPTION)
            if sending.done() and sending.exception() is not None:
                sending.result()
            good = answering.result()
            # An answer before the end of the request: its rest may never come (Expect: 100-continue).
            return good and sending.done()
        finally:
            for task in (sending, answering):
                task.cancel()
            await asyncio.gather(sending, answering, return_exceptions=True)
            up_writer.transport.abort()

    async def _send_body(
        self, reader: asyncio.StreamReader, up_writer: asyncio.StreamWriter, request: Head, fault: Fault | None
    ) -> None:
        cut = None
        if isinstance(fault, Reset) and fault.where == "request":
            cut = place(fault.at, request.length or 0)
        sent = 0
        async for piece in request_body(reader, request):
            await self.up.take(len(piece))
            if cut is not None and sent + len(piece) > cut:
                up_writer.write(piece[: cut - sent])
                await up_writer.drain()
                raise _ResetHere
            up_writer.write(piece)
            await up_writer.drain()
            sent += len(piece)
            self.sent += len(piece)
        if cut is not None:
            raise _ResetHere

    async def _answer(
        self, up_reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: Head, fault: Fault | None
    ) -> bool:
        method, path, _ = request.start
        while True:
            answer = await Head.read(up_reader)
            status = int(answer.start[1])
            if status >= 200:
                break
            writer.write(answer.raw)
        if isinstance(fault, Reset) and fault.where == "answer":
            raise _ResetHere
        bodiless = method == "HEAD" or status in (204, 304)
        length, head, body = 0 if bodiless else answer.length, answer.raw, None
        if length is None or (answer.chunked and not bodiless):
            if answer.chunked:
                body = b"".join([payload async for _, payload in chunks_of(up_reader)])
            else:
                body = await up_reader.read()
            length, head = len(body), answer.with_length(len(body))
        writer.write(head)
        if length:
            struck = self._strike(method, path, length) if 200 <= status < 300 else None
            pieces = pieces_of(up_reader, length) if body is None else _one(body)
            if not await self._pass_body(pieces, writer, length, struck):
                return False
        await writer.drain()
        return answer.headers.get("connection", "").lower() != "close"

    async def _pass_body(
        self, pieces: AsyncIterator[bytes], writer: asyncio.StreamWriter, length: int, fault: Fault | None
    ) -> bool:
        sent = 0
        async for piece in pieces:
            self.received += len(piece)
            await self.down.take(len(piece))
            if isinstance(fault, Reset | Truncate):
                cut = place(fault.at, length)
                if sent + len(piece) > cut:
                    writer.write(piece[: cut - sent])
                    await writer.drain()
                    if isinstance(fault, Reset):
                        raise _ResetHere
                    return False
            elif isinstance(fault, Flip):
                first = place(fault.at, length) - sent
                inverted = range(max(0, first), min(len(piece), first + fault.count))
                piece = bytes(byte ^ 0xFF if index in inverted else byte for index, byte in enumerate(piece))
            elif isinstance(fault, Drip):
                await _drip(writer, piece, fault.bytes_per_s)
                continue
            writer.write(piece)
            await writer.drain()
            sent += len(piece)
        return True


async def _one(body: bytes) -> AsyncIterator[bytes]:
    yield body


async def _drip(writer: asyncio.StreamWriter, piece: bytes, bytes_per_s: float) -> None:
    step = max(1, int(bytes_per_s * DRIP_STEP_S))
    for first in range(0, len(piece), step):
        writer.write(piece[first : first + step])
        await writer.drain()
        await asyncio.sleep(step / bytes_per_s)


def _printed(injected: Iterable[Injected]) -> str:
    lines = []
    for one in injected:
        record = {**asdict(one), "kind": type(one.rule.fault).__name__}
        lines.append(json.dumps(record, sort_keys=True))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command line: serves until SIGTERM or an interrupt."""
    parser = argparse.ArgumentParser(prog="python -m infra.fault_proxy", description="A proxy that injects faults.")
    parser.add_argument("--upstream", required=True, help="the server, http://HOST:PORT")
    parser.add_argument("--rules", type=Path, help="JSON file with the rules")
    arguments = parser.parse_args(argv)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    rules = rules_from_json(arguments.rules.read_text()) if arguments.rules else []
    with FaultProxy(arguments.upstream, rules) as proxy:
        print(json.dumps({"endpoint": proxy.endpoint}), flush=True)
        shown = 0
        while not stop.wait(0.2):
            fresh = proxy.injected[shown:]
            if fresh:
                print(_printed(fresh), flush=True)
                shown += len(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
