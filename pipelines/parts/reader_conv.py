"""`reader-conv`: EfficientNet-Lite0 up to stride 16, taught to read signs: 0.7 M parameters, minutes on two CPU cores.

It starts from ImageNet weights; statistics of batch norms stay as they are (`TimmConvEncoder`). Labels are direct: for
every patch, which character has its middle there, which comes next and which before it, and its place in the word. So
a language model behind it finds a word's letters in order. It learns from composed scenes of the split `train` and is
scored on `validation`, whose texts are never drawn there; the fonts are.

Legend: M images, N patches in raster order, D width, S side in pixels, 4 labels a patch.
"""

from __future__ import annotations

import json
import math
import string
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from meteor_model.encode import encode_pruned
from meteor_model.encoders import EncoderConfig, build_encoder
from pipelines.data.sources.scenes import Letter, Split, compose
from pipelines.parts.efficientnet import ARCHITECTURE, read_package

TOWER: dict[str, Any] = {"model_name": ARCHITECTURE, "stage": -2}
SIDE, PATCH = 192, 16
CELLS = SIDE // PATCH
CHARACTERS = string.ascii_uppercase + string.digits
NONE = len(CHARACTERS)
"""Label of "no character"."""
IGNORE = -100
PLACES = 8
"""Places in a word that are told apart; later ones count as the last."""
LABELS = {"character": NONE + 1, "next": NONE + 1, "previous": NONE + 1, "place": PLACES}
"""What is named in every patch, and among how many."""
WEIGHTS = {"character": 1.0, "next": 0.5, "previous": 0.3, "place": 0.3}
"""Of the four losses."""
EMPTY_WEIGHT = 0.2
"""Of patches without a character in the first loss: most have none."""
HEAD_FILE = "head.safetensors"
HELD_OUT: Split = "validation"
REPORT_EVERY = 25


@dataclass(frozen=True)
class ReaderConvTraining:
    """How the reader is trained. The defaults make the part `reader-conv`."""

    steps: int = 800
    """Optimizer steps."""
    images: int = 16
    """Images of one step, each with at least one character."""
    learning_rate: float = 3e-3
    """Peak of AdamW's, after a linear warm-up, before half a cosine."""
    warmup_steps: int = 30
    """Steps of the warm-up."""
    seed: int = 0
    """Seed of the head's weights and of the scenes."""
    threads: int = 2
    """Torch threads."""
    heldout_images: int = 256
    """Images of the final score."""


