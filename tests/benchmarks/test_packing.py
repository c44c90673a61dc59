"""The padding that `make bench-packing` tells is that of the training's own batches."""

from __future__ import annotations

import pytest

from benchmarks.packing import BATCHINGS, PAD, padding_of, spread, steps_of


def test_packed_steps_hold_the_same_tokens_with_less_padding() -> None:
    rows, longest = spread(64, 8, 20, 0.9, 128)
    found = {name: steps_of(rows, name, longest, 4, 4) for name in BATCHINGS}
    shares = [padding_of(steps) for steps in found.values()]
    assert shares == sorted(shares, reverse=True)
    assert shares[2] < 0.02 < 0.2 < shares[0]
    for steps in found.values():
        batches = [batch for step in steps for batch in step]
        assert sum(batch.tokens for batch in batches) == sum(len(row.input_ids) for row in rows)
        places = sum(int((batch.inputs["input_ids"] == PAD).sum()) for batch in batches)
        assert padding_of(steps) == pytest.approx(places / sum(batch.cells for batch in batches))
