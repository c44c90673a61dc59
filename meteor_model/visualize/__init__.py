"""Pictures of what the model does: the cells that each stage keeps, feature-map ranks, attention on visual tokens.

from_model  from a model, an image and prompts: `explain`, or `explain_kept`, `explain_ranks`, `explain_vav` alone
sheets      from what a pass returned: `draw_kept`, `draw_overview`
compare     from a model, an image and a prompt: `explain_pruners`, every pruner side by side
charts      from numbers: `draw_ranks`, `draw_head_vav`
calibration `draw_calibration`: expected ranks with intervals, datasets side by side
"""

from meteor_model.visualize.calibration import draw_calibration
from meteor_model.visualize.charts import draw_head_vav, draw_ranks, rank_report
from meteor_model.visualize.compare import draw_pruners, explain_pruners, look_under
from meteor_model.visualize.from_model import explain, explain_kept, explain_ranks, explain_vav
from meteor_model.visualize.panels import COLOURS
from meteor_model.visualize.sheets import draw_kept, draw_overview

__all__ = [
    "COLOURS",
    "draw_calibration",
    "draw_head_vav",
    "draw_kept",
    "draw_overview",
    "draw_pruners",
    "draw_ranks",
    "explain",
    "explain_kept",
    "explain_pruners",
    "explain_ranks",
    "explain_vav",
    "look_under",
    "rank_report",
]
