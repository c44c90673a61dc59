"""Pretrained weights of a model's parts, from hub ids, folders and files; every misfit is one error that names it.

parts        into a tower or the LLM, checked tensor by tensor and checksummed: `load_parts`, `load_encoder`, `load_llm`
names        what each family's published checkpoints call their tensors, and what they hold beside the tower
checkpoints  where the tensors lie: sources, files, shards, the hub
"""

from meteor_model.weights.checkpoints import WeightsError, parse_source
from meteor_model.weights.parts import LoadedPart, checksum, load_encoder, load_llm, load_parts, vocabulary_rows

__all__ = [
    "LoadedPart",
    "WeightsError",
    "checksum",
    "load_encoder",
    "load_llm",
    "load_parts",
    "parse_source",
    "vocabulary_rows",
]