class ReaderConv(nn.Module):
    """The tower behind its adapter, and the head that names what is in a patch."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = build_encoder(EncoderConfig("reader", "timm_conv", SIDE, TOWER))
        self.head = nn.Linear(self.encoder.embed_dim, sum(LABELS.values()))

    def forward(self, pixels_M3SS: torch.Tensor) -> dict[str, torch.Tensor]:
        """(M, 3, S, S) uint8 -> logits (M, N, classes) fp32 of each label."""
        pixels = self.encoder.normalize(pixels_M3SS, torch.float32).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):  # on CPUs with AVX512-BF16 several times as fast
            tokens, _ = encode_pruned(self.encoder, pixels, (CELLS * CELLS,), 2, None)
        parts = self.head(tokens.hidden.float()).split(list(LABELS.values()), dim=-1)
        return dict(zip(LABELS, parts, strict=True))


def labels_of(letters: Sequence[Letter]) -> np.ndarray:
    """What is in each patch, (4, N) int64 in the order of LABELS.

    A patch without a character has NONE as its first label and nothing to learn of the others. Where the middles of
    two characters are in one patch, the first counts.

    Args:
        letters: of the scene, word after word, each word's from left to right.
    """
    labels_4N = np.full((len(LABELS), CELLS * CELLS), IGNORE, np.int64)
    labels_4N[0] = NONE
    for index, letter in enumerate(letters):
        row, column = (min(max(int(value // PATCH), 0), CELLS - 1) for value in (letter.y, letter.x))
        patch = row * CELLS + column
        if labels_4N[0, patch] != NONE:
            continue
        following = letters[index + 1].character if letter.place + 1 < letter.length else None
        before = letters[index - 1].character if letter.place else None
        labels_4N[:, patch] = (
            CHARACTERS.index(letter.character),
            NONE if following is None else CHARACTERS.index(following),
            NONE if before is None else CHARACTERS.index(before),
            min(letter.place, PLACES - 1),
        )
    return labels_4N


def make_reader_conv(
    folder: Path, say: Callable[[str], None], settings: ReaderConvTraining | None = None
) -> dict[str, Any]:
    """Train and write `config.json`, `model.safetensors` (the tower, timm's names) and `head.safetensors`.

    Returns: what was done and measured, as plain values.
    """
    settings = settings or ReaderConvTraining()
    threads, started = torch.get_num_threads(), time.monotonic()
    torch.set_num_threads(settings.threads)
    try:
        reader = _fit(settings, say)
        scores = score(reader, settings)
    finally:
        torch.set_num_threads(threads)
    tower = {name: tensor.contiguous() for name, tensor in reader.encoder.tower.state_dict().items()}
    save_file(tower, folder / "model.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in reader.head.state_dict().items()}, folder / HEAD_FILE)
    (folder / "config.json").write_text(json.dumps({"architecture": ARCHITECTURE}, indent=2) + "\n")
    verified = ", ".join(f"{name} {100 * value:.1f}%" for name, value in scores.items())
    return {
        "verified": f"patches with a character, texts that training never drew: {verified} right",
        "training": asdict(settings),
        "seconds": round(time.monotonic() - started),
        "heldout": scores,
        "characters": CHARACTERS,
    }


def _fit(settings: ReaderConvTraining, say: Callable[[str], None]) -> ReaderConv:
    torch.manual_seed(settings.seed)
    reader = ReaderConv().train()
    result = reader.encoder.tower.load_state_dict(read_package(), strict=False)
    assert not result.missing_keys, "the cut net is a beginning of the whole"
    reader.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(reader.parameters(), settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings))
    started, recent = time.monotonic(), []
    with ThreadPoolExecutor(1) as pool:  # composes the next step's scenes
        ahead = pool.submit(_draw, "train", settings.seed, 0, settings.images)
        for step in range(1, settings.steps + 1):
            pixels_M3SS, labels_M4N, drawn = ahead.result()
            ahead = pool.submit(_draw, "train", settings.seed, drawn, settings.images)
            logits = reader(pixels_M3SS)
            loss = _loss(logits, labels_M4N)
            reader.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            recent.append(_right(logits, labels_M4N)[0])
            if step % REPORT_EVERY == 0:
                right, total = np.sum(recent[-REPORT_EVERY:], axis=0)
                so_far = f"step {step}/{settings.steps}, {time.monotonic() - started:.0f} s"
                say(f"reader-conv: {so_far}, {100 * right / total:.1f}% of characters")
    return reader.eval()


def _draw(split: Split, seed: int, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """`count` scenes with characters from index `start` on: (M, 3, S, S) uint8, (M, 4, N), the next index."""
    pixels, labels, index = list[np.ndarray](), list[np.ndarray](), start
    while len(pixels) < count:
        scene = compose(split, seed, index)
        index += 1
        if scene.letters:
            pixels.append(scene.pixels.transpose(2, 0, 1))
            labels.append(labels_of(scene.letters))
    return torch.from_numpy(np.stack(pixels)), torch.from_numpy(np.stack(labels)), index


def _loss(logits: dict[str, torch.Tensor], labels_M4N: torch.Tensor) -> torch.Tensor:
    class_weight = torch.ones(NONE + 1)
    class_weight[NONE] = EMPTY_WEIGHT
    total = torch.zeros(())
    for index, (name, logits_MNK) in enumerate(logits.items()):
        weight = class_weight if name == "character" else None
        truth = labels_M4N[:, index].flatten()
        loss = F.cross_entropy(logits_MNK.flatten(0, 1), truth, weight=weight, ignore_index=IGNORE)
        total = total + WEIGHTS[name] * loss
    return total


def _right(logits: dict[str, torch.Tensor], labels_M4N: torch.Tensor) -> np.ndarray:
    """For each label, how many of the patches that hold a character are named rightly, and how many there are."""
    holds_MN = labels_M4N[:, 0] != NONE
    right = [
        int((logits_MNK.argmax(dim=-1) == labels_M4N[:, index])[holds_MN].sum())
        for index, logits_MNK in enumerate(logits.values())
    ]
    return np.array([(count, int(holds_MN.sum())) for count in right])


@torch.no_grad()
def score(reader: ReaderConv, settings: ReaderConvTraining) -> dict[str, float]:
    """Share of patches with a character of which each label is named rightly, on the split HELD_OUT."""
    total, drawn = np.zeros((len(LABELS), 2)), 0
    for _ in range(math.ceil(settings.heldout_images / settings.images)):
        pixels_M3SS, labels_M4N, drawn = _draw(HELD_OUT, settings.seed, drawn, settings.images)
        total += _right(reader(pixels_M3SS), labels_M4N)
    return {name: round(right / count, 4) for name, (right, count) in zip(LABELS, total, strict=True)}


def _rate(step: int, settings: ReaderConvTraining) -> float:
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))
