"""What this project uses of Ray Train's torch backend beyond its public interface (Ray 2.60)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


class _StartHookBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        assert isinstance(backend_config, StartHookTorchConfig)
        worker_group.execute(_call, backend_config.start_hook)
        super().on_start(worker_group, backend_config)


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
