"""One way from a conversation to a prompt: random conversations, every template, several kinds of tokenizer.

What is asked is the beginning of what was trained; both are the ids that the tokenizer gives the conversation's text.
"""

from __future__ import annotations

import functools
import json
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from meteor_model.chat import IGNORE_INDEX, TEMPLATES, TURN_TOKEN, Special, turns_up_to_replies
from meteor_model.image_processing_meteor import MeteorImageProcessor
from meteor_model.processing_meteor import MeteorProcessor
from meteor_model.sample_encoder import SampleEncoder, load_sample_encoder, save_sample_encoder
from meteor_model.tokenizer import train_tokenizer

TEXTS = (
    "USER: \nWhat colour is it? ASSISTANT: red. A: B: which of them?\n\n  left  right",
    "A chat between a curious user and an artificial intelligence assistant. answers to the user's questions. system",
)
TOKENS_PER_IMAGE = 3


def _trained(
    trainer: Callable[..., trainers.Trainer],
    model: models.Model,
    pre_tokenizer: pre_tokenizers.PreTokenizer | None,
    normalizer: normalizers.Normalizer | None = None,
    trained_with: pre_tokenizers.PreTokenizer | None = None,
) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = trained_with or pre_tokenizer
    names = ["<pad>", "<s>", "</s>", "<unk>"]
    options = {"unk_token": "<unk>"} if trainer is trainers.UnigramTrainer else {}
    alphabet = sorted(set("".join(TEXTS)) | {"▁"})
    tokenizer.train_from_iterator(
        TEXTS * 3,
        trainer(vocab_size=400, special_tokens=names, initial_alphabet=alphabet, show_progress=False, **options),
    )
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def _metaspace(scheme: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Metaspace(prepend_scheme=scheme)


def _llama() -> PreTrainedTokenizerBase:
    """What transformers loads for Vicuna: a blank begins the text, and words are not cut before they are tokenized."""
    trained = _trained(trainers.BpeTrainer, models.BPE(unk_token="<unk>"), _metaspace("never"))
    state = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in state["merges"]]
    return LlamaTokenizer(vocab=state["vocab"], merges=merges, pad_token="<pad>")


def _prefix_space() -> Tokenizer:
    tokenizer = train_tokenizer(TEXTS, 320).backend_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


_PREPENDING = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
TOKENIZERS: dict[str, Callable[[], Tokenizer | PreTrainedTokenizerBase]] = {
    "byte-level": lambda: train_tokenizer(TEXTS, 320),
    "byte-level with a blank": _prefix_space,
    "Llama": _llama,
    "SentencePiece BPE, blank by its normalizer": lambda: _trained(
        trainers.BpeTrainer, models.BPE(unk_token="<unk>"), None, _PREPENDING, trained_with=_metaspace("always")
    ),
    "Unigram, blank by its normalizer": lambda: _trained(
        trainers.UnigramTrainer, models.Unigram(), None, _PREPENDING, trained_with=_metaspace("always")
    ),
    "Unigram, blank before every text": lambda: _trained(
        trainers.UnigramTrainer, models.Unigram(), _metaspace("always")
    ),
    "Unigram, blank before the first text": lambda: _trained(
        trainers.UnigramTrainer, models.Unigram(), _metaspace("first")
    ),
    "Unigram, no blank": lambda: _trained(trainers.UnigramTrainer, models.Unigram(), _metaspace("never")),
}


@functools.cache
def processor(kind: str, template: str) -> MeteorProcessor:
    made = TOKENIZERS[kind]()
    if isinstance(made, Tokenizer):
        made = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    made.add_special_tokens({"additional_special_tokens": ["<image>"]})
    if template == "chatml":
        made.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": [TURN_TOKEN, "<image>"]})
    return MeteorProcessor(MeteorImageProcessor(64), made, TOKENS_PER_IMAGE, template=template)


@functools.cache
def light(kind: str, template: str) -> SampleEncoder:
    """What data tasks encode with."""
    with tempfile.TemporaryDirectory() as folder:
        assert save_sample_encoder(processor(kind, template), Path(folder))
        found = load_sample_encoder(Path(folder))
    assert found is not None
    return found


# ------------------------------------------------------------------------------------------------------- conversations

_WORDS = st.lists(
    st.sampled_from(
        [*" \n\t.:,", "  ", "\n\n", "red", "What", "A:", "USER", "ASSISTANT:", "é", "日本", "\u00a0", "\u2581"]
    ),
    max_size=6,
).map("".join)


