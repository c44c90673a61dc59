"""What the speed benchmarks share: models of one size with and without pruning, workloads, clocks, hardware.

Every ratio comes from runs that take turns (A, B, A, B, ...) in one process; the median of the turns counts. Needs
torch, transformers, timm and meteor_model only.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from meteor_model.configuration_meteor import DecodePruning, EncodePruning, FusePruning, MeteorConfig, PruningConfig
from meteor_model.encoders import EncoderConfig, encoder_class
from meteor_model.flops import FlopReport, count_flops, count_training_flops
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.rivals import FastV, LayerPruner, prefill, step

DENSE = PruningConfig(EncodePruning(enabled=False), FusePruning(enabled=False), DecodePruning(enabled=False))
SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
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

    def fastv(self) -> FastV:
        """FastV at METEOR's final number of visual tokens."""
        return FastV(layer=self.layer, keep=self.kept)


def build(
    config: MeteorConfig, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> MeteorForConditionalGeneration:
    """Random weights, made on the device in their final dtype."""
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = MeteorForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)
    return model.to(device=device, dtype=dtype).eval()


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


@dataclass(frozen=True)
class Work:
    """One model and one batch of one-image prompts."""

    model: MeteorForConditionalGeneration
    setup: Setup
    batch: int
    device: torch.device
    rival: LayerPruner | None = None

    def pixels(self) -> Tensor:
        size = self.setup.image_size
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, 256, (self.batch, 3, size, size), dtype=torch.uint8, generator=generator).to(
            self.device
        )

    def prompt(self) -> dict[str, Tensor]:
        """Image first, then text; no padding."""
        text = torch.arange(self.setup.text_tokens) + IMAGE_TOKEN + 1
        row = torch.cat([torch.full((self.model.config.tokens_per_image,), IMAGE_TOKEN), text])
        input_ids = row.expand(self.batch, -1).contiguous().to(self.device)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": self.pixels()}

    @torch.no_grad()
    def encode(self) -> None:
        """Towers, projectors, fusion."""
        self.model.get_image_features(self.pixels())

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
        prompt = self.prompt()
        if self.rival is not None:
            self._generate_by_rival(prompt, self.rival, new_tokens)
            return
        self.model.generate(**prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)

    def _generate_by_rival(self, prompt: Mapping[str, Tensor], rival: LayerPruner, new_tokens: int) -> None:
        model = self.model
        embeds_BTC, visual_BT = model.embed_prompts(prompt["input_ids"], prompt["pixel_values"])
        hidden, state = prefill(model.language_model, embeds_BTC, visual_BT, rival)
        for _ in range(new_tokens - 1):
            token_B1 = model.lm_head(hidden[:, -1:]).argmax(dim=-1)
            hidden, state = step(model.language_model, model.get_input_embeddings()(token_B1), state)
        model.lm_head(hidden[:, -1:]).argmax(dim=-1)


@contextmanager
def attention(model: MeteorForConditionalGeneration, kernel: str) -> Iterator[None]:
    """The LLM's attention kernel, for as long as this lasts."""
    before = model.language_model.config._attn_implementation
    model.language_model.set_attn_implementation(kernel)
    try:
        yield
    finally:
        model.language_model.set_attn_implementation(before)


def workload_flops(report: FlopReport, config: MeteorConfig, setup: Setup, training: bool = True) -> dict[str, int]:
    """FLOPs per image of each workload, from flops.py."""
    first = report.total + report.lm_head
    flops = {
        "encode": report.encoding + report.projection + report.fusion,
        "first_token": first,
        "answer": first + (setup.new_tokens - 1) * report.step,
    }
    return {**flops, "train": count_training_flops(config, setup.text_tokens)} if training else flops


def reports(setup: Setup) -> dict[str, tuple[MeteorConfig, FlopReport]]:
    """Configs and FLOPs of the four variants."""
    dense, text = setup.dense(), setup.text_tokens
    return {
        "dense": (dense, count_flops(dense, text)),
        "meteor": (setup.pruned(), count_flops(setup.pruned(), text)),
        "stage3": (setup.stage3_only(), count_flops(setup.stage3_only(), text)),
        "fastv": (dense, count_flops(dense, text, setup.fastv().schedule)),
    }


