"""The named recipes of the training jobs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from meteor_model.checks import nearest
from meteor_model.configuration_meteor import DecodePruning, EncodePruning, FusePruning, PruningConfig
from pipelines.config.recipe import CalibrationSettings, ModelSettings, Recipe
from pipelines.config.settings import DataSettings, LearningRates, OptimizerSettings, TrainingSettings, Zero3Settings
from pipelines.data.sources.openmoji import OpenMojiSettings

LOSS_CHUNK = 1024
"""Supervised tokens whose logits exist at a time, where a vocabulary is tens of thousands of words large (`tiny` has
hundreds, and all of its logits at once)."""


def tiny() -> Recipe:
    """Random weights, drawings with exact answers, a few minutes on two CPU cores."""
    return Recipe(
        name="tiny",
        model=ModelSettings(architecture="tiny", template="short"),
        pruning=PruningConfig(
            encode=EncodePruning(totals=(96, 64, 64)),
            fuse=FusePruning(keep=32),
            decode=DecodePruning(layer=2, target_mean=16.0),
        ),
        data=DataSettings(heldout_samples=256, max_length=256),
        source=OpenMojiSettings(code_points=2048, variants=4),
        training=TrainingSettings(
            workers=2,
            micro_batch=16,
            global_batch=32,
            optimizer=OptimizerSettings(learning_rates=LearningRates(2e-3, 2e-3, 2e-3)),
            zero3=Zero3Settings(persistence_threshold=10_000),
        ),
    )


def tiny_finetune() -> Recipe:
    """`tiny`, continued from the newest registered pre-training on other variants of the drawings."""
    base = tiny()
    rates = LearningRates(5e-4, 5e-4, 5e-4)
    return replace(
        base,
        model=replace(base.model, start="models:/meteor@latest-pretrain"),
        source=replace(base.source, code_points=512, seed=1),
        training=replace(base.training, optimizer=replace(base.training.optimizer, learning_rates=rates)),
    )


def small() -> Recipe:
    """Real pretrained parts (make parts): the projectors learn to show DINOv2, EfficientNet and a reader to SmolLM2."""
    return Recipe(
        name="small",
        model=ModelSettings(architecture="small", template="chatml"),
        pruning=PruningConfig(
            encode=EncodePruning(totals=(400, 280, 192)),
            fuse=FusePruning(keep=96),
            decode=DecodePruning(layer=2, target_mean=48.0),
        ),
        data=DataSettings(heldout_samples=64, max_length=512),
        source=OpenMojiSettings(code_points=512, variants=2),
        training=TrainingSettings(
            workers=2,
            micro_batch=8,
            global_batch=16,
            loss_chunk=LOSS_CHUNK,
            optimizer=OptimizerSettings(learning_rates=LearningRates(projector=1e-3, towers=None, llm=None)),
        ),
    )


def small_finetune() -> Recipe:
    """`small`, continued from the newest registered pre-training: every part learns, on other drawings."""
    base = small()
    rates = LearningRates(projector=2e-4, towers=2e-5, llm=2e-5)
    return replace(
        base,
        model=replace(base.model, start="models:/meteor@latest-pretrain"),
        source=replace(base.source, seed=1),
        training=replace(base.training, optimizer=replace(base.training.optimizer, learning_rates=rates)),
    )


def _published(architecture: str, pruning: PruningConfig) -> Recipe:
    """LLaVA's pre-training as EAGLE runs it: projector alone, lr 1e-3, global batch 256, one epoch, bf16, 8 GPUs."""
    return Recipe(
        name=architecture,
        model=ModelSettings(architecture=architecture, template="plain"),
        pruning=pruning,
        data=DataSettings(heldout_samples=512, max_length=2048),
        training=TrainingSettings(
            workers=8,
            micro_batch=8,
            global_batch=256,
            precision="bf16",
            gradient_checkpointing=True,
            gpus_per_worker=1.0,
            loss_chunk=LOSS_CHUNK,
            optimizer=OptimizerSettings(learning_rates=LearningRates(projector=1e-3, towers=None, llm=None)),
        ),
    )


