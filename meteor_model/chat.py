"""Chat templates: how a conversation becomes text, as literal pieces so that labels can be masked piece by piece.

A template writes text and special tokens; a conversation writes text and images. The two never mix: what a
conversation spells like a special token stays text, because `render` hands both over as different types. The Jinja form
of a template (`jinja_template`), for programs that know only text, is made from the same table.
"""

from __future__ import annotations

import hashlib
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
    """What is not text: the beginning of a sequence, its end, an image, ChatML's start of a turn."""

    BEGIN = "begin"
    IMAGE = "image"
    END = "end"
    TURN = "turn"


Part = str | Special
#: Either text in which each `<image>` stands for an image, or parts, in which text is only text.
Content = str | Sequence[Part]
#: (role, content) pairs; roles are system (first only), user and assistant.
Turns = Sequence[tuple[str, Content]]


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
        trims_reply: whether white space that begins a reply is left out. Needed where white space stands before it: a
            tokenizer would join the two into one token, which no prompt can end with.
        after_reply: parts after a reply's end token.
        begins: whether the tokenizer's beginning-of-sequence token comes first.
        user_words: whether the words of a user turn are kept, or its images alone.
    """

    system: str = ""
    around_system: tuple[tuple[Part, ...], tuple[Part, ...]] = ((), ())
    around_user: tuple[tuple[Part, ...], tuple[Part, ...]] = ((), ())
    before_reply: tuple[Part, ...] = ()
    reply_prefix: str = ""
    trims_reply: bool = False
    after_reply: tuple[Part, ...] = ()
    begins: bool = True
    user_words: bool = True


_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_BLANK_AFTER: tuple[tuple[Part, ...], tuple[Part, ...]] = ((), (" ",))
_USER, _ASSISTANT = (("USER: ",), (" ",)), ("ASSISTANT:",)
_AFTER_TURN = (Special.END, "\n")

TEMPLATES: dict[str, ChatTemplate] = {
    # LLaVA's pre-training: the images, then the caption; the user's words are dropped.
    "plain": ChatTemplate(around_system=((), ("\n",)), user_words=False),
    "vicuna_v1": ChatTemplate(
        _VICUNA_SYSTEM, around_system=_BLANK_AFTER, around_user=_USER, before_reply=_ASSISTANT, reply_prefix=" "
    ),
    # vicuna_v1 without its system prompt: a short prompt for small models.
    "short": ChatTemplate(around_system=_BLANK_AFTER, around_user=_USER, before_reply=_ASSISTANT, reply_prefix=" "),
    # Qwen's and SmolLM2's; the tokenizer's end-of-sequence token must be <|im_end|>.
    "chatml": ChatTemplate(
        around_system=((Special.TURN, "system\n"), _AFTER_TURN),
        around_user=((Special.TURN, "user\n"), _AFTER_TURN),
        before_reply=(Special.TURN, "assistant\n"),
        trims_reply=True,
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


def images_in_front(question: str, num_images: int) -> Turns:
    """A plain question as a user turn, with its images in front where it does not place them."""
    if num_images and IMAGE_PLACEHOLDER not in question:
        question = IMAGE_PLACEHOLDER * num_images + "\n" + question
    return [("user", question)]


def turns_up_to_replies(turns: Turns) -> Iterator[Turns]:
    """What each reply of a conversation answers: all turns before it, earlier replies as the conversation has them."""
    return (turns[:index] for index, (role, _) in enumerate(turns) if role == "assistant")


def template_marks(name: str) -> tuple[str, str]:
    """What stands before a user's words and before a reply, as text without outer white space; "" for nothing."""
    template = chat_template(name)
    written = {Special.END: "", Special.TURN: TURN_TOKEN}
    before_user, before_reply = (
        "".join(part if isinstance(part, str) else written[part] for part in parts).strip()
        for parts in (template.around_user[0], template.before_reply)
    )
    return before_user, before_reply


def render(name: str, turns: Turns, add_generation_prompt: bool, continue_final: bool = False) -> Iterator[Piece]:
    """Pieces of a conversation, the beginning-of-sequence token first where the template has it.

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
    if template.begins:
        yield Piece((Special.BEGIN,), False)
    if continue_final and (add_generation_prompt or not turns or turns[-1][0] != "assistant"):
        raise ValueError("a final message to go on with is an assistant's, without a generation prompt after it")
    given: Content = template.system
    if turns and turns[0][0] == "system":
        given, turns = turns[0][1], turns[1:]
    if any(system := content_parts(given)):
        yield _surround(template.around_system, system)
    for index, (role, content) in enumerate(turns):
        parts = content_parts(content)
        parts = content_parts(content)
        if role == "user":
            seen = [part for part in parts if template.user_words or part is Special.IMAGE]
            yield _surround(template.around_user, seen)
        elif role == "assistant":
            yield Piece(template.before_reply, False)
            reply = _reply(template, parts)
            if continue_final and index == len(turns) - 1:
                yield Piece(reply, True)
                return
            yield Piece((*reply, Special.END), True)
            yield Piece(template.after_reply, False)
        else:
            raise ValueError(f"role {role!r} is not allowed here; a conversation has one leading system turn at most")
    if add_generation_prompt:
        yield Piece(template.before_reply, False)


def _reply(template: ChatTemplate, parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """The parts of a reply, prefixed and trimmed."""
    places = [place for place, part in enumerate(parts) if isinstance(part, Special)]
    first = places[0] if places else len(parts)
    words = "".join(str(part) for part in parts[:first])
    return template.reply_prefix + (words.lstrip() if template.trims_reply else words), *parts[first:]


def _surround(around: tuple[tuple[Part, ...], tuple[Part, ...]], parts: Sequence[Part]) -> Piece:
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


#: SHA-256 of the text that each template had before 2026-11-30: a system turn stuck to the question, and white space
#: that begins a ChatML reply was kept. Other conversations read the same, so folders that hold it are loaded.
_EARLIER_JINJA = {
    "plain": "74d6356dc33bde3fe4e17cbca92f750ae367fb546a00d0af0fba31ce51adb447",
    "vicuna_v1": "6a11497b61d54c42ab39b26a8b719367d0ac17d52d506fe3a1150f27331d42c6",
    "short": "0793b275b7bbf3a9545f35972e2809c0a39ab423aded85f062ee5785eb35e4a1",
    "chatml": "c0dfe1deba3cf598b4e336bd92d35904ff145c2d0c4049679f9b4556131b0721",
}

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
{%%- set system = %(system)s -%%}
{%%- if messages and messages[0].role == "system" -%%}
{%%- set system = words(messages[0].content, true) -%%}
{%%- endif -%%}
{%%- if system -%%}
{{ %(before_system)s }}{{ system }}{{ %(after_system)s }}
{%%- endif -%%}
{%%- for message in messages -%%}
{%%- if message.role == "user" -%%}
{{ %(before_user)s }}{{ words(message.content, %(user_words)s) }}{{ %(after_user)s }}
{%%- elif message.role == "assistant" -%%}
{{ %(before_reply)s }}{{ %(reply_prefix)s }}{{ words(message.content, true)%(trim)s -}}
{{ eos_token }}{{ %(after_reply)s }}
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
        "trim": ".lstrip()" if template.trims_reply else "",
        "after_reply": literal(template.after_reply),
    }


def is_jinja_of(name: str, text: str) -> bool:
    """Whether a text is the template's Jinja form, or the one that earlier folders hold."""
    return text == jinja_template(name) or hashlib.sha256(text.encode()).hexdigest() == _EARLIER_JINJA[name]