# -------------------------------------------------------------------------------------------------------------- clocks


def seconds(call: Callable[[], None], device: torch.device) -> float:
    """Wall time of one call; on a GPU by events, from an idle stream to an idle stream."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def take_turns(
    calls: Mapping[str, Callable[[], None]], rounds: int, device: torch.device, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of every call in every round, in turns; rounds before the first are thrown away."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-warm_up, rounds):
        for name, call in calls.items():
            elapsed = seconds(call, device)
            if turn >= 0:
                spent[name].append(elapsed)
    return spent


def realised(spent: Mapping[str, Sequence[float]], flops: Mapping[str, int], dense: str, other: str) -> dict[str, Any]:
    """Speed-up in time over speed-up in FLOPs, round by round; the median and its range."""
    speed_ups = [slow / fast for slow, fast in zip(spent[dense], spent[other], strict=True)]
    promised = flops[dense] / flops[other]
    return {
        "seconds_dense": round(statistics.median(spent[dense]), 4),
        "seconds": round(statistics.median(spent[other]), 4),
        "speed_up": round(statistics.median(speed_ups), 3),
        "speed_up_range": [round(min(speed_ups), 3), round(max(speed_ups), 3)],
        "flops_ratio": round(promised, 3),
        "realised": round(statistics.median(speed_ups) / promised, 3),
        "rounds": len(speed_ups),
    }


#: Functions of meteor_model whose time is selection: scores, sorting, gathering.
SELECTION = {
    "encode": {"importance", "mean_similarity", "select_top", "gather_tokens"},
    "fuse": {"fuse_cooperatively"},
    "decode": {"score_layer", "_decide", "gather_tokens"},
}
_ENTRY = {"encode_pruned": "encode", "get_image_features": "fuse", "decode_pruned": "decode"}


class SelectionClock:
    """Time that selection takes within the real forward: entry and exit of its functions, by Python's profile hook.

    Only the outermost call counts. The hook costs some microseconds a call, on the side of more overhead. On a GPU the
    device is waited for at both ends, which again counts against selection.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(SELECTION, 0.0)
        self.seen: set[str] = set()
        self._stages: list[str] = []
        self._inside: FrameType | None = None
        self._start = 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _hook(self, frame: FrameType, event: str, argument: Any) -> None:
        if event not in ("call", "return") or not frame.f_globals.get("__name__", "").startswith("meteor_model"):
            return
        name = frame.f_code.co_name
        if name in _ENTRY:
            self._stages.append(_ENTRY[name]) if event == "call" else self._stages.pop()
        if not self._stages or name not in SELECTION[self._stages[-1]]:
            return
        if event == "call" and self._inside is None:
            self._inside, self._start = frame, self._now()
        elif event == "return" and frame is self._inside:
            self.seconds[self._stages[-1]] += self._now() - self._start
            self._inside = None
            self.seen.add(name)

    def measure(self, call: Callable[[], None]) -> float:
        """Run once; returns the whole wall time. `seconds` holds selection's share of it by stage."""
        start = self._now()
        sys.setprofile(self._hook)
        try:
            call()
        finally:
            sys.setprofile(None)
        missing = set().union(*SELECTION.values()) - self.seen
        assert not missing, f"selection functions that never ran, so their time is not in: {sorted(missing)}"
        return self._now() - start


# ------------------------------------------------------------------------------------------------------------ hardware


def hardware(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What the numbers were measured on, and how busy it was."""
    about: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": __import__("transformers").__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about.update(
            gpu=properties.name, gpu_memory_gib=round(properties.total_memory / 2**30, 1), cuda=torch.version.cuda
        )
    return about


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    name = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return f"{name} ({', '.join(flag for flag in ('avx2', 'avx512f', 'avx512_bf16', 'amx_tile') if flag in flags)})"


# -------------------------------------------------------------------------------------------------------------- memory


def peak_memory(call: Callable[[], None], device: torch.device) -> float:
    """MiB that a call needs at its peak above what is allocated before it.

    On a GPU the allocator's own count; on a CPU the process's resident set, so use a fresh process each time.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before_kib = _status("VmRSS")
    call()
    return round((_status("VmHWM") - before_kib) / 2**10, 1)


def _status(field: str) -> int:
    """KiB of one line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))
