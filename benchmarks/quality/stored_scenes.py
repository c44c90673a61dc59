"""Composed scenes on disk: each is drawn once, for all towers, trainings and questions.

A file belongs to one sequence of scenes; its name is the digest of the first of them. Scenes are added in order, so a
stopped run goes on, and a larger experiment extends what is there.

Legend: M images, S their side in pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.data.sources.scenes import SIDE, Question, Split, compose
from pipelines.io.fingerprint import sha256, sha256_of_json

WITNESSES = 4
"""Scenes that stand for the composer in digests."""
PIXELS = 3 * SIDE * SIDE
REPORT_EVERY = 512


@dataclass(frozen=True)
class Images:
    """A sequence of scenes: number i is `compose(split, seed, i)`."""

    split: Split
    seed: int
    count: int

    def pixel_digests(self) -> list[str]:
        """Of the witnesses' pixels."""
        return [sha256(compose(self.split, self.seed, index).pixels.tobytes()) for index in range(WITNESSES)]

    def digest(self) -> str:
        """Of split, seed, and the witnesses' pixels and questions."""
        scenes = [compose(self.split, self.seed, index) for index in range(WITNESSES)]
        questions = [[asdict(question) for question in scene.questions] for scene in scenes]
        return sha256_of_json([self.split, self.seed, self.pixel_digests(), questions])


@dataclass(frozen=True)
class Scenes:
    """What is on disk.

    Attributes:
        images: the sequence.
        array: (M, 3, S, S) uint8.
        questions: of every scene.
    """

    images: Images
    array: np.ndarray
    questions: list[list[Question]]

    def __len__(self) -> int:
        return len(self.questions)

    def pixels(self, indices: Sequence[int]) -> torch.Tensor:
        """(M, 3, S, S) uint8 of these scenes."""
        return torch.from_numpy(np.stack([self.array[index] for index in indices]))


def store_scenes(images: Images, root: Path, say: Callable[[str], None]) -> Scenes:
    """The scenes of a sequence; those that are not on disk yet are composed.

    Args:
        images: the sequence.
        root: folder of all such files.
        say: is told about progress.
    """
    root.mkdir(parents=True, exist_ok=True)
    name = f"{images.split}-{images.digest()[:16]}"
    pixels, questions = root / f"{name}.u8", root / f"{name}.jsonl"
    lines = questions.read_text().splitlines() if questions.is_file() else []
    whole = pixels.stat().st_size // PIXELS if pixels.is_file() else 0
    done = min(len(lines), whole)
    lines = lines[:done]
    questions.write_text("".join(f"{line}\n" for line in lines))
    with pixels.open("ab") as pixel_file, questions.open("a") as question_file:
        pixel_file.truncate(done * PIXELS)  # what a run that was stopped wrote of a scene
        for index in range(done, images.count):
            scene = compose(images.split, images.seed, index)
            pixel_file.write(np.ascontiguousarray(scene.pixels.transpose(2, 0, 1)).tobytes())
            lines.append(json.dumps([asdict(question) for question in scene.questions]))
            question_file.write(f"{lines[-1]}\n")
            if (index + 1) % REPORT_EVERY == 0:
                say(f"scenes of {images.split}: {index + 1}/{images.count}")
    array = np.memmap(pixels, np.uint8, "r", shape=(len(lines), 3, SIDE, SIDE))[: images.count]
    return Scenes(images, array, [_questions(line) for line in lines[: images.count]])


def _questions(line: str) -> list[Question]:
    entries: list[dict[str, Any]] = json.loads(line)
    return [Question(**entry) for entry in entries]
