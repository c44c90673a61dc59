"""Parts: the cache, the drawn pages and the reader's training, the converters, and a model built from parts.

Converters are tested on the real packages (parts-requirements.txt). Where these are not installed the tests are skipped
by name; with METEOR_REQUIRE_PARTS=1, which CI sets, they fail instead.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from jobs.make_parts import JOB
from jobs.recipes import recipe
from meteor_model.architectures import architecture
from meteor_model.encoders import build_encoder
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.tokenizer import SPECIAL_TOKENS, pretrained_tokenizer, train_tokenizer
from meteor_model.weights import load_encoder, load_llm, load_parts, vocabulary_rows
from pipelines.data import shards
from pipelines.job.start import _built
from pipelines.parts import PARTS, PartError, PartMaker, make_part, resolve_sources
from pipelines.parts.packages import versions
from pipelines.parts.reader import Reader, ReaderTraining, _average_precision, make_reader
from pipelines.parts.text_images import ALPHABET, _ink, draw_batch, draw_page, words
from tests.meteor_model.builders import DENSE, TEXTS, config, model


def silent(_: str) -> None:
    """Progress that nobody reads."""


def library_tower(encoder: torch.nn.Module) -> Any:
    """The library's network inside an encoder; Any, as torch types the attributes of a module as Tensor or Module."""
    return encoder.tower


