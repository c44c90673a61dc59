"""Maps that are kept: damaged ones are found, what they depend on is in their name, and they take no more room."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from pipelines.evaluation import tower_store
from pipelines.evaluation.embedded import embed_questions
from pipelines.evaluation.tower_store import COMPUTED, DAMAGED, NOT_KEPT, READ, TowerStore
from tests.meteor_model.builders import PRUNED, model, processor
from tests.pipelines.evaluation.test_evaluate import _asked

TOWERS = 3
PLENTY = 2**30


def embedded(store: TowerStore, built: MeteorForConditionalGeneration, begin: int = 0) -> torch.Tensor:
    made = processor()
    questions = _asked(made).asked[begin : begin + 2]
    found = store.embed(built, made, questions)
    expected = embed_questions(built, made, questions)
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other), "to the bit"
    return found.embeds_BTC


def test_images_keep_their_places_with_kept_maps(tmp_path: Path) -> None:
    original = replace(PRUNED, fuse=replace(PRUNED.fuse, positions="original"))
    embedded(TowerStore(model(original), PLENTY, tmp_path), model(original))


def test_maps_are_computed_once_and_damaged_ones_again(tmp_path: Path) -> None:
    built = model()
    store = TowerStore(built, PLENTY, tmp_path)
    embedded(store, built)
    assert store.counts == {COMPUTED: TOWERS}
    embedded(store, built)
    assert store.counts == {COMPUTED: TOWERS, READ: TOWERS}
    other = TowerStore(model(), PLENTY, tmp_path)  # another process of the same weights
    embedded(other, built)
    assert other.counts == {READ: TOWERS}
    for number, path in enumerate(sorted(tmp_path.iterdir())[:2]):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data if number else data[:40])  # a flipped bit, and a file cut short
    embedded(store, built)
    assert store.counts == {COMPUTED: TOWERS + 2, READ: 2 * TOWERS - 2, DAMAGED: 2}


def test_other_weights_images_order_or_threads_are_other_maps(tmp_path: Path) -> None:
    built = model()
    store = TowerStore(built, PLENTY, tmp_path)
    first = embedded(store, built)
    changed = model(seed=1)
    assert not torch.equal(embedded(TowerStore(changed, PLENTY, tmp_path), changed), first)
    embedded(store, built, begin=1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        embedded(store, built)
    finally:
        torch.set_num_threads(threads)
    assert store.counts == {COMPUTED: 3 * TOWERS}
    assert len(list(tmp_path.iterdir())) == 4 * TOWERS


def test_they_take_no_more_room_than_is_given(tmp_path: Path) -> None:
    built = model()
    store = TowerStore(built, PLENTY, tmp_path)
    embedded(store, built)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    full = TowerStore(built, size, tmp_path)
    embedded(full, built, begin=2)
    assert full.counts == {COMPUTED: TOWERS, NOT_KEPT: TOWERS}, "what was used in this process makes no room"
    embedded(full, built)
    assert full.counts[READ] == TOWERS
    for path in tmp_path.iterdir():  # as an earlier search left them
        os.utime(path, (1, 1))
    later = TowerStore(built, size, tmp_path)
    embedded(later, built, begin=2)
    embedded(later, built, begin=2)
    assert later.counts[READ] > 0, "they made room"
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= size
    assert not list(tmp_path.glob("*.*")), "no half-written file"
    assert tower_store.default_folder().name.startswith("meteor-maps-")
