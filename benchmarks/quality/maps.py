"""Maps of frozen towers, computed once and kept on disk: training then pays for the language model alone.

A file belongs to one tower's weights and one sequence of scenes; its name is their digest. Maps are added in order,
so a stopped run goes on, and a larger experiment extends what is there. Values are bf16, as they are computed.

Legend: M images, N tokens of one encoder, D its width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.quality.stored_scenes import Scenes
from meteor_model.encode import encode_pruned
from meteor_model.encoders import VisionEncoder
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.weights.parts import LoadedPart
from pipelines.io.fingerprint import sha256_of_json

BATCH = 32
TOLERANCE = 0.05
"""Largest difference of a stored map to a new one, as a share of its largest value: bf16 kernels round by batch."""


@dataclass(frozen=True)
class Maps:
    """What is on disk of a sequence of scenes.

    Attributes:
        digest: of all maps' names.
        arrays: of every encoder, (M, N, D) int16: the bits of bf16.
    """

    digest: str
    arrays: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def of(self, indices: Sequence[int], device: torch.device) -> list[torch.Tensor]:
        """The maps of these images, (M, N, D) bf16, one an encoder."""
        chosen = [np.stack([array[index] for index in indices]) for array in self.arrays.values()]
        return [torch.from_numpy(array).view(torch.bfloat16).to(device) for array in chosen]


@torch.inference_mode()
def map_of(encoder: VisionEncoder, pixels_MCSS: torch.Tensor) -> torch.Tensor:
    """The unpruned map (M, N, D) of a tower, bf16."""
    device = next(encoder.parameters()).device
    pixels = encoder.normalize(pixels_MCSS.to(device), torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        tokens, _ = encode_pruned(encoder, pixels, (_shape(encoder)[0],), 2, None)
    return tokens.hidden.to(torch.bfloat16)


def _shape(encoder: VisionEncoder) -> tuple[int, int]:
    """Tokens and width of its map."""
    return encoder.grid[0] * encoder.grid[1], encoder.embed_dim


def make_maps(
    model: MeteorForConditionalGeneration,
    loaded: Sequence[LoadedPart],
    scenes: Scenes,
    root: Path,
    say: Callable[[str], None],
) -> Maps:
    """The maps of these scenes; what is not on disk yet is computed.

    Args:
        model: its towers count.
        loaded: what they were loaded from.
        scenes: the sequence.
        root: folder of all such files.
        say: is told about progress.

    Raises:
        ValueError: where a stored map is not what the tower gives now.
    """
    root.mkdir(parents=True, exist_ok=True)
    checksums = {part.name: part.sha256 for part in loaded}
    images, arrays, names = scenes.images, {}, []
    pixels = images.pixel_digests()
    for name, encoder in model.encoders.items():
        assert isinstance(encoder, VisionEncoder)
        weights = checksums.get(name) or float(sum(item.double().abs().sum() for item in encoder.parameters()))
        digest = sha256_of_json([encoder.config.to_dict(), weights, images.split, images.seed, pixels])
        path = root / f"{images.split}-{name}-{digest[:16]}.bf16"
        _fill(path, encoder, scenes, say)
        arrays[name] = np.memmap(path, np.int16, "r", shape=(_stored(path, encoder), *_shape(encoder)))[: len(scenes)]
        names.append(path.name)
    return Maps(sha256_of_json(names), arrays)


def _stored(path: Path, encoder: VisionEncoder) -> int:
    """Whole maps in a file."""
    tokens, width = _shape(encoder)
    return path.stat().st_size // (2 * tokens * width) if path.is_file() else 0


def _fill(path: Path, encoder: VisionEncoder, scenes: Scenes, say: Callable[[str], None]) -> None:
    """Append the maps that are missing. One stored map is computed anew first."""
    tokens, width = _shape(encoder)
    done, count = _stored(path, encoder), len(scenes)
    if done:
        _check(path, encoder, scenes, min(done, count) - 1)
    started = time.monotonic()
    with path.open("ab") as file:
        file.truncate(done * tokens * width * 2)  # part of a map, of a run that was stopped
        for number, begin in enumerate(range(done, count, BATCH)):
            pixels = scenes.pixels(range(begin, min(begin + BATCH, count)))
            file.write(map_of(encoder, pixels).contiguous().cpu().view(torch.int16).numpy().tobytes())
            file.flush()
            now = begin + len(pixels)
            if number % 16 == 15 or now == count:
                say(f"{path.name}: {now}/{count} images, {(now - done) / (time.monotonic() - started):.1f} a second")


def _check(path: Path, encoder: VisionEncoder, scenes: Scenes, index: int) -> None:
    """Compute one stored map again. ValueError where it differs."""
    now = map_of(encoder, scenes.pixels([index])).float().cpu()
    array = np.memmap(path, np.int16, "r", shape=(index + 1, *_shape(encoder)))
    stored = torch.from_numpy(np.array(array[index : index + 1])).view(torch.bfloat16).float()
    difference = float((now - stored).abs().max() / now.abs().max())
    if difference > TOLERANCE:
        raise ValueError(
            f"{path}: the map of image {index} differs by {difference:.2f} of its largest value from what the tower "
            "gives now: remove the file"
        )
