"""How a replica reads requests: in threads of its own, within a deadline, light requests past heavy ones.

Decoding pixels is what a stranger can make dear, so a request is read in two steps:

1. open      JSON, base64 and the headers of its images, in one of a few threads; the limits speak here
2. decode    pixels, and encode prompts: a light request in the same threads; one of more than LIGHT_PIXELS or
             LIGHT_CHARACTERS in a thread that has only such ones and takes them one after another

The model's batches run in other threads, so a request that costs seconds delays neither small ones nor the model. At
the deadline a request is refused: at once where it waits, else before its next image, so at most one image late.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from meteor_model.answering import (
    Answerer,
    Budget,
    OpenedRow,
    Question,
    RequestError,
    decode_rows,
    num_characters,
    num_pixels,
    open_rows,
)
from meteor_model.foreign import JsonError, parse_json
from meteor_model.limits import RequestLimits

T = TypeVar("T")
Item = tuple[Question, Budget]

LIGHT_PIXELS = 4 * 2**20
"""Pixels of a request that is read past heavier ones: some 0.1 s of decoding."""
LIGHT_CHARACTERS = 2**17
"""Characters of its prompts: as much of encoding."""


class ReadingTimeoutError(RuntimeError):
    """A request was not read within the deadline."""


@dataclass(frozen=True)
class OpenedRequest:
    """A request that is checked, its images not decoded."""

    rows: list[OpenedRow]
    budget: Budget

    @property
    def light(self) -> bool:
        """Whether it is read past heavy ones."""
        return num_pixels(self.rows) <= LIGHT_PIXELS and num_characters(self.rows) <= LIGHT_CHARACTERS


class RequestReader:
    """Bodies of requests to rows for the model.

    Args:
        answerer: whose model and processor the requests are for.
        limits: the most that is accepted of a request.
        threads: that open requests and decode light ones.
        deadline_s: for a request, from its arrival on.
    """

    def __init__(self, answerer: Answerer, limits: RequestLimits, threads: int, deadline_s: float) -> None:
        self._answerer = answerer
        self._limits = limits
        self._deadline_s = deadline_s
        self._light = ThreadPoolExecutor(threads, thread_name_prefix="read")
        self._heavy = ThreadPoolExecutor(1, thread_name_prefix="read-heavy")

    async def read(self, body: bytes) -> list[Item]:
        """The rows of a request. Raises RequestError for what cannot be served, ReadingTimeoutError."""
        deadline = time.monotonic() + self._deadline_s
        opened = await self._run(self._light, deadline, lambda: open_request(body, self._answerer, self._limits))
        pool = self._light if opened.light else self._heavy

        def decode() -> list[Item]:
            return decode_request(opened, self._answerer, lambda: self._check(deadline))

        return await self._run(pool, deadline, decode)

    async def _run(self, pool: Executor, deadline: float, call: Callable[[], T]) -> T:
        work = asyncio.get_running_loop().run_in_executor(pool, call)
        try:
            return await asyncio.wait_for(work, max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise self._late() from None

    def _check(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            raise self._late()

    def _late(self) -> ReadingTimeoutError:
        return ReadingTimeoutError(
            f"the request was not read within {self._deadline_s:g} s: send smaller images, or send it later"
        )


def open_request(body: bytes, answerer: Answerer, limits: RequestLimits) -> OpenedRequest:
    """Check a request, but for the pixels of its images. Raises RequestError for anything that cannot be served."""
    try:
        content = parse_json(body)
    except JsonError as error:
        raise RequestError(f"the request is no JSON: {error}") from None
    if not isinstance(content, dict) or not {"dataframe_records"} <= set(content) <= {"dataframe_records", "params"}:
        raise RequestError("the request must be an object with `dataframe_records` and perhaps `params`, nothing else")
    rows, parameters = content["dataframe_records"], content.get("params", {})
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise RequestError("dataframe_records must be a list of objects with `prompt` and perhaps `image`")
    if not isinstance(parameters, dict):
        raise RequestError(f"params must be an object, got {type(parameters).__name__}")
    return OpenedRequest(open_rows(rows, limits), answerer.budget(parameters))


def decode_request(opened: OpenedRequest, answerer: Answerer, check: Callable[[], None] = lambda: None) -> list[Item]:
    """The rows of a checked request, and their budget. `check` as in `decode_rows`. Raises RequestError."""
    questions = decode_rows(opened.rows, answerer.processor, check)
    answerer.require_room(questions, opened.budget)
    return [(question, opened.budget) for question in questions]


def read_request(body: bytes, answerer: Answerer, limits: RequestLimits = RequestLimits()) -> list[Item]:  # noqa: B008
    """Both steps in one. Raises RequestError."""
    return decode_request(open_request(body, answerer, limits), answerer)
