"""ZeRO-3 trainings at several world sizes, each group of workers forked from this one process, which imports once.

    python -m tests.pipelines.checkpoint.reshard_worker FOLDER

writes what `test_universal` compares: FOLDER/{precision}/{training}/{stage}-{rank}.pt.
"""

import gc
import importlib
import multiprocessing
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipelines.checkpoint.lora import add_adapters
from pipelines.checkpoint.reshard import load_resharded
from pipelines.checkpoint.shards import save_shards
from pipelines.checkpoint.start_weights import StartWeights
from pipelines.checkpoint.state import ZERO3_TAG
from pipelines.checkpoint.zero3 import adamw, deepspeed_config, parameter_groups, schedule_factor
from pipelines.compat.deepspeed import import_deepspeed
from pipelines.config.settings import LearningRates, LoraSettings, OptimizerSettings, TrainingSettings

VOCABULARY, WIDTH, LENGTH = 13, 7, 5
MICRO, MICRO_BATCHES = 2, 6
BORDER, STEPS = 3, 6
STORED = ("encoders.", "language_model.")
LORA = LoraSettings(rank=2, alpha=6, targets=("0", "2"))
SETTINGS = TrainingSettings(
    workers=2,
    micro_batch=MICRO,
    global_batch=MICRO * MICRO_BATCHES,
    optimizer=OptimizerSettings(learning_rates=LearningRates(projector=2e-2, towers=None, llm=5e-3)),
)


class Model(nn.Module):
    """Odd sizes, a parameter of one element, a frozen part, a tied head, a persistent and another buffer."""

    scale: Tensor
    positions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({"a": nn.Linear(3, WIDTH), "one": nn.Linear(1, 1)})
        embed = nn.Embedding(VOCABULARY, WIDTH)
        self.projectors = nn.ModuleDict({"a": nn.Linear(WIDTH, WIDTH), "gate": nn.Linear(1, 1)})
        self.language_model = nn.ModuleDict(
            {
                "embed": embed,
                "layers": nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)]),
                "norm": nn.LayerNorm(WIDTH),
            }
        )
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = embed.weight
        self.register_buffer("scale", torch.tensor([0.5]))
        self.register_buffer("positions", torch.arange(LENGTH) / LENGTH, persistent=False)

    def forward(self, ids_BT: Tensor, pixels_BTC: Tensor) -> Tensor:
        dtype = self.lm_head.weight.dtype
        gate_11 = self.projectors["gate"](self.encoders["one"](torch.ones(1, 1, dtype=dtype)))
        seen_BTC = self.projectors["a"](torch.tanh(self.encoders["a"](pixels_BTC.to(dtype)))) * gate_11
        hidden_BTC = self.language_model["embed"](ids_BT) + self.scale.to(dtype) * seen_BTC
        hidden_BTC = hidden_BTC + self.positions.to(dtype)[:, None]
        layers: Any = self.language_model["layers"]
        for layer in layers:
            hidden_BTC = hidden_BTC + torch.tanh(layer(hidden_BTC))
        logits_BTV = self.lm_head(self.language_model["norm"](hidden_BTC)).float()
        loss: Tensor = nn.functional.cross_entropy(
            logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum"
        )
        return loss


@dataclass(frozen=True)
class Training:
    """One training: where it starts, at which world size, and what it leaves."""

    name: str
    world: int
    start: str | None = None
    """The training whose checkpoint it starts from; None starts anew."""
    like: str = ""
    """The training that it begins like, from the same weights and settings; without, it begins like no other."""
    native: bool = False
    """Load with DeepSpeed's own `load_checkpoint`."""
    save_at: int | None = None
    """Step after which it saves."""
    sub_group_size: int | None = 60
    """Elements of a worker's sub-group, so small that other worlds have other sub-groups; None has one per group."""
    lora: bool = False
    """With adapters of rank 2 on two layers of the language model."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What rests in host memory; on CPUs everything does, but by the code that GPUs take."""
    secondary: int = 1
    """Workers that hold all weights once more among them."""
    keeps_frozen: bool = False
    """Save as earlier versions did: with the frozen parameters."""
    persistent: int = 0
    """Parameters of at most this many elements stay gathered on every worker."""


