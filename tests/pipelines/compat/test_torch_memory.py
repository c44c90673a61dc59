"""The count of living tensors, against sums by hand."""

import torch
from torch import nn

from pipelines.compat.torch_memory import LivingTensors

META = torch.device("meta")


def test_what_lives_and_the_most_that_lived() -> None:
    with LivingTensors(nn.Linear(1, 1)) as living:
        first = torch.empty(100, dtype=torch.float32, device=META)
        second = first + first
        view = second[:10]
        assert (living.now, living.peak) == (800, 800)
        del second
        assert living.now == 800, "the view holds its memory"
        del view
        assert (living.now, living.peak) == (400, 800)
        del first
    assert (living.now, living.peak) == (0, 800)


def test_a_model_does_not_count_and_what_autograd_holds_does() -> None:
    with META:
        layer = nn.Linear(1000, 10, bias=False)
    with LivingTensors(layer) as living:
        inputs = torch.empty(4, 1000, device=META)
        loss = torch.relu(layer(inputs)).sum()
    assert living.now == 4 * (4 * 1000 + 2 * 4 * 10 + 1) - 4 * 4 * 10, "input, result of relu, and the sum"
    assert loss.requires_grad
