"""SynthER's network: a residual MLP on a noised row, its noise level and, where there is one, its condition."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from diffrl.nets import MLP, StackedLinear, affine


class TransitionNetwork(nn.Module):
    """The network F(x, t, condition) of S seeds: x (S, B, D), t () or (S, B), condition (S, B, C) or None -> (S, B, D).

    As published (Lu et al. 2023, arXiv 2303.06614, appendix B): row and condition are mapped to 128 dimensions, to
    which the embedding of the noise level is added (16 random Fourier features and the level itself through a two-layer
    SiLU network); then a linear layer to `width`, `blocks` times h + W relu(h), and a linear layer back.

    causes: how many of a clean row's first columns tell whether it is terminal, by a second, small network; 0: there is
    no such network.
    """

    def __init__(
        self,
        row_size: int,
        generators: Sequence[torch.Generator],
        *,
        width: int,
        blocks: int,
        condition_size: int = 0,
        causes: int = 0,
        time_width: int = 128,
        n_features: int = 16,
    ) -> None:
        super().__init__()
        stack = (len(generators),)
        frequencies = torch.stack([torch.randn(n_features // 2, generator=g) for g in generators])
        # They are random, so a checkpoint must hold them; nothing trains them.
        self.frequencies = nn.Parameter(frequencies.unsqueeze(1), requires_grad=False)
        self.embed_row = StackedLinear(stack, row_size + condition_size, time_width, generators)
        self.embed_time = nn.ModuleList(
            [
                StackedLinear(stack, n_features + 1, time_width, generators),
                StackedLinear(stack, time_width, time_width, generators),
            ]
        )
        self.first = StackedLinear(stack, time_width, width, generators)
        self.blocks = nn.ModuleList(StackedLinear(stack, width, width, generators) for _ in range(blocks))
        self.last = StackedLinear(stack, width, row_size, generators)
        self.head = MLP(stack, causes, 1, generators, width=128, layers=2, activation=torch.relu) if causes else None

    @override
    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        h = self.embed_row(x if condition is None else torch.cat([x, condition], -1)) + self._time(t)
        h = self.first(h)
        for block in self.blocks:
            assert isinstance(block, StackedLinear)
            h = affine(torch.relu(h), block.weight, block.bias + h)  # the sum is the product's own accumulator
        out: Tensor = self.last(torch.relu(h))
        return out

    def terminal(self, causes: Tensor) -> Tensor:
        """The logit (S, B) that a row is terminal, from its first columns (S, B, causes)."""
        assert self.head is not None
        logit: Tensor = self.head(causes).squeeze(-1)
        return logit

    def _time(self, t: Tensor) -> Tensor:
        """The embedding of the noise level: (S, 1, 128) of t (), (S, B, 128) of t (S, B)."""
        label = t.expand(len(self.frequencies), 1, 1) if t.ndim == 0 else t.unsqueeze(-1)
        angles = 2 * math.pi * label * self.frequencies
        first, second = self.embed_time
        embedding: Tensor = second(torch.nn.functional.silu(first(torch.cat([label, angles.sin(), angles.cos()], -1))))
        return embedding
