"""Multi-layer perceptrons and time embeddings on the seeds axis."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from diffrl.nets.activation import mish
from diffrl.nets.stacked import StackedLayerNorm, StackedLinear


class MLP(nn.Module):
    """`layers` hidden layers of `width` and a linear one: x (*stack, B, in) -> (*stack, B, out).

    layer_norm: normalise every hidden layer before its activation (Ba et al. 2016, arXiv 1607.06450).
    """

    def __init__(
        self,
        stack: Sequence[int],
        in_features: int,
        out_features: int,
        generators: Sequence[torch.Generator],
        *,
        width: int = 256,
        layers: int = 3,
        activation: Callable[[Tensor], Tensor] = mish,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        sizes = [in_features, *[width] * layers, out_features]
        pairs = itertools.pairwise(sizes)
        self.linears = nn.ModuleList(StackedLinear(stack, i, o, generators) for i, o in pairs)
        norms = (StackedLayerNorm(stack, width) if layer_norm else nn.Identity() for _ in range(layers))
        self.norms = nn.ModuleList(norms)
        self.activation = activation

    @property
    def first(self) -> StackedLinear:
        """The first layer."""
        layer = self.linears[0]
        assert isinstance(layer, StackedLinear)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """x (*stack, B, in) -> (*stack, B, out)."""
        return self.after_first(self.first(x))

    def after_first(self, h: Tensor) -> Tensor:
        """The network from h = x W + b of its first layer on: (*stack, B, width) -> (*stack, B, out).

        For callers who know parts of x beforehand, and so parts of h.
        """
        for linear, norm in zip(self.linears[1:], self.norms, strict=True):
            h = linear(self.activation(norm(h)))
        return h


class TimeEmbedding(nn.Module):
    """Sinusoids of the time label (Vaswani et al. 2017) through a two-layer MLP, as in Diffusion-QL's networks.

    t: () or (S, B) -> (S, 1, size) or (S, B, size).
    """

    frequencies: Tensor

    def __init__(self, n_seeds: int, size: int, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        self.n_seeds = n_seeds
        half = size // 2
        frequencies = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = MLP((n_seeds,), 2 * half, size, generators, width=2 * size, layers=1)

    def forward(self, t: Tensor) -> Tensor:
        """The embedding of t, see the class."""
        angles = t.unsqueeze(-1) * self.frequencies
        if t.ndim == 0:
            angles = angles.expand(self.n_seeds, 1, -1)
        embedding: Tensor = self.mlp(torch.cat([angles.sin(), angles.cos()], -1))
        return embedding
