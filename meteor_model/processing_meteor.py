"""MeteorProcessor: conversations and images to tensors, labels and placeholders; and the collation of examples.

Whatever way a conversation comes in (training's turns, a plain question, Hugging Face messages, the text made from
them), its ids come from one place, `MeteorProcessor.encode`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin
from typing_extensions import override

from meteor_model.chat import (
    IGNORE_INDEX,
    IMAGE_PLACEHOLDER,
    TURN_TOKEN,
    Content,
    Part,
    Special,
    chat_template,
    content_parts,
    jinja_template,
    read_messages,
    render,
)
from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.image_processing_meteor import ImageInput, MeteorImageProcessor, flatten_images

PROCESSOR_FILE = "processor_config.json"
PADDINGS = (True, False, "longest", "max_length")

Turns = Sequence[tuple[str, Content]]
Messages = Sequence[Mapping[str, Any]]


class Encoded(NamedTuple):
    """One conversation as token ids, and labels that are IGNORE_INDEX except on replies and their end token."""

    input_ids: list[int]
    labels: list[int]


class Prompt(str):
    """The text of a rendered conversation that still knows the conversation.

    `apply_chat_template(..., tokenize=False)` makes it, and a call of the processor turns it into the ids that the
    conversation has in training. A plain string is a user's question.
    """

    turns: Turns
    options: dict[str, bool]

    @classmethod
    def of(cls, text: str, turns: Turns, options: dict[str, bool]) -> Prompt:
        """The text with its conversation and how it ends (`encode`'s options)."""
        prompt = cls(text)
        prompt.turns, prompt.options = turns, options
        return prompt


class MeteorProcessor(ProcessorMixin):
    """Turns conversations and images into model inputs; saved beside the model, loaded by `AutoProcessor`.

    Args:
        image_processor: makes the square uint8 images.
        tokenizer: with pad, end-of-sequence and the image token.
        tokens_per_image: placeholders per image = visual tokens that survive fusion (`config.tokens_per_image`).
        image_token: the placeholder token, one id in the tokenizer.
        template: name of the chat template.
        chat_template: Jinja text of that template, as it is saved for other programs; nothing else is accepted.

    Raises:
        ValueError: where the tokenizer lacks one of the tokens, or the template's text is another.
    """

    def __init__(
        self,
        image_processor: MeteorImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        tokens_per_image: int,
        image_token: str = IMAGE_PLACEHOLDER,
        template: str = "vicuna_v1",
        chat_template: str | None = None,
    ) -> None:
        _check_tokens(tokenizer, image_token, template)
        self.tokens_per_image = tokens_per_image
        self.image_token = image_token
        self.image_token_id = int(tokenizer.convert_tokens_to_ids(image_token))
        self.template = template
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def image_size(self) -> int:
        """Side of the square image that travels."""
        size: int = self.image_processor.size
        return size

    @property
    def chat_template(self) -> str:
        """The named template as Jinja text."""
        return jinja_template(self.template)

    @chat_template.setter
    def chat_template(self, value: str | None) -> None:
        if value is not None and value != jinja_template(self.template):
            raise ValueError(
                f"chat_template is not the text of template {self.template!r}, whose pieces training encodes: name "
                "another template (meteor_model.chat.TEMPLATES), or delete the file chat_template.jinja"
            )

    @property
    def model_input_names(self) -> list[str]:
        """What the model takes of this processor."""
        return ["input_ids", "attention_mask", "pixel_values"]

    def encode(
        self,
        turns: Turns,
        num_images: int,
        add_generation_prompt: bool = False,
        continue_final: bool = False,
        max_length: int | None = None,
    ) -> Encoded:
        """One conversation -> ids and labels.

        Args:
            turns: (role, content) pairs; each `<image>` in a string stands for one image, in order.
            num_images: images that come with it.
            add_generation_prompt: end where the model is to answer.
            continue_final: leave the last reply open, for the model to go on with.
            max_length: refuse longer sequences.

        Raises:
            ValueError: on a placeholder count that differs from the images, or a sequence that is too long.
        """
        written = sum(content_parts(content).count(Special.IMAGE) for _, content in turns)
        if written != num_images:
            raise ValueError(f"{written} {IMAGE_PLACEHOLDER} placeholders in the conversation, {num_images} images")
        bos = self.tokenizer.bos_token_id if chat_template(self.template).begins else None
        input_ids: list[int] = [] if bos is None else [bos]
        labels: list[int] = [IGNORE_INDEX] * len(input_ids)
        for parts, supervised in render(self.template, turns, add_generation_prompt, continue_final):
            ids = self._tokenize(parts)
            input_ids += ids
            labels += ids if supervised else [IGNORE_INDEX] * len(ids)
        if max_length is not None and len(input_ids) > max_length:
            raise ValueError(f"{len(input_ids)} tokens exceed the longest sequence allowed, {max_length}")
        return Encoded(input_ids, labels)

    def encode_question(self, question: str, num_images: int) -> Encoded:
        """A user's question as the prompt of its answer, with its images in front where it does not place them.

        Raises:
            ValueError: as `encode`.
        """
        return self.encode(_put_in_front(question, num_images), num_images, add_generation_prompt=True)

    def batch_prompts(self, prompts: Sequence[Encoded], images: Sequence[Sequence[ImageInput]]) -> BatchFeature:
        """Prompts that are encoded already, and the images of each, ready for `generate`: what a call makes of both."""
        return self._batch(prompts, images, padding=True, padding_side="left", max_length=None, return_tensors="pt")

    def _tokenize(self, parts: Sequence[Part]) -> list[int]:
        """Token ids of a piece: an image becomes its placeholders, text that spells a special token stays text."""
        ids: list[int] = []
        text = ""
        for part in (*parts, None):
            if isinstance(part, str):
                text += part
                continue
            if text:
                ids += self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
                text = ""
            if part is Special.IMAGE:
                ids += [self.image_token_id] * self.tokens_per_image
            elif part is Special.END:
                ids.append(self.tokenizer.eos_token_id)
            elif part is Special.TURN:
                ids.append(self.tokenizer.convert_tokens_to_ids(TURN_TOKEN))
        return ids

    def load_image(self, image: ImageInput) -> torch.Tensor:
        """Any usual image -> (3, S, S) uint8; see `MeteorImageProcessor.load_image`."""
        loaded: torch.Tensor = self.image_processor.load_image(image)
        return loaded

    def __call__(
        self,
        text: str | Sequence[str],
        images: Any = None,
        padding: bool | str = True,
        padding_side: str = "left",
        max_length: int | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Prompts ready for `generate`: padded ids, attention mask and uint8 pixels.

        Args:
            text: one prompt or several. A plain string is a user's question and becomes a user turn with a generation
                prompt, `<image>` in front where it is missing; a `Prompt` is the conversation that it was made from.
            images: per prompt one image, a list of images, or none; for one prompt also its flat list of images, and
                for several the flat list of all, dealt out by their `<image>`.
            padding: True or "longest", or "max_length" for one length always; False for prompts of equal length.
            padding_side: "left" for `generate`, "right" for training.
            max_length: refuse longer prompts; nothing is ever cut, for that would cut images.
            return_tensors: "pt" or "np".

        Raises:
            ValueError: where there is no prompt, prompts and images differ in number, a prompt is too long, an image
                cannot be used (naming its place) or an argument has another value.
        """
        prompts = [text] if isinstance(text, str) else list(text)
        conversations = [_conversation(prompt) for prompt in prompts]
        groups = _deal(images, [content for content, _ in conversations], single=isinstance(text, str))
        rows = []
        for (turns, options), group in zip(conversations, groups, strict=True):
            placed = _put_in_front(turns, len(group)) if isinstance(turns, str) else turns
            rows.append(self.encode(placed, len(group), **options, max_length=max_length))
        return self._batch(rows, groups, padding, padding_side, max_length, return_tensors)

    @override
    def apply_chat_template(
        self,
        conversation: Messages | Sequence[Messages],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hugging Face messages -> the text of their conversation, or the ids that training's `encode` gives it.

        Args:
            conversation: a list of messages (`meteor_model.chat.read_messages`), or several lists.
            chat_template: None, or the processor's own text.
            add_generation_prompt: end where the model is to answer.
            continue_final_message: leave the last reply open, for the model to go on with.
            return_assistant_tokens_mask: with `return_dict`, also `assistant_masks`: 1 on replies and their end tokens.
            tokenize: give ids instead of text.
            return_tensors: "np" for arrays; otherwise torch tensors.
            return_dict: give everything that the model takes, pixels too, instead of the ids alone.
            processor_kwargs: arguments of a call: padding, padding_side, max_length; and `images`, for messages that
                only hold an image's place.
            kwargs: the same, the older way.

        Raises:
            ValueError: as `encode`, and for a template or an argument that this processor does not have.
        """
        self.chat_template = chat_template
        settings = {**kwargs, **(processor_kwargs or {})}
        given = settings.pop("images", None)
        for name in (
            "tools",
            "documents",
            "truncation",
            "sanitize_control_tokens",
        ):  # asked for by the library's pipeline
            if settings.pop(name, None) and name != "sanitize_control_tokens":  # which is always on here
                raise ValueError(f"{name} is not supported by MeteorProcessor.apply_chat_template")
        batched = len(conversation) > 0 and not isinstance(conversation[0], Mapping)
        chats: list[Messages] = list(conversation) if batched else [conversation]  # type: ignore[list-item, arg-type]
        options = {"add_generation_prompt": add_generation_prompt, "continue_final": bool(continue_final_message)}
        read = [read_messages(chat) for chat in chats]
        if not tokenize:
            ending = {
                "add_generation_prompt": add_generation_prompt,
                "continue_final_message": continue_final_message,
            }
            texts = super().apply_chat_template(chats, tokenize=False, **ending)
            prompts = [Prompt.of(t, turns, options) for t, (turns, _) in zip(texts, read, strict=True)]
            return prompts if batched else prompts[0]
        groups = [images for _, images in read]
        if given is not None:
            groups = _deal(given, [turns for turns, _ in read], single=not batched)
        max_length = settings.get("max_length")
        rows = [
            self.encode(turns, len(group), **options, max_length=max_length)
            for (turns, _), group in zip(read, groups, strict=True)
        ]
        settings = {"padding": True, "padding_side": "left", "max_length": None, **settings}
        batch = self._batch(
            rows, groups, return_tensors=return_tensors or "pt", masks=return_assistant_tokens_mask, **settings
        )
        return batch if return_dict else batch["input_ids"]

    def _batch(
        self,
        rows: Sequence[Encoded],
        groups: Sequence[Sequence[ImageInput]],
        padding: bool | str,
        padding_side: str,
        max_length: int | None,
        return_tensors: str | None,
        masks: bool = False,
    ) -> BatchFeature:
        """Rows and the images of each as one batch."""
        if not rows:
            raise ValueError("there is no prompt: give at least one")
        if padding not in PADDINGS:
            raise ValueError(f"padding must be one of {PADDINGS}, got {padding!r}")
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
        lengths = {len(row.input_ids) for row in rows}
        if padding is False and len(lengths) > 1:
            raise ValueError(f"prompts of {sorted(lengths)} tokens do not stack: set padding=True")
        if padding == "max_length" and max_length is None:
            raise ValueError("padding='max_length' needs a max_length")
        length = max_length if padding == "max_length" else None
        ids = [row.input_ids for row in rows]
        input_ids, attention_mask = _pad(ids, self.tokenizer.pad_token_id, padding_side, length)
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        if masks:
            replies = [[int(label != IGNORE_INDEX) for label in row.labels] for row in rows]
            batch["assistant_masks"] = _pad(replies, 0, padding_side, length)[0]
        pixels = self.image_processor.load_images([image for group in groups for image in group])
        if pixels:
            batch["pixel_values"] = torch.stack(pixels)
        return BatchFeature(batch, tensor_type=return_tensors)

    def decode(self, ids: torch.Tensor | Sequence[int], skip_special_tokens: bool = True, **kwargs: Any) -> str:
        """Token ids -> text, special tokens left out unless asked for."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **kwargs)).strip()

    def batch_decode(
        self, sequences: torch.Tensor | Sequence[Any], skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Rows of token ids -> texts."""
        return [self.decode(ids, skip_special_tokens, **kwargs) for ids in sequences]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> MeteorProcessor:
        """From a folder that `save_pretrained` wrote, or a hub id. Raises FileNotFoundError for another folder."""
        folder = Path(pretrained_model_name_or_path)
        if (folder.is_dir() or folder.is_absolute()) and not (folder / PROCESSOR_FILE).is_file():
            raise FileNotFoundError(f"{folder / PROCESSOR_FILE} is missing: {folder} is not a METEOR model folder")
        processor: MeteorProcessor = super().from_pretrained(str(pretrained_model_name_or_path), **kwargs)
        return processor


def _check_tokens(tokenizer: PreTrainedTokenizerBase, image_token: str, template: str) -> None:
    """Whether the tokenizer has what the template writes. Raises ValueError that names what is missing."""
    needs_turns = Special.TURN in chat_template(template).before_reply
    for name, value in (("pad", tokenizer.pad_token_id), ("end-of-sequence", tokenizer.eos_token_id)):
        if value is None:
            raise ValueError(f"the tokenizer has no {name} token: set it before building the processor")
    for token, role in ((image_token, "image token"), *([(TURN_TOKEN, "turn token")] if needs_turns else [])):
        token_id = tokenizer.convert_tokens_to_ids(token)
        if not isinstance(token_id, int) or token_id in (None, tokenizer.unk_token_id):
            raise ValueError(f"the tokenizer does not know the {role} {token!r}: add it as a special token")
    if needs_turns and tokenizer.eos_token != "<|im_end|>":
        raise ValueError(
            f"template {template!r} ends a turn with '<|im_end|>', the tokenizer's end-of-sequence token is "
            f"{tokenizer.eos_token!r}: set it to '<|im_end|>' or choose another template"
        )


def _conversation(prompt: str) -> tuple[Turns | str, dict[str, bool]]:
    """A prompt's turns, or the question that it is; and how it ends."""
    if isinstance(prompt, Prompt):
        return prompt.turns, prompt.options
    return prompt, {"add_generation_prompt": True}


def _put_in_front(question: str, num_images: int) -> Turns:
    """A question as a user turn, with its images in front where it does not place them."""
    if num_images and IMAGE_PLACEHOLDER not in question:
        question = IMAGE_PLACEHOLDER * num_images + "\n" + question
    return [("user", question)]


def _deal(images: Any, prompts: Sequence[Turns | str], single: bool) -> list[list[ImageInput]]:
    """The images of each prompt.

    Raises:
        ValueError: where neither the entries nor the placeholders say which image goes where.
    """
    if images is None:
        return [[] for _ in prompts]
    entries = list(images) if _is_sequence(images) else [images]
    if single:
        return [flatten_images(entries)]
    if len(entries) == len(prompts):
        return [flatten_images(entry) for entry in entries]
    counts = [_placeholders(prompt) for prompt in prompts]
    if any(_is_sequence(entry) for entry in entries) or sum(counts) != len(entries):
        raise ValueError(f"{len(prompts)} prompts came with images for {len(entries)}")
    flat = iter(entries)
    return [[next(flat) for _ in range(count)] for count in counts]


def _placeholders(prompt: Turns | str) -> int:
    """Images that a prompt places itself."""
    if isinstance(prompt, str):
        return prompt.count(IMAGE_PLACEHOLDER)
    return sum(content_parts(content).count(Special.IMAGE) for _, content in prompt)


def _is_sequence(images: Any) -> TypeGuard[Sequence[Any]]:
    """Whether it holds several images: a list, or a stack in one tensor or array."""
    return isinstance(images, list | tuple) or (isinstance(images, torch.Tensor | np.ndarray) and images.ndim == 4)


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


def _pad(
    rows: Sequence[Sequence[int]], value: int, side: str, length: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids -> (B, T) int64 filled with `value`, and the attention mask; T: the longest row's by default."""
    length = length or max(len(row) for row in rows)
    padded = torch.full((len(rows), length), value, dtype=torch.int64)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    for index, row in enumerate(rows):
        where = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        padded[index, where] = torch.as_tensor(np.asarray(row, dtype=np.int64))
        mask[index, where] = 1
    return padded, mask


AutoProcessor.register(MeteorConfig, MeteorProcessor, exist_ok=True)
