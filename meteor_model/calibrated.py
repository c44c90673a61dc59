"""Numbers that were measured or solved under certain settings, and those settings: one is of no use without the other.

    lam     of stage 3: solved for a target mean and one way of asking one LLM about the tokens that stages 1, 2 leave
    ranks   of stage 1: measured by one estimator on the maps of these towers, at these boundaries

A configuration keeps with each number what it belongs to (`MeteorConfig.calibrated`, in config.json). A number that
stays while one of its settings changes is an error that names both; a new number belongs to what is set with it. A
folder without such a record is taken at its word: its numbers belong to the settings beside them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meteor_model.configuration_meteor import MeteorConfig

Record = dict[str, dict[str, Any]]
"""Number -> {"value": the number, "settings": {dotted name: value}}."""

_ANEW = {
    "lam": "set pruning.decode.lam to None and solve it anew: `python jobs/calibrate.py --model MODEL --target-mean N` "
    "on held-back prompts, or meteor_model.pruners.counts.solve_lambda on your own",
    "ranks": "measure them anew: `python jobs/calibrate.py --model MODEL`, and set them together with it "
    "(with_pruning(pruning, ranks)), or share by token count alone (ranks None)",
}
_LLM = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")


class StaleCalibrationError(ValueError):
    """A calibrated number is set beside other settings than those it belongs to."""


def settings_of_lam(config: MeteorConfig) -> dict[str, Any]:
    """What the number of tokens that a lambda keeps depends on, by dotted name."""
    pruning = config.pruning
    decode, fuse = pruning.decode, pruning.fuse
    return _plain(
        {
            "pruning.decode.target_mean": decode.target_mean,
            "pruning.decode.layer": decode.layer,
            "pruning.decode.num_heads": config.decode_heads,
            "pruning.decode.query": decode.query,
            "pruning.decode.k_min": decode.k_min,
            "pruning.decode.criterion": decode.criterion,
            "pruning.decode.budget": decode.budget,
            "pruning.decode.options": decode.options,
            "pruning.fuse.enabled": fuse.enabled,
            "pruning.fuse.keep": fuse.keep if fuse.enabled else None,
            "pruning.fuse.criterion": fuse.criterion if fuse.enabled else None,
            "pruning.fuse.options": fuse.options if fuse.enabled else None,
            **_stage1(config),
            **later_settings(config),
            "budgets of stage 1": config.encode_budgets,
            "fusion": config.fusion,
            "concat_grid": config.concat_grid if config.fusion == "channel_concat" else None,
            **_towers(config),
            **{f"text_config.{name}": getattr(config.text_config, name) for name in _LLM},
        }
    )


#: Settings of stage 2 that came after lambdas were stored with theirs, and what they were then.
_LATER = {"pruning.fuse.floor": 0.0, "pruning.fuse.merge": "none", "pruning.fuse.positions": "renumbered"}


def later_settings(config: MeteorConfig) -> dict[str, Any]:
    """Those that are not what they were."""
    fuse = config.pruning.fuse
    now: dict[str, Any] = {"pruning.fuse.positions": fuse.positions}  # (stage 1 alone drops tokens, too)
    if fuse.enabled:
        now |= {"pruning.fuse.floor": fuse.floor, "pruning.fuse.merge": fuse.merge}
    return {name: value for name, value in now.items() if value != _LATER[name]}


def settings_of_ranks(config: MeteorConfig) -> dict[str, Any]:
    """What the rank of a feature map depends on, by dotted name."""
    encode = config.pruning.encode
    return _plain(
        {
            "pruning.encode.rank_estimator": encode.rank_estimator,
            "segments of pruning.encode.totals": len(encode.totals),
            **_towers(config),
        }
    )


def settled(config: MeteorConfig) -> Record:
    """The record of a configuration whose other settings are checked.

    Raises:
        StaleCalibrationError: a number that stayed while a setting that it belongs to changed; it names both, and the
            command that finds it anew.
    """
    record: Record = {}
    if config.pruning.decode.lam is not None:
        known = config.calibrated.get("lam")
        record["lam"] = _settle("lam", config.pruning.decode.lam, settings_of_lam(config), known)
    if config.ranks is not None:
        known = config.calibrated.get("ranks")
        if known and known.get("value") == config.ranks and not config.pruning.encode.enabled:
            record["ranks"] = known  # they decide nothing now, and are checked when they do again
        else:
            record["ranks"] = _settle("ranks", config.ranks, settings_of_ranks(config), known)
    return record


def _settle(name: str, value: Any, now: dict[str, Any], known: Mapping[str, Any] | None) -> dict[str, Any]:
    if known is not None and known.get("value") == value:
        changed = [
            f"{setting} {_shown(before)}, now it is {_shown(now.get(setting, _LATER.get(setting)))}"
            for setting, before in {**_LATER, **known.get("settings", {})}.items()
            if now.get(setting, _LATER.get(setting)) != before
        ]
        if changed:
            which = f"pruning.decode.lam {value:.6g} was solved" if name == "lam" else "ranks were measured"
            raise StaleCalibrationError(f"{which} for {'; for '.join(changed)}: {_ANEW[name]}")
    return {"value": value, "settings": now}


def _stage1(config: MeteorConfig) -> dict[str, Any]:
    encode = config.pruning.encode
    used: dict[str, Any] = {"pruning.encode.enabled": encode.enabled}
    for name in ("totals", "first_deep_segment", "score_queries", "criterion", "budget", "options"):
        used[f"pruning.encode.{name}"] = getattr(encode, name) if encode.enabled else None
    return used


def _towers(config: MeteorConfig) -> dict[str, Any]:
    towers = {f"encoder {item.name}": asdict(item) for item in config.encoders}
    return {"encoders": [item.name for item in config.encoders], **towers, "image_size": config.image_size}


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """As config.json gives it back: lists for tuples, text for keys."""
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:120]}..."
