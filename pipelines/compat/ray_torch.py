"""What this project uses of Ray Train's torch backend beyond its public interface (Ray 2.60)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray.exceptions
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

_LOG = logging.getLogger(__name__)


class _StartHookBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        assert isinstance(backend_config, StartHookTorchConfig)
        worker_group.execute(_call, backend_config.start_hook)
        super().on_start(worker_group, backend_config)

    def on_shutdown(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """A worker that is gone must not keep the others' room.

        Ray passes over RayActorError and RayTaskError here, but not over OutOfMemoryError: after its own memory monitor
        has ended a worker, the group's placement group would stay, and a restart would wait for ever for that room.
        """
        try:
            super().on_shutdown(worker_group, backend_config)
        except ray.exceptions.RayError as error:
            _LOG.info("torch was not shut down on every worker: %s", error)


def _call(hook: Callable[[], None]) -> None:
    hook()  # Ray asks what it executes for its name, which a partial has not


@dataclass
class StartHookTorchConfig(TorchConfig):
    """Ray Train's TorchConfig that first calls a function in the main thread of every worker.

    The train loop itself runs in another thread, where no signal handler can be set, and Ray Train's public callbacks
    run in its controller. What a backend starts runs in the main thread, but the backend class is private.

    Attributes:
        start_hook: takes no arguments.
    """

    start_hook: Callable[[], None] = field(kw_only=True)

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """The backend that starts the workers."""
        return _StartHookBackend
