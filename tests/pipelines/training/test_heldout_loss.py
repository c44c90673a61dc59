"""Images are shuffled within a batch, among samples with as many of them."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.training.heldout_loss import shuffle_images


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_shuffled_images_come_from_another_sample_with_as_many(num_images: list[int]) -> None:
    owner = [sample for sample, count in enumerate(num_images) for _ in range(count)]
    order = [place for count in num_images for place in range(count)]
    pixels = torch.tensor(list(zip(owner, order, strict=True)), dtype=torch.int64).view(-1, 2, 1, 1)
    shuffled, changed = shuffle_images(pixels, num_images)
    expected_changed = 0
    for sample, count in enumerate(num_images):
        start = sum(num_images[:sample])
        givers = {int(image) for image in shuffled[start : start + count, 0, 0, 0]}
        alone = num_images.count(count) == 1
        if count:
            assert len(givers) == 1
            giver = givers.pop()
            assert num_images[giver] == count
            assert (giver == sample) == alone
            expected_changed += not alone
            assert shuffled[start : start + count, 1, 0, 0].tolist() == list(range(count))
    assert changed == expected_changed
    used = [tuple(image) for image in shuffled.flatten(1).tolist()]
    assert sorted(used) == sorted(tuple(image) for image in pixels.flatten(1).tolist())
