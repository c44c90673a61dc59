"""Chat templates: how a conversation becomes text, as literal pieces so that labels can be masked piece by piece."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

IMAGE_PLACEHOLDER = "<image>"
IGNORE_INDEX = -100  # label of a token that the loss leaves out
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class ChatTemplate:
    """What stands before each turn; every reply is followed by the end-of-sequence token."""

    system: str
    before_user: str
    before_assistant: str


_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)

TEMPLATES: dict[str, ChatTemplate] = {
    # LLaVA's pre-training: the images, then the caption; the user's words are dropped.
    "plain": ChatTemplate(system="", before_user="", before_assistant=""),
    "vicuna_v1": ChatTemplate(system=_VICUNA_SYSTEM, before_user="USER: ", before_assistant=" ASSISTANT:"),
    # vicuna_v1 without its system prompt: a short prompt for small models.
    "short": ChatTemplate(system="", before_user="USER: ", before_assistant=" ASSISTANT:"),
}


def chat_template(name: str) -> ChatTemplate:
    """A template by name. Raises ValueError that names the nearest one."""
    if name not in TEMPLATES:
        near = difflib.get_close_matches(name, TEMPLATES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown chat template {name!r}; known: {', '.join(sorted(TEMPLATES))}{hint}")
    return TEMPLATES[name]


def render(name: str, turns: Sequence[tuple[str, str]], add_generation_prompt: bool) -> Iterator[tuple[str, bool]]:
    """Pieces (text, supervised) of a conversation; a supervised piece is a reply and is followed by end-of-sequence.

    Args:
        name: key of `TEMPLATES`.
        turns: (role, text) pairs; roles are system (first only), user and assistant.
        add_generation_prompt: end with what stands before a reply.

    Raises:
        ValueError: on an unknown role, or a system turn that is not first.
    """
    template = chat_template(name)
    system = template.system
    if turns and turns[0][0] == "system":
        system, turns = turns[0][1], turns[1:]
    if system:
        yield system, False
    for role, text in turns:
        if role == "user":
            if name == "plain":
                text = IMAGE_PLACEHOLDER * text.count(IMAGE_PLACEHOLDER)
            yield template.before_user + text, False
        elif role == "assistant":
            yield template.before_assistant, False
            yield (" " if template.before_assistant else "") + text, True
        else:
            raise ValueError(f"role {role!r} is not allowed here; a conversation has one leading system turn at most")
    if add_generation_prompt:
        yield template.before_assistant, False
