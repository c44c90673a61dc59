"""What the commands do: maps, a dense model, METEOR from it, and every row's answers in one file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.quality.align import Aligner, patch_labels
from benchmarks.quality.answers import answer, masses, same_towers
from benchmarks.quality.maps import Maps, make_maps
from benchmarks.quality.models import (
    MODELS,
    Trained,
    build,
    cut_projector,
    dense_config,
    encoders,
    load_trained,
    make_processor,
    make_tokenizer,
    measured_ranks,
    meteor_config,
    open_trained,
    save_trained,
    trained_tensors,
)
from benchmarks.quality.projectors import fit_once, imitate
from benchmarks.quality.questions import Asked, Encoder, final_questions
from benchmarks.quality.rows import Row, equal_cost_rows, rows_of, trained_rows
from benchmarks.quality.sizes import Recipe, Size
from benchmarks.quality.stored_scenes import Images, Scenes, store_scenes
from benchmarks.quality.train import Look, Run, exact_match, look_at_maps, look_at_pixels
from benchmarks.results_file import hardware
from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.pruners.named import with_pruner
from meteor_model.weights.parts import LoadedPart
from pipelines.data.sources.scenes import VOCABULARY_SIZE, Split, texts
from pipelines.io.fingerprint import sha256_of_json

DATA_SEED = 0
TOTALS = (108, 72, 144)
"""Stage 1: tokens after each third of DINOv2, which alone is pruned between blocks, and of all towers at the end."""
KEEP = 34
"""Stage 2: 23.6 % of the dense model's 144."""
RANK_IMAGES = 64
MASS_QUESTIONS_OF_A_GROUP = 24


@dataclass(frozen=True)
class Place:
    """Where an experiment runs.

    Attributes:
        root: maps, checkpoints and trained models.
        parts: made by `make parts`.
        device: of the models.
        say: is told about progress.
    """

    root: Path
    parts: Path
    device: torch.device
    say: Callable[[str], None]

    def parts_of(self, size: Size) -> Path | None:
        return self.parts if size.pretrained else None

    def model_folder(self, name: str) -> Path:
        """A trained model: newly made, or in the repository."""
        own = self.root / "models" / name
        return own if own.is_dir() or not (MODELS / name).is_dir() else MODELS / name


def tokenizer_of(size: Size) -> PreTrainedTokenizerBase:
    return make_tokenizer(texts(), min(size.vocabulary, VOCABULARY_SIZE))


def scenes_for(place: Place, split: Split, count: int) -> Scenes:
    """The scenes of a split; what is missing is composed."""
    return store_scenes(Images(split, DATA_SEED, count), place.root / "scenes", place.say)


def maps_for(place: Place, size: Size, scenes: Scenes) -> Maps:
    """The dense maps of scenes; what is missing is computed."""
    torch.manual_seed(DATA_SEED)  # random towers of a toy are the same every time
    config = dense_config(tokenizer_of(size), size.llm, size.pretrained)
    model, loaded = build(config, place.parts_of(size))
    return make_maps(model.to(place.device), loaded, scenes, place.root / "maps", place.say)


def train_dense(place: Place, size: Size, name: str, seed: int, steps: int = 0) -> Path:
    """Maps, then the dense model, in another number of steps where one is given. Returns: its folder."""
    scenes = scenes_for(place, "train", size.train_images)
    held = scenes_for(place, "validation", size.validation_images)
    maps, held_maps = maps_for(place, size, scenes), maps_for(place, size, held)
    tokenizer, recipe = tokenizer_of(size), _recipe(size.dense, seed, steps)
    torch.manual_seed(DATA_SEED)
    model, loaded = build(dense_config(tokenizer, size.llm, size.pretrained), place.parts_of(size))
    towers = model.encoders.state_dict()
    torch.manual_seed(1000 + seed)
    model, _ = build(model.config, None)
    model.encoders.load_state_dict(towers)
    encoder = Encoder(make_processor(model.config, tokenizer))
    model.to(place.device)
    folder = place.root / "trainings" / name
    aligned = None
    if recipe.alignment:
        aligner = Aligner(model, tokenizer, maps, patch_labels(scenes.images))
        settings = {"steps": str(recipe.alignment), "seed": str(seed), "maps": maps.digest}
        fit_once(folder, model, settings, lambda: aligner.train(recipe.alignment, seed, place.say))
        aligned = Aligner(model, tokenizer, held_maps, patch_labels(held.images)).score()
        place.say(f"{name}: patches that say the right word on the validation split: {aligned}")
    run = Run(folder, model, encoder, recipe, scenes.questions, look_at_maps(model, maps))
    run.train(place.say)
    scores = exact_match(model, encoder, held.questions, look_at_maps(model, held_maps))
    return _finish(place, name, run, recipe, scores, loaded, {"maps": maps.digest, "alignment": aligned})


