"""How a job uses the cluster: copies of a model side by side, and what each of them reserves.

Tasks import this module, so it imports no model.
"""

from __future__ import annotations

from pydantic import NonNegativeFloat, PositiveInt

from pipelines.config.settings import SettingsError
from pipelines.io.validation import settings_class


@settings_class(error=SettingsError)
class Workers:
    """Copies of a model; how many there are changes no result.

    Attributes:
        actors: copies of the model that work side by side.
        cpus: that one of them, or a task, reserves; may be a fraction.
        gpus: that one of them reserves; 0 runs on the CPU.
    """

    actors: PositiveInt = 1
    cpus: NonNegativeFloat = 1.0
    gpus: NonNegativeFloat = 0.0
