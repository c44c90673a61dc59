"""What an accepted image, text or request can cost at most: `make bench-limits`.

Every case is at a limit of `meteor_model/limits.py`, is read in a process of its own, and is measured by CPU seconds
and by the memory that reading takes beyond what the process has. The last part asks what heavy requests do to a light
one: `reading.py` beside the shared threads that asyncio has.

Writes benchmarks/results/limits.json.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import multiprocessing
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.clocks import hardware
from benchmarks.results_file import RESULTS, write_results
from meteor_model.answering import Answerer, RequestError
from meteor_model.images import ImageError, decode_image
from meteor_model.limits import MAX_CHARACTERS, MAX_SCANS, RequestLimits
from pipelines.data.schema import parse_sample
from pipelines.inference.reading import RequestReader, read_request
from tests.meteor_model.builders import model, processor

SIDE = 8192
"""Rows and columns of a picture of ImageLimits.pixels."""
TRAVELLING = 336
HEAVY_REQUESTS = 6


def picture(side: int, mode: str = "RGB") -> Image.Image:
    """A picture that packs well, so that few bytes hold many pixels."""
    tile = np.random.default_rng(0).integers(0, 255, (8, 8, 4), dtype=np.uint8)
    return Image.fromarray(np.tile(tile, (side // 8, side // 8, 1))).convert(mode)


def saved(kind: str, side: int, mode: str = "RGB", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture(side, mode).save(stream, kind, **options)
    return stream.getvalue()


def many_scans(side: int) -> bytes:
    """A progressive JPEG whose last scan comes again until there are MAX_SCANS; refused once it is decoded."""
    stream = io.BytesIO()
    Image.new("RGB", (side, side), (0, 200, 0)).save(stream, "JPEG", progressive=True)
    whole = stream.getvalue()
    last = whole.rindex(b"\xff\xda")
    return whole[:-2] + whole[last:-2] * (MAX_SCANS - whole.count(b"\xff\xda")) + whole[-2:]


def _decode(data: bytes) -> None:
    with suppress(ImageError):
        decode_image(data, TRAVELLING)


def grey_16(side: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.asarray(picture(side, "L")).astype(np.uint16)).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def images(side: int) -> dict[str, Callable[[], bytes]]:
    """Files by name, each of `side` x `side` pixels."""
    return {
        "JPEG": partial(saved, "JPEG", side, quality=90),
        "JPEG, progressive": partial(saved, "JPEG", side, quality=90, progressive=True),
        f"JPEG, {MAX_SCANS} scans": partial(many_scans, side),
        "PNG, RGB": partial(saved, "PNG", side, compress_level=1),
        "PNG, RGBA": partial(saved, "PNG", side, "RGBA", compress_level=1),
        "PNG, 16 bits": partial(grey_16, side),
        "WebP, lossless, alpha": partial(saved, "WEBP", side, "RGBA", lossless=True, method=0, quality=0),
        "GIF": partial(saved, "GIF", side, "P"),
    }


def request(images_of: Sequence[bytes], prompt: str = "what?") -> bytes:
    rows = [{"image": base64.b64encode(image).decode(), "prompt": prompt} for image in images_of]
    return json.dumps({"dataframe_records": rows, "params": {"max_new_tokens": 1}}).encode()


def _read(answerer: Answerer, body: bytes) -> None:
    with suppress(RequestError):  # too many tokens for the model, which is said after they are counted
        read_request(body, answerer)


def texts(answerer: Answerer) -> dict[str, Callable[[], None]]:
    """Texts and requests at their limits, ready to be read."""
    limits, encode = RequestLimits(), answerer.processor.encode
    words = "a picture of a cat, " * (MAX_CHARACTERS // 20)
    turns = [{"from": "human", "value": words}, {"from": "gpt", "value": "yes"}]
    record = json.dumps({"id": "a", "conversations": turns}).encode()
    prompts = request([b""] * (limits.all_characters // limits.characters), words[: limits.characters])
    bytes_of_images = request([b"\0" * (limits.image_bytes // 4 - 4)] * 4)

    def read_record() -> None:
        encode([(turn.role, turn.text) for turn in parse_sample("k", {"json": record}).turns], 0)

    return {
        f"a sample of {MAX_CHARACTERS} characters": read_record,
        f"a request of prompts of {limits.all_characters} characters": partial(_read, answerer, prompts),
        "a request of 64 MiB of images that are none": partial(_read, answerer, bytes_of_images),
    }


def _measured(call: Callable[[], object], results: Connection) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, started = _peak_mib("VmRSS"), time.process_time()
    call()
    results.send({"cpu_s": round(time.process_time() - started, 2), "mib": round(_peak_mib("VmHWM") - before)})


def _peak_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def measure(call: Callable[[], object]) -> dict[str, float]:
    """CPU seconds and MiB of one call, in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measured, args=(call, sender))
    child.start()
    sender.close()
    found: dict[str, float] = receiver.recv()
    child.join()
    return found


async def _light_beside_heavy(read: Callable[[bytes], Awaitable[object]], heavy: bytes, light: bytes) -> float:
    waiting = [asyncio.ensure_future(read(heavy)) for _ in range(HEAVY_REQUESTS)]
    await asyncio.sleep(0.5)
    started = time.perf_counter()
    await read(light)
    seconds = time.perf_counter() - started
    await asyncio.gather(*waiting)
    return seconds


def light_beside_heavy(answerer: Answerer, side: int) -> dict[str, float]:
    """Seconds of a light request while six heavy ones are read, in shared threads and by `reading.py`."""
    heavy, light = request([saved("PNG", side, "RGBA", compress_level=1)]), request([saved("JPEG", TRAVELLING)])

    async def shared(body: bytes) -> object:
        return await asyncio.to_thread(read_request, body, answerer)

    async def apart(body: bytes) -> object:
        return await RequestReader.read(reader, body)

    reader = RequestReader(answerer, RequestLimits(), threads=2, deadline_s=600)
    started = time.perf_counter()
    read_request(light, answerer)
    alone = time.perf_counter() - started
    return {
        "alone_s": round(alone, 3),
        "shared_threads_s": round(asyncio.run(_light_beside_heavy(shared, heavy, light)), 3),
        "reading_s": round(asyncio.run(_light_beside_heavy(apart, heavy, light)), 3),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=SIDE, help="of the pictures")
    parser.add_argument("--output", type=Path, default=RESULTS / "limits.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    answerer = Answerer(model(), processor())
    costs: dict[str, dict[str, float]] = {}
    for name, make in images(options.side).items():
        data = make()
        costs[name] = {"file_kb": len(data) // 1000, **measure(partial(_decode, data))}
        print(f"{name}: {costs[name]}", flush=True)
    for name, call in texts(answerer).items():
        costs[name] = measure(call)
        print(f"{name}: {costs[name]}", flush=True)
    result = {
        "hardware": hardware(torch.device("cpu"), torch.float32),
        "load": round(os.getloadavg()[0], 2),
        "side": options.side,
        "costs": costs,
        "light_request_beside_six_heavy": light_beside_heavy(answerer, options.side),
    }
    print(result["light_request_beside_six_heavy"])
    write_results(options.output, result)


if __name__ == "__main__":
    main()
