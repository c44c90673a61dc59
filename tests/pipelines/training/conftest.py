"""One small Ray and one undisturbed training for the tests of this folder."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from pipelines.training.trainer import TrainingResult, fit
from tests.pipelines.training.stand_in import SETTINGS, make_job, write_init


@pytest.fixture(scope="package")
def cluster() -> Iterator[None]:
    """Ray in this process; six logical CPUs: two for workers, the rest for data tasks."""
    ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="package")
def trained(tmp_path_factory: pytest.TempPathFactory, cluster: None) -> tuple[Path, TrainingResult]:
    """A storage root and the uninterrupted run `whole` in it, the only one that is validated on the way."""
    root = tmp_path_factory.mktemp("storage")
    write_init(root, "whole")
    return root, fit(make_job(root, "whole", dataclasses.replace(SETTINGS, validate_every_checkpoints=1)))
