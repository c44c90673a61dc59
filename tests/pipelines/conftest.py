"""Servers that the tests of several rooms share, one of each for the session."""

from tests.pipelines.fake_s3 import fake_s3
from tests.pipelines.mlflow_fixture import exported, parity_file, registered, run_id, server, tiny
from tests.pipelines.s3_fixture import s3, s3_stack

__all__ = ["exported", "fake_s3", "parity_file", "registered", "run_id", "s3", "s3_stack", "server", "tiny"]
