"""Everything that transformers' auto classes need to know of METEOR, in one import.

    import meteor_model.auto
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)

Each class registers itself at the end of its own module.
"""

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.image_processing_meteor import MeteorImageProcessor
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor

__all__ = ["MeteorConfig", "MeteorForConditionalGeneration", "MeteorImageProcessor", "MeteorProcessor"]