def trainings(precision: str) -> list[Training]:
    """In the order in which they must run."""
    chain = [
        Training("whole", 2, save_at=BORDER, keeps_frozen=precision == "fp32"),
        Training("three", 3, "whole", save_at=BORDER + 1, persistent=WIDTH),
        Training("one_after_three", 1, "three"),
    ]
    if precision == "bf16":
        return [*chain, Training("two", 2, "whole")]
    return [
        *chain,
        Training("native", 2, "whole", native=True),
        Training("two", 2, "whole"),
        Training("one", 1, "whole"),
        Training("four", 4, "whole", sub_group_size=None),
        Training("adapted", 2, save_at=BORDER, lora=True),
        Training("adapted_two", 2, "adapted", lora=True),
        Training("adapted_three", 3, "adapted", save_at=BORDER + 1, lora=True),
        Training("adapted_one", 1, "adapted_three", lora=True),
        Training("hierarchical", 4, save_at=BORDER, like="whole", secondary=2),
        Training("hierarchical_two", 2, "whole", secondary=2),
        Training("optimizer_offloaded", 2, "whole", offload="optimizer"),
        Training("all_offloaded", 2, "whole", offload="all", save_at=BORDER + 1),
        Training("two_after_offloaded", 2, "all_offloaded"),
        Training("begun_offloaded", 2, save_at=BORDER, like="whole", offload="all"),
    ]


def keeps_frozen(start: str, precision: str) -> bool:
    """Whether the checkpoint of training `start` holds what is frozen."""
    return next(one.keeps_frozen for one in trainings(precision) if one.name == start)


def micro_batch(step: int, index: int) -> tuple[Tensor, Tensor]:
    """Micro-batch `index` of optimizer step `step`: token ids (B, T) and pixels (B, T, 3)."""
    random = torch.Generator().manual_seed(1000 * step + index)
    return torch.randint(0, VOCABULARY, (MICRO, LENGTH), generator=random), torch.rand(
        MICRO, LENGTH, 3, generator=random
    )


def write_start(folder: Path) -> Path:
    """The weights that some training freezes."""
    torch.manual_seed(0)
    weights = {name: tensor for name, tensor in Model().state_dict().items() if name.startswith(STORED)}
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    return folder


def _frozen(model: Model, training: Training) -> list[tuple[str, nn.Parameter]]:
    llm = "language_model." if training.lora else "encoders."
    return [(name, one) for name, one in model.named_parameters() if name.startswith(("encoders.", llm))]


