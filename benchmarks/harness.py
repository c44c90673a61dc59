"""What the speed benchmarks share: models of one size with and without pruning, their workloads, the comparison.

Every ratio comes from runs that take turns (A, B, A, B, ...) in one process; the median of the turns counts. Needs
torch, transformers, timm and meteor_model only.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.clocks import SelectionClock, realised, take_turns
from meteor_model.configuration_meteor import DecodePruning, EncodePruning, FusePruning, MeteorConfig, PruningConfig
from meteor_model.encoders import EncoderConfig, encoder_class
from meteor_model.flops import count_flops, count_training, meta_model
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.pruners.named import with_pruner

DENSE = PruningConfig(EncodePruning(enabled=False), FusePruning(enabled=False), DecodePruning(enabled=False))
SPECIAL_IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE_TOKEN = 3


@dataclass(frozen=True)
class Setup:
    """Towers and LLM, EAGLE's way (joined on the channels, dense) and METEOR's.

    Attributes:
        encoders: the towers.
        text_config: the LLM.
        image_size: of the uint8 images that come in.
        concat_grid: side of EAGLE's common grid: its visual tokens are the square.
        shares: of the transformer towers' tokens that the first two boundaries leave.
        leave, fused, kept: tokens that leave the encoders, enter the LLM and stay above the stage-3 layer.
        text_tokens: of a prompt.
        new_tokens: that a whole generate makes.
    """

    encoders: tuple[EncoderConfig, ...]
    text_config: Mapping[str, Any]
    image_size: int
    concat_grid: int
    shares: tuple[float, float]
    leave: int
    fused: int
    kept: int
    layer: int = 2
    text_tokens: int = 40
    new_tokens: int = 32

    def config(self, fusion: str, pruning: PruningConfig) -> MeteorConfig:
        return MeteorConfig(
            encoders=self.encoders,
            text_config=dict(self.text_config),
            pruning=pruning,
            image_size=self.image_size,
            image_token_id=IMAGE_TOKEN,
            fusion=fusion,
            concat_grid=self.concat_grid,
            **SPECIAL_IDS,
        )

    @property
    def stage3(self) -> DecodePruning:
        """Random weights say nothing about K, so K is the same for every prompt: k_min, and a lambda near 0."""
        return DecodePruning(layer=self.layer, target_mean=float(self.kept), lam=1e-9, k_min=self.kept)

    def dense(self) -> MeteorConfig:
        """EAGLE."""
        return self.config("channel_concat", DENSE)

    def stage3_only(self) -> MeteorConfig:
        """EAGLE with METEOR's stage 3 alone: FastV's FLOPs."""
        off = PruningConfig(EncodePruning(enabled=False), FusePruning(enabled=False), self.stage3)
        return self.config("channel_concat", off)

    def pruned(self) -> MeteorConfig:
        """METEOR with all three stages."""
        tokens = self.config("post_projection", DENSE).encoder_tokens
        between = [tokens[e.name] for e in self.encoders if encoder_class(e.family).prunes_between_blocks]
        totals = (*(int(sum(between) * share) for share in self.shares), self.leave)
        return self.config(
            "post_projection", PruningConfig(EncodePruning(totals=totals), FusePruning(keep=self.fused), self.stage3)
        )

    def fastv(self) -> MeteorConfig:
        """EAGLE with FastV at METEOR's final number of visual tokens."""
        return with_pruner(self.dense(), "fastv", self.kept, layer=self.layer)


def build(
    config: MeteorConfig, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> MeteorForConditionalGeneration:
    """Random weights, made on the device in their final dtype; buffers keep the dtype that their module chose."""
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = MeteorForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)
    return model.eval()


def with_shared_llm(
    config: MeteorConfig, other: MeteorForConditionalGeneration, device: torch.device, dtype: torch.dtype
) -> MeteorForConditionalGeneration:
    """A model of `config` whose LLM, head and towers are the very modules of `other`; the projectors are its own."""
    with torch.device("meta"):
        model = MeteorForConditionalGeneration(config)
    model.encoders, model.language_model, model.lm_head = other.encoders, other.language_model, other.lm_head
    model.projectors = model.projectors.to_empty(device=device).to(dtype)
    for parameter in model.projectors.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


# ----------------------------------------------------------------------------------------------------------- workloads