def train_meteor(
    place: Place, size: Size, name: str, start: str, seed: int, steps: int = 0, variant: str = "paper"
) -> Path:
    """METEOR from a dense model: stages 1 and 2 on in training, towers live. Returns: its folder."""
    dense = open_trained(place.model_folder(start), place.parts_of(size))
    scenes = scenes_for(place, "train", size.train_images)
    ranks = _ranks(dense, scenes)
    config = meteor_config(dense.model.config, TOTALS, KEEP, ranks, variant)
    torch.manual_seed(1000 + seed)
    model, loaded = build(config, place.parts_of(size))
    model.encoders.load_state_dict(dense.model.encoders.state_dict())
    widths = {tower: encoder.embed_dim for tower, encoder in model._towers()}
    load_trained(model, cut_projector(trained_tensors(dense.model), widths))
    encoder = Encoder(make_processor(config, dense.processor.tokenizer))
    recipe = _recipe(size.pruned, seed, steps)
    model.to(place.device)
    folder = place.root / "trainings" / name
    maps = maps_for(place, size, scenes)
    if recipe.alignment:
        settings = {"steps": str(recipe.alignment), "seed": str(seed), "of": start}
        dense.model.to(place.device)
        fit_once(folder, model, settings, lambda: imitate(model, dense.model, maps, recipe.alignment, seed, place.say))
    run = Run(folder, model, encoder, recipe, scenes.questions, look_at_pixels(model, scenes, maps))
    run.train(place.say)
    held = scenes_for(place, "validation", size.validation_images)
    scores = exact_match(model, encoder, held.questions, look_at_pixels(model, held))
    pruner = "meteor" if variant == "paper" else f"meteor, {variant}"
    return _finish(place, name, run, recipe, scores, loaded, {"start": start, "pruner": pruner, "ranks": ranks})


def train_rival(
    place: Place, size: Size, name: str, start: str, pruner: str, keep: int, seed: int, steps: int = 0
) -> Path:
    """A dense model trained on with another pruner, as long as METEOR is. Returns: its folder.

    Raises:
        ValueError: for a pruner that looks at the text, of which a packed row has several, or that acts in the language
            model, where training prunes nothing.
    """
    dense = open_trained(place.model_folder(start), place.parts_of(size))
    config = with_pruner(dense.model.config, pruner, keep)
    if config.pruning.decode.enabled or (config.pruning.fuse.enabled and config.pruning.fuse.wants_text):
        raise ValueError(f"pruner {pruner!r} acts in the language model or looks at the text: it is not trained here")
    maps_serve = same_towers(config, dense.model.config)
    model, loaded = build(config, place.parts_of(size))
    model.encoders.load_state_dict(dense.model.encoders.state_dict())
    load_trained(model, trained_tensors(dense.model))
    scenes, held = (
        scenes_for(place, "train", size.train_images),
        scenes_for(place, "validation", size.validation_images),
    )

    def look_at(seen: Scenes) -> Look:
        return look_at_maps(model, maps_for(place, size, seen)) if maps_serve else look_at_pixels(model, seen)

    encoder, recipe = Encoder(make_processor(config, dense.processor.tokenizer)), _recipe(size.pruned, seed, steps)
    model.to(place.device)
    run = Run(place.root / "trainings" / name, model, encoder, recipe, scenes.questions, look_at(scenes))
    run.train(place.say)
    scores = exact_match(model, encoder, held.questions, look_at(held))
    more = {"start": start, "pruner": pruner, "keep": keep}
    return _finish(place, name, run, recipe, scores, loaded, more)


def _recipe(recipe: Recipe, seed: int, steps: int) -> Recipe:
    return replace(recipe, seed=seed, steps=steps or recipe.steps)


