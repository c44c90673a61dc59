"""The training loop: one process, one device, bf16 autocast over fp32 weights, exact resume.

What a step does is a function of recipe and step number alone, so a stopped run goes on as if it had not stopped. It
needs torch, transformers, timm, meteor_model and the composer of scenes, and no cluster.

Legend: B images of a step, M the same, T tokens of a packed row, K visual tokens of an image, C width, V vocabulary,
n supervised tokens.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality.maps import Maps
from benchmarks.quality.models import trained_tensors
from benchmarks.quality.muon import BatchedMuon
from benchmarks.quality.questions import Encoder, images_of_step, learned_of
from benchmarks.quality.sizes import Recipe
from benchmarks.quality.stored_scenes import Scenes
from meteor_model.chat import IGNORE_INDEX
from meteor_model.decoder.packed import Packed
from meteor_model.fusion import prune_pool
from meteor_model.inputs import scatter_visual
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from pipelines.data.sources.scenes import Question
from pipelines.io.fingerprint import sha256_of_json

CHECKPOINT_FILE, LOG_FILE = "checkpoint.pt", "log.jsonl"
CHECKPOINT_SECONDS = 180.0
REPORT_EVERY = 25
CLIP = 1.0
LAST_RATE = 0.03
"""Of the peak, at the end of the cosine."""

Batch = dict[str, Tensor]
Look = Callable[[Sequence[int]], Tensor]
"""Visual tokens (M, K, C) of these images, with a gradient where something on their way is learned."""


@dataclass(frozen=True)
class Step:
    """What is ready for a step."""

    images: list[int]
    questions: list[list[Question]]
    batch: Batch


def look_at_maps(model: MeteorForConditionalGeneration, maps: Maps) -> Look:
    """Cached dense maps, joined on the channels, through the joint projector; then what stage 2 keeps of them."""

    def look(images: Sequence[int]) -> Tensor:
        found = dict(zip(maps.arrays, maps.of(images, model.device), strict=True))
        return prune_pool(model.pool_of(model._project(found), []), model.config.pruning.fuse)[0]

    return look


def look_at_pixels(model: MeteorForConditionalGeneration, scenes: Scenes, maps: Maps | None = None) -> Look:
    """The model's own stages 1 and 2 on pixels; a tower that is pruned at its end alone may take its dense map."""
    whole = [name for name, tower in model._towers() if not tower.prunes_between_blocks]

    def look(indices: Sequence[int]) -> Tensor:
        found = {} if maps is None else dict(zip(maps.arrays, maps.of(indices, model.device), strict=True))
        dense = {name: found[name] for name in whole if name in found}
        encoded = model._encode(scenes.pixels(indices).to(model.device), None, dense)
        return model._fused(*encoded, None, None)[0]

    return look


