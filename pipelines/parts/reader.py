"""`reader-small`: a text-reading vision tower of 2.8 M parameters, trained here because no package holds one.

Family: Pix2Struct's encoder, whose row and column embeddings serve every grid up to 32 x 32 (512 px): training moves
each page to a random place of that grid, so that all rows and columns are trained although pages are smaller.
Objective: for every patch, which of 94 characters have ink in it. It is dense, so minutes on two CPU cores teach
letters; words and language are left to the LLM.

Legend: M pages, N patches, K characters, D width, S side in pixels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import Pix2StructVisionConfig, Pix2StructVisionModel

from meteor_model.encoders import EncoderConfig
from meteor_model.encoders.pix2struct import Pix2StructEncoder
from pipelines.parts.text_images import ALPHABET, draw_batch

PATCH = 16
GRID = 32
"""Rows and columns with embeddings of their own."""
TOWER: dict[str, Any] = {
    "hidden_size": 192,
    "d_ff": 512,
    "d_kv": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "patch_embed_hidden_size": 3 * PATCH * PATCH,
    "seq_len": GRID + 1,  # the library counts rows and columns from 1
    "dropout_rate": 0.0,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
}
HEAD_FILE = "head.safetensors"
REPORT_EVERY = 50


@dataclass(frozen=True)
class ReaderTraining:
    """How the reader is trained. The defaults make the part `reader-small`."""

    steps: int = 1200
    """Optimizer steps."""
    patches: int = 2304
    """Patches of one step; pages of every size fill it."""
    sides: tuple[int, ...] = (96, 128, 192)
    """Sides of the pages in pixels, one after the other."""
    learning_rate: float = 4e-3
    """Peak, after a linear warm-up, before half a cosine."""
    warmup_steps: int = 50
    """Steps of the warm-up."""
    seed: int = 0
    """Seed of weights and pages."""
    threads: int = 2
    """Torch threads."""
    heldout_pages: int = 64
    """Pages of the final score at each size; their words are never drawn in training."""


class Reader(nn.Module):
    """The tower behind its adapter at several sizes, and the head that names characters."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = Pix2StructVisionModel(Pix2StructVisionConfig(**TOWER))
        self.head = nn.Linear(TOWER["hidden_size"], len(ALPHABET))
        nn.init.constant_(self.head.bias, -math.log(len(ALPHABET)))  # about one character of 94 to a patch
        self._wave_positions()

    @torch.no_grad()
    def _wave_positions(self) -> None:
        """Start rows and columns as waves in separate halves of the width: neighbours are then found from the start."""
        half = TOWER["hidden_size"] // 2
        frequency = torch.exp(-math.log(100.0) * torch.arange(half // 2) / (half // 2))
        angle = 1.5 * torch.arange(GRID + 1).unsqueeze(1) * frequency
        waves = 0.3 * torch.cat([angle.sin(), angle.cos()], dim=1)
        embeddings = self.tower.embeddings
        for table, columns in ((embeddings.row_embedder, slice(half)), (embeddings.column_embedder, slice(half, None))):
            table.weight.zero_()
            table.weight[:, columns] = waves

    def adapter(self, side: int) -> Pix2StructEncoder:
        """The model's own way of seeing a page of this size, around this tower."""
        encoder = Pix2StructEncoder(EncoderConfig("reader", "pix2struct", side, {**TOWER, "num_hidden_layers": 1}))
        encoder.tower = self.tower
        return encoder

    def forward(self, pictures_M3SS: torch.Tensor, offsets_M2: torch.Tensor) -> torch.Tensor:
        """(M, 3, S, S) uint8 -> (M, N, K) fp32; `offsets_M2` moves each page by whole rows and columns of the grid."""
        encoder = self.adapter(pictures_M3SS.shape[-1])
        patches_MNE = encoder.flatten_patches(encoder.normalize(pictures_M3SS, torch.float32))
        patches_MNE[..., :2] += offsets_M2[:, None]
        with torch.autocast("cpu", torch.bfloat16):
            hidden_MND = self.tower(flattened_patches=patches_MNE).last_hidden_state
        logits_MNK: torch.Tensor = self.head(hidden_MND.float())
        return logits_MNK


def train_reader(settings: ReaderTraining, say: Callable[[str], None]) -> tuple[Reader, dict[str, Any]]:
    """Train, then score on pages with words that were never drawn.

    Returns: the reader in eval mode; what was done and measured, as plain values.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        started = time.monotonic()
        reader = _fit(settings, say)
        scores = {str(side): score(reader, side, settings) for side in (*settings.sides, 2 * max(settings.sides))}
    finally:
        torch.set_num_threads(threads)
    report = {"training": asdict(settings), "seconds": round(time.monotonic() - started), "heldout": scores}
    return reader, report


def _fit(settings: ReaderTraining, say: Callable[[str], None]) -> Reader:
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    reader = Reader().train()
    optimizers = _optimizers(reader, settings)
    schedules = [torch.optim.lr_scheduler.LambdaLR(item, lambda step: _rate(step, settings)) for item in optimizers]
    started, losses = time.monotonic(), []
    for step in range(1, settings.steps + 1):
        side = settings.sides[step % len(settings.sides)]
        pictures, labels_MNK = _pages(rng, side, settings.patches // (side // PATCH) ** 2, held_out=False)
        offsets_M2 = torch.from_numpy(rng.integers(0, GRID - side // PATCH + 1, (len(pictures), 2)))
        binary, choice = _losses(reader(pictures, offsets_M2), labels_MNK.float())
        reader.zero_grad(set_to_none=True)
        (binary + choice).backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        losses.append(binary.item())
        if step % REPORT_EVERY == 0:
            nats, seconds = sum(losses[-REPORT_EVERY:]) / REPORT_EVERY, time.monotonic() - started
            say(f"reader-small: step {step}/{settings.steps}, {nats:.3f} nats per patch, {seconds:.0f} s")
    return reader.eval()


def _losses(logits_MNK: torch.Tensor, labels_MNK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two losses of a batch.

    Binary cross-entropy per character, in nats per patch; and, where there is ink, the choice among all characters
    (cross-entropy to the even mixture of those present), which leaves the plateau of "some ink" sooner.
    """
    binary = F.binary_cross_entropy_with_logits(logits_MNK, labels_MNK) * labels_MNK.shape[-1]
    present_MN = labels_MNK.sum(dim=-1)
    choice_MN = -(logits_MNK.log_softmax(dim=-1) * labels_MNK).sum(dim=-1) / present_MN.clamp_min(1)
    return binary, choice_MN.sum() / (present_MN > 0).sum().clamp_min(1)


def _optimizers(reader: Reader, settings: ReaderTraining) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest: 5.65 nats after 57% of the patches that AdamW needs."""
    matrices = [parameter for parameter in reader.tower.encoder.parameters() if parameter.ndim == 2]
    chosen = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in reader.parameters() if id(parameter) not in chosen]
    rate = settings.learning_rate
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def _rate(step: int, settings: ReaderTraining) -> float:
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


def _pages(rng: np.random.Generator, side: int, count: int, held_out: bool) -> tuple[torch.Tensor, torch.Tensor]:
    pictures, labels = draw_batch(rng, count, side, PATCH, held_out)
    return torch.from_numpy(pictures), torch.from_numpy(labels)


@torch.no_grad()
def score(reader: Reader, side: int, settings: ReaderTraining) -> dict[str, float]:
    """How well a patch's characters are named on held-out pages of one size (pages lie at the grid's origin).

    `average_precision`: mean over characters of the area under precision-recall; `constant`: the same of the best
    constant guess, which is the share of patches that hold the character. `f1`: over all characters and patches at
    probability 0.5; `f1_constant`: of the best constant guess, naming the most frequent character everywhere.
    """
    rng = np.random.default_rng((settings.seed, side, 1))
    scores, truths = [], []
    for _ in range(max(1, settings.heldout_pages // 8)):
        pictures, labels = _pages(rng, side, 8, held_out=True)
        logits_MNK = reader(pictures, torch.zeros(len(pictures), 2, dtype=torch.long))
        scores.append(logits_MNK.flatten(0, 1))
        truths.append(labels.flatten(0, 1))
    score_RK, truth_RK = torch.cat(scores), torch.cat(truths)
    present_K = truth_RK.any(dim=0)
    shares = truth_RK.double().mean(dim=0)
    positives, most_frequent = int(truth_RK.sum()), int(truth_RK.sum(dim=0).max())
    return {
        "average_precision": round(float(_average_precision(score_RK, truth_RK)[present_K].mean()), 4),
        "constant": round(float(shares[present_K].mean()), 4),
        "f1": round(_f1(score_RK > 0, truth_RK), 4),
        "f1_constant": round(2 * most_frequent / (len(truth_RK) + positives), 4),
        "patches": len(truth_RK),
        "characters_present": int(present_K.sum()),
    }


def _average_precision(score_RK: torch.Tensor, truth_RK: torch.Tensor) -> torch.Tensor:
    """(K,) mean over a character's true patches of the precision at their rank; NaN for a character without any."""
    order_RK = score_RK.argsort(dim=0, descending=True, stable=True)
    hit_RK = truth_RK.gather(0, order_RK).double()
    rank_R1 = torch.arange(1, len(hit_RK) + 1).unsqueeze(1)
    return (hit_RK.cumsum(dim=0) / rank_R1 * hit_RK).sum(dim=0) / hit_RK.sum(dim=0)


def _f1(guess_RK: torch.Tensor, truth_RK: torch.Tensor) -> float:
    return 2 * int((guess_RK & truth_RK).sum()) / max(1, int(guess_RK.sum()) + int(truth_RK.sum()))


def make_reader(folder: Path, say: Callable[[str], None], settings: ReaderTraining | None = None) -> dict[str, Any]:
    """Train and write `config.json`, `model.safetensors` (the tower) and `head.safetensors` (what named characters).

    Returns: the report of `train_reader`, with the alphabet.
    """
    settings = settings or ReaderTraining()
    reader, report = train_reader(settings, say)
    reader.tower.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in reader.head.state_dict().items()}, folder / HEAD_FILE)
    side = max(settings.sides)
    scores = report["heldout"][str(side)]
    verified = (
        f"held-out pages of {side} px: mean average precision {scores['average_precision']:.3f} (constant guess "
        f"{scores['constant']:.3f}), F1 {scores['f1']:.3f} (constant guess {scores['f1_constant']:.3f})"
    )
    return {"verified": verified, **report, "alphabet": ALPHABET, "patch_size": PATCH, "grid": GRID}
