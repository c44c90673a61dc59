"""Train models on composed scenes and ask them under every pruner: `make train-scenes`, `make bench-quality`.

    python -m benchmarks.quality train       maps, then the dense model; goes on where it stopped
    python -m benchmarks.quality prune       METEOR from the dense model, stages 1 and 2 on in training
    python -m benchmarks.quality rival       the dense model trained on with another pruner, as long
    python -m benchmarks.quality ask         every row of the models' that is not stored yet
    python -m benchmarks.quality statistics  tables and picture, from stored answers alone
    python -m benchmarks.quality sheet       what the models keep of one image, for two questions
    python -m benchmarks.quality all         one after the other

Everything is resumable: maps, trainings and rows that are there are kept. docs/results.md says what was done.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.quality.experiment import Place, ask, scenes_for, train_dense, train_meteor, train_rival
from benchmarks.quality.models import MODELS, VARIANTS, open_trained
from benchmarks.quality.pictures import draw_curves
from benchmarks.quality.sheet import draw_sheet
from benchmarks.quality.sizes import SIZES
from benchmarks.quality.statistics import summarise, table
from benchmarks.results_file import RESULTS
from pipelines.parts import default_parts_dir

RESULT = RESULTS / "quality.json"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "prune", "rival", "ask", "statistics", "sheet", "all"))
    parser.add_argument("--size", choices=sorted(SIZES), default="full")
    parser.add_argument("--quick", action="store_true", help="the size `quick`, under names and a root of its own")
    parser.add_argument("--dense", default="dense-0", help="name of the dense model")
    parser.add_argument("--meteor", default="meteor-0", help="name of the one made from it")
    parser.add_argument("--variant", choices=sorted(VARIANTS), default="paper", help="METEOR's settings in `prune`")
    parser.add_argument("--rival", help="name of the one that a rival makes of it; by default PRUNER-SEED")
    parser.add_argument("--keep", type=int, default=36, help="visual tokens that the rival keeps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=0, help="of the training; 0: the size's")
    parser.add_argument("--models", nargs="*", help="asked ones; by default those that are there")
    parser.add_argument(
        "--pruners", nargs="*", default=[], help="rows of these pruners alone; of `rival` the one to train"
    )
    parser.add_argument("--questions", type=int, default=0, help="of a group; 0: the size's")
    parser.add_argument("--split", choices=("final", "validation"), default="final", help="whose questions are asked")
    parser.add_argument("--anew", action="store_true", help="ask stored rows again")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--root", type=Path, default=Path(".meteor/quality"), help="maps and checkpoints")
    parser.add_argument("--output", type=Path, help="by default benchmarks/results/quality.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    size, root, output = SIZES["quick" if options.quick else options.size], options.root, options.output or RESULT
    if options.quick:
        root, output = root / "quick", options.output or root / "quick" / "quality.json"
    place = Place(root, default_parts_dir(), torch.device(options.device), say)
    if options.command in ("train", "all"):
        train_dense(place, size, options.dense, options.seed, options.steps)
    if options.command in ("prune", "all"):
        train_meteor(place, size, options.meteor, options.dense, options.seed, options.steps, options.variant)
    if options.command == "rival":
        (pruner,) = options.pruners
        name = options.rival or f"{pruner.replace('_', '-')}-{options.seed}"
        train_rival(place, size, name, options.dense, pruner, options.keep, options.seed, options.steps)
    if options.command in ("ask", "all"):
        known = [name for name in (options.dense, options.meteor) if place.model_folder(name).is_dir()]
        names = options.models or known
        if not names:
            raise SystemExit(f"no trained model is in {root / 'models'} or {MODELS}: `make train-scenes` trains them")
        if options.anew:
            output.unlink(missing_ok=True)
        ask(place, size, names, output, options.pruners, options.questions, options.split)
    if options.command == "sheet":
        names = [options.dense, *(options.models or [options.meteor])]
        models = [open_trained(place.model_folder(name), place.parts_of(size)) for name in names]
        path = output.with_name(f"{output.stem}-kept.png")
        draw_sheet(models, scenes_for(place, "validation", size.validation_images), path)
        print(f"written: {path}")
    if options.command in ("statistics", "all", "ask"):
        report(output, output.with_suffix(".png"))


def report(path: Path, picture: Path) -> None:
    """Redo all statistics of stored answers; tables to the screen, curves to a picture."""
    results = json.loads(path.read_text())
    summary = summarise(results)
    for model in summary:
        print(f"\n{model}\n\n{table(summary, model)}", flush=True)
    questions, first = results["questions"], next(iter(summary))
    note = f"{len(questions)} questions on {len({item['image'] for item in questions})} composed images"
    draw_curves(summary[first], picture, f"{first}: {note}; one seed; intervals are 95 %, by image")
    print(f"written: {picture}")


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


if __name__ == "__main__":
    main()