def supervised(model: MeteorForConditionalGeneration, visual_MKC: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (n, V) at supervised tokens, and what should be there (n,). The head runs nowhere else."""
    ids_BT, labels_BT = batch["input_ids"], batch["labels"]
    embeds_BTC = model.get_input_embeddings()(ids_BT)
    embeds_BTC = scatter_visual(embeds_BTC, ids_BT == model.config.image_token_id, visual_MKC)
    packed = Packed(batch["document_ids"], batch["branch_ids"])
    arguments = packed.decoder_arguments(model.config.text_config, torch.bfloat16)
    hidden_BTC = model.language_model(inputs_embeds=embeds_BTC, **arguments).last_hidden_state
    wanted_BT = labels_BT[:, 1:] != IGNORE_INDEX
    return model.lm_head(hidden_BTC[:, :-1][wanted_BT]), labels_BT[:, 1:][wanted_BT]


def prepare(recipe: Recipe, step: int, questions: Sequence[Sequence[Question]], encoder: Encoder) -> Step:
    """The images, questions and tensors of a step; a function of its arguments."""
    images = images_of_step(step, recipe.images, len(questions), recipe.seed)
    rng = np.random.default_rng((recipe.seed, step, 1))
    rows = [learned_of(questions[image], recipe.questions, rng) for image in images]
    return Step(images, rows, encoder.packed(rows))


def rate(step: int, recipe: Recipe) -> float:
    """Share of the peak learning rate: linear warm-up, times one cosine over all steps."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
    return min(1.0, (step + 1) / recipe.warmup) * (LAST_RATE + (1 - LAST_RATE) * cosine)


def optimizers_of(model: MeteorForConditionalGeneration, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of projectors and layers; AdamW for embeddings, head, norms and biases."""
    matrices, others = list[nn.Parameter](), list[nn.Parameter]()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        inside = parameter.ndim == 2 and "embed_tokens" not in name and not name.startswith("lm_head")
        (matrices if inside else others).append(parameter)
    return [
        BatchedMuon(matrices, recipe.muon_rate),
        torch.optim.AdamW(others, recipe.adam_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]


def _identity(model: MeteorForConditionalGeneration, vocabulary: Mapping[str, int]) -> list[Any]:
    """What makes a model another one to a stored run; settings that came later and are at their defaults do not."""
    config = model.config
    shapes = {name: list(tensor.shape) for name, tensor in trained_tensors(model).items()}
    parts = [[item.to_dict() for item in config.encoders], config.fusion, config.pruning.as_stored(), config.ranks]
    return [*parts, shapes, sha256_of_json(dict(vocabulary))]


class Run:
    """A training in a folder: what it has done so far, and how to go on.

    A run that is given another number of steps than it began with goes on along the other cosine; `changes` says so.

    Args:
        folder: of checkpoint and log.
        model: with frozen towers; weights at the start.
        encoder: makes its batches.
        recipe: of the training.
        questions: of every training image.
        look: gives visual tokens.
    """

    def __init__(
        self,
        folder: Path,
        model: MeteorForConditionalGeneration,
        encoder: Encoder,
        recipe: Recipe,
        questions: Sequence[Sequence[Question]],
        look: Look,
    ) -> None:
        self.folder, self.model, self.encoder, self.recipe = folder, model, encoder, recipe
        self.questions, self.look = questions, look
        self.optimizers = optimizers_of(model, recipe)
        self.peaks = [recipe.muon_rate, recipe.adam_rate]
        self.step, self.seconds = 0, 0.0
        #: (step, number of steps that was planned before, and from there on).
        self.changes: list[tuple[int, int, int]] = []
        identity = _identity(model, encoder.processor.tokenizer.get_vocab())
        self.digest = sha256_of_json([asdict(replace(recipe, steps=0)), identity, len(questions)])
        folder.mkdir(parents=True, exist_ok=True)
        self._resume()

    def train(self, say: Callable[[str], None], stop_after: int | None = None) -> None:
        """Go on to the last step, or `stop_after` so many, with a checkpoint every few minutes and at the end."""
        last = self.recipe.steps if stop_after is None else min(self.recipe.steps, self.step + stop_after)
        self.model.train()
        saved, losses, begun, first = time.monotonic(), list[float](), time.monotonic(), self.step
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self._prepare, self.step)
            while self.step < last:
                ready = ahead.result()
                ahead = pool.submit(self._prepare, self.step + 1)
                started = time.monotonic()
                losses.append(self._learn(ready))
                self.step += 1
                self.seconds += time.monotonic() - started
                if self.step % REPORT_EVERY == 0 or self.step == last:
                    self._report(losses, begun, first, say)
                    losses = []
                if time.monotonic() - saved > CHECKPOINT_SECONDS or self.step == last:
                    self._save()
                    saved = time.monotonic()
        self.model.eval()

    def _prepare(self, step: int) -> Step:
        return prepare(self.recipe, step, self.questions, self.encoder)

    def _learn(self, ready: Step) -> float:
        device = self.model.device
        batch = {name: tensor.to(device) for name, tensor in ready.batch.items()}
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate(self.step, self.recipe)
        with torch.autocast(device.type, torch.bfloat16):
            logits_nV, truth_n = supervised(self.model, self.look(ready.images), batch)
            loss = F.cross_entropy(logits_nV.float(), truth_n)
        loss.backward()
        trained = [parameter for optimizer in self.optimizers for parameter in optimizer.param_groups[0]["params"]]
        nn.utils.clip_grad_norm_(trained, CLIP)
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return float(loss.detach())

    def _report(self, losses: Sequence[float], begun: float, first: int, say: Callable[[str], None]) -> None:
        pace = (time.monotonic() - begun) / max(1, self.step - first)
        left = (self.recipe.steps - self.step) * pace / 60
        loss = sum(losses) / len(losses)
        speed = f"{self.recipe.images / pace:.1f} images/s, {left:.0f} min left"
        say(f"step {self.step}/{self.recipe.steps}, loss {loss:.4f}, {speed}")
        self.log({"step": self.step, "loss": round(loss, 5), "seconds": round(self.seconds, 1)})

    def log(self, line: dict[str, Any]) -> None:
        """Add a line to the log of the run."""
        with (self.folder / LOG_FILE).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _save(self) -> None:
        scratch = self.folder / f"{CHECKPOINT_FILE}.new"
        torch.save(
            {
                "digest": self.digest,
                "step": self.step,
                "steps": self.recipe.steps,
                "changes": self.changes,
                "seconds": self.seconds,
                "weights": trained_tensors(self.model),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            },
            scratch,
        )
        scratch.replace(self.folder / CHECKPOINT_FILE)

    def _resume(self) -> None:
        """Take up the checkpoint, if there is one. ValueError for one of another recipe, model or data."""
        path = self.folder / CHECKPOINT_FILE
        if not path.is_file():
            return
        state = torch.load(path, map_location=self.model.device, weights_only=True)
        if state["digest"] != self.digest:
            raise ValueError(
                f"{path} is of another recipe, model, vocabulary or number of images: give the run another name"
            )
        self.model.load_state_dict(state["weights"], strict=False)
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        self.step, self.seconds, self.changes = state["step"], state["seconds"], state["changes"]
        if state["steps"] != self.recipe.steps:
            self.changes.append((self.step, state["steps"], self.recipe.steps))
        self._cut_log()

    def _cut_log(self) -> None:
        path = self.folder / LOG_FILE
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        path.write_text("".join(line for line in lines if json.loads(line)["step"] <= self.step))


@torch.no_grad()
def exact_match(
    model: MeteorForConditionalGeneration, encoder: Encoder, questions: Sequence[Sequence[Question]], look: Look
) -> dict[str, float]:
    """Share of questions whose greedy answer is right, by group, kind and whether a drawing was trained.

    For choices on the validation split. By teacher forcing on packed rows, which for "all tokens right" says the same
    as generating. Nothing may prune in the language model.
    """
    model.eval()
    right: dict[str, list[bool]] = defaultdict(list)
    for begin in range(0, len(questions), 16):
        images = list(range(begin, min(begin + 16, len(questions))))
        rows = [[question for question in questions[image] if not question.learning] for image in images]
        batch = {name: tensor.to(model.device) for name, tensor in encoder.packed(rows).items()}
        with torch.autocast(model.device.type, torch.bfloat16):
            logits_nV, truth_n = supervised(model, look(images), batch)
        wrong_n = (logits_nV.argmax(dim=-1) != truth_n).cpu()
        row_n, column_n = (batch["labels"][:, 1:] != IGNORE_INDEX).cpu().nonzero(as_tuple=True)
        branch_n = batch["branch_ids"].cpu()[row_n, column_n + 1]
        missed = {(int(row), int(branch)) for row, branch in zip(row_n[wrong_n], branch_n[wrong_n], strict=True)}
        for row, own in enumerate(rows):
            for branch, question in enumerate(own, start=1):
                for name in _names(question):
                    right[name].append((row, branch) not in missed)
    return {name: round(sum(values) / len(values), 4) for name, values in sorted(right.items())}


def _names(question: Question) -> list[str]:
    """The scores that a question enters: of its group, of its kind, of seen or of unseen drawings."""
    kind = f"{question.group}/{question.kind}"
    return [question.group, kind, *(f"{kind}/{of}" for of in (question.tags.get("drawing"),) if of)]
