"""DeepSpeed ZeRO-3 around one Hugging Face model: configuration, sharded loading, learning rates.

Everything here runs inside a worker whose process group exists already; `deepspeed` is imported in the functions, after
the accelerator has been chosen.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from pipelines.checkpoint.lora import is_adapter
from pipelines.checkpoint.start_weights import StartWeights, WeightsError
from pipelines.checkpoint.state import WEIGHT_FILE_BYTES
from pipelines.compat.deepspeed import import_deepspeed, whole_shape
from pipelines.config.settings import PARTS, OptimizerSettings, Part, ScheduleSettings, SettingsError, TrainingSettings

PART_OF_MODULE: dict[str, Part] = {
    "projectors": "projector",
    "encoders": "towers",
    "language_model": "llm",
    "lm_head": "llm",
}
"""The part of each of the model's top-level modules."""


def deepspeed_config(settings: TrainingSettings) -> dict[str, Any]:
    """The DeepSpeed configuration of `settings`: stage 3, our own AdamW and our own schedule."""
    zero3 = settings.zero3
    stage3: dict[str, Any] = {
        "stage": 3,
        "stage3_param_persistence_threshold": zero3.persistence_threshold,
        "stage3_model_persistence_threshold": zero3.model_persistence_threshold,
        "stage3_prefetch_bucket_size": zero3.prefetch_bucket,
        "stage3_max_live_parameters": zero3.max_live_parameters,
        "reduce_bucket_size": zero3.reduce_bucket,
        "zero_hpz_partition_size": zero3.secondary_partition,
        "memory_efficient_linear": False,
        "overlap_comm": settings.uses_gpu,
    }
    if zero3.offload != "none":
        stage3["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if zero3.offload == "all":
        stage3["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_batch_size": settings.global_batch,
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": settings.accumulation,
        "gradient_clipping": settings.optimizer.clip_norm,
        "zero_optimization": stage3,
        "zero_allow_untested_optimizer": True,
        # Offload would ask for DeepSpeed's own CPU Adam, which it compiles on every node at the start.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": settings.precision == "bf16"},
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


def weight_dtype(settings: TrainingSettings) -> torch.dtype:
    """The dtype of the training weights."""
    return torch.bfloat16 if settings.precision == "bf16" else torch.float32


def save_for_sharding(model: PreTrainedModel, directory: Path) -> None:
    """Write the folder that `load_sharded` reads: config, and weights under the names of the model's own modules.

    By default transformers writes some towers (DINOv2, ViT) under the names of their published checkpoints.
    """
    model.save_pretrained(directory, save_original_format=False, max_shard_size=WEIGHT_FILE_BYTES)


def load_sharded(
    model_class: type[PreTrainedModel], directory: Path, config: Mapping[str, Any], dtype: torch.dtype, uses_gpu: bool
) -> PreTrainedModel:
    """Build the model of `directory` with its parameters partitioned over the workers, and load its weights.

    No worker ever holds more than one whole parameter beside its own share. Every worker must call this.

    Raises:
        WeightsError: if a parameter is missing in the files or has another shape there, or if what a worker gathers
            after loading is not what the files hold.
    """
    deepspeed = import_deepspeed(uses_gpu)
    model_config = model_class.config_class.from_pretrained(directory)
    if (text_config := getattr(model_config, "text_config", None)) is not None:
        text_config.dtype = dtype  # transformers builds it in the one of its config, which an exported model has
    # Without tensor overrides the buffers (positions, normalisation) keep the dtype that the model gives them.
    with (
        no_init_weights(),
        default_dtype(dtype),
        deepspeed.zero.Init(config_dict_or_path=dict(config), tensor_overrides=[]),
    ):
        model = model_class(model_config)
    model.tie_weights()  # part of the initialisation that is left out above
    files = StartWeights(directory)
    names = _names_in_files(model, files)
    for parameter, name in names.items():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if torch.distributed.get_rank() == 0:
                parameter.copy_(files.read(name))
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in files:
                buffer.copy_(files.read(name))
    _verify_weights(deepspeed, names, files)
    return model


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Tensors that are made in the block without a floating-point format get this one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _names_in_files(model: nn.Module, files: StartWeights) -> dict[nn.Parameter, str]:
    """For every parameter the name under which the files hold it (a tied parameter has several names)."""
    aliases: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(parameter, []).append(name)
    names: dict[nn.Parameter, str] = {}
    for parameter, candidates in aliases.items():
        stored = [candidate for candidate in candidates if candidate in files]
        if not stored:
            raise WeightsError(f"{files.directory} holds no weights for {' = '.join(candidates)}")
        found, wanted = files.shape(stored[0]), tuple(whole_shape(parameter))
        if found != wanted:
            raise WeightsError(
                f"{files.directory} holds {stored[0]} with shape {found}, but the model's config asks for {wanted}"
            )
        names[parameter] = stored[0]
    return names


def _verify_weights(deepspeed: ModuleType, names: Mapping[nn.Parameter, str], files: StartWeights) -> None:
    """Compare what this worker gathers with the files, parameter by parameter."""
    wrong: list[str] = []
    for parameter, name in names.items():
        with deepspeed.zero.GatheredParameters([parameter]), torch.no_grad():
            if not torch.equal(parameter.detach().cpu(), files.read(name).to(parameter.dtype)):
                wrong.append(name)
    if wrong:
        raise WeightsError(
            f"worker {torch.distributed.get_rank()} gathered other values than {files.directory} holds for "
            f"{len(wrong)} of {len(names)} parameters, first {wrong[0]}"
        )


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute the activations inside every block of towers and LLM in the backward pass."""
    # Non-reentrant: it needs no gradient at the inputs, so frozen parts stay frozen.
    arguments = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the name from transformers 5.2x on
        model.activation_checkpointing_enable(arguments)
    else:
        model.gradient_checkpointing_enable(arguments)


def part_of(name: str) -> Part:
    """The part of the model that parameter `name` belongs to.

    Raises:
        SettingsError: if the name starts with none of `PART_OF_MODULE`.
    """
    module = name.split(".", 1)[0]
    if module not in PART_OF_MODULE:
        raise SettingsError(f"parameter {name} is in none of the parts that have a learning rate: {PART_OF_MODULE}")
    return PART_OF_MODULE[module]


def parameter_groups(model: nn.Module, settings: OptimizerSettings, adapted: bool = False) -> list[dict[str, Any]]:
    """AdamW's parameter groups, one per trained part; parameters that are in none stop requiring gradients.

    Each group carries its `part` and its `peak_lr`.

    Args:
        model: the model.
        settings: of the optimizer.
        adapted: whether the language model's adapters learn in place of its own parameters.

    Raises:
        SettingsError: if a part is to be trained that the model does not have.
    """
    members: dict[Part, list[nn.Parameter]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        trains = settings.learning_rates.of(part) is not None and (part != "llm" or is_adapter(name) == adapted)
        parameter.requires_grad_(trains)
        if trains:
            members[part].append(parameter)
    groups: list[dict[str, Any]] = []
    for part in PARTS:
        rate = settings.learning_rates.of(part)
        if rate is None:
            continue
        if not members[part]:
            raise SettingsError(f"learning_rates.{part} is {rate}, but the model has no parameters of that part")
        groups.append({"params": members[part], "lr": rate, "peak_lr": rate, "part": part})
    return groups


def adamw(groups: list[dict[str, Any]], settings: TrainingSettings) -> torch.optim.AdamW:
    """The optimizer of `parameter_groups`; one that is offloaded steps on the CPU, in one pass over memory."""
    optimizer = settings.optimizer
    return torch.optim.AdamW(
        groups,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
        fused=True if settings.zero3.offload != "none" else None,
    )


def schedule_factor(step: int, total_steps: int, settings: ScheduleSettings) -> float:
    """Share of the peak learning rate that optimizer step `step` (from 0) of `total_steps` uses.

    Linear warm-up over ceil(warmup_share * total_steps) steps, whose last step has the peak, then half a cosine that
    would reach `final_share` at step `total_steps`.
    """
    warmup = math.ceil(settings.warmup_share * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return settings.final_share + (1 - settings.final_share) * 0.5 * (1 + math.cos(math.pi * progress))
