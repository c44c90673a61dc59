"""Padding and throughput of packed steps against steps with one sample a row: `make bench-packing`.

1. padding    share of the places of a worker's batches that hold no token, for three sets of samples: drawings as
              `make pretrain` streams them; as many tokens of image with texts of very unequal length; long texts
2. steps      forward and backward of the same steps, one sample a row as they come, by length, and packed: tokens a
              second of the architecture `tiny`, in turns
3. questions  eight questions of an image: a row each, by length, against one row in which the image comes once

Seconds are those of this process's CPU time on one thread, so that other work on the machine counts less; the ratios
are taken within a round. Writes benchmarks/results/packing.json. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.clocks import take_turns
from benchmarks.harness import SPECIAL_IDS
from benchmarks.results_file import RESULTS, hardware, write_results
from jobs.recipes import recipe
from meteor_model.architectures import architecture, build_config
from meteor_model.collate import collate
from meteor_model.image_processing_meteor import MeteorImageProcessor
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.packing import collate_packed, share_beginning
from meteor_model.processing_meteor import MeteorProcessor
from meteor_model.tokenizer import train_tokenizer
from pipelines.data.sample_id import SampleId
from pipelines.data.schema import Row, parse_sample
from pipelines.data.sources import TRAIN
from pipelines.data.sources.openmoji import OpenMoji, OpenMojiSettings
from pipelines.training.batches import BatchReader, MicroBatch, Packing, Share

PAD, IMAGE = 0, 3
SEED = 0
QUESTIONS = 8
BATCHINGS = ("plan", "length", "packed")
#: Samples of a micro-batch, and micro-batches of a worker's step.
SIZES = ((4, 1), (4, 4), (16, 1), (16, 4))


def drawings(count: int) -> tuple[list[Row], int]:
    """Samples of the recipe `tiny` and its longest row; all of one picture, since only lengths differ here."""
    settings = recipe("pretrain", "tiny")
    source = OpenMoji(OpenMojiSettings(code_points=32, variants=-(-count // 32)))
    raw = [parse_sample(key, members) for key, members in islice(source.samples(TRAIN), count)]
    tokenizer = train_tokenizer((turn.text for sample in raw for turn in sample.turns), settings.model.vocab_size)
    tokens = settings.pruning.fuse.keep
    size = architecture(settings.model.architecture).image_size
    processor = MeteorProcessor(MeteorImageProcessor(size), tokenizer, tokens, template=settings.model.template)
    rows = []
    for place, sample in enumerate(raw):
        encoded = processor.encode([(turn.role, turn.text) for turn in sample.turns], len(sample.images))
        image = tokenizer.convert_tokens_to_ids("<image>")
        ids = np.asarray(encoded.input_ids)
        rows.append(_row(place, np.where(ids == image, IMAGE, ids + IMAGE + 1), len(sample.images), size))
    return rows, settings.data.max_length


def spread(count: int, visual: int, median: int, sigma: float, longest: int) -> tuple[list[Row], int]:
    """An image each, and texts whose lengths are lognormal: a spread as instruction data have, cut at `longest`."""
    random, size = np.random.default_rng(SEED), architecture("tiny").image_size
    texts = np.exp(random.normal(np.log(median), sigma, count)).astype(int).clip(8, longest - visual)
    ids = [np.concatenate([np.full(visual, IMAGE), random.integers(10, 250, text)]) for text in texts]
    return [_row(place, own, 1, size) for place, own in enumerate(ids)], longest


def _row(place: int, ids: np.ndarray, images: int, size: int) -> Row:
    """A sample whose last tokens are learned."""
    labels = np.where(np.arange(len(ids)) < len(ids) - 6, -100, ids)
    pixels = np.random.default_rng(place).integers(0, 256, images * 3 * size**2, dtype=np.uint8).tobytes()
    return Row(place, SampleId(0, 0, 0, place, str(place)), "", "", ids.tolist(), labels.tolist(), pixels, images, size)


def steps_of(rows: Sequence[Row], batching: str, capacity: int, micro: int, forwards: int) -> list[list[MicroBatch]]:
    """The micro-batches of one worker's steps, by the code of the training."""
    size = architecture("tiny").image_size
    made: dict[str, Any] = {"pad_token_id": PAD, "image_size": size}
    packing = Packing(partial(collate_packed, **made), capacity) if batching == "packed" else None
    share = Share(0, 1, forwards)
    reader = BatchReader(partial(collate, **made), PAD, micro, share, batching == "length", packing)
    whole = len(rows) // (micro * forwards) * micro * forwards
    cuts = range(0, whole, micro)
    return list(reader.read(iter([list(rows[cut : cut + micro]) for cut in cuts]), 0, whole))


def padding_of(steps: Sequence[Sequence[MicroBatch]]) -> float:
    """Share of the places that hold no token."""
    batches = [batch for step in steps for batch in step]
    return 1 - sum(batch.tokens for batch in batches) / sum(batch.cells for batch in batches)


def measure_padding(rows: Sequence[Row], capacity: int) -> dict[str, Any]:
    """Part 1 of one set of samples, for sizes of a micro-batch and of a step."""
    found = {}
    for micro, forwards in SIZES:
        shares = {name: steps_of(rows, name, capacity, micro, forwards) for name in BATCHINGS}
        found[f"{forwards} of {micro}"] = {name: round(padding_of(steps), 4) for name, steps in shares.items()}
    lengths = [len(row.input_ids) for row in rows]
    return {"samples": len(rows), "mean_tokens": round(statistics.mean(lengths), 1), "row": capacity, "padding": found}


