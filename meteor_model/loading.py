"""A saved model and its processor from a folder, in one call.

Importing this module loads neither torch nor transformers; calling does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from meteor_model.foreign import SHOWN_DETAIL, foreign, shown

if TYPE_CHECKING:
    import torch

    from meteor_model.configuration_meteor import MeteorConfig
    from meteor_model.modeling_meteor import MeteorForConditionalGeneration
    from meteor_model.processing_meteor import MeteorProcessor


def load_config(folder: str | Path) -> MeteorConfig:
    """The configuration in a folder.

    Raises:
        OSError: where there is none, or it is not JSON.
        ValueError: where it is not one of this model's.
    """
    from meteor_model.configuration_meteor import MeteorConfig

    try:
        with foreign(lambda what: ValueError(f"it is none of METEOR: {what}"), (OSError, ValueError)):
            config: MeteorConfig = MeteorConfig.from_pretrained(folder)
    except ValueError as error:  # of the configuration: it quotes values
        raise ValueError(f"{folder}: config.json: {shown(str(error), SHOWN_DETAIL)}") from error
    return config


def load_model_and_processor(
    folder: str | Path, dtype: torch.dtype | None = None
) -> tuple[MeteorForConditionalGeneration, MeteorProcessor]:
    """The model in eval mode, on the CPU, and its processor.

    Weights are read from safetensors files only: nothing in the folder can run code.

    Args:
        folder: what `save_pretrained` of both wrote, or an export.
        dtype: of the weights; None takes them as they are stored.

    Raises:
        CheckpointLayoutError: where the weights are not the ones that config.json describes, naming the tensors.
        OSError: where a file is missing, naming it.
        ValueError: where a weights file is cut short, or a setting or another file is not valid.
    """
    from meteor_model.modeling_meteor import MeteorForConditionalGeneration
    from meteor_model.processing_meteor import MeteorProcessor

    load_config(folder)  # it is the first to be wrong
    # The errors of the model and of missing files say what is wrong; whatever else the libraries raise names nothing.
    with foreign(lambda what: ValueError(f"{folder} holds no model that can be loaded: {what}"), (OSError, ValueError)):
        processor = MeteorProcessor.from_pretrained(folder)
        model = MeteorForConditionalGeneration.from_pretrained(folder, dtype=dtype or "auto", use_safetensors=True)
    return model.eval(), processor
