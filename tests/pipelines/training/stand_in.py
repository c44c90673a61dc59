"""A tiny model with the forward interface of the real one, and a job that trains it on synthetic rows."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from meteor_model.collate import collate
from meteor_model.language_head import LanguageHead
from meteor_model.logits import supervised_rows
from pipelines.checkpoint.state import TrainState
from pipelines.checkpoint.throughput import Throughput
from pipelines.config.settings import LearningRates, OptimizerSettings, TrainingSettings
from pipelines.data.stream import data_config
from pipelines.io import sealed
from pipelines.training.batches import iterate_rows
from pipelines.training.job import TrainingJob
from tests.pipelines.training.rows import FAULTY_ROW, IMAGE, IMAGE_SIZE, PAD, VOCABULARY, Plan, make_stream


class StandInConfig(PretrainedConfig):
    model_type = "stand_in"

    def __init__(self, width: int = 16, layers: int = 2, **kwargs: Any) -> None:
        self.width = width
        self.layers = layers
        super().__init__(**{"tie_word_embeddings": True, **kwargs})


@dataclass
class StandInStats:
    tokens_in: int

    def as_metrics(self) -> dict[str, float]:
        return {"visual_tokens/in": float(self.tokens_in), "visual_tokens/fuse/kept": 1.0}


@dataclass
class StandInOutput(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None
    pruning_stats: Any = None


class StandInModel(PreTrainedModel):
    """Puts each image's projected features in the place of its token; tied head; one buffer of each kind."""

    config_class = StandInConfig
    base_model_prefix = ""
    _tied_weights_keys = {"lm_head.weight": "language_model.embed.weight"}  # noqa: RUF012 (transformers' form)

    def __init__(self, config: StandInConfig) -> None:
        super().__init__(config)
        width = config.width
        self.encoders = nn.ModuleList([nn.Conv2d(3, width, kernel_size=2, stride=2)])
        self.projectors = nn.ModuleList([nn.Linear(width, width)])
        self.language_model = nn.ModuleDict(
            {
                "embed": nn.Embedding(VOCABULARY, width),
                "layers": nn.ModuleList([nn.Linear(width, width) for _ in range(config.layers)]),
                "norm": nn.LayerNorm(width),
            }
        )
        self.lm_head = LanguageHead(width, VOCABULARY, bias=False)
        self.register_buffer("positions", torch.arange(64) / 64.0, persistent=False)
        self.register_buffer("scale", torch.tensor([0.5]))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:  # from_pretrained makes non-persistent buffers without their content
            init.copy_(self.positions, torch.arange(64) / 64.0)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model["embed"]

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        loss_chunk: int | None = None,
    ) -> StandInOutput:
        assert pixel_values is not None
        embeds_BTC = self.language_model["embed"](input_ids) + self.positions[: input_ids.shape[1], None]
        real = len(pixel_values) > 0
        pixels = pixel_values if real else pixel_values.new_zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)
        features_MC = self.projectors[0](self.encoders[0](pixels.to(self.dtype) / 255).mean((2, 3)))
        if real:
            where_BTC = (input_ids == IMAGE).unsqueeze(-1).expand_as(embeds_BTC)
            hidden_BTC = embeds_BTC.masked_scatter(where_BTC, self.scale.to(self.dtype) * features_MC)
        else:
            hidden_BTC = embeds_BTC + 0.0 * features_MC.sum()
        context_BTC = hidden_BTC.cumsum(1) / torch.arange(1, input_ids.shape[1] + 1).unsqueeze(-1)
        hidden_BTC = (hidden_BTC + context_BTC).to(self.dtype)
        for layer in cast(nn.ModuleList, self.language_model["layers"]):
            hidden_BTC = hidden_BTC + torch.tanh(layer(hidden_BTC))
        hidden_BTC, stats = self.language_model["norm"](hidden_BTC), StandInStats(4 * len(pixels))
        if labels is not None and loss_chunk is not None:
            total = self.lm_head(*supervised_rows(hidden_BTC, labels, None), loss_chunk)
            divisor = supervised(labels) if num_items_in_batch is None else num_items_in_batch
            return StandInOutput(loss=total / divisor, pruning_stats=stats)
        logits, loss = self.lm_head(hidden_BTC), None
        if labels is not None:
            loss = nn.functional.cross_entropy(
                logits[:, :-1].reshape(-1, VOCABULARY).float(), labels[:, 1:].reshape(-1), reduction="sum"
            )
            loss = loss / (supervised(labels) if num_items_in_batch is None else num_items_in_batch)
        return StandInOutput(loss=loss, logits=logits, pruning_stats=stats)


def supervised(labels: Tensor) -> int:
    return max(1, int((labels[:, 1:] != -100).sum()))


SETTINGS = TrainingSettings(
    workers=2,
    micro_batch=4,
    global_batch=16,
    optimizer=OptimizerSettings(learning_rates=LearningRates(1e-2, 5e-3, 2e-3), weight_decay=0.01),
    checkpoint_every_steps=2,
    log_every_steps=1,
    max_drop_share=0.05,
    timeout_s=60,
    max_failures=0,
    validate_every_checkpoints=0,
    cpus_per_worker=1.0,
)
TOTAL, SAMPLES, HELDOUT = 96, 93, 16


def untimed(state: TrainState) -> TrainState:
    """The state without what differs between two runs of one training: restarts, and how long everything took."""
    return dataclasses.replace(
        state, restarts=0, step_seconds=0.0, data_seconds=(), own_seconds=(), measured=Throughput()
    )


def write_init(root: Path, run_name: str) -> Path:
    """The start model of a run, as the job leaves it: listed files, and one beside that is in no list."""
    torch.manual_seed(0)
    folder = root / "runs" / run_name / "init"
    StandInModel(StandInConfig()).save_pretrained(folder)
    sealed.write_list(str(folder), sealed.sums_of(folder))
    (folder / "READY.json").write_text("{}")
    return folder


def make_job(
    root: Path, run_name: str, settings: TrainingSettings = SETTINGS, faulty: Sequence[int] = (FAULTY_ROW,), **kw: Any
) -> TrainingJob:
    micro = settings.micro_batch
    return TrainingJob(
        storage=str(root),
        run_name=run_name,
        settings=settings,
        model_class=StandInModel,
        collate=partial(collate, pad_token_id=PAD, image_size=IMAGE_SIZE),
        pad_token_id=PAD,
        plan=Plan(TOTAL, SAMPLES),
        train_data=partial(make_stream, TOTAL, SAMPLES, faulty, micro, spare=settings.spare_rows, **kw),
        heldout_rows=HELDOUT,
        heldout_data=partial(make_stream, HELDOUT, HELDOUT, (), micro, 0),
        iterate=iterate_rows,
        data_config=data_config(),
        recipe={"name": "stand-in"},
        recipe_hash="abc",
    )
