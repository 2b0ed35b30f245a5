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

    layer_norm: normalise every hidden layer (Ba et al. 2016, arXiv 1607.06450), before its activation, or with
    norm_after after it.
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
        norm_after: bool = False,
    ) -> None:
        super().__init__()
        sizes = [in_features, *[width] * layers, out_features]
        pairs = itertools.pairwise(sizes)
        self.linears = nn.ModuleList(StackedLinear(stack, i, o, generators) for i, o in pairs)
        norms = (StackedLayerNorm(stack, width) if layer_norm else nn.Identity() for _ in range(layers))
        self.norms = nn.ModuleList(norms)
        self.activation, self.norm_after = activation, norm_after

    @property
    def first(self) -> StackedLinear:
        """The first layer, in -> width."""
        layer = self.linears[0]
        assert isinstance(layer, StackedLinear)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """x (*stack, B, in) -> (*stack, B, out)."""
        return self.after_first(self.first(x))

    def after_first(self, h: Tensor) -> Tensor:
        """The network without its first layer, whose h = x W + b is given: (*stack, B, width) -> (*stack, B, out).

        For callers who know parts of x beforehand, and so parts of h.
        """
        for linear, norm in zip(self.linears[1:], self.norms, strict=True):
            h = linear(norm(self.activation(h)) if self.norm_after else self.activation(norm(h)))
        return h


class ResidualMLP(nn.Module):
    """A linear layer, `blocks` residual blocks of `width`, and a linear layer: x (*stack, B, in) -> (*stack, B, out).

    A block is h + W_2 mish(W_1 norm(dropout(h))), four times as wide within, with layer normalisation: IDQL's network
    (Hansen-Estruch et al. 2023, arXiv 2304.10573, appendix). The mask of dropout is an argument, drawn by
    `dropout_mask`, so that the network is a plain function of tensors.
    """

    def __init__(
        self,
        stack: Sequence[int],
        in_features: int,
        out_features: int,
        generators: Sequence[torch.Generator],
        *,
        width: int = 256,
        blocks: int = 3,
    ) -> None:
        super().__init__()
        self.first = StackedLinear(stack, in_features, width, generators)
        self.norms = nn.ModuleList(StackedLayerNorm(stack, width) for _ in range(blocks))
        self.widen = nn.ModuleList(StackedLinear(stack, width, 4 * width, generators) for _ in range(blocks))
        self.narrow = nn.ModuleList(StackedLinear(stack, 4 * width, width, generators) for _ in range(blocks))
        self.last = StackedLinear(stack, width, out_features, generators)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """x (*stack, B, in) -> (*stack, B, out). keep: see `after_first`."""
        return self.after_first(self.first(x), keep)

    def after_first(self, h: Tensor, keep: Tensor | None = None) -> Tensor:
        """The network without its first layer, whose h = x W + b is given: (*stack, B, width) -> (*stack, B, out).

        keep: (blocks, *h.shape), the factors of dropout on the blocks' inputs (`dropout_mask`); None: no dropout.
        """
        for i, (norm, widen, narrow) in enumerate(zip(self.norms, self.widen, self.narrow, strict=True)):
            h = h + narrow(mish(widen(norm(h if keep is None else h * keep[i]))))
        out: Tensor = self.last(mish(h))
        return out


def dropout_mask(shape: Sequence[int], rate: float, generator: torch.Generator) -> Tensor:
    """Draw factors of dropout (Srivastava et al. 2014): 0 with probability `rate`, else 1 / (1 - rate).

    The factors' mean is 1. They are on the generator's device.
    """
    uniform = torch.rand(tuple(shape), generator=generator, device=generator.device)
    return (uniform >= rate) / (1 - rate)


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
        """The embedding of t () or (S, B): (S, 1, size) or (S, B, size)."""
        angles = t.unsqueeze(-1) * self.frequencies
        if t.ndim == 0:
            angles = angles.expand(self.n_seeds, 1, -1)
        embedding: Tensor = self.mlp(torch.cat([angles.sin(), angles.cos()], -1))
        return embedding


class RawTime(nn.Module):
    """The time label itself instead of an embedding: t () or (S, B) -> (S, 1, 1) or (S, B, 1)."""

    def __init__(self, n_seeds: int) -> None:
        super().__init__()
        self.n_seeds = n_seeds

    def forward(self, t: Tensor) -> Tensor:
        """t () or (S, B) as (S, 1, 1) or (S, B, 1)."""
        return t.expand(self.n_seeds, 1, 1) if t.ndim == 0 else t.unsqueeze(-1)
