"""ZeRO-3 on two processes without Ray: sharded loading of the real model, frozen parts, bf16, consolidation."""

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from meteor_model.architectures import build_config
from meteor_model.configuration_meteor import DecodePruning, EncodePruning, FusePruning, MeteorConfig, PruningConfig
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from pipelines.checkpoint.consolidate import consolidate
from pipelines.checkpoint.lora import add_adapters
from pipelines.checkpoint.parity_file import read_parity
from pipelines.checkpoint.shards import ZeroFiles, save_shards
from pipelines.checkpoint.start_weights import StartWeights, WeightsError
from pipelines.checkpoint.state import PARITY_FILE, ZERO3_TAG, CheckpointError
from pipelines.checkpoint.weight_sums import COARSER, Precision, weight_sums
from pipelines.checkpoint.whole import WholeWeights
from pipelines.checkpoint.zero3 import (
    checkpoint_activations,
    deepspeed_config,
    load_sharded,
    parameter_groups,
    save_for_sharding,
    weight_dtype,
)
from pipelines.compat.deepspeed import import_deepspeed
from pipelines.config.settings import LearningRates, LoraSettings, OptimizerSettings, TrainingSettings
from pipelines.training.batches import MicroBatch
from pipelines.training.heldout_loss import parity_batch
from tests.meteor_model.towers import TOWERS

IMAGE, VISUAL = 3, 16
RATES = LearningRates(projector=1e-2, towers=None, llm=1e-3)
# A large epsilon: AdamW's first steps are otherwise +-lr even where the gradient is rounding noise.
ADAMW: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.0}
# Towers that read parameters outside their module's own forward: positions, biases, relative positions, fused qkv.
MISSING = "projectors.{}.input.bias"
READERS = ("eva02_det", "eva02_fused", "sam_padded", "dinov2_registers")
NO_LORA = LoraSettings()
LORA = LoraSettings(rank=4, alpha=8, targets=("q_proj", "down_proj"))
WORLD = 2
PATIENCE_S = 60.0
"""How long a worker waits for the other."""
PRUNING = PruningConfig(EncodePruning(totals=(96, 64, 64)), FusePruning(keep=VISUAL), DecodePruning(enabled=False))


def make_batch(rank: int) -> dict[str, Tensor]:
    """Two samples with an image each for worker 0; one text-only sample for worker 1."""
    random = torch.Generator().manual_seed(rank)
    text = torch.randint(4, 64, (2 - rank, 12 + rank), generator=random)
    visual = torch.full((2, VISUAL), IMAGE) if rank == 0 else torch.empty(1, 0, dtype=torch.int64)
    ids = torch.cat([visual, text], 1)
    labels = torch.where(ids == IMAGE, -100, ids)
    pixels = torch.randint(0, 256, (2 if rank == 0 else 0, 3, 64, 64), generator=random, dtype=torch.uint8)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}


def micro_batch(rank: int) -> MicroBatch:
    """The same as workers pass it on."""
    inputs = make_batch(rank)
    images = (1, 1) if rank == 0 else (0,)
    rows, length = inputs["input_ids"].shape
    lengths, cells = (length,) * rows, rows * length
    return MicroBatch(inputs, images, count(inputs), lengths, cells, len(images), (), (), 0, lambda: inputs)


def count(batch: dict[str, Tensor]) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


TOKENS = count(make_batch(0)) + count(make_batch(1))