@lru_cache
def random_pixels(batch: int, size: int, device: torch.device) -> Tensor:
    """(batch, 3, size, size) uint8 on the device; made once, so that no clock sees it."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator).to(device)


@lru_cache
def prompt_ids(batch: int, image_tokens: int, text_tokens: int, device: torch.device) -> Tensor:
    """(batch, image_tokens + text_tokens) on the device; made once."""
    row = torch.cat([torch.full((image_tokens,), IMAGE_TOKEN), torch.arange(text_tokens) + IMAGE_TOKEN + 1])
    return row.expand(batch, -1).contiguous().to(device)


@dataclass(frozen=True)
class Work:
    """One model and one batch of one-image prompts."""

    model: MeteorForConditionalGeneration
    setup: Setup
    batch: int
    device: torch.device

    def pixels(self) -> Tensor:
        return random_pixels(self.batch, self.setup.image_size, self.device)

    def prompt(self) -> dict[str, Tensor]:
        """Image first, then text; no padding."""
        ids = prompt_ids(self.batch, self.model.config.tokens_per_image, self.setup.text_tokens, self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": self.pixels()}

    @torch.no_grad()
    def encode(self) -> None:
        """Towers, projectors, fusion."""
        self.model.encode_images(self.pixels())

    def first_token(self) -> None:
        """The whole model up to the first token."""
        self.generate(1)

    def answer(self) -> None:
        """`new_tokens` tokens, greedily."""
        self.generate(self.setup.new_tokens)

    def train(self) -> None:
        """Forward and backward, all of it trainable, loss on the text; no optimizer (the same on both sides)."""
        prompt = self.prompt()
        labels = prompt["input_ids"].masked_fill(prompt["input_ids"] == IMAGE_TOKEN, -100)
        self.model.train()
        self.model(**prompt, labels=labels).loss.backward()
        self.model.zero_grad(set_to_none=True)
        self.model.eval()

    @torch.no_grad()
    def generate(self, new_tokens: int) -> None:
        self.model.generate(**self.prompt(), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)


#: Who takes part: FastV and stage 3 alone act in the LLM at inference only.
PARTS = {
    "encode": ("dense", "meteor"),
    "first_token": ("dense", "meteor", "stage3", "fastv"),
    "answer": ("dense", "meteor", "stage3", "fastv"),
    "train": ("dense", "meteor"),
}


def train_flops(config: MeteorConfig, text_tokens: int) -> int:
    """FLOPs of forward and backward of one image and `text_tokens`, everything trainable, without stage 3."""
    counted = count_training(meta_model(config).requires_grad_(True))
    return counted.of(1, [text_tokens + config.tokens_per_image], text_tokens).model


def count_work(setup: Setup) -> dict[str, dict[str, int]]:
    """FLOPs per image of every workload and the variants that take part, from meteor_model/flops/."""
    dense, meteor, text = setup.dense(), setup.pruned(), setup.text_tokens
    configs = {"dense": dense, "meteor": meteor, "stage3": setup.stage3_only(), "fastv": setup.fastv()}
    reports = {name: count_flops(config, text) for name, config in configs.items()}
    first = {name: report.total + report.lm_head for name, report in reports.items()}
    counted = {
        "encode": {name: report.encoding + report.projection + report.fusion for name, report in reports.items()},
        "first_token": first,
        "answer": {name: first[name] + (setup.new_tokens - 1) * report.step for name, report in reports.items()},
        "train": {"dense": train_flops(dense, text), "meteor": train_flops(meteor, text)},
    }
    return {workload: {name: counted[workload][name] for name in names} for workload, names in PARTS.items()}


# ------------------------------------------------------------------------------------------------------- the comparison


def works(setup: Setup, device: torch.device, dtype: torch.dtype) -> dict[str, Work]:
    """The four variants on one set of weights."""
    dense = build(setup.dense(), device, dtype)
    others = {"meteor": setup.pruned(), "stage3": setup.stage3_only(), "fastv": setup.fastv()}
    models = {name: with_shared_llm(config, dense, device, dtype) for name, config in others.items()}
    return {name: Work(model, setup, 1, device) for name, model in {"dense": dense, **models}.items()}


def calls(variants: Mapping[str, Work], workload: str) -> dict[str, Callable[[], None]]:
    """One workload of every variant."""
    return {name: getattr(work, workload) for name, work in variants.items()}


def measure_realised(
    variants: Mapping[str, Work],
    counted: Mapping[str, Mapping[str, int]],
    plan: Mapping[str, tuple[int, int]],
    rounds: int,
) -> dict[str, Any]:
    """Every workload of `plan` (batch size, rounds of warm-up), its variants in turns: see `clocks.realised`."""
    device = variants["dense"].device
    out: dict[str, Any] = {}
    for workload, (batch, warm_up) in plan.items():
        chosen = {name: replace(variants[name], batch=batch) for name in PARTS[workload]}
        flops = counted[workload]
        spent = take_turns(calls(chosen, workload), rounds, device, warm_up)
        rate = flops["dense"] * batch / statistics.median(spent["dense"])
        out[workload] = {
            "batch": batch,
            "dense_gflops_per_second": round(rate / 1e9, 1),
            **{name: realised(spent, flops, "dense", name) for name in chosen if name != "dense"},
        }
        print(f"{workload}: {json.dumps(out[workload])}", flush=True)
    return out


def measure_overhead(variants: Mapping[str, Work], rounds: int, warm_up: int) -> dict[str, Any]:
    """Selection within METEOR's run to the first token, over the dense model's time for it."""
    dense, meteor = variants["dense"], variants["meteor"]
    clocks: list[SelectionClock] = []

    def clocked() -> None:
        clocks.append(SelectionClock(meteor.device))
        clocks[-1].measure(meteor.first_token)

    spent = take_turns({"dense": dense.first_token, "meteor": clocked}, rounds, dense.device, warm_up)
    kept, base = clocks[-rounds:], statistics.median(spent["dense"])
    total = statistics.median(sum(clock.seconds.values()) for clock in kept)
    stages = {stage: statistics.median(clock.seconds[stage] for clock in kept) for stage in kept[0].seconds}
    return {
        "tokens": {**meteor.model.config.encoder_tokens, "llm": dense.setup.concat_grid**2},
        "dense_seconds": round(base, 4),
        "selection_seconds": round(total, 5),
        "selection_seconds_by_stage": {stage: round(value, 5) for stage, value in stages.items()},
        "overhead": round(total / base, 5),
        "rounds": rounds,
    }


def describe(setup: Setup) -> dict[str, Any]:
    """Sizes for the results file."""
    pruned = setup.pruned()
    return {
        "encoder_tokens": pruned.encoder_tokens,
        "encoder_budgets": {name: list(budget) for name, budget in pruned.encode_budgets.items()},
        "visual_tokens": {"dense": setup.concat_grid**2, "fused": setup.fused, "kept": setup.kept},
        "stage_3_after_layer": setup.layer,
        "text_tokens": setup.text_tokens,
        "new_tokens": setup.new_tokens,
        "llm": {key: value for key, value in setup.text_config.items() if key != "model_type"},
    }
