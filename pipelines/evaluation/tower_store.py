"""Maps of the towers before any pruning touches them, kept on this machine's disk for all trials of a search.

A trial changes what is kept, not the weights: the blocks before the first boundary, and all of a convolutional tower,
give every trial the same maps (`meteor_model.encode.dense_depth`). They are computed once for a batch of images, and
read afterwards; the images are then not even decoded.

A file is known by all that its numbers depend on: weights, configuration and code of the tower, blocks, device, number
format, threads, versions of the libraries, and the digests of the batch's images in order, since a map computed in
another batch may differ in its last bit. So scores are those without a store, to the bit. A file begins with the
SHA-256 of what follows: a damaged one is computed anew and counted.

The folder holds at most so many bytes. What an earlier search left makes room, the longest unused first; what this
process has used never does, for trials ask for the same batches in the same order, and the next one to be dropped would
be the next one wanted. What finds no room is computed every time, and counted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor

import meteor_model
from meteor_model.encode import beyond_maps
from meteor_model.encoders import VisionEncoder
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from pipelines.evaluation.embedded import Embedded, embed_questions
from pipelines.evaluation.questions import Question
from pipelines.io.fingerprint import RunningSha256, sha256, sha256_bytes, sha256_of_json

LIBRARIES = ("torch", "transformers", "timm")
MOST_SHARE = 0.5
"""Of what the disk would have free without the maps."""
DIGEST = 32
"""Bytes of a SHA-256."""
GIB = 2**30

READ, COMPUTED, DAMAGED, NOT_KEPT = "read", "computed", "damaged", "not_kept"


def default_folder() -> Path:
    """This user's, on this machine."""
    return Path(tempfile.gettempdir()) / f"meteor-maps-{os.getuid()}"


class TowerStore:
    """The maps of one model's towers.

    Args:
        model: whose weights stay what they are.
        most_bytes: that the folder may hold.
        folder: where; this user's by default.

    Attributes:
        counts: batches of one tower by what became of them: READ, COMPUTED, and of the latter DAMAGED (a file was
            there) and NOT_KEPT (no room).

    Raises:
        OSError: a folder of another user, or that cannot be made.
    """

    def __init__(self, model: MeteorForConditionalGeneration, most_bytes: int, folder: Path | None = None) -> None:
        self.folder = default_folder() if folder is None else folder
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.folder.stat().st_uid != os.getuid():
            raise PermissionError(f"{self.folder} is of another user: remove it, or set TMPDIR")
        self.most_bytes, self.counts = most_bytes, Counter[str]()
        self._weights = {name: _digest(cast(VisionEncoder, tower)) for name, tower in model.encoders.items()}
        self._used: set[str] = set()

    @torch.no_grad()
    def embed(
        self, model: MeteorForConditionalGeneration, processor: MeteorProcessor, questions: Sequence[Question]
    ) -> Embedded:
        """As `embed_questions`, to the bit.

        Args:
            model: the store's, or one of some of its towers, under any pruning.
            processor: the model's.
            questions: of one batch.
        """
        if beyond_maps(model.config.pruning) is not None:
            return embed_questions(model, processor, questions)
        inputs = processor.batch_prompts([q.prompt for q in questions], [() for _ in questions]).to(model.device)
        images = [image for question in questions for image in question.images]
        mask_BT = inputs["attention_mask"]
        maps = self._maps(model, processor, images)
        embeds_BTC, is_image_BT, stats = model.embed_dense(inputs["input_ids"], maps, attention_mask=mask_BT)
        return Embedded(mask_BT, embeds_BTC, is_image_BT, model.positions_of_prompts(is_image_BT, mask_BT, stats))

    def _maps(
        self, model: MeteorForConditionalGeneration, processor: MeteorProcessor, images: Sequence[bytes]
    ) -> dict[str, Tensor]:
        """Of every tower, in order."""
        shared = {
            "code": _code(),
            "device": _device(model.device),
            "threads": torch.get_num_threads(),
            "kernel": model.config._attn_implementation,
            "libraries": {name: version(name) for name in LIBRARIES},
            "processor": processor.image_processor.to_dict(),
            "images": [sha256(image) for image in images],
        }
        pixels: Tensor | None = None
        found: dict[str, Tensor] = {}
        for name, depth in model.dense_depths().items():
            tower = cast(VisionEncoder, model.encoders[name]).config.to_dict()
            path = self.folder / sha256_of_json(
                {**shared, "tower": tower, "blocks": depth, "weights": self._weights[name]}
            )
            kept = self._read(path)
            if kept is None:
                if pixels is None:
                    pixels = torch.stack(processor.image_processor.load_images(list(images))).to(model.device)
                kept = model.dense_map(name, pixels, depth)
                self.counts[COMPUTED] += 1
                self._keep(path, kept)
            found[name] = kept.to(model.device)
        return found

    def _read(self, path: Path) -> Tensor | None:
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        if sha256_bytes(data[DIGEST:]) != data[:DIGEST]:
            self.counts[DAMAGED] += 1
            path.unlink(missing_ok=True)
            return None
        self.counts[READ] += 1
        self._use(path)
        return safetensors.torch.load(data[DIGEST:])["map"]

    def _keep(self, path: Path, dense: Tensor) -> None:
        payload = safetensors.torch.save({"map": dense.cpu().contiguous()})
        if not self._make_room(DIGEST + len(payload)):
            self.counts[NOT_KEPT] += 1
            return
        partial = path.with_suffix(f".{os.getpid()}")
        try:
            partial.write_bytes(sha256_bytes(payload) + payload)
            partial.replace(path)
        except OSError:  # no room after all: another process was quicker
            partial.unlink(missing_ok=True)
            self.counts[NOT_KEPT] += 1
            return
        self._use(path)

    def _use(self, path: Path) -> None:
        self._used.add(path.name)
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)

    def _make_room(self, need: int) -> bool:
        """Whether so many bytes fit, once files that this process has not used make room for them."""
        files: dict[str, os.stat_result] = {}
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):  # another process of this search is at work here, too
                files[entry.name] = entry.stat()
        held = sum(state.st_size for state in files.values())
        most = min(self.most_bytes, int(MOST_SHARE * (shutil.disk_usage(self.folder).free + held)))
        idle = sorted(
            (state.st_mtime, name, state.st_size)
            for name, state in files.items()
            if name not in self._used and state.st_mtime < _STARTED
        )
        for _, name, size in idle if need <= most else []:
            if held + need <= most:
                break
            (self.folder / name).unlink(missing_ok=True)
            held -= size
        return held + need <= most


_STARTED = time.time()
"""What was used since may be another trial's of this search, in a process beside this one."""


def _digest(tower: VisionEncoder) -> str:
    """Of a tower's weights: names, formats and bytes."""
    digest = RunningSha256()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.add(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.add(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hex()


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@lru_cache(maxsize=1)
def _code() -> str:
    """Digest of the code that makes maps of images."""
    root = Path(meteor_model.__file__).parent
    files = [root / "encode.py", *sorted(root.glob("image*.py")), *sorted((root / "encoders").glob("*.py"))]
    return sha256("".join(sha256(path.read_bytes()) for path in files))