def _ranks(dense: Trained, scenes: Scenes) -> dict[str, list[float]]:
    """Expected ranks at the three boundaries of stage 1, of the first training images."""
    probe = meteor_config(dense.model.config, TOTALS, KEEP, {name: [1.0] for name in dense.model.encoders})
    model, _ = build(probe, None)
    model.encoders.load_state_dict(dense.model.encoders.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        return measured_ranks(model, scenes.pixels(range(min(len(scenes), RANK_IMAGES))))


def _finish(
    place: Place,
    name: str,
    run: Run,
    recipe: Recipe,
    scores: dict[str, float],
    loaded: Sequence[LoadedPart],
    more: dict[str, Any],
) -> Path:
    """Save the model with its card and say how it does on the validation split."""
    groups = {key: value for key, value in scores.items() if "/" not in key}
    place.say(f"{name}: validation {groups}")
    log = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    card = {
        "name": name,
        "recipe": asdict(recipe),
        "changes_of_steps": run.changes,
        "seconds": round(run.seconds),
        "validation": scores,
        "towers": {part.name: part.sha256 for part in loaded},
        "hardware": hardware(),
        "loss": [[line["step"], line["loss"]] for line in log],
        **more,
    }
    folder = place.root / "models" / name
    save_trained(folder, run.model, run.encoder.processor, card)
    return folder


# ---------------------------------------------------------------------------------------------------------------- ask


def ask(
    place: Place,
    size: Size,
    names: Sequence[str],
    output: Path,
    pruners: Sequence[str] = (),
    per_group: int = 0,
    split: Split = "final",
) -> None:
    """Every row of every model that the file does not hold yet; the file is written after each row.

    Args:
        place: where things are.
        size: of the experiment.
        names: of the models.
        output: the file.
        pruners: rows of these alone.
        per_group: questions of a group; 0: the size's.
        split: "final", or "validation" for a look that spends nothing of it.
    """
    scenes = scenes_for(place, split, size.final_images if split == "final" else size.validation_images)
    maps = maps_for(place, size, scenes)
    asked = final_questions(scenes.questions, per_group or size.questions)
    results = _opened(output, asked, scenes.images)
    for name in names:
        trained = open_trained(place.model_folder(name), place.parts_of(size))
        trained.model.to(place.device)
        whole = trained.model.config.encoders == encoders(size.pretrained)  # a smaller image has other maps
        stored = results["models"].setdefault(name, {"card": _short(trained.card), "rows": []})
        done = {row["name"] for row in stored["rows"]}
        for row in _rows(place, size, trained, pruners):
            if row.name in done:
                continue
            started = time.monotonic()
            found = answer(trained, row.config, asked, scenes, maps if whole else None, place.say)
            seconds = time.monotonic() - started
            right = sum(text == item.question.answer for text, item in zip(found.texts, asked, strict=True))
            share = f"{100 * right / len(asked):.1f}% of {len(asked)}"
            place.say(f"{name}, {row.name}: {share} in {seconds:.0f} s")
            stored["rows"].append(_as_stored(row, found.texts, found.kept, seconds))
            _write(output, results)
    _write(output, results)


def _rows(place: Place, size: Size, trained: Trained, pruners: Sequence[str]) -> Iterator[Row]:
    config: MeteorConfig = trained.model.config
    held = scenes_for(place, "validation", size.validation_images)
    masses_of = masses(trained, final_questions(held.questions, MASS_QUESTIONS_OF_A_GROUP), held)
    if "start" in trained.card:  # trained with its pruning on
        yield from trained_rows(config, trained.card["pruner"], size.tokens, masses_of)
        return
    yield from rows_of(config, size.tokens, masses_of, pruners)
    yield from equal_cost_rows(config, KEEP, pruners)


def _as_stored(row: Row, texts_: Sequence[str], kept: Sequence[int], seconds: float) -> dict[str, Any]:
    return {
        "name": row.name,
        "pruner": row.pruner,
        "keep": row.keep,
        "settings": row.settings,
        "equal": row.equal,
        "budget": row.budget,
        "costs": row.costs(),
        "seconds": round(seconds, 1),
        "kept": [round(sum(kept) / len(kept), 3)] if len(set(kept)) == 1 else list(kept),
        "answers": list(texts_),
    }


def _opened(output: Path, asked: Sequence[Asked], images: Images) -> dict[str, Any]:
    """The results so far. ValueError where they are of other questions."""
    questions = [{"image": item.image, **asdict(item.question)} for item in asked]
    digest = sha256_of_json(questions)
    if output.is_file():
        results: dict[str, Any] = json.loads(output.read_text())
        if results["data"]["questions_sha256"] != digest:
            raise ValueError(f"{output} holds answers to other questions: give another --output")
        return results
    data = {"split": images.split, "seed": images.seed, "images": images.count, "questions_sha256": digest}
    return {"data": data, "hardware": hardware(), "questions": questions, "models": {}}


def _short(card: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in card.items() if key != "loss"}


def _write(output: Path, results: dict[str, Any]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = output.with_name(output.name + ".new")
    scratch.write_text(json.dumps(results, separators=(",", ":")) + "\n")
    os.replace(scratch, output)
