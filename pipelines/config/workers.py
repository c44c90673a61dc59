"""How a job uses the cluster: copies of a model side by side, and what each of them reserves.

Tasks import this module, so it imports no model.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.config.settings import SettingsError


@dataclass(frozen=True)
class Workers:
    """Copies of a model; how many there are changes no result.

    Attributes:
        actors: copies of the model that work side by side.
        cpus: that one of them, or a task, reserves; may be a fraction.
        gpus: that one of them reserves; 0 runs on the CPU.
    """

    actors: int = 1
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.actors < 1:
            raise SettingsError(f"actors is {self.actors}; it must be at least 1")
        for name, amount in (("cpus", self.cpus), ("gpus", self.gpus)):
            if amount < 0:
                raise SettingsError(f"{name} is {amount}; it must not be negative")
