"""MeteorProcessor: conversations and images to tensors, labels and placeholders; and the collation of examples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase

from meteor_model.chat import IGNORE_INDEX, IMAGE_PLACEHOLDER, chat_template, render
from meteor_model.images import decode_image, fit_square, pillow_to_rgb

PROCESSOR_FILE = "meteor_processor.json"

ImageInput = bytes | str | Path | Image.Image | np.ndarray | torch.Tensor


class Encoded(NamedTuple):
    """One conversation as token ids, and labels that are IGNORE_INDEX except on replies and their end token."""

    input_ids: list[int]
    labels: list[int]


class MeteorProcessor:
    """Turns conversations and images into model inputs.

    Args:
        tokenizer: with pad, end-of-sequence and the image token.
        image_size: side S of the square uint8 image that travels.
        tokens_per_image: placeholders per image = visual tokens that survive fusion.
        image_token: the placeholder token, one id in the tokenizer.
        template: name of the chat template.

    Raises:
        ValueError: where the tokenizer lacks one of the tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_size: int,
        tokens_per_image: int,
        image_token: str = IMAGE_PLACEHOLDER,
        template: str = "vicuna_v1",
    ) -> None:
        chat_template(template)
        for name, value in (("pad", tokenizer.pad_token_id), ("end-of-sequence", tokenizer.eos_token_id)):
            if value is None:
                raise ValueError(f"the tokenizer has no {name} token: set it before building the processor")
        image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if not isinstance(image_token_id, int) or image_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(f"the tokenizer does not know the image token {image_token!r}: add it as a special token")
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.tokens_per_image = tokens_per_image
        self.image_token = image_token
        self.image_token_id = image_token_id
        self.template = template

    def encode(
        self,
        turns: Sequence[tuple[str, str]],
        num_images: int,
        add_generation_prompt: bool = False,
        max_length: int | None = None,
    ) -> Encoded:
        """One conversation -> ids and labels.

        Args:
            turns: (role, text) pairs; each `<image>` in the text stands for one image, in order.
            num_images: images that come with it.
            add_generation_prompt: end where the model is to answer.
            max_length: refuse longer sequences.

        Raises:
            ValueError: on a placeholder count that differs from the images, or a sequence that is too long.
        """
        written = sum(text.count(IMAGE_PLACEHOLDER) for _, text in turns)
        if written != num_images:
            raise ValueError(f"{written} {IMAGE_PLACEHOLDER} placeholders in the conversation, {num_images} images")
        bos = self.tokenizer.bos_token_id
        input_ids: list[int] = [] if bos is None else [bos]
        labels: list[int] = [IGNORE_INDEX] * len(input_ids)
        for text, supervised in render(self.template, turns, add_generation_prompt):
            ids = self._tokenize(text)
            if supervised:
                ids.append(self.tokenizer.eos_token_id)
            input_ids += ids
            labels += ids if supervised else [IGNORE_INDEX] * len(ids)
        if max_length is not None and len(input_ids) > max_length:
            raise ValueError(f"{len(input_ids)} tokens exceed the longest sequence allowed, {max_length}")
        return Encoded(input_ids, labels)

    def _tokenize(self, text: str) -> list[int]:
        """Token ids of a piece; `<image>` becomes its run of placeholders, other special-token text stays text."""
        ids: list[int] = []
        for part, piece in enumerate(text.split(IMAGE_PLACEHOLDER)):
            if part:
                ids += [self.image_token_id] * self.tokens_per_image
            if piece:
                ids += self.tokenizer.encode(piece, add_special_tokens=False, split_special_tokens=True)
        return ids

    def load_image(self, image: ImageInput) -> torch.Tensor:
        """Any usual image -> (3, S, S) uint8. Files and bytes are decoded under guard (`meteor_model.images`).

        Raises:
            ImageError: for a file or bytes that cannot be decoded.
            ValueError: for an array of another shape than (H, W, 3) or tensor of another than (3, H, W).
        """
        if isinstance(image, str | Path):
            return decode_image(Path(image).read_bytes(), self.image_size)
        if isinstance(image, bytes):
            return decode_image(image, self.image_size)
        if isinstance(image, Image.Image):
            return fit_square(pillow_to_rgb(image), self.image_size)
        if isinstance(image, np.ndarray):
            image = torch.from_numpy(image).movedim(-1, 0)
        if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
            shape = tuple(image.shape)
            raise ValueError(f"image tensors are uint8 (3, H, W), arrays uint8 (H, W, 3); got {image.dtype} {shape}")
        return fit_square(image, self.image_size)

    def __call__(
        self,
        text: str | Sequence[str],
        images: ImageInput | Sequence[ImageInput | Sequence[ImageInput]] | None = None,
        padding_side: str = "left",
    ) -> BatchFeature:
        """Prompts ready for `generate`: left-padded ids, attention mask and uint8 pixels.

        Args:
            text: one prompt or several, as a user would write them; `<image>` is put in front where it is missing.
            images: per prompt one image, a list of images, or none.

        Raises:
            ValueError: where the number of prompts and image entries differ.
        """
        prompts = [text] if isinstance(text, str) else list(text)
        if images is None:
            groups: list[list[ImageInput]] = [[] for _ in prompts]
        else:
            entries: Sequence[Any] = images if isinstance(images, list | tuple) else [images]
            groups = [list(item) if isinstance(item, list | tuple) else [item] for item in entries]
        if len(groups) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts came with images for {len(groups)}")
        rows = []
        for prompt, group in zip(prompts, groups, strict=True):
            if IMAGE_PLACEHOLDER not in prompt:
                prompt = IMAGE_PLACEHOLDER * len(group) + ("\n" if group else "") + prompt
            rows.append(self.encode([("user", prompt)], len(group), add_generation_prompt=True).input_ids)
        pixels = [self.load_image(image) for group in groups for image in group]
        input_ids, attention_mask = _pad(rows, self.tokenizer.pad_token_id, padding_side)
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        if pixels:
            batch["pixel_values"] = torch.stack(pixels)
        return BatchFeature(batch)

    def decode(self, ids: torch.Tensor | Sequence[int]) -> str:
        """Token ids -> text, special tokens left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def save_pretrained(self, folder: str | Path) -> None:
        """Tokenizer files and `meteor_processor.json`."""
        self.tokenizer.save_pretrained(folder)
        settings = {
            "image_size": self.image_size,
            "tokens_per_image": self.tokens_per_image,
            "image_token": self.image_token,
            "template": self.template,
        }
        (Path(folder) / PROCESSOR_FILE).write_text(json.dumps(settings, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> MeteorProcessor:
        """From a folder that `save_pretrained` wrote. Raises FileNotFoundError that names the missing file."""
        path = Path(folder) / PROCESSOR_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: {folder} is not a METEOR model folder")
        settings: dict[str, Any] = json.loads(path.read_text())
        return cls(AutoTokenizer.from_pretrained(str(folder)), **settings)


def collate(examples: Sequence[Mapping[str, Any]], pad_token_id: int, image_size: int) -> dict[str, torch.Tensor]:
    """Examples -> one right-padded training batch.

    Args:
        examples: mappings with `input_ids`, `labels` (sequences of int) and `images` (uint8 (n, 3, S, S), n >= 0).
        pad_token_id: id that fills `input_ids`.
        image_size: S, for a batch without any image.

    Returns:
        input_ids, attention_mask, labels (B, T) int64; pixel_values (M, 3, S, S) uint8, M >= 0 images in sample order.
    """
    input_ids, attention_mask = _pad([example["input_ids"] for example in examples], pad_token_id, "right")
    labels, _ = _pad([example["labels"] for example in examples], IGNORE_INDEX, "right")
    images = [example["images"] for example in examples if len(example["images"])]
    pixels = torch.cat(images) if images else torch.empty(0, 3, image_size, image_size, dtype=torch.uint8)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "pixel_values": pixels}


def _pad(rows: Sequence[Sequence[int]], value: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids -> (B, T) int64 filled with `value`, and the attention mask."""
    length = max(len(row) for row in rows)
    padded = torch.full((len(rows), length), value, dtype=torch.int64)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    for index, row in enumerate(rows):
        where = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        padded[index, where] = torch.as_tensor(np.asarray(row, dtype=np.int64))
        mask[index, where] = 1
    return padded, mask
