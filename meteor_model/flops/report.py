"""What a count says: FLOPs of one image and one prompt, part by part, with their sums."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TowerFlops:
    """One encoder: FLOPs per image.

    Attributes:
        name: of the encoder.
        tokens: patch tokens of the full grid, then those kept at each boundary.
        tower: embedding, blocks and final norm, on the tokens present.
        selection: scores at the boundaries.
        projector: this encoder's own projector; 0 where all encoders share one.
    """

    name: str
    tokens: tuple[int, ...]
    tower: int
    selection: int
    projector: int


@dataclass(frozen=True)
class LayersFlops:
    """LLM layers [first, end) at prefill, which see the text and `visual_tokens`; and the same for one new token."""

    first: int
    end: int
    visual_tokens: int
    prefill: int
    step: int


@dataclass(frozen=True)
class FlopReport:
    """FLOPs of one image and one prompt up to the first token.

    Attributes:
        encoders: encoder by encoder.
        joint_projector: the one projector of channel_concat, else 0.
        fusion: scores of stage 2; where encoders share a projector they are counted with it.
        text_tokens: text tokens of the prompt.
        layers: runs of LLM layers that see the same tokens.
        decode_selection: scores of stage 3.
        lm_head: the head on one token; not in `total`.
    """

    encoders: tuple[TowerFlops, ...]
    joint_projector: int
    fusion: int
    text_tokens: int
    layers: tuple[LayersFlops, ...]
    decode_selection: int
    lm_head: int

    @property
    def encoding(self) -> int:
        """Towers and the scores at their boundaries."""
        return sum(item.tower + item.selection for item in self.encoders)

    @property
    def projection(self) -> int:
        """All projectors."""
        return self.joint_projector + sum(item.projector for item in self.encoders)

    @property
    def llm(self) -> int:
        """Prefill of all LLM layers, with the scores of stage 3."""
        return self.decode_selection + sum(item.prefill for item in self.layers)

    @property
    def selection(self) -> int:
        """Scores of all three stages, contained in the other sums."""
        return self.fusion + self.decode_selection + sum(item.selection for item in self.encoders)

    @property
    def total(self) -> int:
        """Everything up to the first token but the head."""
        return self.encoding + self.projection + self.fusion + self.llm

    @property
    def step(self) -> int:
        """One generated token: all LLM layers and the head."""
        return self.lm_head + sum(item.step for item in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionary with the parts and their sums, for JSON."""
        sums = ("encoding", "projection", "llm", "selection", "total", "step")
        return {**asdict(self), **{name: getattr(self, name) for name in sums}}

    def table(self) -> str:
        """One line per part: tokens, TFLOPs, share of the total."""
        rows = [(f"encoder {e.name}", " > ".join(map(str, e.tokens)), e.tower) for e in self.encoders]
        rows += [("  scores at boundaries", "", sum(e.selection for e in self.encoders))]
        rows += [("projection", "", self.projection), ("fusion scores", "", self.fusion)]
        rows += [
            (f"LLM layers {run.first}-{run.end - 1}", f"{self.text_tokens} + {run.visual_tokens}", run.prefill)
            for run in self.layers
        ]
        rows += [("  stage 3 scores", "", self.decode_selection), ("total", "", self.total)]
        lines = [f"{'part':<28}{'tokens':>30}{'TFLOPs':>12}{'share':>8}"]
        lines += [f"{name:<28}{tokens:>30}{n / 1e12:>12.4f}{n / self.total:>8.1%}" for name, tokens, n in rows]
        return "\n".join([*lines, f"{'(head, one token)':<58}{self.lm_head / 1e12:>12.4f}"])
