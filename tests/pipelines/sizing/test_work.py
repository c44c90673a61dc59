"""FLOPs of a training are those of what its settings let learn."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meteor_model.flops import TrainingFlops
from pipelines.config.settings import (
    LearningRates,
    LoraSettings,
    OptimizerSettings,
    SettingsError,
    TrainingSettings,
)
from pipelines.sizing.work import count_work, training_flops
from tests.meteor_model.builders import UNSOLVED, config

EVERYTHING = TrainingSettings(optimizer=OptimizerSettings(learning_rates=LearningRates(1e-3, 1e-3, 1e-3)))
PROJECTOR = replace(EVERYTHING, optimizer=OptimizerSettings(learning_rates=LearningRates(1e-3, None, None)))
ADAPTED = replace(
    EVERYTHING,
    optimizer=OptimizerSettings(learning_rates=LearningRates(None, None, 1e-3)),
    lora=LoraSettings(rank=2, targets=("q_proj", "down_proj")),
)


def flops(settings: TrainingSettings) -> TrainingFlops:
    return training_flops(config(UNSOLVED), settings)


def test_what_is_frozen_has_no_gradients_of_weights() -> None:
    everything, projector = flops(EVERYTHING), flops(PROJECTOR)
    assert everything.towers.backward > everything.towers.forward
    assert (projector.towers.forward, projector.towers.backward) == (everything.towers.forward, 0)
    assert 2 * projector.llm_token.backward == everything.llm_token.backward


def test_adapters_learn_in_place_of_the_weights_that_they_stand_beside() -> None:
    adapted, everything = flops(ADAPTED), flops(EVERYTHING)
    assert (adapted.towers.backward, adapted.projector.backward) == (0, 0), "frozen, and nothing below learns"
    rank, width, inner, layers = 2, 128, 320, 4
    extra = layers * 2 * rank * (2 * width + width + inner)
    assert adapted.llm_token.forward == everything.llm_token.forward + extra
    assert adapted.llm_token.backward < 0.6 * everything.llm_token.backward
    with pytest.raises(SettingsError, match=r"training\.lora\.targets has 'keys'"):
        flops(replace(ADAPTED, lora=LoraSettings(rank=2, targets=("keys",))))


def test_recomputation_and_a_sample_of_the_plan() -> None:
    recomputed = replace(PROJECTOR, gradient_checkpointing=True)
    found = flops(recomputed)
    assert found.llm_token.recomputed > 0 == flops(PROJECTOR).llm_token.recomputed
    work = count_work(config(UNSOLVED), recomputed, text_tokens=16)
    assert work.trained == found.of(1, [16 + 24], 16), "stage 3 does not train, 24 tokens leave fusion"


def test_a_loss_in_chunks_runs_the_head_on_the_text() -> None:
    chunked = replace(PROJECTOR, loss_chunk=1024)
    found = flops(chunked)
    assert (flops(PROJECTOR).whole_head, found.whole_head) == (True, False)
    plain, fewer = (count_work(config(UNSOLVED), training, text_tokens=16) for training in (PROJECTOR, chunked))
    assert plain.trained.model - fewer.trained.model == 24 * found.head.model > 0
