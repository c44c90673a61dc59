"""Small data in the place of the placeholders of README.md and docs/, in `$WORK` and in the stack's bucket.

`s3://meteor/docs/shards` holds tars without a manifest, `docs/more` and `docs/text` datasets to mix in.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from PIL import Image

from pipelines.data.build import make_shards
from pipelines.data.shards import MANIFEST_NAME
from pipelines.data.sources.openmoji import OpenMoji, OpenMojiSettings
from pipelines.io import storage

COLORS = {"red": (214, 40, 40), "green": (46, 160, 67), "blue": (38, 84, 214), "gray": (140, 140, 140)}
IMAGES = 160
BUCKET = "s3://meteor/docs"


def main() -> None:
    """Make all of it."""
    work = Path(os.environ["WORK"])
    _photo(work / "photo.jpg")
    _llava(work)
    for name in ("more", "text", "shards"):
        _drawings(f"{BUCKET}/{name}", seed=len(name))
    _without_manifest(f"{BUCKET}/shards")


def _photo(path: Path) -> None:
    Image.new("RGB", (96, 64), COLORS["gray"]).save(path)


def _llava(work: Path) -> None:
    """Records in LLaVA's format, one of them without an image, and their folder."""
    records = []
    (work / "folder").mkdir()
    for number in range(IMAGES):
        color = list(COLORS)[number % len(COLORS)]
        image = Image.new("RGB", (64, 64), COLORS[color])
        image.putpixel((0, 0), (number, 0, 0))  # no two alike: a held-out image must not be among those trained on
        image.save(work / "folder" / f"{number}.png")
        turns = [
            {"from": "human", "value": "<image>\nWhat color is it?"},
            {"from": "gpt", "value": color},
        ]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    text = [{"from": "human", "value": "Which color has grass?"}, {"from": "gpt", "value": "green"}]
    records.append({"id": "text", "conversations": text})
    (work / "data.json").write_text(json.dumps(records))


def _drawings(url: str, seed: int) -> None:
    settings = OpenMojiSettings(code_points=32, heldout_code_points=8, variants=1, seed=seed)
    make_shards(OpenMoji(settings), url, samples_per_shard=16)


def _without_manifest(url: str) -> None:
    """Shards as they come from elsewhere: `train-*.tar` and `val-*.tar`, and nothing that describes them."""
    for name in storage.list_files(url):
        data = storage.read_bytes(storage.join(url, name))
        storage.delete(storage.join(url, name))
        if name.endswith(".tar"):
            storage.write_bytes(storage.join(url, name.replace("heldout", "val").replace("/", "-")), data)
    assert not storage.exists(storage.join(url, MANIFEST_NAME))


if __name__ == "__main__":
    main()
