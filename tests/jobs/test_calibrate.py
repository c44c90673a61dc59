"""jobs/calibrate.py on real servers, and the pieces of its passes without any."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infra.services import Stack, full_env
from jobs.calibrate import JOB
from meteor_model.images import decode_image
from pipelines.calibration.image_plan import CalibrationError, ImagePlan, ReadBatches, _next_wave, _Survey
from pipelines.calibration.job import calibrate
from pipelines.calibration.ranks import ESTIMATORS, RankReport, as_rows, measures_of
from pipelines.calibration.settings import CalibrateSettings
from pipelines.calibration.statistics import RunningStatistics, half_width
from pipelines.data import shards
from pipelines.data.schema import parse_sample
from pipelines.data.sources import Packed
from pipelines.data.sources.openmoji import OpenMoji, OpenMojiSettings
from pipelines.io import storage
from pipelines.registry.folder import ExportError, export_model
from pipelines.registry.open import open_model
from pipelines.registry.publish import register_model
from pipelines.registry.versions import PinnedModel, Registry, pin_model
from pipelines.tracking.mlflow_run import RunRequest, open_run
from tests.meteor_model.builders import model, processor
from tests.stack_fixture import applied

ROOT = Path(__file__).resolve().parents[2]
SOURCE = OpenMojiSettings(code_points=24, heldout_code_points=16, variants=2, text_only_share=0.1)
SAMPLES, PER_SHARD = 30, 16
NAME = "calibrated"


def packed(split: str) -> Iterator[Packed]:
    """Drawings, some without an image; the third of the training samples has one that cannot be decoded."""
    for number, (key, members) in enumerate(OpenMoji(SOURCE).samples(split)):
        if number == 2 and split == "train":
            members = {name: b"no image" if name != "json" else data for name, data in members.items()}
        yield key, members


def make(url: str) -> shards.Manifest:
    infos = [
        info for split in ("train", "heldout") for info in shards.write_shards(packed(split), url, split, PER_SHARD)
    ]
    return shards.save_manifest(url, infos, {"format": 1, "source": {"name": "test"}})


def usable(manifest: shards.Manifest, split: str, count: int) -> tuple[list[bytes], int, int]:
    """The first images in manifest order, plainly: and how many samples before the last were faulty or text only."""
    found: list[bytes] = []
    faulty = text_only = 0
    for info in manifest.split(split):
        for key, members in shards.read_shard(manifest.url, info):
            images = parse_sample(key, members).images
            if len(found) == count:
                return found, faulty, text_only
            if not images:
                text_only += 1
            elif images[0] == b"no image":
                faulty += 1
            else:
                found.append(images[0])
    return found, faulty, text_only


# ------------------------------------------------------------------------------------------------------ without servers


def test_a_survey_tells_every_sample_up_to_the_wanted_image(tmp_path: Path) -> None:
    manifest = make(str(tmp_path))
    info = manifest.split("train")[0]
    states = _Survey(manifest.url, 100, 64, "fail")({"info": asdict(info)})["states"]
    assert len(states) == info.samples
    assert states[2] == "undecodable_image"
    for state, (key, members) in zip(states, shards.read_shard(manifest.url, info), strict=True):
        assert (state == "text_only") == (not parse_sample(key, members).images)
    few = _Survey(manifest.url, 2, 64, "fail")({"info": asdict(info)})["states"]
    assert few == states[: len(few)]
    assert few.count("") == 2
    assert few[-1] == ""


def test_a_damaged_shard_fails_or_is_counted(tmp_path: Path) -> None:
    manifest = make(str(tmp_path))
    info = manifest.split("train")[0]
    (tmp_path / info.path).write_bytes(b"x")
    with pytest.raises(shards.ShardError, match="train-000000"):
        _Survey(manifest.url, 5, 64, "fail")({"info": asdict(info)})
    states = _Survey(manifest.url, 5, 64, "drop")({"info": asdict(info)})["states"]
    assert states == ["bad_shard"] * info.samples


def test_batches_hold_the_planned_images_in_order(tmp_path: Path) -> None:
    manifest = make(str(tmp_path))
    info = manifest.split("train")[0]
    rows = list(ReadBatches(manifest.url, 64, 3)({"info": asdict(info), "places": np.array([0, 1, 3, 4])}))
    pixels = [np.frombuffer(row["pixels"], np.uint8).reshape(-1, 3, 64, 64) for row in rows]
    assert [len(batch) for batch in pixels] == [3, 1]
    samples = shards.read_shard(manifest.url, info)
    expected = [decode_image(parse_sample(*samples[place]).images[0], 64).numpy() for place in (0, 1, 3, 4)]
    assert np.array_equal(np.concatenate(pixels), np.stack(expected))
    assert samples[4][0] in rows[1]["where"]


def test_waves_take_shards_until_there_may_be_enough(tmp_path: Path) -> None:
    waiting = list(make(str(tmp_path)).split("train"))
    assert [info.path for info in _next_wave(waiting, 17)] == ["train-000000.tar", "train-000001.tar"]
    assert [info.path for info in waiting] == ["train-000002.tar"]
    assert ImagePlan("x", tuple((info, (0, 1)) for info in waiting), {}, 0).images == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 1}, "samples is 1"),
        ({"tolerance": 0.0}, r"tolerance is 0\.0"),
        ({"actors": 0}, "actors is 0"),
        ({"gpus": -1.0}, r"gpus is -1\.0"),
        ({"decode_samples": 1}, "decode_samples is 1"),
        ({"decode_samples": 0, "target_per_image": 9.0}, "target_per_image is given"),
    ],
)
def test_bad_settings_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CalibrateSettings("folder", **change)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    assert pin_model(str(tmp_path) + "/", "").address == str(tmp_path)
    with pytest.raises(ExportError, match=r"no files here"), open_model(PinnedModel(str(tmp_path))):
        pass


def test_a_fault_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CalibrationError, match="manifest is missing"):
        calibrate(CalibrateSettings(str(tmp_path)), "")
    with pytest.raises(shards.ShardError, match="there is no manifest here"):
        calibrate(CalibrateSettings(str(tmp_path), manifest=str(tmp_path)), "")
    assert JOB.main(["--model", str(tmp_path), "--samples", "0"]) == 2
    assert capsys.readouterr().err == "error: samples is 0; it must be at least 2\n"


# --------------------------------------------------------------------------------------------------------- with servers


@pytest.fixture(scope="module")
def prepared(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A registered model, its folder, and shards in object storage."""
    folder = export_model(model(), processor(), tmp_path_factory.mktemp("calibrate") / "model")
    with applied(stack):
        manifest = make("s3://meteor/data/calibrate")
        run_id = open_run(stack.mlflow_uri, RunRequest("meteor", "trained")).run_id
        register_model(
            folder, Registry(stack.mlflow_uri, NAME), aliases=("trained",), run_id=run_id,
            tags={"manifest": manifest.url},
        )  # fmt: skip
    return {"folder": folder, "manifest": manifest, "run_id": run_id}


def submit(stack: Stack, *arguments: str) -> subprocess.CompletedProcess[str]:
    """As `make calibrate` does."""
    ray = str(Path(sys.executable).parent / "ray")
    given = ["--samples", str(SAMPLES), "--batch", "4", "--decode-samples", "8", "--cpus", "0.5", *arguments]
    command = [ray, "job", "submit", "--working-dir", ".", "--", "python", "jobs/calibrate.py", *given]
    return subprocess.run(command, cwd=ROOT, env=full_env(stack), capture_output=True, text=True, timeout=300)


def content(stack: Stack, url: str) -> dict[str, Any]:
    with applied(stack):
        found: dict[str, Any] = storage.read_json(url)
    return found


@pytest.mark.stack
@pytest.mark.timeout(600)
def test_ranks_of_a_registered_model_do_not_hang_on_the_number_of_actors(
    stack: Stack, prepared: dict[str, Any]
) -> None:
    first_url, second_url = "s3://meteor/calibration/one", "s3://meteor/calibration/two"
    one = submit(stack, "--model", f"models:/{NAME}@trained", "--output", first_url,
                 "--against", f"{prepared['manifest'].url}:heldout")  # fmt: skip
    assert one.returncode == 0, one.stdout[-4000:] + one.stderr[-2000:]
    first = content(stack, f"{first_url}/calibration.json")
    two = submit(stack, "--model", str(prepared["folder"]), "--manifest", prepared["manifest"].url, "--actors", "2",
                 "--output", second_url, "--against", f"{first_url}/calibration.json",
                 "--decode-samples", "0")  # fmt: skip
    assert two.returncode == 0, two.stdout[-4000:] + two.stderr[-2000:]
    second = content(stack, f"{second_url}/calibration.json")

    for key in ("images", "skipped", "text_only", "ranks", "budgets", "weights_sha256", "dataset"):
        assert first[key] == second[key], key
    assert second["drift"]["verdict"] == "same"
    assert all(s["difference"] == 0 for by in second["drift"]["ranks"].values() for row in by.values() for s in row)
    _check_against_a_plain_loop(stack, prepared["manifest"], first)
    _check_lambda(first["lambda"])
    assert first["drift"]["verdict"] in ("same", "ranks_only", "undecided", "drift")
    with applied(stack):
        assert first["drift"]["images"] == len(usable(prepared["manifest"], "heldout", SAMPLES)[0])
    assert "varies by" in one.stdout
    assert f"filed     with version 1 of {NAME}" in one.stdout
    _check_mlflow(stack, prepared["run_id"], first)


