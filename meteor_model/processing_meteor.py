"""MeteorProcessor: conversations and images to tensors, labels and placeholders; and the collation of examples.

Whatever way a conversation comes in (training's turns, a plain question, Hugging Face messages, the text made from
them), its ids come from one place, `MeteorProcessor.encode`; the prompt of a reply is what stands before it there.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin
from typing_extensions import override

from meteor_model.chat import (
    IGNORE_INDEX,
    IMAGE_PLACEHOLDER,
    TURN_TOKEN,
    Special,
    Turns,
    chat_template,
    images_in_front,
    is_jinja_of,
    jinja_template,
    read_messages,
    template_marks,
)
from meteor_model.collate import pad
from meteor_model.configuration_meteor import HINT, MeteorConfig
from meteor_model.image_processing_meteor import ImageInput, MeteorImageProcessor
from meteor_model.options import refuse_options
from meteor_model.prompts import Prompt, conversation_of, deal, prompts_of
from meteor_model.turn_encoder import Encoded, EncodedQuestion, encode_conversation

PROCESSOR_FILE = "processor_config.json"
PADDINGS = (True, False, "longest", "max_length")

Messages = Sequence[Mapping[str, Any]]


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
        if value is not None and not is_jinja_of(self.template, value):
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
        encoded = encode_conversation(
            self.tokenizer,
            self.template,
            self.image_token,
            self.tokens_per_image,
            turns,
            num_images,
            add_generation_prompt,
            continue_final,
        )
        if max_length is not None and len(encoded.input_ids) > max_length:
            raise ValueError(f"{len(encoded.input_ids)} tokens exceed the longest sequence allowed, {max_length}")
        return encoded

    def encode_question(self, question: str, num_images: int) -> Encoded:
        """A user's question as the prompt of its answer, with its images in front where it does not place them.

        Raises:
            ValueError: as `encode`; a question that is a rendered conversation already.
        """
        self._refuse_rendered(question)
        return self.encode(images_in_front(question, num_images), num_images, add_generation_prompt=True)

    def encode_questions(self, turns: Turns, num_images: int) -> list[EncodedQuestion]:
        """Every reply of a conversation as a question, whose prompt is cut out of what training encodes.

        Equal to `encode` of the turns before the reply, with a generation prompt. Earlier replies stand in it as the
        conversation has them.

        Raises:
            ValueError: as `encode`.
        """
        ids, labels, replies = self.encode(turns, num_images)
        places = [place for place, (role, _) in enumerate(turns) if role == "assistant"]
        return [
            EncodedQuestion(
                Encoded(ids[:begin], labels[:begin], replies[:index]),
                [label for label in labels[begin:end] if label != IGNORE_INDEX],
                ids[:begin].count(self.image_token_id) // self.tokens_per_image,
                place,
            )
            for index, (place, (begin, end)) in enumerate(zip(places, replies, strict=True))
        ]

    def _refuse_rendered(self, question: str) -> None:
        """Raise ValueError for a text that the template has wrapped; warn of one that holds its marks within."""
        before_user, before_reply = template_marks(self.template)
        text = question.replace(IMAGE_PLACEHOLDER, "").strip()
        begins = [self.tokenizer.bos_token, before_user] if chat_template(self.template).begins else [before_user]
        way_out = "give its messages to apply_chat_template, or the text that this made, unchanged"
        if any(mark and text.startswith(mark) for mark in begins) or (before_reply and text.endswith(before_reply)):
            raise ValueError(
                f"the prompt is rendered by a template already ({text[:40]!r}); a string is taken for a user's "
                f"question, which template {self.template!r} would wrap once more: give the question alone, or, for a "
                f"conversation, {way_out}"
            )
        held = [mark for mark in (before_user, before_reply) if mark and mark in text]
        if held:
            warnings.warn(
                f"the prompt holds {' and '.join(map(repr, held))}, which template {self.template!r} writes around "
                f"turns; they are taken for the user's words. For a conversation {way_out}",
                stacklevel=3,
            )

    def batch_prompts(self, prompts: Sequence[Encoded], images: Sequence[Sequence[ImageInput]]) -> BatchFeature:
        """Prompts that are encoded already, and the images of each, ready for `generate`: what a call makes of both."""
        return self._batch(prompts, images, padding=True, padding_side="left", max_length=None, return_tensors="pt")

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
        **kwargs: Any,
    ) -> BatchFeature:
        """Prompts ready for `generate`: padded ids, attention mask and uint8 pixels.

        Args:
            text: one prompt or several. A plain string is a user's question and becomes a user turn with a generation
                prompt, `<image>` in front where it is missing; a `Prompt` is the conversation that it was made from.
            images: per prompt one image, a list of images, or none; for one prompt also its flat list of images, and
                for several the flat list of all, dealt out by their `<image>` where these are as many.
            padding: True or "longest", or "max_length" for one length always; False for prompts of equal length.
            padding_side: "left" for `generate`, "right" for training.
            max_length: refuse longer prompts; nothing is ever cut, for that would cut images.
            return_tensors: "pt" or "np".
            kwargs: none; what other processors take is refused by name.

        Raises:
            ValueError: where there is no prompt, prompts and images differ in number, a prompt is too long, an image
                cannot be used (naming its place) or an argument has another value or is not known.
        """
        refuse_options("MeteorProcessor", kwargs)
        prompts = prompts_of(text)
        for prompt in prompts:
            if not isinstance(prompt, Prompt):
                self._refuse_rendered(prompt)
        conversations = [conversation_of(prompt) for prompt in prompts]
        groups = deal(images, [content for content, _ in conversations], single=isinstance(text, str))
        rows = []
        for (turns, options), group in zip(conversations, groups, strict=True):
            placed = images_in_front(turns, len(group)) if isinstance(turns, str) else turns
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
            groups = deal(given, [turns for turns, _ in read], single=not batched)
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
        input_ids, attention_mask = pad(ids, self.tokenizer.pad_token_id, padding_side, length)
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        if masks:
            replies = [[int(label != IGNORE_INDEX) for label in row.labels] for row in rows]
            batch["assistant_masks"] = pad(replies, 0, padding_side, length)[0]
        pixels = self.image_processor.load_images([image for group in groups for image in group])
        if pixels:
            batch["pixel_values"] = torch.stack(pixels)
        return BatchFeature(batch, tensor_type=return_tensors)

    def decode(self, ids: Any, skip_special_tokens: bool = True, **kwargs: Any) -> Any:
        """Token ids -> text, special tokens left out unless asked for; rows of ids -> a list of texts."""
        if _is_batch(ids):
            return [self.decode(row, skip_special_tokens, **kwargs) for row in ids]
        return str(self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **kwargs)).strip()

    def batch_decode(
        self, sequences: torch.Tensor | Sequence[Any], skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Rows of token ids -> texts."""
        return [self.decode(ids, skip_special_tokens, **kwargs) for ids in sequences]

    def to_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Plain dictionary for processor_config.json; it tells programs without this package what they lack."""
        output: dict[str, Any] = super().to_dict(*args, **kwargs)
        return {**output, "auto_map": {"AutoProcessor": f"{HINT}--processing_meteor.MeteorProcessor"}}

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


def _is_batch(ids: Any) -> bool:
    """Whether ids are rows of ids."""
    if isinstance(ids, torch.Tensor | np.ndarray):
        return ids.ndim > 1
    return isinstance(ids, list | tuple) and len(ids) > 0 and hasattr(ids[0], "__len__")


AutoProcessor.register(MeteorConfig, MeteorProcessor, exist_ok=True)