def make_engine(training: Training, precision: Any, start: StartWeights) -> Any:
    """An engine whose weights are others than those of every other training.

    So are its frozen ones, if it starts from a checkpoint that holds them.
    """
    deepspeed = import_deepspeed(uses_gpu=False)
    zero3 = replace(
        SETTINGS.zero3,
        offload=training.offload,
        persistence_threshold=training.persistent,
        secondary_partition=training.secondary,
    )
    settings = replace(SETTINGS.at_world(training.world), precision=precision, zero3=zero3)
    config = deepspeed_config(settings)
    if training.sub_group_size is not None:
        config["zero_optimization"]["sub_group_size"] = training.sub_group_size
    torch.manual_seed(sum((training.like or training.name).encode()))
    with deepspeed.zero.Init(config_dict_or_path=config, tensor_overrides=[]):
        model = Model().to(torch.bfloat16 if precision == "bf16" else torch.float32)
    if training.start is None or not keeps_frozen(training.start, precision):
        for name, parameter in _frozen(model, training):
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
                if torch.distributed.get_rank() == 0:
                    parameter.copy_(start.read(name))
    if training.lora:
        add_adapters(model, LORA, seed=len(training.name))
    groups = parameter_groups(model, settings.optimizer, training.lora)
    fresh = training.start is None
    for index, group in enumerate(groups):  # a start from a checkpoint must not depend on what these are
        group["weight_decay"] = 0.1 * (index + 1) if fresh else 0.0
        group["betas"] = (0.9 - 0.1 * index, 0.95) if fresh else (0.5, 0.5)
        group["peak_lr"] *= 1 if fresh else 9
    # A large epsilon: AdamW's first steps are otherwise +-lr even where the gradient is rounding noise.
    adam = replace(settings, optimizer=replace(settings.optimizer, epsilon=1e-3, beta2=0.999, weight_decay=0.01))
    optimizer = adamw(groups, adam)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def optimizer_step(engine: Any, step: int, rank: int, world: int) -> float:
    """One step on the global batch, micro-batch j on worker j % world; returns its mean loss."""
    forwards = -(-MICRO_BATCHES // world)
    divisor = MICRO * MICRO_BATCHES * (LENGTH - 1) / (world * forwards)
    for group in engine.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * schedule_factor(step, STEPS + 2, SETTINGS.schedule)
    total = torch.zeros((), dtype=torch.float64)
    for forward in range(forwards):
        index = forward * world + rank
        loss = engine(*micro_batch(step, index)) * (index < MICRO_BATCHES)  # beyond the step: an empty micro-batch
        engine.backward(loss / divisor)
        total += loss.detach().double()
        engine.step()
    torch.distributed.all_reduce(total)
    return total.item() / (MICRO * MICRO_BATCHES * (LENGTH - 1))


def snapshot(engine: Any) -> dict[str, Any]:
    """Everything that a resume must restore, gathered whole; every worker must call it."""
    deepspeed = import_deepspeed(uses_gpu=False)
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    tensors: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            tensors[f"weight {name}"] = parameter.detach().clone()
        if parameter.requires_grad:
            tensors[f"fp32 {name}"] = safe_get_full_fp32_param(parameter).clone()
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{key} {name}"] = safe_get_full_optimizer_state(parameter, key).clone()
    tensors |= {f"buffer {name}": buffer.clone() for name, buffer in engine.module.named_buffers()}
    states = list(engine.optimizer.optimizer.state.values())
    return {
        "tensors": tensors,
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups],
        "adam_steps": [float(state["step"]) for state in states],
        "own_step_counters": len({state["step"].data_ptr() for state in states}) == len(states),
        "sub_groups": len(engine.optimizer.fp16_groups),
        "counters": [
            engine.global_steps,
            engine.skipped_steps,
            engine.micro_steps % engine.gradient_accumulation_steps(),
        ],
        "tied": engine.module.lm_head.weight is engine.module.language_model["embed"].weight,
    }


def work(training: Training, precision: str, folder: Path, rank: int) -> None:
    """One worker of one training."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(training.world), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    store = f"file://{folder}/group-{training.name}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=training.world)
    import_deepspeed(uses_gpu=False).init_distributed(dist_backend="gloo", verbose=False)
    start = StartWeights(folder.parent / "init")
    engine = make_engine(training, precision, start)
    own = folder / training.name
    own.mkdir(exist_ok=True)
    first = 0
    if training.start is not None:
        source = folder / training.start
        if training.native:
            engine.load_checkpoint(str(source), tag=ZERO3_TAG, load_lr_scheduler_states=False)
        else:
            load_resharded(engine, source, start.digest)
        first = engine.global_steps
        torch.save(snapshot(engine), own / f"loaded-{rank}.pt")
    losses = []
    for step in range(first, STEPS):
        losses.append(optimizer_step(engine, step, rank, training.world))
        if step + 1 == training.save_at:
            with torch.no_grad():
                engine.module.scale.fill_(0.75)
            torch.save(snapshot(engine), own / f"saved-{rank}.pt")
            if training.keeps_frozen:
                engine.save_checkpoint(str(own), tag=ZERO3_TAG, save_latest=False)
            else:
                save_shards(engine, own, start.digest, LORA.scale if training.lora else None)
    torch.save({**snapshot(engine), "losses": losses}, own / f"end-{rank}.pt")
    torch.distributed.destroy_process_group()


def run(training: Training, precision: str, folder: Path) -> None:
    """All workers of one training."""
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=work, args=(training, precision, folder, rank)) for rank in range(training.world)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        sys.exit(f"{precision} {training.name}: exit codes {[worker.exitcode for worker in workers]}")


def main(folder: Path) -> None:
    """Every training in every precision."""
    import_deepspeed(uses_gpu=False)
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # 2 s that every engine would spend again
    gc.freeze()
    torch.set_num_threads(1)
    write_start(folder / "init")
    for precision in ("fp32", "bf16"):
        (folder / precision).mkdir()
        for training in trainings(precision):
            run(training, precision, folder / precision)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
