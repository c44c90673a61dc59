"""The LLM's head: hidden states to logits, or straight to a loss whose logits exist for one chunk of tokens at a time.

Logits are the largest tensor of a training step (tokens x vocabulary, kept once in the format of training and twice in
fp32). A loss is one number, so its gradient at the logits is known as soon as they are: each chunk is projected, scored
and differentiated at once, and what remains of it is the gradient of its hidden states and a summand of the weight's.
The backward pass only scales them. Nothing is computed twice, and the head's weight is needed in the forward pass
alone. The idea is that of Liger-Kernel (Hsu et al., 2024, arXiv 2410.10989) and of torch 2.14's
`F.linear_cross_entropy`, which older releases lack and which knows no soft cap of the logits.

Legend: n tokens, c those of a chunk, C LLM width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from typing_extensions import override

Finish = Callable[[Tensor], Tensor]
"""What becomes of raw logits (n, V), as the soft cap of Gemma 2."""


class LanguageHead(nn.Linear):
    """Logits of hidden states; with labels, their summed cross entropy.

    The loss is taken inside of the module's call, since what stands around a module acts there: ZeRO-3 gathers the
    weight once for it, whatever the number of chunks, and so does offloading.
    """

    @override
    def forward(
        self,
        hidden_nC: Tensor,
        labels_n: Tensor | None = None,
        chunk: int | None = None,
        finish: Finish = lambda logits_cV: logits_cV,
    ) -> Tensor:
        """One pass.

        Args:
            hidden_nC: (..., C); with labels (n, C).
            labels_n: (n,) the token that each should have named; None gives logits.
            chunk: tokens whose logits exist at a time; None: all of them.
            finish: of raw logits, where a loss is taken of them.

        Returns:
            raw logits (..., V), or the summed cross entropy, fp32.
        """
        if labels_n is None:
            return super().forward(hidden_nC)
        assert self.bias is None, "no language model of the table has one"
        arguments = (hidden_nC, self.weight, labels_n, chunk or max(1, len(labels_n)), finish)
        learns = torch.is_grad_enabled() and (hidden_nC.requires_grad or self.weight.requires_grad)
        total: Tensor = _SummedLoss.apply(*arguments) if learns else _summed(*arguments, False, False)[0]
        return total


class _SummedLoss(torch.autograd.Function):
    """Cross entropy of a linear layer, summed; its gradients are made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        total, *gradients = _summed(*arguments, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [tensor.dtype for tensor in arguments[:2]]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        scaled = [None if gradient is None else (gradient * scale).to(dtype) for gradient, dtype in gradients]
        return (*scaled, None, None, None)


def _summed(
    hidden_nC: Tensor,
    weight_VC: Tensor,
    labels_n: Tensor,
    chunk: int,
    finish: Finish,
    by_hidden: bool,
    by_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, and its gradients where they are asked for; that of the weight is summed in fp32."""
    total = torch.zeros((), device=hidden_nC.device)
    of_hidden_nC = torch.empty_like(hidden_nC) if by_hidden else None
    of_weight_VC = torch.zeros_like(weight_VC, dtype=torch.float32) if by_weight else None
    for start in range(0, len(hidden_nC), chunk):
        rows = slice(start, start + chunk)
        logits_cV = F.linear(hidden_nC[rows], weight_VC).requires_grad_(by_hidden or by_weight)
        with torch.enable_grad():
            loss = F.cross_entropy(finish(logits_cV).float(), labels_n[rows], reduction="sum")
        total += loss.detach()
        if not (by_hidden or by_weight):
            continue
        (of_logits_cV,) = torch.autograd.grad(loss, logits_cV)
        if of_hidden_nC is not None:
            of_hidden_nC[rows] = of_logits_cV @ weight_VC
        if of_weight_VC is not None:
            of_weight_VC += of_logits_cV.T @ hidden_nC[rows]
    return total, of_hidden_nC, of_weight_VC