def _published_finetune(pretrained: Recipe) -> Recipe:
    """EAGLE's instruction tuning: every part, lr 2e-5, global batch 128, loss on the replies."""
    rates = LearningRates(2e-5, 2e-5, 2e-5)
    training = replace(
        pretrained.training,
        micro_batch=4,
        global_batch=128,
        optimizer=replace(pretrained.training.optimizer, learning_rates=rates),
    )
    model = replace(pretrained.model, start="models:/meteor@latest-pretrain", template="vicuna_v1")
    return replace(pretrained, model=model, training=training)


EAGLE_DENSE = PruningConfig(EncodePruning(enabled=False), FusePruning(enabled=False), DecodePruning(enabled=False))
#: Of the 6,697 tokens of the three transformers 2,600 and 1,300 stay after the first boundaries, and with ConvNeXt's
#: 1,193 after the last; 576 enter the LLM, 242 on average pass layer 2. The last three are the published counts; the
#: first two are ours, chosen to meet the published FLOPs (`make flops`).
METEOR_X4 = PruningConfig(
    EncodePruning(totals=(2600, 1300, 1193)), FusePruning(keep=576), DecodePruning(layer=2, target_mean=242.0)
)


def eagle_x4_7b() -> Recipe:
    """EAGLE-X4-7B, the dense baseline."""
    return _published("eagle_x4_7b", EAGLE_DENSE)


def eagle_x5_7b() -> Recipe:
    """EAGLE-X5-7B: SAM-L as a fifth tower."""
    return _published("eagle_x5_7b", EAGLE_DENSE)


def meteor_x4_7b() -> Recipe:
    """METEOR on EAGLE-X4's towers."""
    return _published("meteor_x4_7b", METEOR_X4)


#: METEOR_X4's shares of 1,856 and 2,112 tokens.
METEOR_X4_1B = PruningConfig(
    EncodePruning(totals=(720, 360, 330)), FusePruning(keep=160), DecodePruning(layer=2, target_mean=67.0)
)


def meteor_x4_1b() -> Recipe:
    """A rehearsal of `meteor_x4_7b` on two CPU workers: files of gigabytes, a few steps, random weights."""
    return Recipe(
        name="meteor_x4_1b",
        model=ModelSettings(architecture="meteor_x4_1b", template="plain"),
        pruning=METEOR_X4_1B,
        data=DataSettings(heldout_samples=4, max_length=512),
        source=OpenMojiSettings(code_points=32, variants=1),
        calibration=CalibrationSettings(samples=4, batch=2, decode_samples=4),
        training=TrainingSettings(
            workers=2,
            micro_batch=2,
            global_batch=8,
            precision="bf16",
            gradient_checkpointing=True,
            checkpoint_every_steps=4,
            loss_chunk=LOSS_CHUNK,
            optimizer=OptimizerSettings(learning_rates=LearningRates(projector=1e-3, towers=None, llm=None)),
        ),
    )


RecipeName = Literal["eagle_x4_7b", "eagle_x5_7b", "meteor_x4_1b", "meteor_x4_7b", "small", "tiny"]

RECIPES: dict[str, dict[str, Callable[[], Recipe]]] = {
    "pretrain": {
        "eagle_x4_7b": eagle_x4_7b,
        "eagle_x5_7b": eagle_x5_7b,
        "meteor_x4_1b": meteor_x4_1b,
        "meteor_x4_7b": meteor_x4_7b,
        "small": small,
        "tiny": tiny,
    },
    "finetune": {
        "eagle_x4_7b": lambda: _published_finetune(eagle_x4_7b()),
        "eagle_x5_7b": lambda: _published_finetune(eagle_x5_7b()),
        "meteor_x4_7b": lambda: _published_finetune(meteor_x4_7b()),
        "small": small_finetune,
        "tiny": tiny_finetune,
    },
}


def recipe(job: str, name: str) -> Recipe:
    """A recipe by name. Raises ValueError that names the nearest one."""
    known = RECIPES[job]
    if name not in known:
        raise ValueError(f"unknown {job} recipe {name!r}; known: {', '.join(sorted(known))}{nearest(name, known)}")
    return known[name]()
