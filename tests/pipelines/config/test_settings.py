"""Settings refuse contradictions by name and number; the schedule and the parameter groups follow them."""

import math

import pytest
import torch
import tyro
from torch import nn

from pipelines.checkpoint.zero3 import deepspeed_config, parameter_groups, schedule_factor
from pipelines.config.settings import (
    DataSettings,
    LearningRates,
    LoraSettings,
    OptimizerSettings,
    ScheduleSettings,
    SettingsError,
    TrainingSettings,
    Zero3Settings,
)

NO_LLM = OptimizerSettings(learning_rates=LearningRates(llm=None))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"workers": 5}, ["workers is 5", "global_batch 32", "only 4 micro-batches of 8"]),
        ({"micro_batch": 5}, ["micro_batch is 5", "global_batch 32", "[1, 2, 4, 8, 16, 32]"]),
        ({"min_workers": 3}, ["min_workers is 3", "workers = 2"]),
        ({"max_failures": -1}, ["max_failures is -1"]),
        ({"upload_patience_s": 0}, ["upload_patience_s is 0"]),
        ({"workers": 0}, ["workers is 0"]),
        ({"max_drop_share": 1.5}, ["max_drop_share is 1.5"]),
        ({"lora": LoraSettings(rank=4), "optimizer": NO_LLM}, ["lora.rank is 4", "learning_rates.llm is None"]),
        ({"zero3": Zero3Settings(secondary_partition=4)}, ["secondary_partition is 4", "workers 2"]),
        ({"gpus_per_worker": 0.5}, ["gpus_per_worker is 0.5", "a whole GPU", "Give 1"]),
        ({"gpus_per_worker": 2.0}, ["gpus_per_worker is 2", "a whole GPU", "more training.workers"]),
        ({"gpus_per_worker": 1.5}, ["gpus_per_worker is 1.5"]),
        ({"gpus_per_worker": -1}, ["gpus_per_worker is -1"]),
    ],
)
def test_contradictions_are_refused(values: dict[str, object], named: list[str]) -> None:
    with pytest.raises(SettingsError) as error:
        TrainingSettings(**values)  # type: ignore[arg-type]
    for part in named:
        assert part in str(error.value)


def test_single_settings_are_checked() -> None:
    with pytest.raises(SettingsError, match=r"learning_rates.llm is -1"):
        LearningRates(llm=-1.0)
    with pytest.raises(SettingsError, match="nothing trains"):
        LearningRates(None, None, None)
    with pytest.raises(SettingsError, match=r"warmup_share is 1\.0"):
        ScheduleSettings(warmup_share=1.0)
    with pytest.raises(SettingsError, match=r"lora\.targets has 'a\.b'.*such as q_proj"):
        LoraSettings(targets=("a.b",))
    with pytest.raises(SettingsError, match=r"lora\.targets is empty"):
        LoraSettings(targets=())
    with pytest.raises(SettingsError, match=r"both 'train'"):
        DataSettings(heldout_split="train")


def test_command_line_is_made_from_the_settings() -> None:
    arguments = ["--workers", "4", "--optimizer.learning-rates.towers", "None", "--zero3.offload", "none"]
    settings = tyro.cli(TrainingSettings, args=arguments)
    assert settings.workers == 4
    assert settings.accumulation == 1
    assert settings.optimizer.learning_rates.towers is None


def test_deepspeed_config_keeps_the_global_batch() -> None:
    config = deepspeed_config(TrainingSettings(workers=2, micro_batch=4, global_batch=32))
    assert config["gradient_accumulation_steps"] == 4
    assert config["train_batch_size"] == 2 * 4 * 4


@pytest.mark.parametrize(("world", "forwards"), [(1, 8), (2, 4), (3, 3), (5, 2), (8, 1)])
def test_any_number_of_workers_shares_a_step(world: int, forwards: int) -> None:
    settings = TrainingSettings(workers=world, micro_batch=4, global_batch=32)
    assert settings.accumulation == forwards
    config = deepspeed_config(settings.at_world(world))
    assert config["gradient_accumulation_steps"] == forwards
    assert config["train_batch_size"] == 4 * forwards * world
    assert (settings.spare_rows == 0) == (8 % world == 0)


def test_a_second_partition_fits_any_number_of_workers() -> None:
    settings = TrainingSettings(workers=4, micro_batch=4, global_batch=32, zero3=Zero3Settings(secondary_partition=4))
    sizes = {world: settings.at_world(world).zero3.secondary_partition for world in range(1, 9)}
    assert sizes == {1: 1, 2: 2, 3: 1, 4: 4, 5: 1, 6: 2, 7: 1, 8: 4}
    assert deepspeed_config(settings)["zero_optimization"]["zero_hpz_partition_size"] == 4


def test_an_elastic_training_has_spare_rows() -> None:
    assert TrainingSettings(workers=2, min_workers=1).spare_rows == 2 * 8
    assert TrainingSettings(workers=2, min_workers=2).spare_rows == 0


def test_schedule_warms_up_then_follows_a_cosine() -> None:
    settings = ScheduleSettings(warmup_share=0.1, final_share=0.2)
    factors = [schedule_factor(step, 100, settings) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    expected = [0.2 + 0.8 * (1 + math.cos(math.pi * (step - 10) / 90)) / 2 for step in range(10, 100)]
    assert factors[10:] == pytest.approx(expected)
    assert schedule_factor(0, 1, ScheduleSettings(warmup_share=0.0)) == 1.0


class _Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.Linear(2, 2)
        self.projectors = nn.Linear(2, 2)
        self.language_model = nn.Linear(2, 2)
        self.lm_head = nn.Linear(2, 2, bias=False)


def test_frozen_parts_are_left_out() -> None:
    model = _Parts()
    groups = parameter_groups(model, OptimizerSettings(learning_rates=LearningRates(1e-3, None, 2e-5)))
    assert [(group["part"], group["peak_lr"], len(group["params"])) for group in groups] == [
        ("projector", 1e-3, 2),
        ("llm", 2e-5, 3),
    ]
    assert not model.encoders.weight.requires_grad
    assert model.lm_head.weight.requires_grad


def test_a_parameter_of_no_part_is_refused() -> None:
    model = _Parts()
    model.adapter = nn.Parameter(torch.zeros(1))
    with pytest.raises(SettingsError, match="parameter adapter"):
        parameter_groups(model, OptimizerSettings())


def test_a_part_without_parameters_is_refused() -> None:
    model = _Parts()
    del model.projectors
    with pytest.raises(SettingsError, match=r"learning_rates.projector is 0.001"):
        parameter_groups(model, OptimizerSettings())
