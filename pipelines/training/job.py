"""What a training is made of: settings, model, data; it travels to the controller and to every worker."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray.data
import ray.train
from transformers import PreTrainedModel

from meteor_model.flops import TrainingFlops
from pipelines.checkpoint.state import TrainState
from pipelines.config.settings import SettingsError, TrainingSettings
from pipelines.data.ledger import Ledger
from pipelines.data.sample_id import Int64s
from pipelines.data.schema import Row
from pipelines.io.run_folder import run_folder
from pipelines.tracking.metric_points import MetricPoint
from pipelines.training.batches import Collate, Packing
from pipelines.training.loop import MetricLogger, Observer
from pipelines.training.validation import Log


class Plan(Protocol):
    """The order of a training's data (`pipelines.data.order`, `pipelines.data.mixture`)."""

    @property
    def total_rows(self) -> int:
        """Rows of the stream, void ones included; a multiple of the global batch."""

    @property
    def total_samples(self) -> int:
        """Samples of all epochs."""

    @property
    def sizes(self) -> Sequence[Sequence[int] | Int64s]:
        """Samples of every shard, by dataset."""

    def consumed(self, rows: int) -> Ledger:
        """The samples of the first `rows` rows."""


@dataclass(frozen=True)
class TrainingJob:
    """Everything that a training needs; it travels to the controller and to every worker."""

    storage: str
    """Root of the object store; the run lives in `{storage}/runs/{run_name}`."""
    run_name: str
    """Name of the run; re-using one continues it."""
    settings: TrainingSettings
    """Sizes, optimizer, resources."""
    model_class: type[PreTrainedModel]
    """Class of the model in `init/`."""
    collate: Collate
    """Examples to the arguments of the model's forward."""
    pad_token_id: int
    """Token of a batch without any sample."""
    plan: Plan
    """The order of the training data."""
    train_data: Callable[[int], ray.data.Dataset]
    """The stream from a given row of the plan on."""
    heldout_rows: int
    """Rows of the held-out stream, void ones included; a multiple of micro_batch."""
    heldout_data: Callable[[], ray.data.Dataset]
    """The held-out stream."""
    iterate: Callable[[ray.data.DataIterator, int], Iterator[Sequence[Row]]]
    """Rows of one worker's share of a stream, in groups of the given size."""
    data_config: ray.train.DataConfig
    """How the dataset "train" is split between the workers, in order; "heldout" must not be split."""
    recipe: Mapping[str, Any]
    """Every setting of the run, kept in every checkpoint."""
    recipe_hash: str
    """Hash of the settings that decide the result."""
    resume_step: int | None = None
    """Optimizer step of the checkpoint to go on from; None: the newest whole one."""
    mlflow_run_id: str | None = None
    """The MLflow run that the metrics go to; kept in every checkpoint."""
    make_logger: Callable[[Sequence[MetricPoint]], MetricLogger] | None = None
    """Makes rank 0's logger, at every start of the workers, from the metrics that the checkpoint still held."""
    validation_limit_s: float = 1800.0
    """Seconds after which a validation is given up where `settings.validation_timeout_s` names none."""
    log_validation: Log | None = None
    """Gets the metrics of every validation during training (picklable)."""
    observe: Observer | None = None
    """Told of every step on every worker (picklable); for audits."""
    packing: Packing | None = None
    """How samples share rows where `settings.batching` is "packed", else None."""
    flops: TrainingFlops | None = None
    """FLOPs of the model that is trained; None measures no utilisation."""

    def __post_init__(self) -> None:
        settings = self.settings
        assert (self.packing is not None) == (settings.batching == "packed"), "one says what the other does"
        if self.heldout_rows < 1 or self.heldout_rows % settings.micro_batch:
            raise SettingsError(
                f"heldout_rows {self.heldout_rows} is no multiple of micro_batch {settings.micro_batch}"
            )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self.plan.total_rows // self.settings.global_batch

    @property
    def url(self) -> str:
        """The folder of the run."""
        return run_folder(self.storage, self.run_name).url

    def start_state(self) -> TrainState:
        """The state before the first step; an elastic training may begin on fewer workers."""
        return TrainState(
            self.recipe_hash,
            self.settings.workers,
            self.total_steps,
            self.mlflow_run_id,
            seed=self.settings.seed,
        )
