"""Tokenizers: a small one trained on the texts of a run, or the one that comes with a pretrained LLM."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from meteor_model.chat import IMAGE_PLACEHOLDER
from meteor_model.foreign import foreign
from meteor_model.weights.checkpoints import WeightsError, parse_source

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", IMAGE_PLACEHOLDER)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every string round-trips, nothing is unknown.

    Args:
        texts: what it is trained on, in a fixed order.
        vocab_size: at most so many tokens, special and byte tokens included (at least 260).
    """
    if vocab_size < 256 + len(SPECIAL_TOKENS):
        raise ValueError(
            f"vocab_size {vocab_size} is below the {256 + len(SPECIAL_TOKENS)} of bytes and special tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, bos, eos, image = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, additional_special_tokens=[image]
    )


def pretrained_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside an LLM's weights, with the image token and, where it has none, a padding token.

    `<image>` becomes a special token after all others (an LLM's embedding may already have a row there). Padding takes
    the unknown or the end-of-sequence token: it is masked wherever it stands, so it needs no token of its own.

    Args:
        source: as for weights (meteor_model/weights/): a folder or a hub repository.

    Raises:
        WeightsError: where the source holds no tokenizer.
    """
    where = parse_source(source)
    with foreign(lambda what: WeightsError(f"{source!r} holds no tokenizer: {what}")):
        tokenizer = AutoTokenizer.from_pretrained(where.place, revision=where.revision or "main")
    tokenizer.add_tokens([AddedToken(IMAGE_PLACEHOLDER, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer
