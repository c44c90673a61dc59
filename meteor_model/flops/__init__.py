"""Cost by stage and part of any `MeteorConfig`, counted by dispatch on the meta device: no weights, no real memory.

The modules themselves run on shape-only tensors under torch's `FlopCounterMode`; no formula here knows an architecture.

Convention, the one that reproduces METEOR's published table: 2 FLOPs per multiply-add; matrix products, convolutions
and attention count, elementwise work, norms, softmax, resizing and sorting do not; causal attention counts its full
square; all encoders + projectors + LLM prefill of one image and `text_tokens` (about 40) text tokens. The
language-model head is reported apart and is not in the total. Papers on FastV and PyramidDrop count otherwise
(two-matrix feed-forward, no factor 2): never mix the two.

count     `count_flops`: to the first token; `FlopReport` of report says it
training  `count_training`: a forward and a backward pass of what learns, as `TrainingFlops`
counter   torch's counter with the products that it leaves out: `counted`, `flop_counter`
on_meta   the model on the meta device
vision, language    the parts
"""

from meteor_model.flops.count import TEXT_TOKENS, count_flops
from meteor_model.flops.counter import counted, flop_counter
from meteor_model.flops.on_meta import META, meta_model
from meteor_model.flops.report import FlopReport, LayersFlops, TowerFlops
from meteor_model.flops.training import PassFlops, TrainingFlops, count_training

__all__ = [
    "META",
    "TEXT_TOKENS",
    "FlopReport",
    "LayersFlops",
    "PassFlops",
    "TowerFlops",
    "TrainingFlops",
    "count_flops",
    "count_training",
    "counted",
    "flop_counter",
    "meta_model",
]
