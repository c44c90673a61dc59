"""The likelihood of an answer while which stage 3 chooses anew: no choice sees tokens that come later."""

from __future__ import annotations

import pytest
import torch

from pipelines.evaluation.evaluate import answer_nll
from tests.meteor_model.decoder.test_anew import Literal
from tests.meteor_model.test_generation import build, make_batch

ANSWERS = [[9, 8, 7, 6, 5], [5, 4], [30, 31, 32], [11]]


@torch.no_grad()
def test_an_answer_is_as_likely_as_token_by_token_without_a_cache() -> None:
    built, batch = build(query="last", reselect_every=2), make_batch()
    inputs = batch.inputs
    embeds_BTC, is_image_BT = built.embed_prompts(inputs["input_ids"], inputs["pixel_values"])
    found_B = answer_nll(built, embeds_BTC, inputs["attention_mask"], is_image_BT, ANSWERS, built.recording_cache())
    for row, (ids, images) in enumerate(zip(batch.ids, batch.images, strict=True)):
        embeds_1TC, visual_1T = built.embed_prompts(ids, images)
        literal = Literal(built.language_model, (embeds_1TC, visual_1T[0]), built.config.pruning.decode)
        nll = 0.0
        for token in ANSWERS[row]:
            nll -= float(built.lm_head(literal.hidden()).log_softmax(-1)[token])
            literal.follow([token])
        assert float(found_B[row]) == pytest.approx(nll / len(ANSWERS[row]), rel=1e-4)
