"""Linear layers with one weight a seed: S networks of one shape are trained as one."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def seed_generator(seed: int) -> torch.Generator:
    """The generator that initialises the networks of `seed`: the same alone and as one of a stack."""
    return torch.Generator().manual_seed(seed)


class StackedLinear(nn.Module):
    """y = x W + b for a stack of layers: x (*stack, B, in) -> y (*stack, B, out).

    `stack` is (S,) for S seeds, (S, 2) for twin critics. Weights (*stack, in, out), biases (*stack, 1, out), both
    initialised as `torch.nn.Linear` does, seed by seed from `generators` (one a seed, on the CPU).
    """

    def __init__(
        self, stack: Sequence[int], in_features: int, out_features: int, generators: Sequence[torch.Generator]
    ) -> None:
        super().__init__()
        self.stack = tuple(stack)
        bound = 1 / math.sqrt(in_features)

        def uniform(*shape: int) -> nn.Parameter:
            draws = [torch.rand(*self.stack[1:], *shape, generator=g) for g in generators]
            return nn.Parameter((2 * torch.stack(draws) - 1) * bound)

        self.weight = uniform(in_features, out_features)
        self.bias = uniform(1, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """x (*stack, B, in) -> (*stack, B, out)."""
        if len(self.stack) == 1:
            return torch.baddbmm(self.bias, x, self.weight)
        n = len(self.stack) - 1
        y = torch.baddbmm(self.bias.flatten(0, n), x.flatten(0, n), self.weight.flatten(0, n))
        return y.view(*self.stack, *y.shape[1:])


class StackedLayerNorm(nn.Module):
    """Layer normalisation over the features of x (*stack, B, size), gain and shift one a network."""

    def __init__(self, stack: Sequence[int], size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(*stack, 1, size))
        self.bias = nn.Parameter(torch.zeros(*stack, 1, size))

    def forward(self, x: Tensor) -> Tensor:
        """x (*stack, B, size) -> the same shape."""
        return torch.addcmul(self.bias, torch.nn.functional.layer_norm(x, x.shape[-1:]), self.weight)