def tiny_model(tokens: int) -> MeteorForConditionalGeneration:
    """The architecture of the recipe `tiny` with random weights."""
    torch.manual_seed(SEED)
    pruning = recipe("pretrain", "tiny").pruning
    assert pruning.fuse.keep == tokens, "placeholders are those of the recipe"
    return MeteorForConditionalGeneration(build_config("tiny", pruning, 4096, SPECIAL_IDS, IMAGE)).train()


def train(model: MeteorForConditionalGeneration, batches: Sequence[Mapping[str, torch.Tensor]]) -> float:
    """Forward and backward of some batches; the summed loss."""
    model.zero_grad()
    total = 0.0
    for inputs in batches:
        loss = model(**inputs, num_items_in_batch=1.0).loss
        loss.backward()
        total += loss.item()
    return total


def take_valued_turns(
    calls: Mapping[str, Callable[[], float]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """CPU seconds of every call in every round, in turns, after one that is thrown away; and what they return."""
    values: dict[str, float] = {}

    def keep(name: str) -> None:
        values[name] = calls[name]()

    kept = {name: partial(keep, name) for name in calls}
    return take_turns(kept, rounds, torch.device("cpu"), clock=time.process_time), values


def compared(batches: Mapping[str, Sequence[Mapping[str, torch.Tensor]]], tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of every way to batch the same samples, and how much faster than the second each is."""
    model = tiny_model(recipe("pretrain", "tiny").pruning.fuse.keep)
    spent, losses = take_valued_turns({name: partial(train, model, own) for name, own in batches.items()}, rounds)
    base = list(batches)[-2]
    found: dict[str, Any] = {"rounds": rounds, "tokens": tokens, "against": base}
    for name, seconds in spent.items():
        ratios = [slow / fast for slow, fast in zip(spent[base], seconds, strict=True)]
        found[name] = {
            "cpu_tokens_per_s": round(tokens / statistics.median(seconds), 1),
            "faster": round(statistics.median(ratios), 3),
            "faster_range": [round(min(ratios), 3), round(max(ratios), 3)],
            "loss_difference": abs(losses[name] / losses[base] - 1),
        }
    return found


def measure_steps(rows: Sequence[Row], capacity: int, rounds: int) -> dict[str, Any]:
    """Part 2: one step of one forward of 16 samples, the micro-batch of the recipe."""
    steps = {name: steps_of(rows[:16], name, capacity, 16, 1) for name in BATCHINGS}
    batches = {name: [batch.inputs for step in own for batch in step] for name, own in steps.items()}
    tokens = sum(batch.tokens for step in steps["plan"] for batch in step)
    shapes = {name: list(own[0]["input_ids"].shape) for name, own in batches.items()}
    return {"shapes": shapes, **compared(batches, tokens, rounds)}


def measure_questions(rounds: int) -> dict[str, Any]:
    """Part 3: two images with eight questions of 8 to 22 tokens each; the tokens are those of the rows of their own."""
    random, size = np.random.default_rng(SEED), architecture("tiny").image_size
    visual, pools = recipe("pretrain", "tiny").pruning.fuse.keep, []
    for image in range(2):
        rows = []
        for question in range(QUESTIONS):
            text = random.integers(10, 250, 8 + 2 * question)
            rows.append(_row(image, np.concatenate([[1], np.full(visual, IMAGE), text]), 1, size))
        pools.append(rows)
    examples = [[_example(row) for row in rows] for rows in pools]
    alone = collate([one for rows in examples for one in rows], PAD, size)
    shared = collate_packed([[share_beginning(rows)] for rows in examples], PAD, size)
    tokens = sum(len(row.input_ids) for rows in pools for row in rows)
    return {
        "images": len(pools),
        "questions": QUESTIONS,
        "shapes": {"separate": list(alone["input_ids"].shape), "one row": list(shared["input_ids"].shape)},
        **compared({"separate": [alone], "one row": [shared]}, tokens, rounds),
    }


def _example(row: Row) -> dict[str, Any]:
    pixels = torch.frombuffer(bytearray(row.images), dtype=torch.uint8)
    images = pixels.view(row.num_images, 3, row.image_size, row.image_size)
    return {"input_ids": row.input_ids, "labels": row.labels, "images": images}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=512, help="of each set, for the padding")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "packing.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    start = time.perf_counter()
    visual = recipe("pretrain", "tiny").pruning.fuse.keep
    sets = {
        "drawings": drawings(options.samples),
        "unequal texts": spread(options.samples, visual, 40, 0.9, 512),
        "long texts": spread(options.samples, 576, 150, 1.0, 2048),
    }
    results: dict[str, Any] = {
        "hardware": {**hardware(), "threads": 1, "torch": torch.__version__},
        "padding": {name: measure_padding(*own) for name, own in sets.items()},
        "steps": {name: measure_steps(*sets[name], rounds=options.rounds) for name in ("drawings", "unequal texts")},
        "questions": measure_questions(options.rounds),
    }
    results["minutes"] = round((time.perf_counter() - start) / 60, 1)
    write_results(options.output, results)


if __name__ == "__main__":
    main()
