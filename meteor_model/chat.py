"""Chat templates: how a conversation becomes text, as literal pieces so that labels can be masked piece by piece.

A template writes text and special tokens; a conversation writes text and images. The two never mix: what a
conversation spells like a special token stays text, because `render` hands both over as different types. The Jinja form
of a template (`jinja_template`), for programs that know only text, is made from the same table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

from meteor_model.checks import nearest

IMAGE_PLACEHOLDER = "<image>"
IGNORE_INDEX = -100  # label of a token that the loss leaves out
TURN_TOKEN = "<|im_start|>"  # ChatML's start of a turn
ROLES = ("system", "user", "assistant")


class Special(Enum):
    """What is not text: an image, the end-of-sequence token, ChatML's start of a turn."""

    IMAGE = "image"
    END = "end"
    TURN = "turn"


Part = str | Special
#: Either text in which each `<image>` stands for an image, or parts, in which text is only text.
Content = str | Sequence[Part]


class Piece(NamedTuple):
    """A run of a rendered conversation; supervised pieces are a reply and its end token."""

    parts: tuple[Part, ...]
    supervised: bool


@dataclass(frozen=True)
class ChatTemplate:
    """What stands around each turn. Every reply is followed by the end-of-sequence token.

    Attributes:
        system: the system turn of a conversation without one; empty for none.
        around_system: parts before and after a system turn.
        around_user: parts before and after a user turn.
        before_reply: parts before a reply: the generation prompt.
        reply_prefix: text that begins every reply and is learned with it.
        after_reply: parts after a reply's end token.
        begins: whether the tokenizer's beginning-of-sequence token comes first.
        user_words: whether the words of a user turn are kept, or its images alone.
    """

    system: str = ""
    around_system: tuple[tuple[Part, ...], tuple[Part, ...]] = ((), ())
    around_user: tuple[tuple[Part, ...], tuple[Part, ...]] = ((), ())
    before_reply: tuple[Part, ...] = ()
    reply_prefix: str = ""
    after_reply: tuple[Part, ...] = ()
    begins: bool = True
    user_words: bool = True


_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
_USER, _ASSISTANT = (("USER: ",), ()), (" ASSISTANT:",)
_AFTER_TURN = (Special.END, "\n")

TEMPLATES: dict[str, ChatTemplate] = {
    # LLaVA's pre-training: the images, then the caption; the user's words are dropped.
    "plain": ChatTemplate(user_words=False),
    "vicuna_v1": ChatTemplate(_VICUNA_SYSTEM, around_user=_USER, before_reply=_ASSISTANT, reply_prefix=" "),
    # vicuna_v1 without its system prompt: a short prompt for small models.
    "short": ChatTemplate(around_user=_USER, before_reply=_ASSISTANT, reply_prefix=" "),
    # Qwen's and SmolLM2's; the tokenizer's end-of-sequence token must be <|im_end|>.
    "chatml": ChatTemplate(
        around_system=((Special.TURN, "system\n"), _AFTER_TURN),
        around_user=((Special.TURN, "user\n"), _AFTER_TURN),
        before_reply=(Special.TURN, "assistant\n"),
        after_reply=("\n",),
        begins=False,
    ),
}


def chat_template(name: str) -> ChatTemplate:
    """A template by name. Raises ValueError that names the nearest one."""
    if name not in TEMPLATES:
        raise ValueError(
            f"unknown chat template {name!r}; known: {', '.join(sorted(TEMPLATES))}{nearest(name, TEMPLATES)}"
        )
    return TEMPLATES[name]


def content_parts(content: Content) -> tuple[Part, ...]:
    """The parts of one turn; in a string each `<image>` is an image."""
    if not isinstance(content, str):
        return tuple(content)
    parts: list[Part] = []
    for index, text in enumerate(content.split(IMAGE_PLACEHOLDER)):
        parts += ([Special.IMAGE] if index else []) + ([text] if text else [])
    return tuple(parts)


def render(
    name: str, turns: Sequence[tuple[str, Content]], add_generation_prompt: bool, continue_final: bool = False
) -> Iterator[Piece]:
    """Pieces of a conversation, without the beginning-of-sequence token.

    Args:
        name: key of `TEMPLATES`.
        turns: (role, content) pairs; roles are system (first only), user and assistant.
        add_generation_prompt: end with what stands before a reply.
        continue_final: leave the last reply open, for the model to go on with.

    Raises:
        ValueError: on an unknown role, a system turn that is not first, or a conversation to go on with that does not
            end with a reply.
    """
    template = chat_template(name)
    if continue_final and (add_generation_prompt or not turns or turns[-1][0] != "assistant"):
        raise ValueError("a final message to go on with is an assistant's, without a generation prompt after it")
    system: tuple[Part, ...] = content_parts(template.system)
    if turns and turns[0][0] == "system":
        system, turns = content_parts(turns[0][1]), turns[1:]
    if system:
        yield _surround(template.around_system, system)
    for index, (role, content) in enumerate(turns):
        parts = content_parts(content)
        if role == "user":
            if not template.user_words:
                parts = tuple(part for part in parts if part is Special.IMAGE)
            yield _surround(template.around_user, parts)
        elif role == "assistant":
            yield Piece(template.before_reply, False)
            reply = ((template.reply_prefix,) if template.reply_prefix else ()) + parts
            if continue_final and index == len(turns) - 1:
                yield Piece(reply, True)
                return
            yield Piece((*reply, Special.END), True)
            yield Piece(template.after_reply, False)
        else:
            raise ValueError(f"role {role!r} is not allowed here; a conversation has one leading system turn at most")
    if add_generation_prompt:
        yield Piece(template.before_reply, False)