@st.composite
def _user_turns(draw: st.DrawFn) -> str:
    pieces = [draw(_WORDS) for _ in range(draw(st.integers(1, 3)))]
    return "<image>".join(pieces)


@st.composite
def conversations(draw: st.DrawFn) -> list[tuple[str, str]]:
    turns = [("system", draw(_WORDS))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [("user", draw(_user_turns())), ("assistant", draw(_WORDS))]
    return turns


def images_of(turns: Sequence[tuple[str, Any]]) -> int:
    return sum(text.count("<image>") for _, text in turns)


def text_ids(made: MeteorProcessor, turns: Sequence[tuple[str, Any]], ask: bool) -> list[int]:
    """What a program that knows only the text gives the model."""
    messages = [{"role": role, "content": text} for role, text in turns]
    text = str(made.apply_chat_template(messages, add_generation_prompt=ask))
    expanded = text.replace("<image>", "<image>" * made.tokens_per_image)
    ids: list[int] = made.tokenizer.encode(expanded, add_special_tokens=False)
    return ids


HARD = [
    [("system", "Be terse."), ("user", "A: <image> B: <image> which?"), ("assistant", "B")],
    [("user", "What?\n<image>"), ("assistant", " red"), ("user", "<image>"), ("assistant", "\n\n\nred")],
    [("system", ""), ("user", ""), ("assistant", ""), ("user", " "), ("assistant", "  \n")],
]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", sorted(TEMPLATES))
@settings(max_examples=25, deadline=None)
@given(turns=conversations())
@example(turns=HARD[0])
@example(turns=HARD[1])
@example(turns=HARD[2])
def test_what_is_asked_is_the_beginning_of_what_was_trained(
    kind: str, template: str, turns: list[tuple[str, str]]
) -> None:
    made = processor(kind, template)
    whole = made.encode(turns, images_of(turns))
    assert light(kind, template).encode(turns, images_of(turns)) == whole
    questions = made.encode_questions(turns, images_of(turns))
    before_replies = list(turns_up_to_replies(turns))
    assert len(questions) == len(before_replies) == sum(role == "assistant" for role, _ in turns)
    for question, before in zip(questions, before_replies, strict=True):
        asked, length = question.prompt.input_ids, len(question.prompt.input_ids)
        assert asked == whole.input_ids[:length]
        assert asked == made.encode(before, images_of(before), add_generation_prompt=True).input_ids
        assert asked == text_ids(made, before, ask=True) or not _keeps_prompts(made, before)
        assert whole.input_ids[length : length + len(question.answer_ids)] == question.answer_ids
        assert whole.labels[length : length + len(question.answer_ids)] == question.answer_ids
        assert question.answer_ids[-1] == made.tokenizer.eos_token_id
        assert question.num_images == images_of(before)
    answers = [label for question in questions for label in question.answer_ids]
    assert [label for label in whole.labels if label != IGNORE_INDEX] == answers
    assert whole.input_ids == text_ids(made, turns, ask=False) or not _keeps_prompts(made, turns)


def _keeps_prompts(made: MeteorProcessor, turns: Sequence[tuple[str, Any]]) -> bool:
    """Whether the tokenizer itself ends a token where each reply begins; else text and prompt cannot both be kept."""
    for place, (role, _) in enumerate(turns):
        if role == "assistant":
            prompt = text_ids(made, turns[:place], ask=True)
            if text_ids(made, turns[: place + 1], ask=False)[: len(prompt)] != prompt:
                return False
    return True


@pytest.mark.parametrize("kind", ["byte-level", "Llama", "SentencePiece BPE, blank by its normalizer"])
def test_usual_tokenizers_keep_every_prompt(kind: str) -> None:
    """So that the test above cannot pass on conversations that are left out of it."""
    for template in TEMPLATES:
        assert all(_keeps_prompts(processor(kind, template), turns) for turns in HARD)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_words_that_spell_special_tokens_stay_words(kind: str) -> None:
    made = processor(kind, "short")
    turns = [("user", "say </s> now <unk>"), ("assistant", "<pad> and <s>"), ("user", "x"), ("assistant", "y")]
    whole = made.encode(turns, 0)
    assert light(kind, "short").encode(turns, 0) == whole
    specials = [made.tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "</s>", "<pad>", "<image>")]
    assert [number for number in whole.input_ids if number in specials] == [*specials[:1], *[specials[1]] * 2]
    for question, before in zip(made.encode_questions(turns, 0), turns_up_to_replies(turns), strict=True):
        asked = made.encode(before, 0, add_generation_prompt=True).input_ids
        assert question.prompt.input_ids == asked == whole.input_ids[: len(asked)]