# -------------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A part `toy`; the list tells how often, and where, it was made."""
    calls: list[Path] = []

    def make(folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
        calls.append(folder)
        say("toy: working")
        (folder / "model.safetensors").write_bytes(b"weights")
        return {"verified": "by hand"}

    monkeypatch.setitem(PARTS, "toy", PartMaker(make, ("torch",), "Apache-2.0", "a toy"))
    return calls


def test_a_part_is_made_once_and_again_when_damaged_or_outdated(
    made: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_part("toy", tmp_path, silent)
    assert (first.folder, first.reused, len(made)) == (tmp_path / "toy", False, 1)
    assert first.metadata["packages"] == versions(("torch",))
    assert first.metadata["files"].keys() == {"model.safetensors"}
    assert make_part("toy", tmp_path, silent).reused
    assert resolve_sources({"llm": "parts:toy", "eye": "owner/name"}, tmp_path, silent) == {
        "llm": str(tmp_path / "toy"),
        "eye": "owner/name",
    }
    (tmp_path / "toy" / "model.safetensors").write_bytes(b"changed")
    assert not make_part("toy", tmp_path, silent).reused
    assert (tmp_path / "toy" / "model.safetensors").read_bytes() == b"weights"
    (tmp_path / "toy" / "part.json").write_text("{")
    assert not make_part("toy", tmp_path, silent).reused
    monkeypatch.setitem(PARTS, "toy", replace(PARTS["toy"], recipe=2))
    assert not make_part("toy", tmp_path, silent).reused
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]  # no scratch folder stays


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
        (folder / "half").write_text("x")
        raise PartError("does not verify")

    monkeypatch.setitem(PARTS, "toy", PartMaker(fail, (), "none", "a toy"))
    with pytest.raises(PartError, match="does not verify"):
        make_part("toy", tmp_path, silent)
    assert not list(tmp_path.iterdir())


def test_missing_packages_and_unknown_names_say_what_to_do(
    made: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PARTS, "toy", replace(PARTS["toy"], distributions=("no-such-distribution",)))
    with pytest.raises(PartError, match="no-such-distribution; run `make parts`"):
        make_part("toy", tmp_path, silent)
    with pytest.raises(PartError, match="did you mean 'dinov2-small'"):
        make_part("dinov2-smal", tmp_path, silent)
    assert JOB.main(["dinov2-smal", "--output", str(tmp_path)]) == 2
    assert "did you mean 'dinov2-small'" in capsys.readouterr().err
    assert not made


def test_the_job_says_what_it_made(made: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for state in ("made in", "whole, left as it is"):
        assert JOB.main(["toy", "--output", str(tmp_path)]) == 0
        printed = capfd.readouterr().out
        assert f"toy: {state}" in printed
        assert "by hand" in printed
    assert len(made) == 1


# ------------------------------------------------------------------------------------------------------------- reader


def test_ink_is_counted_patch_by_patch() -> None:
    """A solid 10 x 4 box over a corner of four patches: the shares of its ink decide, 12 pixels at most are needed."""
    pixels, labels = np.full((32, 32, 3), 255.0, np.float32), np.zeros((4, len(ALPHABET)), bool)
    box, black = np.ones((4, 10), np.float32), np.zeros(3, np.float32)
    _ink(pixels, labels, box, x=8, y=13, colour=black, index=5, patch=16)  # rows 13-16, columns 8-17
    assert pixels[13:17, 8:18].max() == 0
    assert pixels.sum() == 255 * 3 * (32 * 32 - 40)
    # 8 x 3 = 24 pixels, 2 x 3 = 6, 8 x 1 = 8, 2 x 1 = 2; needed are min(12, 0.2 * 40) = 8
    assert labels[:, 5].tolist() == [True, False, True, False]
    assert labels.sum() == 2
    _ink(pixels, labels, box, x=40, y=0, colour=black, index=6, patch=16)
    assert not labels[:, 6].any()


def test_pages_are_reproducible_and_held_out_words_are_never_drawn() -> None:
    assert not set(words(False)) & set(words(True))
    assert len(words(True)) > 100
    pages = [draw_batch(np.random.default_rng(3), 2, 96, 16, held_out=False) for _ in range(2)]
    assert np.array_equal(pages[0][0], pages[1][0])
    assert np.array_equal(pages[0][1], pages[1][1])
    pictures, labels = pages[0]
    assert (pictures.shape, labels.shape) == ((2, 3, 96, 96), (2, 36, 94))
    assert pictures.dtype == np.uint8
    labelled = labels.any(axis=-1)
    assert 0.2 < labelled.mean() < 1


def test_a_labelled_patch_has_ink() -> None:
    """Patches that hold a character differ more within themselves than empty ones of the same plain page."""
    rng = np.random.default_rng(0)
    for _ in range(5):
        picture, labels = draw_page(rng, 128, 16, words(False))
        patches = picture.astype(float).mean(axis=-1).reshape(8, 16, 8, 16).transpose(0, 2, 1, 3).reshape(64, -1)
        held = labels.any(axis=-1)
        assert np.median(patches.std(axis=1)[held]) > np.median(patches.std(axis=1)[~held])


def test_average_precision_is_the_mean_precision_at_the_hits() -> None:
    generator = torch.Generator().manual_seed(0)
    score, truth = torch.randn(40, 3, generator=generator), torch.rand(40, 3, generator=generator) < 0.3
    for column in range(3):
        ranked = [bool(truth[row, column]) for row in score[:, column].argsort(descending=True)]
        hits = [sum(ranked[: place + 1]) / (place + 1) for place, hit in enumerate(ranked) if hit]
        assert _average_precision(score, truth)[column] == pytest.approx(sum(hits) / len(hits))


def test_a_trained_reader_is_a_part_of_the_architecture_small(tmp_path: Path) -> None:
    """A training of two steps: reproducible, stored with its scores, and loaded by the architecture's own tower."""
    brief = ReaderTraining(steps=2, patches=72, sides=(96,), warmup_steps=1, heldout_pages=8, threads=1)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        report = make_reader(tmp_path / name, silent, brief)
    scores = report["heldout"]
    assert set(scores) == {"96", "192"}
    assert 0 < scores["96"]["constant"] < 0.1
    assert f"{scores['96']['average_precision']:.3f}" in report["verified"]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    torch.manual_seed(brief.seed)
    start = Reader().tower.state_dict()
    assert any(not torch.equal(start[key], first[key]) for key in first)

    (tower,) = (item for item in architecture("small").encoders if item.name == "reader")
    encoder = build_encoder(tower)
    part = load_encoder(encoder, str(tmp_path / "a"))
    assert part.tensors == len(first)
    assert all(torch.equal(library_tower(encoder).state_dict()[key], first[key]) for key in first)


# --------------------------------------------------------------------------------------------------------- converters


def _needs(name: str) -> None:
    try:
        versions(PARTS[name].distributions)
    except PartError as error:
        if os.environ.get("METEOR_REQUIRE_PARTS") == "1":
            raise
        pytest.skip(f"{error}; `make parts` installs them")


@pytest.mark.parametrize(
    "name",
    ["dinov2-small", "efficientnet-lite0", pytest.param("smollm2-135m-instruct", marks=pytest.mark.slow)],
)
def test_a_package_becomes_a_part_that_the_architecture_small_loads(name: str, tmp_path: Path) -> None:
    """The converter verifies itself against the package's own network; here its folder is loaded to the last tensor."""
    _needs(name)
    part = make_part(name, tmp_path, silent)
    assert "largest difference" in part.metadata["verified"]
    small = architecture("small")
    (place,) = (key for key, source in small.weights.items() if source == f"parts:{name}")
    if place == "llm":
        _check_llm(part.folder)
        return
    (tower,) = (item for item in small.encoders if item.name == place)
    encoder = build_encoder(tower)
    loaded = load_encoder(encoder, str(part.folder))
    assert loaded.tensors == len(library_tower(encoder).state_dict())
    expected = {"dinov2": "encoder.layer.10.", "efficientnet": "conv_head."}[place]
    assert any(item.startswith(expected) for item in loaded.dropped)


def _check_llm(folder: Path) -> None:
    """Text alone gives the logits and the loss that the stored LLM gives by itself, digit for digit."""
    text = {**architecture("small").text_config, "vocab_size": vocabulary_rows(str(folder)) + 1}
    built = MeteorForConditionalGeneration(config(DENSE, text_config=text, tie_word_embeddings=True)).eval()
    load_llm(built, str(folder))
    alone = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = pretrained_tokenizer(str(folder))("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        logits = built(input_ids=ids).logits[..., : alone.vocab_size]
        torch.testing.assert_close(logits, alone(ids).logits, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------- a model from parts


def test_a_model_is_built_from_parts_with_the_llm_s_tokenizer(tmp_path: Path) -> None:
    torch.manual_seed(9)
    donor = model(DENSE)
    clip, llm = tmp_path / "clip", tmp_path / "llm"
    library_tower(donor.encoders["clip"]).save_pretrained(clip)
    tokenizer = train_tokenizer(TEXTS, 280)
    assert len(tokenizer) < 300
    whole = hf.LlamaForCausalLM(hf.LlamaConfig(**donor.config.text_config.to_dict())).eval()  # 300 rows
    whole.save_pretrained(llm)
    tokenizer.save_pretrained(llm)

    base = recipe("pretrain", "tiny")
    sources = {"clip": str(clip), "llm": str(llm)}
    wanted = replace(base, model=replace(base.model, weights=sources))
    built, processor, loaded = _built(wanted, cast(shards.Manifest, None))
    assert [part.name for part in loaded] == ["clip", "llm"]
    assert processor.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert built.config.image_token_id == tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[3])
    assert built.config.text_config.vocab_size == 300  # rows that no token of the tokenizer has stay
    ids = torch.arange(4, 20)[None]
    with torch.inference_mode():
        torch.testing.assert_close(built.eval()(input_ids=ids).logits, whole(ids).logits, rtol=0, atol=0)
    for key, tensor in library_tower(donor.encoders["clip"]).state_dict().items():
        assert torch.equal(library_tower(built.encoders["clip"]).state_dict()[key], tensor)
    again = load_parts(built, {part.name: f"{part.source}#sha256={part.sha256}" for part in loaded})
    assert [part.sha256 for part in again] == [part.sha256 for part in loaded]
    json.dumps([part.__dict__ for part in loaded])  # as it is stored


def test_a_recipe_names_only_parts_that_the_architecture_has() -> None:
    base = recipe("pretrain", "tiny")
    with pytest.raises(ValueError, match="eva"):
        replace(base, model=replace(base.model, weights={"eva": "owner/name"}))