def _surround(around: tuple[tuple[Part, ...], tuple[Part, ...]], parts: tuple[Part, ...]) -> Piece:
    return Piece((*around[0], *parts, *around[1]), False)


def read_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[list[tuple[str, Content]], list[Any]]:
    """Messages as Hugging Face and OpenAI write them -> turns for `render`, and the images that they name, in order.

    A message is `{"role": ..., "content": ...}`; its content is a string, in which each `<image>` stands for an image,
    or a list of `{"type": "text", "text": ...}` and `{"type": "image", KEY: ...}`, where KEY is image, path, url or
    base64 (or there is none: the image then comes apart from the conversation). In a list, text is only text. A newline
    stands between an image and text that follows it, as in LLaVA's conversations.

    Raises:
        ValueError: on a message or an entry of another form, naming it.
    """
    turns: list[tuple[str, Content]] = []
    images: list[Any] = []
    for index, message in enumerate(messages):
        content = message.get("content")
        if "role" not in message or not isinstance(content, str | Sequence):
            raise ValueError(
                f"message {index} needs a role and a content, a string or a list of entries; got {message!r}"
            )
        if isinstance(content, str):
            turns.append((message["role"], content))
            continue
        parts: list[Part] = []
        for entry in content:
            if entry.get("type") == "text" and isinstance(entry.get("text"), str):
                text = entry["text"]
                after_image = bool(parts) and parts[-1] is Special.IMAGE
                parts.append("\n" + text if after_image and text[:1] != "\n" else text)
            elif entry.get("type") in ("image", "image_url"):
                parts.append(Special.IMAGE)
                images += _image_of(entry)
            else:
                raise ValueError(f"message {index}: an entry is a text or an image, got {entry!r}")
        turns.append((message["role"], parts))
    return turns, images


def _image_of(entry: Mapping[str, Any]) -> list[Any]:
    """The image that an entry names, none where it only holds the place of one."""
    if entry["type"] == "image_url":
        target = entry["image_url"]
        return [target["url"] if isinstance(target, Mapping) else target]
    if "base64" in entry:
        return ["data:image/any;base64," + entry["base64"]]
    return [entry[key] for key in ("image", "path", "url") if entry.get(key) is not None][:1]


_JINJA = """\
{%%- macro words(content, keep) -%%}
{%%- if content is string -%%}
{%%- if keep -%%}{{ content }}{%%- else -%%}{{ %(image)s * (content.split(%(image)s) | length - 1) }}{%%- endif -%%}
{%%- else -%%}
{%%- for part in content -%%}
{%%- if part.type == "text" -%%}
{%%- if keep -%%}
{%%- if loop.previtem is defined and loop.previtem.type != "text" and part.text[:1] != "\\n" -%%}
{{ "\\n" }}
{%%- endif -%%}
{{ part.text }}
{%%- endif -%%}
{%%- else -%%}{{ %(image)s }}{%%- endif -%%}
{%%- endfor -%%}
{%%- endif -%%}
{%%- endmacro -%%}
{%%- if %(begins)s and bos_token -%%}{{ bos_token }}{%%- endif -%%}
{%%- if messages and messages[0].role == "system" -%%}
{{ %(before_system)s }}{{ words(messages[0].content, true) }}{{ %(after_system)s }}
{%%- elif %(system)s -%%}
{{ %(before_system)s }}{{ %(system)s }}{{ %(after_system)s }}
{%%- endif -%%}
{%%- for message in messages -%%}
{%%- if message.role == "user" -%%}
{{ %(before_user)s }}{{ words(message.content, %(user_words)s) }}{{ %(after_user)s }}
{%%- elif message.role == "assistant" -%%}
{{ %(before_reply)s }}{{ %(reply_prefix)s }}{{ words(message.content, true) }}{{ eos_token }}{{ %(after_reply)s }}
{%%- elif message.role != "system" or not loop.first -%%}
{{ raise_exception("a conversation has user and assistant turns, and one leading system turn at most") }}
{%%- endif -%%}
{%%- endfor -%%}
{%%- if add_generation_prompt -%%}{{ %(before_reply)s }}{%%- endif -%%}
"""


def jinja_template(name: str) -> str:
    """The template in the form that transformers, vLLM and others take: messages to text, `<image>` for an image.

    As text it cannot keep a conversation's words and special tokens apart; `MeteorProcessor` tokenizes the pieces of
    `render` instead.
    """
    template = chat_template(name)

    def literal(parts: tuple[Part, ...]) -> str:
        written = {Special.END: "eos_token", Special.TURN: json.dumps(TURN_TOKEN)}
        return " ~ ".join(json.dumps(p) if isinstance(p, str) else written[p] for p in parts) or '""'

    return _JINJA % {
        "image": json.dumps(IMAGE_PLACEHOLDER),
        "begins": json.dumps(template.begins),
        "system": json.dumps(template.system),
        "before_system": literal(template.around_system[0]),
        "after_system": literal(template.around_system[1]),
        "before_user": literal(template.around_user[0]),
        "after_user": literal(template.around_user[1]),
        "user_words": json.dumps(template.user_words),
        "before_reply": literal(template.before_reply),
        "reply_prefix": json.dumps(template.reply_prefix),
        "after_reply": literal(template.after_reply),
    }