def _check_against_a_plain_loop(stack: Stack, manifest: shards.Manifest, found: dict[str, Any]) -> None:
    with applied(stack):
        images, faulty, text_only = usable(manifest, "train", SAMPLES)
    assert (found["images"], found["skipped"], found["text_only"]) == (
        SAMPLES,
        {"undecodable_image": faulty},
        text_only,
    )
    assert faulty == 1
    built = model()
    pixels = torch.stack([decode_image(image, 64) for image in images])
    rows = np.concatenate([as_rows(built.measure_ranks(part, ESTIMATORS)) for part in pixels.split(7)])
    expected = RankReport.of(RunningStatistics.of(rows), measures_of(built.config), {})
    for estimator, by_name in expected.ranks.items():
        for name, items in by_name.items():
            for item, other in zip(items, found["ranks"][estimator][name], strict=True):
                assert other["mean"] == pytest.approx(item.mean, rel=1e-6)
                assert other["std"] == pytest.approx(item.std, rel=1e-4, abs=1e-6)
                assert other["high"] - other["mean"] == pytest.approx(half_width(other["std"], SAMPLES))


def _check_lambda(found: dict[str, Any]) -> None:
    assert found["target_per_image"] == 12.0
    solved, checked = found["solved_on"], found["checked_on"]
    assert solved + checked == 16
    assert abs(solved - checked) <= 4, "halves of whole groups: no image is on both sides"
    assert found["solved_per_image"] == pytest.approx(12.0, abs=0.5)
    assert found["low"] <= found["checked_per_image"] <= found["high"]


def _check_mlflow(stack: Stack, run_id: str, first: dict[str, Any]) -> None:
    from mlflow import MlflowClient

    with applied(stack):
        client = MlflowClient(stack.mlflow_uri)
        tags = client.get_model_version(NAME, "1").tags
        assert tags["calibration.images"] == str(SAMPLES)
        assert tags["calibration.drift"].startswith(first["drift"]["verdict"])
        path = client.download_artifacts(run_id, tags["calibration"])
        assert json.loads(Path(path).read_text()) == first
        folder = tags["calibration"].rpartition("/")[0]
        assert [item.path for item in islice(client.list_artifacts(run_id, folder), 3)] == [
            f"{folder}/calibration.json",
            f"{folder}/calibration.png",
        ]
