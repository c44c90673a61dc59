"""The trivial row that acts on the pixels: every tower sees a smaller image.

The image that travels stays what it is; each tower resizes it to its own resolution, which is what changes.
"""

from __future__ import annotations

from dataclasses import replace

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.encoders import EncoderConfig, encoder_class


def resized(config: MeteorConfig, keep: int) -> MeteorConfig:
    """The configuration in which `keep` visual tokens an image enter the language model.

    Raises:
        ValueError: for a tower whose weights belong to one size, or a number that no common factor gives.
    """
    known = _grids_by_count(config)
    if keep not in known:
        near = sorted(sorted(known, key=lambda count: abs(count - keep))[:2])
        numbers = " and ".join(map(str, near))
        raise ValueError(f"no smaller image gives {keep} visual tokens; the nearest give {numbers}")
    return _with_grids(config, known[keep], keep)


def reachable(config: MeteorConfig) -> list[int]:
    """The numbers of visual tokens that smaller images give, ascending. Errors as in `resized`."""
    return sorted(_grids_by_count(config))


def _grids_by_count(config: MeteorConfig) -> dict[int, dict[str, tuple[int, int]]]:
    """Visual tokens of an image -> the towers' grids that give them, all shrunk by one factor."""
    fixed = [item.name for item in config.encoders if not encoder_class(item.family).any_size]
    if fixed:
        raise ValueError(
            f"encoders {fixed} run at the image size of their weights alone, so a smaller image cannot be had: choose "
            "another pruner"
        )
    joint = config.fusion == "channel_concat"
    largest = config.concat_grid if joint else max(max(grid) for grid in config.encoder_grids.values())
    folds = {item.name: item.fold for item in config.encoders}
    known = {}
    for side in range(1, largest + 1):
        grids = {
            name: _shrunk(grid, side, largest, folds[name] if joint else 1)
            for name, grid in config.encoder_grids.items()
        }
        known[side * side if joint else sum(rows * columns for rows, columns in grids.values())] = grids
    return known


def _shrunk(grid: tuple[int, int], side: int, largest: int, fold: int) -> tuple[int, int]:
    rows, columns = (max(1, round(cells * side / largest / fold)) * fold for cells in grid)
    return rows, columns


def _with_grids(config: MeteorConfig, grids: dict[str, tuple[int, int]], keep: int) -> MeteorConfig:
    encoders = [_at(item, config.encoder_grids[item.name], grids[item.name]) for item in config.encoders]
    side = {"concat_grid": round(keep**0.5)} if config.fusion == "channel_concat" else {}
    return MeteorConfig(**{**config.to_dict(), "encoders": encoders, "ranks": None, "calibrated": None, **side})


def _at(encoder: EncoderConfig, before: tuple[int, int], now: tuple[int, int]) -> EncoderConfig:
    if encoder.image_size % before[0]:
        raise ValueError(
            f"encoder {encoder.name!r}: its {before[0]} rows do not divide its image of {encoder.image_size}"
        )
    return replace(encoder, image_size=encoder.image_size // before[0] * now[0])
