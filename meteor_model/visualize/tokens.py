"""The kept tokens of one image as cells of grids."""

from __future__ import annotations

from itertools import cycle

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.outputs import PruningStats
from meteor_model.vision_meteor import JOINT
from meteor_model.visualize.panels import COLOURS, Cells, Panel, Row


class ImageTokens:
    """The kept tokens of one image of a batch, stage by stage.

    Args:
        config: of the model that kept them.
        stats: what it kept.
        sample: the image's place in `stats`.

    Raises:
        ValueError: where there is no such image.
    """

    def __init__(self, config: MeteorConfig, stats: PruningStats, sample: int) -> None:
        if not 0 <= sample < len(stats.fuse):
            raise ValueError(f"sample {sample} is not one of the {len(stats.fuse)} images of these statistics")
        self.config = config
        self.layer = config.pruning.decode.layer
        self.encode = {name: [cells[sample].tolist() for cells in kept] for name, kept in stats.encode.items()}
        self.grids = config.encoder_grids
        self.colours = dict(zip([*self.grids, JOINT], cycle(COLOURS), strict=False))
        #: Grids that the LLM's visual tokens are cells of.
        self.visual_grids = self.grids
        pool = [(name, cell) for name, kept in self.encode.items() for cell in kept[-1]]
        if config.fusion == "channel_concat":
            side = config.concat_grid
            self.visual_grids = {JOINT: (side, side)}
            pool = [(JOINT, cell) for cell in range(side * side)]
        self.pool_size = len(pool)
        self.fused = [pool[index] for index in stats.fuse[sample].tolist()]

    def encode_table(self) -> tuple[list[tuple[str, str]], list[Row]]:
        """Columns (title, note) and a row per encoder: the full grid, then every boundary."""
        encode = self.config.pruning.encode
        boundaries = max(map(len, self.encode.values())) if encode.enabled else 0
        columns = [("full grid", f"{sum(rows * columns for rows, columns in self.grids.values())} tokens")]
        for boundary in range(1, boundaries + 1):
            criterion = "least like the mean" if boundary < encode.first_deep_segment else "most attended"
            columns.append((f"boundary {boundary}", criterion))
        table = []
        for name, kept in self.encode.items():
            rows, width = self.grids[name]
            everything, colour = range(rows * width), self.colours[name]
            panels = [Panel((rows, width), everything, colour, f"{rows * width}")]
            dense = boundaries - len(kept)  # a convolutional tower is pruned at its output only
            for boundary in range(boundaries):
                cells: Cells = everything if boundary < dense else kept[boundary - dense]
                caption = "runs dense" if boundary < dense else share_of(len(cells), rows * width)
                if dense and dense <= boundary and boundary + 1 >= encode.first_deep_segment:
                    caption += ", by mean"  # it has no attention to score by
                panels.append(Panel((rows, width), cells, colour, caption))
            table.append(Row(f"{name}, {rows} x {width}", colour, panels))
        return columns, table

    def steps(self) -> list[tuple[str, int]]:
        """Tokens of all encoders together after each step up to fusion."""
        steps = [("full grids", sum(rows * columns for rows, columns in self.grids.values()))]
        if self.config.pruning.encode.enabled:
            steps.append(("after encoding", self.pool_size))
        return [*steps, ("after fusion, into the LLM", len(self.fused))]

    def visual_panels(self, kept: Cells | None = None) -> list[Panel]:
        """A panel per grid of the tokens that entered the LLM, or of those among them at the indices `kept`."""
        beyond = [index for index in kept or () if not 0 <= index < len(self.fused)]
        if beyond:
            raise ValueError(f"stage 3 cannot keep token {beyond[0]}: the image has {len(self.fused)} visual tokens")
        chosen = self.fused if kept is None else [self.fused[index] for index in kept]
        panels = []
        for name, grid in self.visual_grids.items():
            cells = [cell for owner, cell in chosen if owner == name]
            entered = sum(owner == name for owner, _ in self.fused)
            pool = len(self.encode[name][-1]) if name in self.encode else self.pool_size
            panels.append(
                Panel(grid, cells, self.colours[name], share_of(len(cells), pool if kept is None else entered))
            )
        return panels


def share_of(count: int, total: int) -> str:
    """A caption."""
    return f"{count} of {total}"
