"""Batch inference: the plan, one part, what counts as whole, what is refused; and the job, killed and gone on with."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from meteor_model.answering import Answerer, Budget, Question
from pipelines.config.workers import Workers
from pipelines.data import shards
from pipelines.data.schema import build_members, parse_sample
from pipelines.data.sources import Packed
from pipelines.data.sources.openmoji import OpenMoji, OpenMojiSettings
from pipelines.inference.batch import _PartAnswerer, predict_split
from pipelines.inference.output import (
    SPEC_FILE,
    OutputPart,
    OutputSpec,
    PredictError,
    claim_output,
    plan_parts,
    whole_part,
)
from pipelines.registry.folder import export_model, model_digest, weights_digest
from pipelines.registry.versions import PinnedModel
from tests.jobs.killing import ROOT, kill_when, own_environment
from tests.meteor_model.builders import counted_encodes, model, processor
from tests.pipelines.registry.test_versions import png

SOURCE = OpenMojiSettings(code_points=16, heldout_code_points=8, variants=2, text_only_share=0.1)


def packed() -> Iterator[Packed]:
    """Drawings; the fourth has an image that cannot be decoded, the fifth no record."""
    for number, (key, members) in enumerate(OpenMoji(SOURCE).samples("train")):
        if number == 3:
            members = {name: b"no image" if name != "json" else data for name, data in members.items()}
        if number == 4:
            members = {name: data for name, data in members.items() if name != "json"}
        yield key, members


def make(url: str) -> shards.Manifest:
    return shards.save_manifest(url, shards.write_shards(packed(), url, "train", 10), {"format": 1, "source": {}})


def asked_of(folder: Path, manifest: shards.Manifest, **changes: Any) -> OutputSpec:
    asked = OutputSpec(
        str(folder), model_digest(folder), manifest.url, manifest.sha256, "train", "", "first", 3, None, 4, "fail"
    )
    return replace(asked, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_model(model(), processor(), tmp_path_factory.mktemp("predict") / "model")


# ------------------------------------------------------------------------------------------------------ without servers


def test_the_plan_holds_every_sample_once(tmp_path: Path) -> None:
    manifest = make(str(tmp_path))
    infos = manifest.split("train")
    parts = plan_parts(infos, 4)
    places = [(part.shard, index) for part in parts for index in range(part.lo, part.hi)]
    assert places == [(shard, index) for shard, info in enumerate(infos) for index in range(info.samples)]
    assert len({part.name for part in parts}) == len(parts)
    assert max(part.hi - part.lo for part in parts) == 4
    with pytest.raises(PredictError, match="part_samples is 0"):
        plan_parts(infos, 0)


def test_a_part_holds_answers_and_reasons(folder: Path, tmp_path: Path) -> None:
    manifest = make(str(tmp_path / "data"))
    info, output, budget = manifest.split("train")[0], str(tmp_path / "out"), Budget(3)
    asked, part = asked_of(folder, manifest, questions="all"), OutputPart(0, 0, 0, 6)
    actor = _PartAnswerer(PinnedModel(str(folder)), asked, budget, output, gpus=0.0)
    row = {"part": asdict(part), "info": asdict(info)}
    with counted_encodes() as calls:
        actor(row)
    first = (tmp_path / "out" / part.name).read_bytes()
    facts = whole_part(output, part, asked, [info])
    assert facts is not None
    assert facts["errors"] == {"missing_json": 1, "undecodable_image": 1}
    actor(row)
    assert (tmp_path / "out" / part.name).read_bytes() == first

    rows = pq.read_table(io.BytesIO(first)).to_pylist()
    whole = {row["index"] for row in rows if row["error"] is None}
    assert len(calls) == len(whole), "every conversation is encoded once"
    answerer = Answerer(model(), processor())
    for index, (key, members) in enumerate(shards.read_shard(manifest.url, info)[:6]):
        of_sample = [row for row in rows if row["index"] == index]
        assert {row["key"] for row in of_sample} == {key}
        if index in (3, 4):
            assert [row["error"] for row in of_sample] == [("undecodable_image", "missing_json")[index - 3]]
            continue
        sample = parse_sample(key, members)
        replies = [place for place, turn in enumerate(sample.turns) if turn.role == "assistant"]
        assert len(of_sample) == len(replies)
        for row, place in zip(of_sample, replies, strict=True):
            assert row["prompt"] == sample.turns[place - 1].text
            before = sample.conversation[:place]
            count = sum(text.count("<image>") for _, text in before)
            images = [answerer.processor.load_image(image) for image in sample.images[:count]]
            prompt = answerer.processor.encode(before, count, add_generation_prompt=True)
            (alone,) = answerer.answer([Question(prompt, images)], budget)
            assert (row["answer"], row["visual_tokens"], row["error"]) == (alone.text, alone.visual_tokens, None)


@pytest.mark.parametrize(
    ("prompt", "shown", "reasons"),
    [
        ("What is this?", {0: "What is this?", 1: "<image>\nWhat is this?", 2: "<image><image>\nWhat is this?"}, {}),
        (
            "Is <image> a cat?",
            {1: "Is <image> a cat?"},
            {0: "placeholder_excess", 2: "placeholder_missing"},
        ),
    ],
)
def test_a_given_prompt_places_its_images_or_says_which_samples_it_does_not_fit(
    folder: Path, tmp_path: Path, prompt: str, shown: dict[int, str], reasons: dict[int, str]
) -> None:
    record = {count: "<image>" * count + "what?" for count in (0, 1, 2)}
    members = {
        f"k{count}": build_members(
            {"id": "k", "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "a"}]},
            [("png", png((0, 200, 0)))] * count,
        )
        for count, text in record.items()
    }
    url = str(tmp_path / "data")
    manifest = shards.save_manifest(url, shards.write_shards(list(members.items()), url, "train", 3), {"source": {}})
    (info,) = manifest.split("train")
    actor = _PartAnswerer(
        PinnedModel(str(folder)), asked_of(folder, manifest, prompt=prompt), Budget(3), str(tmp_path), gpus=0.0
    )
    part = OutputPart(0, 0, 0, 3)
    actor({"part": asdict(part), "info": asdict(info)})
    rows = pq.read_table(tmp_path / part.name).to_pylist()
    assert {count: row["prompt"] for count, row in enumerate(rows) if row["prompt"] is not None} == shown
    assert {count: row["error"] for count, row in enumerate(rows) if row["error"] is not None} == reasons


def test_a_prompt_that_is_rendered_already_is_refused_before_anything_is_answered(folder: Path, tmp_path: Path) -> None:
    manifest = make(str(tmp_path / "data"))
    with pytest.raises(PredictError, match="prompt: the prompt is rendered by a template already"):
        predict_split(
            PinnedModel(str(folder)), manifest, "train", str(tmp_path / "out"), Budget(3), Workers(1, 0.5, 0.0),
            prompt="USER: what? ASSISTANT:",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_part_of_another_job_or_a_damaged_one_does_not_count(folder: Path, tmp_path: Path) -> None:
    manifest = make(str(tmp_path / "data"))
    info, output, part = manifest.split("train")[0], str(tmp_path / "out"), OutputPart(0, 0, 0, 3)
    asked = asked_of(folder, manifest, prompt="What is this?")
    assert whole_part(output, part, asked, [info]) is None
    _PartAnswerer(PinnedModel(str(folder)), asked, Budget(3), output, gpus=0.0)(
        {"part": asdict(part), "info": asdict(info)}
    )
    assert whole_part(output, part, asked, [info]) is not None
    assert whole_part(output, replace(part, hi=4), asked, [info]) is None, "a sample is missing"
    assert whole_part(output, part, replace(asked, prompt="other"), [info]) is None
    (tmp_path / "out" / part.name).write_bytes((tmp_path / "out" / part.name).read_bytes()[:-9])
    assert whole_part(output, part, asked, [info]) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_sha256": "0" * 64}, "model_sha256 was .* take a new output"),
        ({"manifest_sha256": "0" * 64}, "manifest_sha256 was"),
        ({"prompt": "other"}, "prompt was '', now it is 'other'"),
        ({"max_new_tokens": 4, "part_samples": 5}, r"max_new_tokens was 3, now it is 4 \(and part_samples\)"),
    ],
)
def test_an_output_of_something_else_is_refused(
    folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    asked = asked_of(folder, make(str(tmp_path / "data")))
    claim_output(str(tmp_path / "out"), asked)
    claim_output(str(tmp_path / "out"), replace(asked, model="elsewhere"))
    with pytest.raises(PredictError, match=message):
        claim_output(str(tmp_path / "out"), replace(asked, **change))
    with pytest.raises(PredictError, match=f"no {SPEC_FILE}"):
        claim_output(str(tmp_path / "data"), asked)


def test_variants_with_the_same_weights_are_two_models(folder: Path, tmp_path: Path) -> None:
    """Their answers differ, so one must not go on with the other's output."""
    other = model()
    other.config.pruning = replace(other.config.pruning, decode=replace(other.config.pruning.decode, lam=7.0))
    variant = export_model(other, processor(), tmp_path / "variant")
    assert weights_digest(variant) == weights_digest(folder)
    manifest = make(str(tmp_path / "data"))
    claim_output(str(tmp_path / "out"), asked_of(folder, manifest))
    with pytest.raises(PredictError, match="model_sha256 was"):
        claim_output(str(tmp_path / "out"), asked_of(variant, manifest))


# ------------------------------------------------------------------------------------------------------ on Ray's actors


def test_a_killed_job_answers_what_is_missing_and_nothing_twice(folder: Path, tmp_path: Path) -> None:
    manifest, out = make(str(tmp_path / "data")), tmp_path / "out"
    arguments = {"model": folder, "manifest": tmp_path / "data", "split": "train", "output": out}
    command = [sys.executable, "jobs/predict_shards.py", "--part-samples", "2", "--max-new-tokens", "3"]
    command += [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    environment = own_environment()
    kill_when(lambda: len(list(out.glob("part-*"))) >= 2, command, environment, tmp_path / "log")
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert not (out / "_SUCCESS.json").exists()
    second = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stdout[-3000:] + second.stderr[-1000:]

    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept, "what was there was written again"
    success = json.loads((out / "_SUCCESS.json").read_text())
    assert success["errors"] == {"missing_json": 1, "undecodable_image": 1}
    rows = [row for part in success["parts"] for row in pq.read_table(out / part["name"]).to_pylist()]
    places = [(row["shard"], row["index"]) for row in rows]
    assert places == [(info.path, index) for info in manifest.split("train") for index in range(info.samples)]
    assert all((row["answer"] is None) == (row["error"] is not None) for row in rows)
