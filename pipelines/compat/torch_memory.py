"""What this project uses of torch beyond its public interface to count memory: the mode that sees every operation.

Written for torch 2.14. The public hooks of autograd see what it saves, but not the inputs that a recomputed block
holds, nor what lives in between. `tests/pipelines/compat/test_torch_memory.py` fails when one of these things changes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LivingTensors(TorchDispatchMode):
    """Bytes of the tensors that operations made inside the block and that are still there.

    Those of a model do not count. Works on the meta device, where nothing is allocated.

    Args:
        model: whose parameters and buffers, and views of them, do not count.

    Attributes:
        now: bytes that live.
        peak: the most that has lived at a time.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._model = model  # held: the identity of memory that is gone would be given anew
        self._known = {_key(tensor): 0 for tensor in [*model.parameters(), *model.buffers()]}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and note what it made."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and _key(tensor) not in self._known:
                self._add(tensor)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        self._known[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key)


def _key(tensor: Tensor) -> int:
    """Identity of the memory that a tensor looks at; all shape-only tensors have the same address."""
    return tensor.untyped_storage()._cdata
