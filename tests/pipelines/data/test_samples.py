"""Samples read outside of training: what is faulty is counted, and nothing else is caught."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from meteor_model.images import decode_image
from pipelines.data.samples import SampleFault, SampleReader, try_sample
from pipelines.data.schema import RawSample
from pipelines.data.shards import Manifest, save_manifest, write_shards


def picture() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (4, 4)).save(data, "PNG")
    return data.getvalue()


def record(question: str) -> bytes:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "yes"}]
    return json.dumps({"id": "x", "conversations": turns}).encode()


SAMPLES = [
    ("a", {"json": record("<image>a"), "png": picture()}),
    ("b", {"json": b"{"}),
    ("c", {"json": record("c")}),
    ("d", {"json": record("<image>d"), "png": b"no image"}),
    ("e", {"json": record("<image>e"), "png": picture()}),
    ("f", {"png": picture()}),
]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    url = str(tmp_path)
    return save_manifest(url, write_shards(SAMPLES, url, "train", 4), {"format": 1, "source": {"name": "test"}})


def decoded(sample: RawSample) -> str:
    for image in sample.images:
        decode_image(image, 4)
    return sample.key


def test_faulty_samples_are_passed_over_and_counted(manifest: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    reader = SampleReader(manifest, "train", decoded)
    assert reader.take(9) == ["a", "c", "e"]
    assert reader.skipped == {"bad_json": 1, "undecodable_image": 1, "missing_json": 1}
    assert "'train'" in caplog.text
    assert "passed over: 1 bad_json, 1 missing_json, 1 undecodable_image" in caplog.text


def test_what_lies_behind_the_last_one_is_not_read(manifest: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    reader = SampleReader(manifest, "train", decoded)
    assert reader.take(1) == ["a"]
    assert (reader.skipped, caplog.text) == ({}, "")
    assert SampleReader(manifest, "train", decoded).take(1, where=lambda key: key == "c") == ["c"]


def test_a_fault_has_its_reason_and_detail() -> None:
    fault = try_sample(*SAMPLES[3], decoded)
    assert isinstance(fault, SampleFault)
    assert (fault.reason, bool(fault.detail)) == ("undecodable_image", True)


def test_a_fault_of_the_code_is_raised() -> None:
    def wrong(sample: RawSample) -> None:
        raise KeyError(sample.key)

    with pytest.raises(KeyError, match="a"):
        try_sample(*SAMPLES[0], wrong)
