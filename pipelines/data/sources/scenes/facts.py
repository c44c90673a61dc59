"""What a scene shows, as values: everything that its questions are asked of."""

from dataclasses import dataclass

from pipelines.data.sources.scenes.parts import Familiarity, Split, TextKind


@dataclass(frozen=True)
class DrawnThing:
    """A drawing in a scene.

    Attributes:
        code_point: of the drawing.
        category: one of twelve.
        name: one word that training teaches for it, or "".
        familiarity: whether training has seen it.
        half: "top" or "bottom" of the picture; "" where it lies across the middle.
        side: "left" or "right".
        box: left, top, right and bottom of what was painted, in pixels.
    """

    code_point: str
    category: str
    name: str
    familiarity: Familiarity
    half: str
    side: str
    box: tuple[int, int, int, int]

    @property
    def quadrant(self) -> str:
        """As "top left"; "" where it lies across the middle."""
        return f"{self.half} {self.side}" if self.half else ""


@dataclass(frozen=True)
class Sign:
    """A written text: a sign of a scene, or a line of a board.

    Attributes:
        text: capitals or digits.
        kind: of text.
        font: file name without extension.
        familiarity: whether training has seen the font.
        height: "top", "middle" or "bottom" of a scene; "" on a board.
        side: "left" or "right"; "" where its middle is near that of the picture.
    """

    text: str
    kind: TextKind
    font: str
    familiarity: Familiarity
    height: str
    side: str


@dataclass(frozen=True)
class Facts:
    """All of a scene.

    Attributes:
        split: that it belongs to.
        board: lines of text alone; else drawings, and up to two signs.
        background: a colour's name.
        drawings: at most four, row by row; none on a board.
        signs: from top to bottom; of a board its lines.
    """

    split: Split
    board: bool
    background: str
    drawings: tuple[DrawnThing, ...]
    signs: tuple[Sign, ...]
