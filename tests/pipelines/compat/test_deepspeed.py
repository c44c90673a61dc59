"""DeepSpeed's private parts are there and behave as `pipelines.compat.deepspeed` uses them, on one worker."""

import importlib
import multiprocessing
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipelines.checkpoint.zero3 import deepspeed_config
from pipelines.compat.deepspeed import (
    engine_layout,
    ignore_deprecated_collectives,
    import_deepspeed,
    load_into_engine,
    whole_shape,
)
from pipelines.config.settings import TrainingSettings


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.frozen = nn.Linear(5, 2)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.frozen(self.first(inputs) * self.scale).square().mean()


def make_engine(deepspeed: Any) -> Any:
    config = deepspeed_config(TrainingSettings(workers=1, micro_batch=1, global_batch=1))
    with deepspeed.zero.Init(config_dict_or_path=config, tensor_overrides=[]):
        model = Model()
    model.frozen.requires_grad_(False)
    groups = [{"params": [model.first.weight], "lr": 0.1}, {"params": [model.first.bias], "lr": 0.2}]
    optimizer = torch.optim.AdamW(groups)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def gathered(deepspeed: Any, engine: Any) -> dict[str, torch.Tensor]:
    whole = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            whole[name] = parameter.detach().clone()
    return {**whole, "scale": engine.module.scale.clone()}


def work(folder: Path) -> None:
    """One worker, in a process of its own."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
    deepspeed = import_deepspeed(uses_gpu=False)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    no_operator_is_built(deepspeed)
    no_range_is_opened(deepspeed)
    collectives_are_deprecated(deepspeed)
    first = make_engine(deepspeed)
    layout_is_that_of_its_checkpoint(first, folder)
    loads_what_it_saved(deepspeed, first, folder)
    torch.distributed.destroy_process_group()


def no_operator_is_built(deepspeed: Any) -> None:
    assert vars(deepspeed.ops)["__compatible_ops__"] == {}, "asked for lazily, so it was not probed"
    assert importlib.import_module("deepspeed.comm.torch").build_shm_op() is None


def no_range_is_opened(deepspeed: Any) -> None:
    accelerator = deepspeed.accelerator.get_accelerator()
    opened: list[str] = []
    accelerator.range_push = opened.append
    deepspeed.utils.nvtx.instrument_w_nvtx(lambda: None)()
    assert opened == []
    deepspeed.utils.nvtx.enable_nvtx = True
    deepspeed.utils.nvtx.instrument_w_nvtx(lambda: None)()
    assert len(opened) == 1, "enable_nvtx is what decides"
    deepspeed.utils.nvtx.enable_nvtx = False


def collectives_are_deprecated(deepspeed: Any) -> None:
    whole, part = torch.zeros(2), torch.ones(2)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        deepspeed.comm.all_gather_into_tensor(whole, part)
        assert [warning.category for warning in told] == [FutureWarning], "no longer deprecated: remove the filter"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ignore_deprecated_collectives()
        deepspeed.comm.all_gather_into_tensor(whole, part)


def layout_is_that_of_its_checkpoint(engine: Any, folder: Path) -> None:
    layout = engine_layout(engine)
    assert whole_shape(engine.module.first.weight) == (5, 3)
    assert engine.module.first.weight.shape == (0,), "a partitioned parameter shows no shape of its own"
    assert list(layout.sub_groups) == [{"first.weight": (5, 3)}, {"first.bias": (5,)}]
    assert list(layout.group_of) == [0, 1]
    assert layout.frozen == {"frozen.weight": (2, 5), "frozen.bias": (2,)}
    engine.module.scale.fill_(0.75)
    engine.backward(engine(torch.ones(1, 3)))
    engine.step()
    engine.save_checkpoint(str(folder), tag="saved", save_latest=False)
    model = torch.load(folder / "saved" / "zero_pp_rank_0_mp_rank_00_model_states.pt", weights_only=False)
    assert [dict(shapes) for shapes in model["param_shapes"]] == [dict(shapes) for shapes in layout.sub_groups]
    assert dict(model["frozen_param_shapes"]) == dict(layout.frozen)


def loads_what_it_saved(deepspeed: Any, engine: Any, folder: Path) -> None:
    torch.manual_seed(1)
    other = make_engine(deepspeed)
    before, expected = gathered(deepspeed, other), gathered(deepspeed, engine)
    assert not any(torch.equal(before[name], expected[name]) for name in expected)
    model, optimizer = (
        torch.load(folder / "saved" / f"zero_pp_rank_0_mp_rank_00_{kind}_states.pt", weights_only=False)
        for kind in ("model", "optim")
    )
    buffers = {name: model["module"][name] for name in model["buffer_names"]}
    state = optimizer["optimizer_state_dict"]
    load_into_engine(other, 0, state, buffers, model["frozen_param_fragments"], model)
    found = gathered(deepspeed, other)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert other.global_steps == engine.global_steps == 1
    assert [group["lr"] for group in other.optimizer.param_groups] == [0.1, 0.2]


def test_deepspeed_is_as_it_is_used(tmp_path: Path) -> None:
    worker = multiprocessing.get_context("spawn").Process(target=work, args=(tmp_path,))
    worker.start()
    worker.join()
    assert worker.exitcode == 0, "the worker's traceback is above"
