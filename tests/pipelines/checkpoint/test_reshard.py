"""A checkpoint of two workers goes on with one, two, three and four, as if nothing had happened.

`universal_worker` trains; its engines start from other weights, weight decays, betas and learning rates than the
checkpoint has, so what a load leaves out shows.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.checkpoint.consolidate import read_weights
from pipelines.checkpoint.lora import add_adapters
from pipelines.checkpoint.reshard import check_groups, common_buffers, optimizer_state
from pipelines.checkpoint.shards import Layout, ZeroFiles, layout_of, overlaps, require_start
from pipelines.checkpoint.start_weights import StartWeights, WeightsError, write_sums
from pipelines.checkpoint.state import ZERO3_TAG, CheckpointError
from pipelines.config.settings import LoraSettings, SettingsError
from pipelines.io import sealed
from tests.pipelines.checkpoint.reshard_worker import BORDER, LORA, STEPS, Model, Training, trainings

REPOSITORY = Path(__file__).parents[3]
ALL = [(precision, training) for precision in ("fp32", "bf16") for training in trainings(precision)]
RESUMED = [(precision, training) for precision, training in ALL if training.start is not None]
ROOTS = ("whole", "adapted")
BEGUN_ALIKE = [training for precision, training in ALL if training.like]
ENCODERS = ("a.weight", "a.bias", "one.weight", "one.bias")
NAMES = [f"{precision}-{training.name}" for precision, training in RESUMED]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all trainings left."""
    folder = tmp_path_factory.mktemp("universal")
    done = subprocess.run(
        [sys.executable, "-m", "tests.pipelines.checkpoint.reshard_worker", str(folder)],
        cwd=REPOSITORY,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


def read(folder: Path, training: str, stage: str, rank: int = 0) -> dict[str, Any]:
    result: dict[str, Any] = torch.load(folder / training / f"{stage}-{rank}.pt", weights_only=False)
    return result


@pytest.mark.parametrize(("precision", "training"), RESUMED, ids=NAMES)
def test_every_worker_resumes_the_very_state(trained: Path, precision: str, training: Training) -> None:
    """Bit for bit, before any further step: the state that the workers of the checkpoint had."""
    assert training.start is not None
    saved = read(trained / precision, training.start, "saved")
    step = BORDER if training.start in ROOTS else BORDER + 1
    kinds = {name.split()[0] for name in saved["tensors"]}
    assert kinds == {"weight", "fp32", "exp_avg", "exp_avg_sq", "buffer"}
    assert saved["groups"][0]["weight_decay"] != saved["groups"][1]["weight_decay"]
    assert saved["tensors"]["buffer scale"].item() == 0.75, "the value before the load is 0.5"
    for rank in range(training.world):
        loaded = read(trained / precision, training.name, "loaded", rank)
        assert loaded["tensors"].keys() == saved["tensors"].keys()
        for name, tensor in saved["tensors"].items():
            assert torch.equal(loaded["tensors"][name], tensor), name
        assert loaded["groups"] == saved["groups"]
        assert loaded["adam_steps"] == [step] * loaded["sub_groups"]
        assert loaded["own_step_counters"]
        assert loaded["counters"] == [step, 0, 0]
        assert loaded["tied"]


@pytest.mark.parametrize(("precision", "training"), RESUMED, ids=NAMES)
def test_the_next_steps_are_those_of_the_uninterrupted_training(
    trained: Path, precision: str, training: Training
) -> None:
    """Bit-equal on two workers; elsewhere up to the order in which gradients are summed."""
    whole = read(trained / precision, root(training), "end")
    end = read(trained / precision, training.name, "end")
    expected = whole["losses"][-len(end["losses"]) :]
    assert end["groups"] == whole["groups"]
    assert end["adam_steps"] == [STEPS] * end["sub_groups"]
    if training.world == 2 and training.offload == "none" and "offloaded" not in (training.start or ""):
        assert end["losses"] == expected
        assert all(torch.equal(end["tensors"][name], tensor) for name, tensor in whole["tensors"].items())
        return
    loss_rtol, _, _ = TOLERANCE[precision]
    assert end["losses"] == pytest.approx(expected, rel=loss_rtol)
    assert_same_end(trained / precision, training, precision)


@pytest.mark.parametrize("training", BEGUN_ALIKE, ids=[training.name for training in BEGUN_ALIKE])
def test_the_same_is_trained_however_memory_is_saved(trained: Path, training: Training) -> None:
    """From the first step on, up to the order in which numbers are summed."""
    whole, end = (read(trained / "fp32", name, "end") for name in (training.like, training.name))
    assert end["losses"] == pytest.approx(whole["losses"], rel=TOLERANCE["fp32"][0])
    assert len(end["losses"]) == STEPS
    assert_same_end(trained / "fp32", training, "fp32")


TOLERANCE = {"fp32": (1e-6, 1e-6, 0.0), "bf16": (1e-4, 1e-3, 2**-7)}
"""Relative of a loss, absolute of a tensor, relative of a weight."""


def assert_same_end(folder: Path, training: Training, precision: str) -> None:
    """What a training ended with is what the whole one did, up to rounding."""
    whole, end = (read(folder, name, "end") for name in (root(training), training.name))
    _, atol, weight_rtol = TOLERANCE[precision]
    start = read(folder, root(training), "saved")["tensors"]
    for name, tensor in whole["tensors"].items():
        rtol = weight_rtol if name.startswith("weight") else 0.0
        torch.testing.assert_close(end["tensors"][name], tensor, rtol=rtol, atol=atol, msg=name)
        if f"fp32 {name.removeprefix('weight ')}" not in whole["tensors"] and name.startswith("weight"):
            assert torch.equal(tensor, start[name]), "frozen"
        elif name.startswith("fp32"):
            assert (tensor - start[name]).abs().max() > 3 * atol, f"{name} moves too little to tell"


def root(training: Training) -> str:
    """The uninterrupted training of the same."""
    return "adapted" if training.lora else "whole"


def test_adapters_are_merged_into_the_weights_beside_which_they_were_trained(trained: Path) -> None:
    """By the formula, from what the workers held; everything else is the start model's, under its names."""
    folder = trained / "fp32" / "adapted"
    saved = read(trained / "fp32", "adapted", "saved")["tensors"]
    weights, start = read_weights(folder, trained / "init"), StartWeights(trained / "init")
    assert ZeroFiles(folder).lora_scale == 3.0
    assert len(weights) == len(list(weights)) == len(read_weights(trained / "fp32" / "whole", trained / "init"))
    for layer in "012":
        name = f"language_model.layers.{layer}"
        expected = start.read(f"{name}.weight")
        if layer in LORA.targets:
            down, up = (saved[f"fp32 {name}.lora_{side}.default.weight"] for side in "AB")
            assert up.abs().max() > 1e-3, "it has learnt"
            expected = expected + 3.0 * up @ down
        torch.testing.assert_close(weights[f"{name}.weight"], expected, rtol=0, atol=1e-7)
        assert torch.equal(weights[f"{name}.bias"], start.read(f"{name}.bias"))
    assert torch.equal(weights["lm_head.weight"], start.read("language_model.embed.weight"))
    held = ZeroFiles(folder).optimizer(0)["fp32_flat_groups"]
    assert sum(flat.numel() for flat in held) < 100, "adapters and projectors alone"


def test_a_target_that_is_no_layer_is_refused_by_name() -> None:
    with pytest.raises(SettingsError, match=r"targets has 'q_proj', but the linear layers .* are 0, 1, 2; choose"):
        add_adapters(Model(), LoraSettings(rank=2), seed=0)


def test_worlds_have_other_sub_groups(trained: Path) -> None:
    """So the trainings above did regroup step counters and flat tensors."""
    numbers = {name: read(trained / "fp32", name, "loaded")["sub_groups"] for name in ("one", "two", "three", "four")}
    assert len(set(numbers.values())) == 4, numbers


def test_what_is_saved_after_a_resume_is_whole(trained: Path) -> None:
    """The consolidation of a checkpoint that a resumed training of another world wrote."""
    weights = read_weights(trained / "fp32" / "three", trained / "init")
    saved = read(trained / "fp32", "three", "saved")["tensors"]
    for name, tensor in saved.items():
        kind, parameter = name.split()
        if kind == "fp32":
            assert torch.equal(weights[parameter], tensor), parameter


def test_the_whole_weights_are_those_that_deepspeed_s_own_function_gives(trained: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    start = StartWeights(trained / "init")
    for precision in ("fp32", "bf16"):
        folder = trained / precision / "whole"
        left_out = ZeroFiles(folder).needs_start
        assert left_out == (precision == "bf16")
        theirs = get_fp32_state_dict_from_zero_checkpoint(str(folder), ZERO3_TAG, exclude_frozen_parameters=left_out)
        if left_out:
            theirs |= {f"encoders.{name}": start.read(f"encoders.{name}") for name in ENCODERS}
        ours = read_weights(folder, trained / "init")
        assert sorted(ours) == sorted(theirs)
        assert len(ours) == len(theirs)
        for name, tensor in theirs.items():
            assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
            assert torch.equal(ours[name], tensor), name


def test_what_is_frozen_is_not_in_the_shards(trained: Path) -> None:
    """Only its names and shapes are, and whose weights they are."""
    kept, left = ZeroFiles(trained / "fp32" / "whole"), ZeroFiles(trained / "bf16" / "whole")
    frozen = {f"encoders.{name}" for name in ENCODERS}
    assert set(kept.frozen) == set(left.frozen) == set(kept.model(0)["frozen_param_fragments"]) == frozen
    assert (kept.start, left.start) == (None, StartWeights(trained / "init").digest)
    assert left.model(0)["frozen_param_fragments"] is None
    assert frozen.isdisjoint(left.model(0)["module"])


def test_another_start_model_is_refused_wherever_it_would_be_used(trained: Path, tmp_path: Path) -> None:
    left, other = trained / "bf16" / "whole", tmp_path / "init"
    weights = load_file(trained / "init" / "model.safetensors")
    weights["encoders.one.bias"] += 1
    other.mkdir()
    save_file(weights, other / "model.safetensors")
    names = r"leaves 4 frozen parameters to the start model \w{12}, but the run's init/ holds \w{12}"
    with pytest.raises(CheckpointError, match=names):
        read_weights(left, other)
    with pytest.raises(CheckpointError, match=names):
        require_start(ZeroFiles(left), StartWeights(other).digest)
    require_start(ZeroFiles(trained / "fp32" / "whole"), "any, since these shards hold what is frozen")
    assert len(read_weights(trained / "fp32" / "whole", tmp_path / "nothing")) == len(
        read_weights(left, trained / "init")
    )


def test_a_start_model_is_known_by_its_list_or_by_its_bytes(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "init", tmp_path / "init")
    digest = StartWeights(trained / "init").digest
    sums = sealed.sums_of(tmp_path / "init")
    sealed.write_list(str(tmp_path / "init"), sums)
    assert StartWeights(tmp_path / "init").digest == digest
    write_sums(tmp_path / "init", sums)
    (tmp_path / "init" / sealed.list_name()).unlink()
    assert StartWeights(tmp_path / "init").digest == digest
    (tmp_path / "init" / "weights.json").write_text('{"other.safetensors": ""}')
    with pytest.raises(WeightsError, match=r"weights\.json names \['other.safetensors'\], but the folder holds"):
        _ = StartWeights(tmp_path / "init").digest


def layout_of_all(folder: Path) -> Any:
    shards = ZeroFiles(folder)
    return shards.model(1), shards.optimizer(1)


class Planted:
    """A pickle that writes a file where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("kind", ["model", "optim"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "plain"])
@pytest.mark.parametrize(
    "reader", [lambda folder: dict(read_weights(folder, folder)), layout_of_all], ids=["whole", "resharded"]
)
def test_a_planted_pickle_is_refused_by_every_reader_of_shards(
    trained: Path, tmp_path: Path, kind: str, zipped: bool, reader: Callable[[Path], Any]
) -> None:
    shutil.copytree(trained / "fp32" / "whole" / ZERO3_TAG, tmp_path / ZERO3_TAG)
    shard, mark = tmp_path / ZERO3_TAG / f"zero_pp_rank_1_mp_rank_00_{kind}_states.pt", tmp_path / "ran"
    content = torch.load(shard, weights_only=False)
    torch.save({**content, "extra": Planted(mark)}, shard, _use_new_zipfile_serialization=zipped)
    refused = r"rank_1_.*holds \w+\.mkdir, which no checkpoint" if zipped else r"rank_1_mp_rank_00_\w+\.pt"
    with pytest.raises(CheckpointError, match=refused):
        reader(tmp_path)
    assert not mark.exists()


def test_missing_foreign_and_damaged_shards_are_named(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no ZeRO-3 shard of worker 0"):
        ZeroFiles(tmp_path)
    shards = tmp_path / ZERO3_TAG
    shutil.copytree(trained / "fp32" / "whole" / ZERO3_TAG, shards)
    lost = shards / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = lost.read_bytes()
    lost.unlink()
    with pytest.raises(CheckpointError, match=r"whole checkpoint of 2 workers: optim states of worker 1 are missing"):
        ZeroFiles(tmp_path)
    lost.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"rank_1_mp_rank_00_optim_states.pt is damaged"):
        ZeroFiles(tmp_path).optimizer(1)
    lost.write_bytes(content)
    shutil.copy(lost, shards / "zero_pp_rank_2_mp_rank_00_optim_states.pt")
    with pytest.raises(CheckpointError, match=r"2 workers: optim states of worker 2 are too many"):
        ZeroFiles(tmp_path)


def test_other_groups_names_shapes_steps_and_buffers_are_refused(trained: Path, tmp_path: Path) -> None:
    shards = ZeroFiles(trained / "fp32" / "whole")
    layout = layout_of(shards)
    groups = layout.groups()
    with pytest.raises(CheckpointError, match="has 2 parameter groups, the training has 1"):
        check_groups(groups, groups[:1], tmp_path)
    swapped = [groups[1], groups[0]]
    with pytest.raises(CheckpointError, match=r"parameter group 0: projectors\.\S+ is not in the model"):
        check_groups(groups, swapped, tmp_path)
    name = "projectors.a.weight"
    with pytest.raises(CheckpointError, match=r"projectors\.a\.weight has shape \(7, 7\) instead of \(7, 8\)"):
        check_groups(groups, [{**groups[0], name: torch.Size([7, 8])}, groups[1]], tmp_path)
    state = shards.optimizer(0)["optimizer_state_dict"]["state"]  # mapped privately: the file stays as it is
    state[1]["step"] += 1
    one = Layout(1, groups, [0, 1])
    with pytest.raises(CheckpointError, match="different values of 'step' in sub-groups"):
        optimizer_state(shards, layout, one, 0)
    shards.model(1)["module"]["scale"] += 1
    with pytest.raises(CheckpointError, match="buffer scale of worker 1 differs"):
        common_buffers(shards)


@pytest.mark.parametrize("numel", [0, 1, 2, 3, 5, 7, 12, 97])
def test_pieces_move_every_element_to_where_its_world_has_it(numel: int) -> None:
    """Against the literal way: cut the padded vector for both worlds."""

    def cut(world: int) -> list[list[int]]:
        length = -(-numel // world)
        padded = [*range(numel), *[-1] * (world * length - numel)]
        return [padded[rank * length : (rank + 1) * length] for rank in range(world)]

    for old_world in range(1, 9):
        old = cut(old_world)
        for new_world in range(1, 9):
            for rank, expected in enumerate(cut(new_world)):
                got = [-1] * len(expected)
                for overlap in overlaps(numel, old_world, new_world, rank):
                    taken = old[overlap.source][overlap.source_start :][: overlap.length]
                    assert len(taken) == overlap.length > 0
                    got[overlap.target_start : overlap.target_start + overlap.length] = taken
                assert got == expected, (old_world, new_world, rank)