def join(rank: int, group: Path) -> None:
    """A worker's process begins: it is one of the group, and has what all trainings import."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{group}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=PATIENCE_S)
    )
    import_deepspeed(uses_gpu=False).init_distributed(dist_backend="gloo", verbose=False)


@dataclass
class Workers:
    """A process for each rank, for one training after the other: most of what one costs is the imports before it."""

    folder: Path
    started: int = 0
    pools: list[ProcessPoolExecutor] = field(default_factory=list)

    def do(self, work: Callable[..., None], *arguments: Any) -> None:
        """Run it on every rank; what the first of them to fail raises is raised here, and the next call starts anew."""
        if not self.pools:
            self.started += 1
            group, spawn = self.folder / f"group-{self.started}", multiprocessing.get_context("spawn")
            self.pools = [ProcessPoolExecutor(1, spawn, join, (rank, group)) for rank in range(WORLD)]
        running = [pool.submit(work, rank, *arguments) for rank, pool in enumerate(self.pools)]
        ended, others = wait(running, return_when=FIRST_EXCEPTION)
        if others or any(one.exception() for one in ended):
            self.stop()  # a rank that waits for one that failed gives up after PATIENCE_S
        for one in (*ended, *others):
            one.result()

    def stop(self) -> None:
        """End the processes once they are done."""
        for pool in self.pools:
            pool.shutdown()
        self.pools = []


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    started = Workers(tmp_path_factory.mktemp("workers"))
    yield started
    started.stop()


def work(rank: int, folder: Path, precision: Any, rates: LearningRates, recompute: bool, lora: LoraSettings) -> None:
    """One worker: load, two steps, save; and a folder that lacks a weight."""
    settings = TrainingSettings(
        workers=WORLD,
        micro_batch=2,
        global_batch=4,
        precision=precision,
        gradient_checkpointing=recompute,
        optimizer=OptimizerSettings(learning_rates=rates),
        lora=lora,
    )
    deepspeed = import_deepspeed(uses_gpu=False)
    config = deepspeed_config(settings)
    arguments = (config, weight_dtype(settings), False)
    with pytest.raises(WeightsError, match=r"holds no weights for projectors\.\w+\.input\.bias"):
        load_sharded(MeteorForConditionalGeneration, folder / "incomplete", *arguments)
    model = load_sharded(MeteorForConditionalGeneration, folder / "init", *arguments)
    if lora.rank is not None:
        add_adapters(model, lora, seed=0)
    if recompute:
        checkpoint_activations(model)
    groups = parameter_groups(model, settings.optimizer, lora.rank is not None)
    optimizer = torch.optim.AdamW(groups, **ADAMW)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    losses = []
    for _ in range(2):
        batch = make_batch(rank)
        loss = engine(**batch, num_items_in_batch=TOKENS / 2, loss_chunk=5).loss  # `plain` makes all logits
        engine.backward(loss)
        engine.step()
        total = loss.detach().double() / 2
        torch.distributed.all_reduce(total)
        losses.append(total.item())
    parity = parity_batch(engine, micro_batch(rank), precision)
    if rank == 0:
        parity.save(folder / PARITY_FILE, precision)
    target = folder / "checkpoint" if rank == 0 else folder / f"checkpoint-{rank}"
    save_shards(engine, target, StartWeights(folder / "init").digest, lora.scale)
    (folder / f"losses-{rank}.json").write_text(json.dumps(losses))
    engine.destroy()


def tiny(towers: Sequence[str] = ()) -> MeteorConfig:
    """The tiny architecture, on towers of the tests' table where some are named."""
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = build_config("tiny", PRUNING, 64, ids, IMAGE)
    if not towers:
        return config
    return MeteorConfig(**{**config.to_dict(), "encoders": [replace(TOWERS[name], name=name) for name in towers]})


def run(
    workers: Workers,
    folder: Path,
    precision: str,
    rates: LearningRates = RATES,
    recompute: bool = False,
    towers: Sequence[str] = (),
    lora: LoraSettings = NO_LORA,
) -> tuple[list[float], Path]:
    """On both workers; returns the losses and the checkpoint, in which both workers' files are together."""
    torch.manual_seed(0)
    start = MeteorForConditionalGeneration(tiny(towers))
    start.config.text_config.dtype = torch.float32  # as in every model that was exported, and is trained further
    save_for_sharding(start, folder / "init")
    shutil.copytree(folder / "init", folder / "incomplete")
    weights = load_file(folder / "init" / "model.safetensors")
    del weights[MISSING.format(towers[0] if towers else "clip")]
    save_file(weights, folder / "incomplete" / "model.safetensors", metadata={"format": "pt"})
    workers.do(work, folder, precision, rates, recompute, lora)
    shutil.copytree(folder / "checkpoint-1" / ZERO3_TAG, folder / "checkpoint" / ZERO3_TAG, dirs_exist_ok=True)
    losses = [json.loads((folder / f"losses-{rank}.json").read_text()) for rank in range(2)]
    assert losses[0] == losses[1]
    return losses[0], folder / "checkpoint"


def plain(
    init: Path, rates: LearningRates = RATES, lora: LoraSettings = NO_LORA
) -> tuple[list[float], MeteorForConditionalGeneration]:
    """The same two steps in this process."""
    model = MeteorForConditionalGeneration.from_pretrained(init)
    settings = OptimizerSettings(learning_rates=rates)
    if lora.rank is not None:
        add_adapters(model, lora, seed=0)
    optimizer = torch.optim.AdamW(parameter_groups(model, settings, lora.rank is not None), **ADAMW)
    losses = []
    for _ in range(2):
        loss = sum(model(**make_batch(rank), num_items_in_batch=TOKENS).loss for rank in range(2))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


