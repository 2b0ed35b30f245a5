"""The training of built-in models: where the gradient is always 1, AdamW's steps are its rates, by hand."""

import math

import pytest
import torch
from torch import Tensor, nn

from diffrl.images.models.training import optimise


@pytest.mark.parametrize("average", [False, True])
def test_steps_and_running_mean_are_those_of_a_gradient_of_one(average: bool) -> None:
    steps, heard = 70, []
    weight = nn.Parameter(torch.tensor([0.5]))
    network = nn.ParameterList([weight])

    def loss() -> Tensor:
        return weight.sum()

    optimise(network, loss, steps, average=average, on_progress=lambda done, of: heard.append((done, of)))
    p = mean = 0.5
    for k in range(steps):
        rate = 2e-3 * min(1, (k + 1) / 50) * (1 + math.cos(math.pi * k / steps)) / 2
        p = p * (1 - 1e-4 * rate) - rate
        share = 1 - min(0.995, (k + 1) / (k + 10))
        mean += share * (p - mean)
    assert weight.item() == pytest.approx(mean if average else p, abs=1e-6)
    assert abs(mean - p) > 1e-4
    assert heard == [(k + 1, steps) for k in range(steps)]
