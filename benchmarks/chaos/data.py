"""The data of the chaos runs: a few hundred tiny samples in small, uneven shards, and a byte tokenizer.

Every kind of sample is there: one image, two images, none, several turns; two samples hold an image that cannot be
decoded (about 1%), and one shard is empty. Shards are made here with Python's own tarfile, and `keys_in` reads them
back with it, so that what is counted in the end does not rest on the project's readers.
"""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from pipelines.data.shards import ShardInfo, save_manifest
from pipelines.io import storage
from pipelines.io.fingerprint import sha256

IMAGE_SIZE = 8
PAD, IMAGE, VOCABULARY = 256, 257, 258
PLACEHOLDER = "<image>"
TRAIN_SIZES = (18, 17, 19, 0, 16, 20, 18, 17, 19, 18, 18)
HELDOUT_SIZES = (24,)
FAULTY = (37, 121)
"""Numbers of the samples whose image is cut off."""

Members = dict[str, bytes]


def key_of(number: int) -> str:
    """Key of sample `number`."""
    return f"sample{number:05d}"


def _image(number: int, place: int) -> bytes:
    random = np.random.default_rng([number, place])
    buffer = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _turns(*texts: str) -> bytes:
    speakers = ("human", "gpt")
    turns = [{"from": speakers[place % 2], "value": text} for place, text in enumerate(texts)]
    return json.dumps({"id": "chaos", "conversations": turns}).encode()


def sample(number: int) -> Members:
    """The members of sample `number`: of eight neighbours five have one image, one two, one none, one three turns."""
    if number in FAULTY:
        return {"json": _turns(f"{PLACEHOLDER}?", f"f{number}"), "png": _image(number, 0)[:60]}
    match number % 8:
        case 3:
            return {"json": _turns(f"text {number}", f"answer {number % 7}")}
        case 5:
            two = {"0.png": _image(number, 0), "1.png": _image(number, 1)}
            return {"json": _turns(f"{PLACEHOLDER} or {PLACEHOLDER}?", f"b{number}"), **two}
        case 7:
            turns = _turns(f"{PLACEHOLDER}what", "an image", f"which of {number % 5}?", f"number {number}")
            return {"json": turns, "png": _image(number, 0)}
        case _:
            return {"json": _turns(f"{PLACEHOLDER}?", f"a{number}"), "png": _image(number, 0)}


def pack(samples: Iterable[tuple[str, Members]]) -> bytes:
    """A tar of the samples in their order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for key, members in samples:
            for extension, data in members.items():
                entry = tarfile.TarInfo(f"{key}.{extension}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def keys_in(tar: bytes) -> list[str]:
    """The keys of the samples of a shard in order, a key that comes back later once more."""
    keys: list[str] = []
    with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as archive:
        for name in archive.getnames():
            key = name.split(".", 1)[0]
            if not keys or keys[-1] != key:
                keys.append(key)
    return keys


@dataclass(frozen=True)
class Dataset:
    """The shards of one dataset by name, as they are to be; `claims` overrides what the manifest says of some."""

    url: str
    shards: Mapping[str, bytes]
    claims: Mapping[str, bytes]

    def write(self) -> None:
        """Put the shards and the manifest into storage.

        Where `claims` has a shard, the manifest describes those bytes.
        """
        infos = []
        for name, data in self.shards.items():
            storage.write_bytes(storage.join(self.url, name), data)
            infos.append(_info(name, self.claims.get(name, data)))
        save_manifest(self.url, infos, {"format": 1, "source": {"name": "chaos", "settings": {}}})

    def put(self, name: str, data: bytes) -> None:
        """Replace one shard in storage, without a word to the manifest."""
        storage.write_bytes(storage.join(self.url, name), data)

    def restore(self, name: str) -> None:
        """Put the true bytes of one shard back, and the true manifest."""
        replace(self, claims={}).write()


def make_dataset(url: str) -> Dataset:
    """The whole dataset below `url`; nothing is written yet."""
    shards: dict[str, bytes] = {}
    number = 0
    for split, sizes in (("train", TRAIN_SIZES), ("heldout", HELDOUT_SIZES)):
        for place, size in enumerate(sizes):
            numbers = range(number, number + size)
            shards[f"{split}-{place:06d}.tar"] = pack((key_of(each), sample(each)) for each in numbers)
            number += size
    return Dataset(url, shards, {})


def stored_shards(url: str, split: str = "train") -> list[list[str]]:
    """The keys of every shard of a split that lies in storage now, in the order of their names.

    They are read with tarfile alone.
    """
    names = [name for name in storage.list_files(url) if name.startswith(f"{split}-") and name.endswith(".tar")]
    return [keys_in(storage.read_bytes(storage.join(url, name))) for name in names]


def _info(name: str, data: bytes) -> ShardInfo:
    keys = keys_in(data)
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        extensions = Counter(member.split(".", 1)[1] for member in archive.getnames())
    split = name.partition("-")[0]
    return ShardInfo(name, split, len(keys), len(data), sha256(data), dict(extensions))


@dataclass(frozen=True)
class Encoded:
    """Tokens of one conversation; `labels` are -100 where nothing is learnt."""

    input_ids: list[int]
    labels: list[int]


class ByteProcessor:
    """The bytes of a conversation as its tokens, one token an image; the replies are learnt."""

    image_size: int = IMAGE_SIZE

    def encode(self, turns: Sequence[tuple[str, str]], num_images: int) -> Encoded:
        """(role, text) turns to tokens and labels."""
        ids: list[int] = []
        labels: list[int] = []
        for role, text in turns:
            pieces: list[list[int]] = [list(piece.encode()) for piece in text.split(PLACEHOLDER)]
            tokens = pieces[0] + [token for piece in pieces[1:] for token in (IMAGE, *piece)]
            ids += tokens
            labels += tokens if role == "assistant" else [-100] * len(tokens)
        if ids.count(IMAGE) != num_images:
            raise ValueError(f"{ids.count(IMAGE)} placeholders for {num_images} images")
        return Encoded(ids, labels)


def as_json(value: Any) -> str:
    """One line of JSON."""
    return json.dumps(value, separators=(",", ":"))