def test_real_model_in_fp32_equals_one_process(workers: Workers, tmp_path: Path) -> None:
    losses, checkpoint = run(workers, tmp_path, "fp32")
    expected, model = plain(tmp_path / "init")
    assert losses == pytest.approx(expected, rel=1e-5)
    whole = consolidate(checkpoint, MeteorForConditionalGeneration, tmp_path / "init")
    start = load_file(tmp_path / "init" / "model.safetensors")
    weights = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(weights[name], parameter, rtol=1e-3, atol=2e-5, msg=name)
        if name.startswith("encoders."):
            assert torch.equal(weights[name], start[name]), name
    assert not torch.equal(weights["lm_head.weight"], start["lm_head.weight"])
    batch, _ = read_parity(tmp_path / PARITY_FILE)
    for precision in COARSER["fp32"]:
        assert batch.sums[precision] == weight_sums(whole.named_parameters(), precision)
    for path in (checkpoint / ZERO3_TAG).glob("*_optim_states.pt"):
        if "rank_1_" in path.name:
            path.unlink()
    with pytest.raises(CheckpointError, match="is not the whole checkpoint of 2 workers"):
        consolidate(checkpoint, MeteorForConditionalGeneration, tmp_path / "init")


@pytest.mark.parametrize("towers", [(), READERS], ids=["tiny", "readers"])
def test_recomputed_activations_train_the_same_weights_in_every_part(
    workers: Workers, tmp_path: Path, towers: tuple[str, ...]
) -> None:
    """Towers train too, one rank has no image, and every block is recomputed in the backward pass."""
    rates = LearningRates(projector=1e-2, towers=1e-3, llm=1e-3)
    losses, checkpoint = run(workers, tmp_path, "fp32", rates, recompute=True, towers=towers)
    expected, model = plain(tmp_path / "init", rates)
    assert losses == pytest.approx(expected, rel=1e-5)
    whole = consolidate(checkpoint, MeteorForConditionalGeneration, tmp_path / "init")
    weights, start = dict(whole.named_parameters()), load_file(tmp_path / "init" / "model.safetensors")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(weights[name], parameter, rtol=1e-3, atol=2e-5, msg=name)
    moved = {
        name.split(".")[1]
        for name in start
        if name.startswith("encoders.") and name in weights and not torch.equal(weights[name], start[name])
    }
    assert moved == set(model.encoders), "every tower trains"


def test_real_model_in_bf16_keeps_fp32_masters(workers: Workers, tmp_path: Path) -> None:
    losses, checkpoint = run(workers, tmp_path, "bf16")
    expected, _ = plain(tmp_path / "init")
    assert losses == pytest.approx(expected, rel=2e-2)
    whole = consolidate(checkpoint, MeteorForConditionalGeneration, tmp_path / "init")
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.float32}
    trained = whole.get_parameter("lm_head.weight")
    assert not torch.equal(trained, trained.bfloat16().float()), "the fp32 master weights are lost"
    loss = whole(**make_batch(0)).loss
    assert loss.isfinite()
    batch, precision = read_parity(tmp_path / PARITY_FILE)
    assert (precision, list(batch.sums)) == ("bf16", ["bf16"])
    assert batch.sums["bf16"] == weight_sums(whole.named_parameters(), "bf16"), "masters rounded are what was trained"


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_adapters_learn_as_in_one_process_and_answer_the_same_once_merged(
    workers: Workers, tmp_path: Path, precision: Precision, tolerance: float
) -> None:
    """With every block recomputed, beside frozen towers and a frozen language model."""
    losses, checkpoint = run(workers, tmp_path, precision, recompute=True, lora=LORA)
    expected, _ = plain(tmp_path / "init", lora=LORA)
    assert losses == pytest.approx(expected, rel=tolerance)
    merged = consolidate(checkpoint, MeteorForConditionalGeneration, tmp_path / "init")
    before = MeteorForConditionalGeneration.from_pretrained(tmp_path / "init").eval()
    moved = {name for name, one in merged.state_dict().items() if not torch.equal(one, before.state_dict()[name])}
    layers = len(before.language_model.layers)
    assert sum(name.startswith("language_model.") for name in moved) == 2 * layers
    assert all(name.startswith("projectors.") or name.endswith(("q_proj.weight", "down_proj.weight")) for name in moved)
    adapted = MeteorForConditionalGeneration.from_pretrained(tmp_path / "init").eval()
    add_adapters(adapted, LORA, seed=1)
    adapted.load_state_dict(dict(WholeWeights(ZeroFiles(checkpoint), tmp_path / "init")))
    batch = make_batch(0)
    labels = batch.pop("labels")
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, adapted(**batch).logits, rtol=0, atol=1e-5)
        assert merged(**batch, labels=labels).loss < before(**batch, labels=labels).loss
        answers = [one.generate(**batch, max_new_tokens=8, do_sample=False) for one in (merged, adapted)]
    assert torch.equal(*answers)
    parity, _ = read_parity(tmp_path / PARITY_FILE)
    adapted_layers = {name for name in moved if name.startswith("language_model.")}
    assert set(parity.merged) == adapted_layers
    names = {name for name, _ in merged.named_parameters()}
    assert all(set(sums) == names - adapted_layers for sums in parity.sums.values())
    own = [(name, weight) for name, weight in merged.named_parameters() if name not in parity.merged]
    assert parity.sums[precision] == weight_sums(own, precision)
