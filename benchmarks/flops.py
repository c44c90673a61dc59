"""Our FLOPs beside the published table: `make flops`. Counted on the meta device, no weights, some ten seconds.

Writes benchmarks/results/flops.json. See benchmarks/README.md for what is counted and what is ours.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from meteor_model.architectures import build_config
from meteor_model.configuration_meteor import DecodePruning, EncodePruning, FusePruning, MeteorConfig, PruningConfig
from meteor_model.encoders import encoder_class
from meteor_model.flops import TEXT_TOKENS, FlopReport, count_flops
from meteor_model.rivals import FastV

RESULTS = Path(__file__).parent / "results"
DENSE = PruningConfig(EncodePruning(enabled=False), FusePruning(enabled=False), DecodePruning(enabled=False))
#: Vicuna's vocabulary and the placeholder.
VOCABULARY, IMAGE_TOKEN = 32001, 32000

#: Tokens that leave the encoders, that enter the LLM, and that stay on average: METEOR's own.
LEAVE, FUSED, MEAN = 1193, 576, 242
#: Ours: share of the transformer towers' tokens that the first two boundaries leave.
SHARES = (0.5, 0.25)


@dataclass(frozen=True)
class Row:
    """One line of the table: TFLOPs published and counted, and the bound that ours must meet."""

    method: str
    visual_tokens: int
    published: float
    ours: float
    within: float | None
    """Largest relative difference; None: ours must not be larger than published."""

    @property
    def holds(self) -> bool:
        if self.within is None:
            return self.ours <= self.published
        return abs(self.ours / self.published - 1) <= self.within


def llm_config(name: str, pruning: PruningConfig) -> MeteorConfig:
    """A named architecture with Vicuna's vocabulary."""
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return build_config(name, pruning, VOCABULARY, ids, IMAGE_TOKEN)


def meteor_pruning(name: str, layer: int = 2) -> PruningConfig:
    """METEOR's counts on a named architecture; boundary totals by `SHARES` of its transformer towers' tokens."""
    dense = llm_config(name, DENSE)
    tokens = sum(dense.encoder_tokens[e.name] for e in dense.encoders if encoder_class(e.family).prunes_between_blocks)
    totals = (*(int(tokens * share) for share in SHARES), LEAVE)
    return PruningConfig(
        EncodePruning(totals=totals), FusePruning(keep=FUSED), DecodePruning(layer=layer, target_mean=float(MEAN))
    )


def count_all() -> tuple[list[Row], dict[str, tuple[MeteorConfig, FlopReport]]]:
    """The table, and config and report of every variant."""
    eagle, pruning = llm_config("eagle_x4_7b", DENSE), meteor_pruning("meteor_x4_7b")
    meteor, later = llm_config("meteor_x4_7b", pruning), llm_config("meteor_x4_7b", meteor_pruning("meteor_x4_7b", 3))
    encoders_only = replace(pruning, decode=DecodePruning(enabled=False))
    fastv = FastV(layer=2, keep=256)
    reports = {
        "EAGLE": (eagle, count_flops(eagle)),
        "FastV": (eagle, count_flops(eagle, schedule=fastv.schedule)),
        "METEOR": (meteor, count_flops(meteor)),
        "METEOR, stage 3 after layer 3": (later, count_flops(later)),
        "METEOR, stages 1 and 2": (both := llm_config("meteor_x4_7b", encoders_only), count_flops(both)),
    }
    tera = {name: report.total / 1e12 for name, (_, report) in reports.items()}
    rows = [
        Row("EAGLE", 1024, 26.21, tera["EAGLE"], 0.03),
        Row("FastV", 256, 16.83, tera["FastV"], 0.03),
        Row("METEOR", MEAN, 13.42, tera["METEOR"], None),
    ]
    return rows, reports


def describe(config: MeteorConfig, report: FlopReport) -> dict[str, Any]:
    """One variant for the results file."""
    encode = config.pruning.encode
    return {
        "fusion": config.fusion,
        "boundary_totals": list(encode.totals) if encode.enabled else None,
        "ranks": config.ranks or "equal",
        "encoder_budgets": {name: list(budget) for name, budget in config.encode_budgets.items()},
        **report.as_dict(),
    }


def main() -> None:
    start = time.perf_counter()
    rows, reports = count_all()
    seconds = time.perf_counter() - start
    for name, (_, report) in reports.items():
        print(f"\n{name}\n{report.table()}")
    print(f"\n{'method':<12}{'visual tokens':>14}{'published':>11}{'ours':>9}{'difference':>12}  bound")
    for row in rows:
        bound = "at or below" if row.within is None else f"within {row.within:.0%}"
        print(
            f"{row.method:<12}{row.visual_tokens:>14}{row.published:>11.2f}{row.ours:>9.2f}"
            f"{row.ours / row.published - 1:>12.1%}  {bound}: {'holds' if row.holds else 'MISSED'}"
        )
    saved = 1 - rows[2].ours / rows[0].ours
    print(f"\nMETEOR costs {saved:.0%} less than EAGLE (published: 49%); counted in {seconds:.1f} s")
    results = {
        "convention": "2 FLOPs per multiply-add; products, convolutions, attention; towers + projectors + LLM prefill",
        "text_tokens": TEXT_TOKENS,
        "table": [{**asdict(row), "holds": row.holds} for row in rows],
        "variants": {name: describe(*pair) for name, pair in reports.items()},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "flops.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"written: {RESULTS / 'flops.json'}")
    if not all(row.holds for row in rows):
        raise SystemExit("a bound of the published table is missed")


if __name__ == "__main__":
    main()
