"""benchmarks/quality at toy size: its own rules, exact resume, and that its answers are the project's own."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import benchmarks.gpu
from benchmarks.quality import answers, statistics
from benchmarks.quality.__main__ import main as quality_main
from benchmarks.quality.align import CHARACTERS, IGNORE, Aligner, patch_labels
from benchmarks.quality.answers import answer
from benchmarks.quality.experiment import tokenizer_of
from benchmarks.quality.maps import Maps, make_maps
from benchmarks.quality.models import (
    VARIANTS,
    Trained,
    build,
    cut_projector,
    dense_config,
    make_processor,
    meteor_config,
    open_trained,
    save_trained,
    trained_tensors,
)
from benchmarks.quality.muon import BatchedMuon
from benchmarks.quality.projectors import fit_once, imitate
from benchmarks.quality.questions import Asked, Encoder, final_questions, images_of_step, learned_of
from benchmarks.quality.sizes import SIZES, Recipe
from benchmarks.quality.stored_scenes import Images, Scenes, store_scenes
from benchmarks.quality.train import Run, exact_match, look_at_maps, look_at_pixels, rate
from meteor_model.answering import Answerer, Budget
from meteor_model.answering import Question as Request
from meteor_model.fusion import concat_channels, prune_pool
from meteor_model.pruners.fuse_criteria import Pool
from meteor_model.pruners.named import with_pruner
from meteor_model.pruning_config import FusePruning
from pipelines.data.sources.scenes import Question, compose
from pipelines.data.sources.scenes.drawings import CATEGORIES, names

TOY = SIZES["toy"]
CPU = torch.device("cpu")


def silent(_: str) -> None:
    """Progress that nobody reads."""


def question(group: str, kind: str, answered: str = "yes", learning: bool = False, **tags: str) -> Question:
    return Question(kind, group, f"what about {kind}?", answered, "background", tags, learning)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ optimizer


def test_matrices_together_step_as_torchs_muon_does_one_by_one() -> None:
    torch.manual_seed(0)
    start = [torch.randn(24, 16), torch.randn(16, 24), torch.randn(24, 16)]
    ours, theirs = ([torch.nn.Parameter(item.clone()) for item in start] for _ in range(2))
    batched = BatchedMuon(ours, lr=0.02, weight_decay=0.1)
    single = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        batched.step()
        single.step()
    for mine, other, before in zip(ours, theirs, start, strict=True):
        assert (mine - before).norm() > 0.1
        assert (mine - other).norm() / (other - before).norm() < 0.02  # bf16 steps of Newton-Schulz


def test_the_rate_warms_up_and_falls_to_its_share() -> None:
    recipe = Recipe(steps=100, warmup=10)
    assert rate(0, recipe) == pytest.approx(0.1)
    assert rate(9, recipe) > 0.97
    assert rate(99, recipe) < 0.031


# ------------------------------------------------------------------------------------------------------------ questions


def test_every_epoch_is_a_shuffled_pass() -> None:
    seen = [index for step in range(6) for index in images_of_step(step, 4, 8, seed=1)]
    assert [sorted(seen[begin : begin + 8]) for begin in (0, 8, 16)] == [list(range(8))] * 3
    assert len({tuple(seen[begin : begin + 8]) for begin in (0, 8, 16)}) == 3
    assert seen[:4] != images_of_step(0, 4, 8, seed=2)


def test_reading_is_always_learned() -> None:
    own = [
        question("ocr", "sign"),
        *(question("general", f"k{number}") for number in range(9)),
        question("ocr", "line"),
    ]
    picked = learned_of(own, 4, np.random.default_rng(0))
    assert [item.kind for item in picked[:2]] == ["sign", "line"]
    assert len(picked) == 4


def test_final_questions_are_equally_many_of_a_group_and_as_even_over_kinds_as_there_are() -> None:
    images = [
        [
            question("ocr", "sign"),
            question("ocr", "line"),
            question("general", "color"),
            question("ocr", "letter", learning=True),
        ]
        for _ in range(20)
    ] + [[question("general", "rare")]] * 2
    asked = final_questions(images, per_group=12)
    assert Counter(item.question.kind for item in asked) == {"sign": 6, "line": 6, "color": 10, "rare": 2}
    assert asked == final_questions(images, per_group=12)
    assert len(final_questions(images, per_group=1000)) == 2 * 22  # the smallest group says how many


# --------------------------------------------------------------------------------------------------------------- models


def toy_dense() -> tuple[Any, Any]:
    torch.manual_seed(0)
    tokenizer = tokenizer_of(TOY)
    model, _ = build(dense_config(tokenizer, TOY.llm, pretrained=False), None)
    return model.eval(), make_processor(model.config, tokenizer)


def toy_questions(count: int) -> list[list[Question]]:
    return [[question("ocr", "sign", f"A{index}"), question("general", "color", "red")] for index in range(count)]


def toy_maps(model: Any, count: int) -> Maps:
    random = np.random.default_rng(0)
    arrays = {}
    for name, encoder in model.encoders.items():
        values = torch.from_numpy(random.normal(size=(count, encoder.grid[0] ** 2, encoder.embed_dim)))
        arrays[name] = values.to(torch.bfloat16).view(torch.int16).numpy()
    return Maps("toy", arrays)


def test_each_encoder_gets_its_channels_of_the_joint_projector() -> None:
    torch.manual_seed(0)
    joint = {f"projectors.joint.{name}": torch.randn(shape) for name, shape in JOINT_SHAPES.items()}
    cut = cut_projector({**joint, "lm_head.weight": torch.ones(1)}, {"a": 3, "b": 2})
    one, two = torch.randn(4, 3), torch.randn(4, 2)
    first = one @ cut["projectors.a.input.weight"].T + two @ cut["projectors.b.input.weight"].T
    torch.testing.assert_close(first / 1.5, torch.cat([one, two], dim=1) @ joint["projectors.joint.input.weight"].T)
    assert torch.equal(cut["projectors.b.output.weight"], joint["projectors.joint.output.weight"])
    assert "projectors.joint.input.weight" not in cut
    assert "lm_head.weight" in cut


JOINT_SHAPES = {"input.weight": (6, 5), "input.bias": (6,), "output.weight": (6, 6), "output.bias": (6,)}


def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    recipe = Recipe(steps=4, images=3, questions=2, warmup=2)

    def run(folder: str, stops: Sequence[int | None]) -> dict[str, torch.Tensor]:
        for stop in stops:
            model, processor = toy_dense()
            training = Run(
                tmp_path / folder, model, Encoder(processor), recipe, toy_questions(8), look_at_maps(model, maps)
            )
            training.train(silent, stop)
        lines = [json.loads(line) for line in (tmp_path / folder / "log.jsonl").read_text().splitlines()]
        assert lines[-1]["step"] == 4
        return trained_tensors(model)

    maps = toy_maps(toy_dense()[0], 8)
    whole, parts = run("whole", [None]), run("parts", [1, 2, None])
    begun = trained_tensors(toy_dense()[0])
    assert "lm_head.weight" not in whole, "it is the embedding"
    embedding = "language_model.embed_tokens.weight"
    assert not torch.equal(whole[embedding], begun[embedding])
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
    other = replace(recipe, seed=3)
    model, processor = toy_dense()
    look = look_at_maps(model, maps)
    longer = Run(tmp_path / "whole", model, Encoder(processor), replace(recipe, steps=9), toy_questions(8), look)
    assert (longer.step, longer.changes) == (4, [(4, 4, 9)])
    with pytest.raises(ValueError, match="another recipe"):
        Run(tmp_path / "whole", model, Encoder(processor), other, toy_questions(8), look_at_maps(model, maps))


def test_what_is_learned_by_heart_is_right_by_teacher_forcing(tmp_path: Path) -> None:
    recipe = Recipe(steps=40, images=2, questions=2, muon_rate=0.02, adam_rate=0.02, warmup=4)
    model, processor = toy_dense()
    maps, encoder, questions = toy_maps(model, 2), Encoder(processor), toy_questions(2)
    before = exact_match(model, encoder, questions, look_at_maps(model, maps))
    Run(tmp_path, model, encoder, recipe, questions, look_at_maps(model, maps)).train(silent)
    after = exact_match(model, encoder, questions, look_at_maps(model, maps))
    assert before == {"general": 0.0, "general/color": 0.0, "ocr": 0.0, "ocr/sign": 0.0}
    assert after["general/color"] == 1.0


# ----------------------------------------------------------------------------------------------------------- alignment


def test_patches_are_labelled_with_what_is_in_them() -> None:
    images = Images("train", 0, 12)
    labels_M3N = patch_labels(images)
    for index, labels_3N in enumerate(labels_M3N):
        facts, letters = compose("train", 0, index).facts, compose("train", 0, index).letters
        for thing in facts.drawings:
            left, top, right, bottom = thing.box
            row, column = (int((low + high) / 2 * 12 / 192) for low, high in ((top, bottom), (left, right)))
            category, name, _ = labels_3N[:, row * 12 + column]
            assert CATEGORIES[category] == thing.category
            assert (names()[name] if thing.name else IGNORE) == (thing.name or name)
        shown = {"".join(sorted({letter.character for letter in letters}))}
        read = "".join(sorted({CHARACTERS[label] for label in labels_3N[2] if label != IGNORE}))
        assert set(read) <= set(shown.pop())
        assert (labels_3N[0] != IGNORE).any() == bool(facts.drawings)


def test_the_boxes_of_drawings_hold_their_pixels() -> None:
    scenes = (compose("train", 0, index) for index in range(60))
    drawn = [scene for scene in scenes if scene.facts.drawings and not scene.facts.signs]
    assert drawn
    for scene in drawn:
        ground = np.median(scene.pixels.reshape(-1, 3), axis=0)
        far = np.abs(scene.pixels.astype(int) - ground).max(axis=-1) > 60
        for thing in scene.facts.drawings:
            left, top, right, bottom = thing.box
            assert far[top:bottom, left:right].any()
            far[top:bottom, left:right] = False
        assert not far.any()


def test_tokens_learn_to_point_to_the_words_of_what_patches_show(tmp_path: Path) -> None:
    model, processor = toy_dense()
    images = Images("train", 0, 6)
    maps, labels = toy_maps(model, 6), patch_labels(images)
    aligner = Aligner(model, processor.tokenizer, maps, labels)
    before, table = aligner.score(), model.get_input_embeddings().weight.clone()
    fit_once(tmp_path, model, {"seed": "0"}, lambda: aligner.train(150, 0, silent))
    after = aligner.score()
    assert all(after[key] > before[key] + 0.3 for key in ("category", "character")), (before, after)
    assert torch.equal(table, model.get_input_embeddings().weight)
    other, _ = toy_dense()
    fit_once(tmp_path, other, {"seed": "0"}, lambda: pytest.fail("it is there already"))
    assert Aligner(other, processor.tokenizer, maps, labels).score() == after
    with pytest.raises(ValueError, match="another name"):
        fit_once(tmp_path, other, {"seed": "1"}, lambda: None)


def test_encoders_learn_to_say_what_the_joint_projector_says() -> None:
    dense, _ = toy_dense()
    ranks = {name: [2.0] for name in dense.encoders}
    model, _ = build(meteor_config(dense.config, (108, 72, 144), 34, ranks), None)
    width = dense.encoders["dinov2"].embed_dim
    with torch.no_grad():  # only the first encoder's channels count, so that it can say all
        dense.projectors["joint"].input.weight[:, width:] = 0
    maps = toy_maps(dense, 4)
    losses: list[float] = []
    imitate(model, dense, maps, 300, 0, lambda line: losses.append(float(line.rpartition(" ")[2])))
    assert losses[-1] < 0.75 * losses[0]
    seen = maps.of([0], CPU)
    joined = concat_channels([item.float() for item in seen], list(dense.config.encoder_grids.values()), [1] * 3, 12)
    wanted, said = dense.projectors["joint"](joined), model.projectors["dinov2"](seen[0].float())
    assert float(((said - wanted).square().mean() / wanted.var()).detach()) < 0.2


# ------------------------------------------------------------------------------------------------- maps, answers, file


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Scenes, Maps, Path]:
    """A toy model with random weights, four composed scenes and their maps on disk."""
    root = tmp_path_factory.mktemp("maps")
    model, processor = toy_dense()
    make_maps(model, [], store_scenes(Images("validation", 0, 2), root, silent), root, silent)
    stored = store_scenes(Images("validation", 0, 4), root, silent)
    return Trained("toy", model, processor, {}), stored, make_maps(model, [], stored, root, silent), root


def test_scenes_and_maps_are_extended_and_read_back(scenes: tuple[Trained, Scenes, Maps, Path]) -> None:
    trained, stored, maps, root = scenes
    composed = [compose("validation", 0, index) for index in range(4)]
    assert np.array_equal(stored.pixels([3])[0].permute(1, 2, 0), composed[3].pixels)
    assert [list(scene.questions) for scene in composed] == stored.questions
    found = maps.of([3, 0], CPU)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected, _, _ = trained.model._encode(stored.pixels([3, 0]), None)
    for kept, now in zip(found, expected.values(), strict=True):
        torch.testing.assert_close(kept.float(), now.float(), rtol=0.05, atol=0.05 * float(now.abs().max()))
    damaged = next(path for path in root.iterdir() if "reader" in path.name)
    content = damaged.read_bytes()
    damaged.write_bytes(b"\x40" * len(content))
    with pytest.raises(ValueError, match="remove the file"):
        make_maps(trained.model, [], stored, root, silent)
    damaged.write_bytes(content)


@pytest.mark.parametrize("pruner", ["none", "average_pooling", "fastv", "visionzip", "smaller_image"])
def test_answers_are_those_of_the_projects_own_answerer(
    scenes: tuple[Trained, Scenes, Maps, Path], pruner: str
) -> None:
    """A question at a time, towers live: what `jobs/predict.py` does."""
    trained, stored, _, _ = scenes
    asked = [Asked(index, own) for index in (1, 3) for own in stored.questions[index][:2]]
    dense = trained.model.config
    config = with_pruner(dense, pruner, dense.tokens_per_image if pruner == "none" else 36)
    found = answer(trained, config, asked, stored, bf16=False)
    assert trained.model.config is dense
    model, processor = trained.model, trained.processor
    model.follow(config)
    processor.tokens_per_image = config.tokens_per_image
    try:
        for item, text, kept in zip(asked, found.texts, found.kept, strict=True):
            request = Request.of(item.question.prompt, processor, [stored.pixels([item.image])[0]])
            (expected,) = Answerer(model, processor).answer([request], Budget(12))
            assert (text, kept) == (expected.text, expected.visual_tokens)
    finally:
        model.follow(dense)
        processor.tokens_per_image = dense.tokens_per_image


def test_a_pruner_that_looks_at_the_text_is_given_each_questions_own(
    scenes: tuple[Trained, Scenes, Maps, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, stored, _, _ = scenes
    asked = [Asked(1, own) for own in stored.questions[1][:3]]
    pools: list[Pool] = []

    def spy(pool: Pool, settings: FusePruning) -> Any:
        pools.append(pool)
        return prune_pool(pool, settings)

    monkeypatch.setattr(answers, "prune_pool", spy)
    config = with_pruner(trained.model.config, "cdpruner", 36)
    assert answer(trained, config, asked, stored, bf16=False).kept == [36] * 3
    table = trained.model.get_input_embeddings()
    text_MC = pools[0].text_MC
    assert text_MC is not None
    for item, text_C in zip(asked, text_MC, strict=True):
        ids = trained.processor.encode_question(item.question.prompt, 1).input_ids
        words = torch.tensor([token for token in ids if token != trained.processor.image_token_id])
        torch.testing.assert_close(text_C, torch.nn.functional.normalize(table(words), dim=-1).mean(dim=0))


def test_stored_maps_serve_where_the_towers_are_unchanged(scenes: tuple[Trained, Scenes, Maps, Path]) -> None:
    trained, stored, maps, _ = scenes
    asked = [Asked(1, own) for own in stored.questions[1][:3]]
    dense = trained.model.config
    live, kept = (answer(trained, dense, asked, stored, found) for found in (None, maps))
    assert live == kept
    nothing = Maps("NaN", {name: np.full_like(array, 0x7FC0) for name, array in maps.arrays.items()})
    assert answer(trained, dense, asked, stored, nothing).texts != kept.texts


def test_towers_that_are_pruned_at_their_end_may_take_their_maps(scenes: tuple[Trained, Scenes, Maps, Path]) -> None:
    trained, stored, maps, _ = scenes
    ranks = {name: [2.0] for name in trained.model.encoders}
    torch.manual_seed(0)
    model, _ = build(meteor_config(trained.model.config, (108, 72, 144), 34, ranks), None)
    model.encoders.load_state_dict(trained.model.encoders.state_dict())
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        live, mixed = (look_at_pixels(model, stored, known)([2, 0]) for known in (None, maps))
        torch.testing.assert_close(live.float(), mixed.float(), rtol=0.05, atol=0.05 * float(live.abs().max()))
        model.encoders["reader"].register_forward_pre_hook(lambda *_: pytest.fail("its map is there"))
        look_at_pixels(model, stored, maps)([1])


def test_a_model_is_stored_without_its_towers(tmp_path: Path) -> None:
    model, processor = toy_dense()
    save_trained(tmp_path, model, processor, {"name": "toy"})
    torch.manual_seed(5)
    again = open_trained(tmp_path, None)
    assert not any(name.startswith("encoders.") for name in trained_tensors(again.model))
    for name, tensor in trained_tensors(model).items():
        assert torch.equal(tensor.to(torch.bfloat16).float(), trained_tensors(again.model)[name]), name
    ranks = {name: [2.0] for name in model.encoders}
    pruned = meteor_config(model.config, (108, 72, 144), 34, ranks)
    assert (pruned.tokens_per_image, pruned.fusion) == (34, "post_projection")


def test_asking_without_a_model_says_how_to_get_one(tmp_path: Path) -> None:
    absent = ["--dense", "absent", "--meteor", "absent", "--root", str(tmp_path)]
    with pytest.raises(SystemExit, match="make train-scenes"):
        quality_main(["ask", "--anew", *absent, "--output", str(tmp_path / "quality.json")])


def test_the_whole_runs_by_the_gpus_command_and_asks_no_row_twice(tmp_path: Path) -> None:
    output = tmp_path / "quality.json"
    sizes = ["--device", "cpu", "--size", "toy", "--threads", str(torch.get_num_threads())]
    command = ["train-scenes", *sizes, "--root", str(tmp_path), "--output", str(output), "--pruners", "stride"]
    benchmarks.gpu.main(command)
    first = json.loads(output.read_text())
    rows = {name: [row["name"] for row in model["rows"]] for name, model in first["models"].items()}
    assert rows == {
        "dense-0": ["none@144", "stride@34", "stride@17"],
        "meteor-0": ["trained meteor@34", "trained meteor, stage 3(layer=2)@17"],
    }
    assert output.with_suffix(".png").is_file()
    assert Counter(item["group"] for item in first["questions"]).total() == 4 * TOY.questions
    card = json.loads((tmp_path / "models" / "meteor-0" / "card.json").read_text())
    assert card["start"] == "dense-0"
    assert "validation split" in (tmp_path / "models" / "meteor-0" / "README.md").read_text()
    benchmarks.gpu.main(command)
    assert json.loads(output.read_text()) == first
    quality_main(["sheet", *sizes[2:], "--root", str(tmp_path), "--output", str(output)])
    with Image.open(tmp_path / "quality-kept.png") as sheet:
        assert sheet.height > 2 * sheet.width / 4, "one part a question"


@pytest.mark.parametrize("pruner", ["average_pooling", "smaller_image"])
def test_a_rival_is_trained_on_from_the_dense_model_and_asked_as_it_was_trained(tmp_path: Path, pruner: str) -> None:
    common = ["--size", "toy", "--root", str(tmp_path), "--threads", str(torch.get_num_threads())]
    quality_main(["train", *common])
    quality_main(["rival", *common, "--pruners", pruner, "--keep", "36"])
    name, output = f"{pruner.replace('_', '-')}-0", tmp_path / "quality.json"
    card = json.loads((tmp_path / "models" / name / "card.json").read_text())
    assert (card["start"], card["pruner"], card["keep"]) == ("dense-0", pruner, 36)
    quality_main(["ask", *common, "--models", "dense-0", name, "--pruners", "none", "--output", str(output)])
    (row,) = json.loads(output.read_text())["models"][name]["rows"]
    assert (row["name"], row["kept"]) == (f"trained {pruner}@36", [36.0])
    before, after = (load_file(tmp_path / "models" / which / "model.safetensors") for which in ("dense-0", name))
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_a_variant_of_meteor_is_trained_and_said_by_the_row(tmp_path: Path) -> None:
    common = ["--size", "toy", "--root", str(tmp_path), "--threads", str(torch.get_num_threads())]
    quality_main(["train", *common])
    quality_main(["prune", *common, "--variant", "merge", "--meteor", "merging-0"])
    fuse = open_trained(tmp_path / "models" / "merging-0", None).model.config.pruning.fuse
    assert (fuse.merge, fuse.criterion) == ("nearest", "mutual_redundancy")
    quality_main(
        ["ask", *common, "--models", "dense-0", "merging-0", "--pruners", "none", "--output", str(tmp_path / "q.json")]
    )
    (row,) = json.loads((tmp_path / "q.json").read_text())["models"]["merging-0"]["rows"]
    assert (row["name"], row["kept"]) == ("trained meteor, merge@34", [34.0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_keep_as_many_tokens_as_the_papers_settings(variant: str) -> None:
    tokenizer = tokenizer_of(TOY)
    dense = dense_config(tokenizer, TOY.llm, pretrained=False)
    names = [encoder.name for encoder in dense.encoders]
    config = meteor_config(dense, (108, 72, 144), 34, {name: [2.0] for name in names}, variant)
    assert config.tokens_per_image == 34


def test_a_rival_that_looks_at_the_text_is_not_trained(tmp_path: Path) -> None:
    common = ["--size", "toy", "--root", str(tmp_path), "--threads", str(torch.get_num_threads())]
    quality_main(["train", *common])
    for pruner in ("cdpruner", "fastv"):
        with pytest.raises(ValueError, match="is not trained here"):
            quality_main(["rival", *common, "--pruners", pruner])


# ----------------------------------------------------------------------------------------------------------- statistics


def stored(rows: dict[str, list[str]], start: str | None = None) -> dict[str, Any]:
    entries = [
        {"name": name, "pruner": name.partition("@")[0], "keep": 1, "settings": {}, "equal": "tokens", "budget": 34}
        | {"costs": {"tflops": 1.0}, "kept": [34], "answers": answers}
        for name, answers in rows.items()
    ]
    return {"card": {} if start is None else {"start": start}, "rows": entries}


def results(models: dict[str, Any]) -> dict[str, Any]:
    questions = [
        {"image": place // 2, "group": group, "kind": "k", "answer": "a", "tags": {}}
        for place, group in enumerate(["ocr", "general"] * 40)
    ]
    return {"questions": questions, "models": models}


def test_statistics_say_what_the_answers_say() -> None:
    right, no_ocr = ["a"] * 80, ["b", "a"] * 40
    found = statistics.summarise(
        results({"dense": stored({"none": right, "random@34": no_ocr, "smaller_image@36": no_ocr})})
    )
    row = found["dense"]["random@34"]
    assert [row["scores"][name][0] for name in ("all", "ocr", "general")] == [0.5, 0.0, 1.0]
    assert row["against_dense"]["ocr"]["mean"] == -1.0
    assert row["against_dense"]["ocr"]["verdict"] == "inferior"
    assert row["against_dense"]["general"]["verdict"] in ("undecided", "non-inferior")
    assert row["against_dense"]["ocr"]["p_holm"] == pytest.approx(2 * row["against_dense"]["ocr"]["p"], abs=1e-5)
    assert row["where_smaller_image_fails"] == [0.0, 40]
    assert "| random@34 | 34 |" in statistics.table(found, "dense")


def test_a_trained_row_is_held_against_the_model_it_came_from() -> None:
    smaller = ["a", "b", "b", "b"] * 20
    models = {
        "dense": stored({"none": ["a"] * 80, "smaller_image@36": ["a"] * 80, "random@34": ["b"] * 80}),
        "meteor": stored({"trained meteor@34": ["a", "a", "b", "b"] * 20}, start="dense"),
        "small": stored({"trained smaller_image@34": smaller}, start="dense"),
    }
    summary = statistics.summarise(results(models))
    assert list(summary) == ["dense"]
    row = summary["dense"]["meteor: trained meteor@34"]
    assert (row["trained"], row["against_dense"]["all"]["mean"]) == (True, -0.5)
    assert row["where_smaller_image_fails"] == [pytest.approx(1 / 3, abs=1e-4), 60], "the one that was trained, too"
    assert "where_smaller_image_fails" not in summary["dense"]["random@34"], "the untrained one fails nowhere"
    ours = [one["against_dense"]["all"] for one in summary["dense"].values() if one["pruner"] != "none"]
    assert max(one["p_holm"] / one["p"] for one in ours if 0 < one["p"] < one["p_holm"] < 1) == pytest.approx(
        4, rel=0.1
    )
    del models["dense"]
    with pytest.raises(ValueError, match="no dense row"):
        statistics.summarise(results(models))
