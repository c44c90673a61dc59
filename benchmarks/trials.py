"""What a trial of a sweep costs with the towers' maps kept and without: side by side, and that the scores are equal.

A model with random weights, drawings on local disk, the settings of the paper's line; trials with and without maps take
turns in one process. The first turn computes the maps. What a trial does is `tune.trial`'s own code: pruning, lambda on
the prompts of the training split, then the questions by likelihood alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from optuna.trial import FixedTrial
from ray.tune.result import DONE

from benchmarks.results_file import RESULTS, hardware, write_results
from meteor_model.architectures import build_config
from meteor_model.configuration_meteor import DecodePruning, EncodePruning, FusePruning, PruningConfig
from meteor_model.image_processing_meteor import MeteorImageProcessor
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from meteor_model.tokenizer import train_tokenizer
from pipelines.data import shards
from pipelines.data.build import make_shards
from pipelines.data.sources.openmoji import OpenMoji, OpenMojiSettings
from pipelines.evaluation.suite import Suite
from pipelines.evaluation.tower_store import default_folder
from pipelines.registry.folder import export_model
from tune.defaults import paper_line
from tune.finals import load_score
from tune.folder import SweepFolder
from tune.settings import SweepSettings
from tune.space import Space
from tune.study import as_plain
from tune.trial import EvaluateTrial, TrialContext

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PAPER = {
    "tiny": PruningConfig(
        EncodePruning(totals=(96, 64, 64)), FusePruning(keep=32), DecodePruning(layer=2, target_mean=16.0)
    ),
    "small": PruningConfig(
        EncodePruning(totals=(400, 280, 192)), FusePruning(keep=96), DecodePruning(layer=2, target_mean=48.0)
    ),
}


def prepared(name: str, questions: int, folder: Path) -> tuple[TrialContext, list[dict[str, Any]]]:
    """A model and its data in a folder, and the settings of the paper's line as Tune gives them to trials."""
    size = {"tiny": 64, "small": 336}[name]
    source = OpenMoji(OpenMojiSettings(image_size=size, code_points=max(8, questions // 6), heldout_code_points=0))
    make_shards(source, str(folder / "data"))
    manifest = shards.load_manifest(str(folder / "data"))
    tokenizer = train_tokenizer(["What colour is the background? red", "Where is the drawing? left"], 300)
    torch.manual_seed(0)
    config = build_config(name, PAPER[name], 300, IDS, 3)
    model = MeteorForConditionalGeneration(config).eval()
    processor = MeteorProcessor(
        MeteorImageProcessor(config.image_size), tokenizer, config.tokens_per_image, template="short"
    )
    sweep = SweepFolder(str(folder / "sweep"))
    export_model(model, processor, Path(sweep.base))
    settings = SweepSettings(questions=questions, calibration_samples=questions, storage=str(folder))
    search, final = (
        Suite.of(manifest, "heldout", questions, part=part).fitted(manifest) for part in ("search", "final")
    )
    space = Space(config, {})
    line = [space.sample(FixedTrial(choices)) for choices in paper_line(space)]
    changes = [{"pruning": as_plain(one.pruning), "ranks": one.ranks, "towers": None, "of": ""} for one in line]
    return TrialContext("sweep", sweep, search, final, manifest.url, settings), changes


class Runner:
    """One actor of a sweep, in this process.

    Args:
        context: of its trials.
        gib: for maps.
    """

    def __init__(self, context: TrialContext, gib: float) -> None:
        mine = replace(context, settings=replace(context.settings, tower_maps_gib=gib))

        class InThisProcess(EvaluateTrial):
            def setup(self, config: dict[str, Any], _: Any = None) -> None:
                super().setup(config, mine)

        self._kind = InThisProcess
        self._trial: EvaluateTrial | None = None

    def seconds(self, name: str, change: dict[str, Any]) -> float:
        """Run one trial."""
        config = {"trial": name, "change": json.dumps(change)}
        if self._trial is None:
            self._trial = self._kind(config)
        else:
            self._trial.reset_config(config)
        begun = time.perf_counter()
        while not (result := self._trial.step()).get(DONE):
            pass
        if "failed" in result:
            raise ValueError(f"trial {name} failed: {result['failed']}")
        return time.perf_counter() - begun


@contextmanager
def own_temp_folder(folder: Path) -> Iterator[Path]:
    """The maps of this benchmark lie there, and those of others are not touched."""
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield folder
    finally:
        tempfile.tempdir = before


def measure(name: str, questions: int) -> dict[str, Any]:
    """Seconds of each trial of the line with and without maps, and whether their scores are equal to the bit."""
    with tempfile.TemporaryDirectory(prefix="meteor-trials-") as scratch, own_temp_folder(Path(scratch)) as folder:
        context, changes = prepared(name, questions, folder)
        without, with_maps = Runner(context, 0.0), Runner(context, 16.0)
        warm = [without.seconds("warm-000", changes[0]), with_maps.seconds("warm-001", changes[0])]
        pairs, equal = [], True
        for number, change in enumerate(changes):
            names = f"search-{number:03d}", f"search-{number:03d}-maps"
            pairs.append((without.seconds(names[0], change), with_maps.seconds(names[1], change)))
            first, second = (load_score(context.folder, one) for one in names)
            equal = equal and first.records == second.records
        held = sum(path.stat().st_size for path in default_folder().iterdir())
    ratios = [before / after for before, after in pairs]
    return {
        "model": name,
        "questions": context.search.questions,
        "lambda_prompts": context.settings.calibration_samples,
        "trials": len(pairs),
        "seconds_without": round(statistics.median(before for before, _ in pairs), 3),
        "seconds_with": round(statistics.median(after for _, after in pairs), 3),
        "seconds_of_the_first": [round(one, 3) for one in warm],
        "without_over_with": [round(one, 2) for one in (statistics.median(ratios), min(ratios), max(ratios))],
        "maps_mib": round(held / 2**20, 1),
        "scores_equal_to_the_bit": equal,
    }


def main() -> None:
    """Measure, say, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(PAPER), default=["tiny"])
    parser.add_argument("--questions", type=int, default=256)
    parser.add_argument("--output", type=Path, default=RESULTS / "trials.json")
    options = parser.parse_args()
    rows = [measure(name, options.questions) for name in options.models]
    for row in rows:
        print(json.dumps(row))
    write_results(options.output, {"rows": rows, "hardware": hardware()})


if __name__ == "__main__":
    main()
