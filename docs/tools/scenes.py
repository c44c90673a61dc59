"""Draw docs/images/scenes.png, scenes of the final part with what they are asked: `python -m docs.tools.scenes`."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from pipelines.data.sources.scenes import SIDE, Question, Scene, compose
from pipelines.data.sources.scenes.lettering import fonts_folder

PAGE = Path(__file__).resolve().parents[2] / "docs" / "images" / "scenes.png"
COLUMNS, ROWS = 5, 2
SHOWN = 5  # questions of a scene
GAP, LINE = 10, 13
CELL = (SIDE + GAP, SIDE + GAP + (2 * SHOWN) * LINE)


def chosen(scene: Scene) -> list[Question]:
    """Some questions of a scene, of different kinds and of all its groups."""
    by_kind = {question.kind: question for question in reversed(scene.questions)}
    of_group: dict[str, list[Question]] = {}
    for question in reversed(by_kind.values()):
        of_group.setdefault(question.group, []).append(question)
    in_turn = [
        question for place in range(SHOWN) for found in of_group.values() for question in found[place : place + 1]
    ]
    return in_turn[:SHOWN]


def sheet(first: int = 1) -> Image.Image:
    """The picture."""
    page = Image.new("RGB", (COLUMNS * CELL[0] + GAP, ROWS * CELL[1] + GAP), "white")
    draw = ImageDraw.Draw(page)
    plain, strong = (
        ImageFont.truetype(str(fonts_folder() / f"{name}.ttf"), 10) for name in ("DejaVuSans", "DejaVuSans-Bold")
    )
    for place in range(COLUMNS * ROWS):
        scene = compose("final", 0, first + place)
        x, y = GAP + place % COLUMNS * CELL[0], GAP + place // COLUMNS * CELL[1]
        page.paste(Image.fromarray(scene.pixels), (x, y))
        for line, question in enumerate(chosen(scene)):
            top = y + SIDE + 3 + 2 * line * LINE
            draw.text((x, top), question.prompt, fill="#555555", font=plain)
            draw.text((x + 8, top + LINE - 1), question.answer, fill="black", font=strong)
    return page


def main() -> None:
    """Write the picture."""
    sheet().quantize(128, dither=Image.Dither.NONE).save(PAGE, optimize=True)


if __name__ == "__main__":
    main()
