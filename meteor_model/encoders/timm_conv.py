"""Convolutional nets of timm: EfficientNet, ConvNeXt-XXL, ResNet and others. They run dense, pruned at the output only.

`tower` holds `model_name`, optionally `stage` (which of the net's feature maps gives the tokens; -1, the last, unless
said) and the arguments of `timm.create_model`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import timm
import torch
from timm.models.convnext import ConvNeXtStage
from torch import nn
from typing_extensions import override

from meteor_model.encoders.base import EncoderConfig, VisionEncoder, square_grid
from meteor_model.foreign import foreign, quoted

OWN_SETTINGS = ("model_name", "stage")


class Chain(NamedTuple):
    """The net up to the chosen feature map as a chain of modules, by name.

    A module that works in place is in the link of the one before it, since a link alone may be recomputed from its
    input.
    """

    links: tuple[tuple[str, ...], ...]
    width: int
    stride: int


def _build(tower: dict[str, Any]) -> Any:
    """The net without what comes after the chosen feature map. Raises ValueError for a name that timm does not know."""
    name = tower.get("model_name")
    if not isinstance(name, str) or not timm.is_model(name):
        near = timm.list_models(f"*{str(name).split('.')[0][:8]}*")[:5]
        raise ValueError(f"timm has no model {name!r} (tower['model_name']); near: {', '.join(near) or 'none'}")
    arguments = {key: value for key, value in tower.items() if key not in OWN_SETTINGS}
    net = timm.create_model(name, **{"num_classes": 0, **arguments})
    net.prune_intermediate_layers([tower.get("stage", -1)], prune_norm=True, prune_head=True)
    return net


def _links(net: nn.Module, prefix: str = "") -> Iterator[str]:
    """Names of the modules that run one after the other, containers opened."""
    for name, child in net.named_children():
        if isinstance(child, nn.Sequential):
            yield from _links(child, f"{prefix}{name}.")
        elif isinstance(child, ConvNeXtStage):
            for part in ("downsample", "blocks"):
                module = child.get_submodule(part)  # an Identity or a Sequential
                if isinstance(module, nn.Sequential):
                    yield from _links(module, f"{prefix}{name}.{part}.")
        elif not isinstance(child, nn.Identity):
            yield prefix + name


def _run(net: nn.Module, link: Sequence[str], hidden: torch.Tensor) -> torch.Tensor:
    for name in link:
        hidden = net.get_submodule(name)(hidden)
    return hidden


@lru_cache(maxsize=32)
def _chain(tower_json: str) -> Chain:
    """The chain of a net, from its configuration alone: the net is built on the meta device, without weights."""
    tower = json.loads(tower_json)
    with torch.device("meta"):
        net = _build(tower).eval()  # batch norm of a single cell is refused in training
    info = net.feature_info[tower.get("stage", -1)]
    last: str = info["module"]
    links: list[tuple[str, ...]] = []
    reached = False
    for name in _links(net):
        inside = name == last or name.startswith(f"{last}.")
        if reached and not inside:
            break
        reached = reached or inside
        if links and getattr(net.get_submodule(name), "inplace", False) is True:
            links[-1] = (*links[-1], name)
        else:
            links.append((name,))
    chain = Chain(tuple(links), info["num_chs"], info["reduction"])
    hidden = torch.empty(1, 3, 4 * chain.stride, 4 * chain.stride, device="meta")
    for link in chain.links:
        hidden = _run(net, link, hidden)
    if hidden.shape != (1, chain.width, 4, 4):
        raise ValueError(f"its modules run in order give a map of shape {tuple(hidden.shape)}, not a convolutional one")
    return chain


class TimmConvEncoder(VisionEncoder):
    """A convolutional net of timm whose modules run in the order they were registered in.

    timm's own `features_only` assumes the same; a test compares with the net's `forward_intermediates`. Statistics of
    batch norms are frozen: small batches that differ by rank would spoil them, and so would recomputation.
    """

    any_size = True
    prunes_between_blocks = False

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.chain = self._chain(config)
        self.tower = _build(config.tower)
        self.mean, self.std = self.tower.pretrained_cfg["mean"], self.tower.pretrained_cfg["std"]

    @classmethod
    def _chain(cls, config: EncoderConfig) -> Chain:
        refusal = (
            f"encoder {config.name!r}: cannot build {quoted(config.tower)} as a chain of convolutional modules "
            "(docs/encoders.md lists the kinds of nets of timm that are one)"
        )
        with foreign(lambda what: ValueError(f"{refusal}: {what}")):
            return _chain(json.dumps(config.tower, sort_keys=True))

    @classmethod
    @override
    def grid_size(cls, config: EncoderConfig) -> tuple[int, int]:
        return square_grid(config, cls._chain(config).stride)

    @classmethod
    @override
    def num_blocks(cls, config: EncoderConfig) -> int:
        return len(cls._chain(config).links) - 1

    @property
    @override
    def embed_dim(self) -> int:
        return self.chain.width

    @property
    @override
    def blocks(self) -> Sequence[nn.Module]:
        return [self.tower.get_submodule(link[0]) for link in self.chain.links[1:]]

    @override
    def train(self, mode: bool = True) -> TimmConvEncoder:
        super().train(mode)
        for module in self.tower.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def embed(self, pixels_MCRR: torch.Tensor) -> torch.Tensor:
        """The first module: (M, 3, R, R) -> a feature map, not yet a row of tokens."""
        return _run(self.tower, self.chain.links[0], pixels_MCRR)

    @override
    def run_block(self, index: int, hidden_MTD: torch.Tensor, positions_MN: torch.Tensor) -> torch.Tensor:
        return _run(self.tower, self.chain.links[index + 1], hidden_MTD)

    def finish(self, hidden_MTD: torch.Tensor, positions_MN: torch.Tensor) -> torch.Tensor:
        """(M, D, rows, columns) -> (M, N, D) in raster order."""
        return hidden_MTD.flatten(2).transpose(1, 2)
