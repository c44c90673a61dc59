"""What encodes conversations without transformers: for processes that read data, which load it in a third of the time.

A `MeteorProcessor` writes what its encoding consists of as one file (`save_sample_encoder`), the tokenizer as its Rust
library itself serialises it; `SampleEncoder` reads the file and gives the very same ids and labels. A tokenizer that is
none of that library's has no such file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meteor_model.chat import Turns
from meteor_model.foreign import foreign
from meteor_model.turn_encoder import Encoded, encode_conversation

if TYPE_CHECKING:
    from meteor_model.processing_meteor import MeteorProcessor

SAMPLE_ENCODER_FILE = "sample_encoder.json"


@dataclass(frozen=True)
class _AddedToken:
    content: str
    special: bool


class LightTokenizer:
    """What `TurnEncoder` asks of a tokenizer, without transformers.

    Args:
        backend: JSON of a `tokenizers.Tokenizer`.
        bos_token: beginning of a sequence; None without one.
        eos_token: its end.
        added: tokens that were added, and whether each is special.
    """

    def __init__(self, backend: str, bos_token: str | None, eos_token: str, added: Mapping[str, bool]) -> None:
        from tokenizers import Tokenizer  # here: who writes the file needs it not

        self._backend = Tokenizer.from_str(backend)
        self.bos_token, self.eos_token = bos_token, eos_token
        self.added_tokens_decoder = {
            self.convert_tokens_to_ids(content): _AddedToken(content, special) for content, special in added.items()
        }

    def encode(self, text: str, *, add_special_tokens: bool, split_special_tokens: bool = False) -> list[int]:
        """The ids of a text; with `split_special_tokens`, words that spell special tokens are words."""
        self._backend.encode_special_tokens = split_special_tokens
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def convert_tokens_to_ids(self, tokens: str) -> int:
        """The id of a token. Raises ValueError for one that the vocabulary lacks."""
        number = self._backend.token_to_id(tokens)
        if number is None:
            raise ValueError(f"the tokenizer does not know {tokens!r}")
        return int(number)


@dataclass(frozen=True)
class SampleEncoder:
    """The part of a `MeteorProcessor` that data tasks use.

    Attributes:
        tokenizer: without transformers.
        image_size: side of the square image that travels.
        tokens_per_image: placeholders of an image.
        image_token: the placeholder.
        template: name of the chat template.
    """

    tokenizer: LightTokenizer
    image_size: int
    tokens_per_image: int
    image_token: str
    template: str

    def encode(self, turns: Turns, num_images: int) -> Encoded:
        """One conversation -> ids and labels, as `MeteorProcessor.encode`. Raises ValueError as that does."""
        return encode_conversation(
            self.tokenizer, self.template, self.image_token, self.tokens_per_image, turns, num_images
        )


def save_sample_encoder(processor: MeteorProcessor, folder: Path) -> bool:
    """Write the file beside a processor; False, and no file, for a tokenizer that is not of the Rust library."""
    tokenizer: Any = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    text = {
        "image_size": processor.image_size,
        "tokens_per_image": processor.tokens_per_image,
        "image_token": processor.image_token,
        "template": processor.template,
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "added": {token.content: bool(token.special) for token in tokenizer.added_tokens_decoder.values()},
        "tokenizer": json.loads(backend.to_str()),
    }
    (folder / SAMPLE_ENCODER_FILE).write_text(json.dumps(text), encoding="utf-8")
    return True


def load_sample_encoder(folder: Path) -> SampleEncoder | None:
    """What `save_sample_encoder` wrote; None where there is no such file. Raises ValueError for one that is damaged."""
    path = folder / SAMPLE_ENCODER_FILE
    if not path.is_file():
        return None
    with foreign(lambda what: ValueError(f"{path} cannot be read: {what}")):
        found = json.loads(path.read_text(encoding="utf-8"))
        tokenizer = LightTokenizer(
            json.dumps(found["tokenizer"]), found["bos_token"], found["eos_token"], found["added"]
        )
        return SampleEncoder(
            tokenizer,
            int(found["image_size"]),
            int(found["tokens_per_image"]),
            str(found["image_token"]),
            str(found["template"]),
        )