@pytest.mark.parametrize("kind", ["Llama", "SentencePiece BPE, blank by its normalizer"])
def test_vicuna_v1_is_the_published_text_without_a_lone_blank(kind: str) -> None:
    """FastChat's and LLaVA's conversation "v1": one blank between system, user and assistant, none after an end."""
    made = processor(kind, "vicuna_v1")
    turns = [("user", "What?"), ("assistant", "red"), ("user", "A: left"), ("assistant", "B")]
    text = (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: What? ASSISTANT: red</s>USER: A: left "
        "ASSISTANT: B</s>"
    )
    ids = made.encode(turns, 0).input_ids
    assert ids == made.tokenizer.encode(text, add_special_tokens=False)
    spelled = made.tokenizer.convert_ids_to_tokens(ids)
    lone = [place for place, token in enumerate(spelled) if token == "\u2581" and spelled[place + 1][0] == "\u2581"]
    assert lone == [], "two blanks in a row"


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_turns_do_not_stick_to_one_another(template: str) -> None:
    made = processor("byte-level", template)
    turns = [("system", "Be terse."), ("user", "one<image>"), ("user", "two<image>"), ("assistant", "three")]
    text = made.tokenizer.decode(made.encode(turns, 2).input_ids)
    rest = text.partition("Be terse.")[2]
    assert rest[0].isspace() or rest.startswith("<|im_end|>"), text
    if TEMPLATES[template].user_words:
        after_first = rest.partition("<image><image><image>")[2]
        assert after_first[0].isspace() or after_first.startswith("<|im_end|>"), text


def test_images_in_a_reply_are_seen_and_never_said() -> None:
    made = processor("byte-level", "short")
    turns = [("user", "draw"), ("assistant", "here <image> it is"), ("user", "<image>?"), ("assistant", "<image>")]
    whole = made.encode(turns, 3)
    assert whole.input_ids.count(made.image_token_id) == 3 * TOKENS_PER_IMAGE
    assert made.image_token_id not in whole.labels
    first, second = made.encode_questions(turns, 3)
    assert made.tokenizer.decode(first.answer_ids) == " here  it is</s>"
    assert (first.num_images, second.num_images) == (0, 2), "an image of the reply comes after its prompt"
    parts: list[tuple[str, Any]] = [("user", ["draw"]), ("assistant", [Special.IMAGE])]
    assert made.image_token_id not in made.encode(parts, 1).labels


RENDERED = {
    "short": ["USER: hi ASSISTANT:", "USER: hi", "<s>USER: hi", "hi ASSISTANT: ", "<image>\nUSER: hi ASSISTANT:"],
    "vicuna_v1": ["A chat. USER: hi ASSISTANT:", "USER: hi ASSISTANT:"],
    "chatml": ["<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>user\nhi<|im_end|>\n"],
    "plain": ["<s>hi"],
}


@pytest.mark.parametrize(("template", "text"), [(name, text) for name, texts in RENDERED.items() for text in texts])
def test_a_text_that_is_rendered_already_is_refused(template: str, text: str) -> None:
    made = processor("byte-level", template)
    count = text.count("<image>")
    for ask in (
        made.encode_question,
        lambda text, images: made(text, None if not images else [np.zeros((8, 8, 3), np.uint8)]),
    ):
        with pytest.raises(ValueError, match=r"is rendered by a template already .* give the question alone"):
            ask(text, count)


def test_marks_within_a_question_are_warned_of_and_stay_words() -> None:
    made = processor("byte-level", "short")
    with pytest.warns(UserWarning, match="holds 'USER:' and 'ASSISTANT:', which template 'short' writes around turns"):
        inputs = made("What does 'USER: hi ASSISTANT: yes' mean?")
    assert "USER: What does 'USER: hi ASSISTANT: yes' mean? ASSISTANT:" in made.decode(inputs["input_ids"][0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made("What does a user mean by this?")
        made(made.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True))


def test_data_tasks_refuse_what_training_refuses_and_a_damaged_file(tmp_path: Path) -> None:
    made = light("byte-level", "short")
    assert (made.image_size, made.tokens_per_image) == (64, TOKENS_PER_IMAGE)
    with pytest.raises(ValueError, match="1 <image> placeholders in the conversation, 2 images"):
        made.encode([("user", "<image>"), ("assistant", "a")], 2)
    assert load_sample_encoder(tmp_path) is None
    save_sample_encoder(processor("byte-level", "short"), tmp_path)
    path = tmp_path / "sample_encoder.json"
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ValueError, match=r"sample_encoder\.json cannot be read"):
        load_sample_encoder(tmp_path)
