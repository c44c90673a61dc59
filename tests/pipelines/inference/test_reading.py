"""How a replica reads requests: limits before pixels, light requests past heavy ones, and a deadline."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from meteor_model.answering import Answerer, RequestError
from meteor_model.foreign import SHOWN_DETAIL
from meteor_model.images import OpenedImage
from meteor_model.limits import ImageLimits, RequestLimits
from pipelines.inference import reading
from pipelines.inference.reading import ReadingTimeoutError, RequestReader, open_request, read_request
from pipelines.inference.settings import ServeSettings
from tests.meteor_model.builders import model, processor


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return Answerer(model(), processor())


def picture(side: int, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (0, 200, 0)).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def body(*images: str, prompt: Any = "what?", **parameters: Any) -> bytes:
    rows = [{"image": image, "prompt": prompt} for image in images]
    return json.dumps({"dataframe_records": rows, "params": parameters}).encode()


LIGHT, HEAVY = picture(16), picture(2100)


@pytest.mark.parametrize(
    ("limits", "request_body", "message"),
    [
        (RequestLimits(ImageLimits(pixels=255)), body(LIGHT), "row 0: image cannot be used: image_too_large: 16 x 16"),
        (RequestLimits(pixels=511), body(LIGHT, LIGHT), "have 512 pixels, the limit is 511: send them in several"),
        (RequestLimits(characters=4), body(LIGHT), "row 0: prompt has 5 characters, the limit is 4"),
        (RequestLimits(all_characters=9), body(LIGHT, LIGHT), "have 10 characters, the limit is 9: send them in sev"),
        (RequestLimits(rows=1), body(LIGHT, LIGHT), r"2 rows; 1\.\.1 are allowed"),
        (RequestLimits(image_bytes=9), body(LIGHT), "base64 characters, the limit is 12"),
        (RequestLimits(ImageLimits(scans=0)), body(picture(16, "JPEG")), "more than 0 scans"),
    ],
)
def test_limits_speak_before_a_pixel_is_decoded(
    answerer: Answerer, limits: RequestLimits, request_body: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OpenedImage, "decode", lambda *_: pytest.fail("pixels were decoded"))
    with pytest.raises(RequestError, match=message):
        open_request(request_body, answerer, limits)


def test_the_settings_are_the_limits() -> None:
    prompts: dict[str, Any] = {"prompt_characters": 5, "request_characters": 6}
    how = ServeSettings(image_pixels=1, image_aspect=2, jpeg_scans=3, request_pixels=4, **prompts)
    image = ImageLimits(pixels=1, aspect=2, scans=3)
    assert how.limits == RequestLimits(image, characters=5, all_characters=6, pixels=4)
    assert ServeSettings().limits == RequestLimits(), "all ways of answering have the same limits"


LONG = "y" * 3_000_000


@pytest.mark.parametrize(
    "request_body",
    [
        b'{"dataframe_records": [{"prompt": ' + b"9" * 5000 + b"}]}",
        b'{"dataframe_records": [{"prompt": NaN}]}',
        b'{"dataframe_records": [{"prompt": "x", "prompt": "y"}]}',
        b'{"dataframe_records": [' + b"{}," * 200_000 + b"{}]}",
        body("", prompt="\ud800"),
        json.dumps({"dataframe_records": [{LONG: 1}]}).encode(),
        json.dumps({"dataframe_records": [{"prompt": "x"}], "params": {LONG: 1}}).encode(),
        json.dumps({"dataframe_records": [{"prompt": "x"}], "params": {"max_new_tokens": [LONG]}}).encode(),
        body("", prompt="x", max_new_tokens=int("9" * 4000)),
        body("\u0661" * 8),
    ],
    ids=["digits", "nan", "key_twice", "many", "surrogate", "column", "name", "value", "number", "base64"],
)
def test_a_refusal_is_bounded(answerer: Answerer, request_body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        read_request(request_body, answerer)
    assert len(str(caught.value)) <= SHOWN_DETAIL


class Gate:
    """Stands in for decoding: pictures of many pixels wait until they are let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.at_once, self.most = threading.Event(), 0, 0
        self._lock = threading.Lock()
        decode: Callable[[OpenedImage, int], Any] = OpenedImage.decode

        def gated(image: OpenedImage, size: int) -> Any:
            if image.num_pixels > reading.LIGHT_PIXELS:
                with self._lock:
                    self.at_once += 1
                    self.most = max(self.most, self.at_once)
                assert self.open.wait(30)
                with self._lock:
                    self.at_once -= 1
                return decode(OpenedImage(image.image.reduce(100), image.file), size)
            return decode(image, size)

        monkeypatch.setattr(OpenedImage, "decode", gated)


def test_a_light_request_passes_all_heavy_ones(answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    reader = RequestReader(answerer, RequestLimits(), threads=2, deadline_s=30)

    async def serve() -> int:
        heavy = [asyncio.create_task(reader.read(body(HEAVY))) for _ in range(6)]
        await asyncio.sleep(0.5)
        light = await asyncio.wait_for(reader.read(body(LIGHT)), 10)
        assert not any(task.done() for task in heavy), "they wait, and the light one is through"
        gate.open.set()
        return len(light) + sum(map(len, await asyncio.gather(*heavy)))

    assert asyncio.run(serve()) == 7
    assert gate.most == 1, "heavy ones go one after another"


def test_at_the_deadline_what_waits_and_what_is_read_is_refused(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    reader = RequestReader(answerer, RequestLimits(), threads=2, deadline_s=1.0)

    async def serve() -> list[Any]:
        started = time.monotonic()
        found = await asyncio.gather(*(reader.read(body(HEAVY, HEAVY)) for _ in range(3)), return_exceptions=True)
        assert time.monotonic() - started < 5
        gate.open.set()
        return found

    found = asyncio.run(serve())
    assert [type(one) for one in found] == [ReadingTimeoutError] * 3
    assert "not read within 1 s: send smaller images" in str(found[0])


def test_a_request_ends_before_its_next_image_once_it_is_late(answerer: Answerer) -> None:
    decoded = []

    def check() -> None:
        decoded.append(1)
        if len(decoded) == 3:
            raise ReadingTimeoutError("late")

    opened = open_request(body(*[LIGHT] * 9), answerer, RequestLimits())
    with pytest.raises(ReadingTimeoutError):
        reading.decode_request(opened, answerer, check)
    assert len(decoded) == 3
