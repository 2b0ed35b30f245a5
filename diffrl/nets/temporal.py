"""A temporal U-Net on the seeds axis: the network that denoises trajectories (Janner et al. 2022, arXiv 2205.09991).

Convolutions run along the rows of a trajectory. Inside, all seeds stand side by side as channels, (B, S C, H), and
every operation is a grouped one: a convolution has S groups, a group normalisation S times as many. So S = 1 is
PyTorch's plain network, without one operation more. On a CPU, where nine tenths of the time are convolutions, grouped
ones take as long as one a seed or less, and matrix products of gathered rows a quarter longer or more; on a GPU they
are one call for all seeds.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffrl.nets.mlp import MLP, StackedLinear, TimeEmbedding, mish

_HEAD = 32
"""Channels of one head of attention, where there are as many."""


class StackedConv1d(nn.Module):
    """A convolution along the last axis for S seeds: x (B, S in, H) -> (B, S out, H'), as `torch.nn.Conv1d` a seed.

    Weights (S, out, in, kernel), biases (S, out), initialised as `torch.nn.Conv1d` does, seed by seed from `generators`
    (one a seed, on the CPU). Zeros pad both ends by kernel // 2: at stride 1 and an odd kernel H' = H, at stride 2
    H' = ceil(H / 2).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        generators: Sequence[torch.Generator],
        *,
        stride: int = 1,
    ) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_channels * kernel)
        self.weight = nn.Parameter(_uniform((out_channels, in_channels, kernel), bound, generators))
        self.bias = nn.Parameter(_uniform((out_channels,), bound, generators))
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """x (B, S in, H) -> (B, S out, H')."""
        n_seeds, *_, kernel = self.weight.shape
        weight, bias = self.weight.flatten(0, 1), self.bias.flatten()
        return functional.conv1d(x, weight, bias, self.stride, kernel // 2, groups=n_seeds)


class StackedUpsampling(nn.Module):
    """A transposed convolution that doubles the length, kernel 4, for S seeds: x (B, S C, H) -> (B, S C, 2 H).

    Weights (S, C, C, 4), the second axis the input's, biases (S, C), initialised as `torch.nn.ConvTranspose1d` does,
    seed by seed from `generators`.
    """

    def __init__(self, channels: int, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        bound = 1 / math.sqrt(channels * 4)
        self.weight = nn.Parameter(_uniform((channels, channels, 4), bound, generators))
        self.bias = nn.Parameter(_uniform((channels,), bound, generators))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, S C, H) -> (B, S C, 2 H)."""
        weight, bias = self.weight.flatten(0, 1), self.bias.flatten()
        return functional.conv_transpose1d(x, weight, bias, stride=2, padding=1, groups=len(self.weight))


class StackedGroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018, arXiv 1803.08494) for S seeds: x (B, S C, H) -> the same shape.

    The number of groups of a seed is the largest of 8 or fewer that divides its channels. Gains and shifts (S, C).
    """

    def __init__(self, n_seeds: int, channels: int) -> None:
        super().__init__()
        self.groups = n_seeds * math.gcd(8, channels)
        self.weight = nn.Parameter(torch.ones(n_seeds, channels))
        self.bias = nn.Parameter(torch.zeros(n_seeds, channels))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, S C, H) -> the same shape."""
        return functional.group_norm(x, self.groups, self.weight.flatten(), self.bias.flatten())


def _uniform(shape: Sequence[int], bound: float, generators: Sequence[torch.Generator]) -> Tensor:
    """Numbers (S, *shape) uniform on [-bound, bound), seed by seed."""
    return bound * (2 * torch.stack([torch.rand(*shape, generator=g) for g in generators]) - 1)


class ConvBlock(nn.Module):
    """mish(norm(conv(x))): x (B, S in, H) -> (B, S out, H)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        self.conv = StackedConv1d(in_channels, out_channels, kernel, generators)
        self.norm = StackedGroupNorm(len(generators), out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, S in, H) -> (B, S out, H)."""
        return mish(self.norm(self.conv(x)))


class ResidualBlock(nn.Module):
    """Two `ConvBlock`s, the embedding's share added between them, beside a skip: x (B, S in, H) -> (B, S out, H)."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, embedding: int, generators: Sequence[torch.Generator]
    ) -> None:
        super().__init__()
        self.first = ConvBlock(in_channels, out_channels, kernel, generators)
        self.second = ConvBlock(out_channels, out_channels, kernel, generators)
        self.shift = StackedLinear((len(generators),), embedding, out_channels, generators)
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else StackedConv1d(in_channels, out_channels, 1, generators)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (B, S in, H), mish of the embedding (S, 1 or B, E) -> (B, S out, H)."""
        shift = self.shift(embedding).transpose(0, 1).flatten(1).unsqueeze(-1)
        out: Tensor = self.second(self.first(x) + shift) + self.skip(x)
        return out


class CrossAttention(nn.Module):
    """x + attention of x's rows to a context, over heads of 32 channels: x (B, S C, H), context (S, B, H_c, E).

    Sinusoids of the rows' places are added to queries and keys, which would else know no order.
    """

    def __init__(self, channels: int, context: int, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        stack = (len(generators),)
        self.heads = max(1, channels // _HEAD) if channels % _HEAD == 0 else 1
        self.norm = StackedGroupNorm(len(generators), channels)
        self.query = StackedLinear(stack, channels, channels, generators)
        self.key = StackedLinear(stack, context, channels, generators)
        self.value = StackedLinear(stack, context, channels, generators)
        self.out = StackedLinear(stack, channels, channels, generators)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, S C, H), context (S, B, H_c, E) -> x's shape."""
        n_seeds, batch, length, _ = context.shape
        channels, rows = x.shape[1] // n_seeds, x.shape[2]
        h = self.norm(x).view(batch, n_seeds, channels, rows).permute(1, 0, 3, 2).reshape(n_seeds, -1, channels)
        c = context.flatten(1, 2)
        query = self.query(h).view(n_seeds * batch, rows, channels) + places(rows, channels, x)
        key = self.key(c).view(n_seeds * batch, length, channels) + places(length, channels, x)
        value = self.value(c).view(n_seeds * batch, length, channels)

        def heads(v: Tensor) -> Tensor:
            return v.view(*v.shape[:2], self.heads, -1).transpose(1, 2)

        found = functional.scaled_dot_product_attention(heads(query), heads(key), heads(value))
        out: Tensor = self.out(found.transpose(1, 2).reshape(n_seeds, batch * rows, channels))
        return x + out.view(n_seeds, batch, rows, channels).permute(1, 0, 3, 2).reshape(x.shape)


def places(rows: int, size: int, like: Tensor) -> Tensor:
    """Sinusoids (rows, size) of the places 0, 1, ... (Vaswani et al. 2017), with the device and dtype of `like`."""
    half = (size + 1) // 2
    dtype = torch.promote_types(like.dtype, torch.float32)
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, device=like.device, dtype=dtype))
    angles = torch.arange(rows, device=like.device, dtype=dtype).unsqueeze(-1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1)[:, :size].to(like.dtype)


class TemporalUNet(nn.Module):
    """Diffuser's temporal U-Net for S seeds: x (S, B, H, D) and time labels t, () or (S, B) -> (S, B, H, D).

    A level has two residual blocks of kernel 5 (with a condition trajectory also cross-attention), and the rows are
    halved between levels and doubled on the way back, where each level's result on the way down is joined. H is any
    number of rows >= 1: the last row is repeated up to a multiple of 2^(levels - 1), and the answer is cut to H.

    in_features: D. width and multipliers: a level's channels are width times its multiplier.
    seen_features: E of further columns that rows have and the answer has not: then x is (S, B, H, D + E).
    trajectory_features: D_c of a condition trajectory (S, B, H_c, D_c), which every level attends to; None: no such
        condition. vector_features: C of a condition (S, B, C), such as a return, added to the time embedding by an MLP.
    generators: one a seed, on the CPU; from them the weights are drawn, the same alone and as one of a stack.

    `null_trajectory` (S, 1, 1, D_c) and `null_vector` (S, 1, C) are learned, and stand for a dropped condition: pass
    them to `diffusion.drop_condition` (event_dims=2 for a trajectory) and `diffusion.classifier_free`.
    """

    null_trajectory: Tensor | None
    null_vector: Tensor | None

    def __init__(
        self,
        in_features: int,
        generators: Sequence[torch.Generator],
        *,
        width: int = 32,
        multipliers: Sequence[int] = (1, 4, 8),
        kernel: int = 5,
        seen_features: int = 0,
        trajectory_features: int | None = None,
        vector_features: int | None = None,
    ) -> None:
        super().__init__()
        if not multipliers or min(multipliers) < 1 or width < 4 or kernel % 2 == 0:
            raise ValueError(
                f"need multipliers >= 1, a width >= 4 and an odd kernel, got {tuple(multipliers)}, {width} and {kernel}"
            )
        n_seeds = len(generators)
        self.in_features, self.levels = in_features, len(multipliers)
        channels = [in_features + seen_features, *(width * m for m in multipliers)]
        self.time = TimeEmbedding(n_seeds, width, generators)
        context = width if trajectory_features is not None else None
        self.context = self.vector = None
        self.register_parameter("null_trajectory", None)
        self.register_parameter("null_vector", None)
        if trajectory_features is not None:
            self.context = StackedLinear((n_seeds,), trajectory_features, width, generators)
            self.null_trajectory = nn.Parameter(torch.zeros(n_seeds, 1, 1, trajectory_features))
        if vector_features is not None:
            self.vector = MLP((n_seeds,), vector_features, width, generators, width=2 * width, layers=1)
            self.null_vector = nn.Parameter(torch.zeros(n_seeds, 1, vector_features))

        def level(i: int, o: int) -> nn.ModuleDict:
            parts: dict[str, nn.Module] = {
                "first": ResidualBlock(i, o, kernel, width, generators),
                "second": ResidualBlock(o, o, kernel, width, generators),
            }
            if context is not None:
                parts["attention"] = CrossAttention(o, context, generators)
            return nn.ModuleDict(parts)

        pairs = list(itertools.pairwise(channels))
        self.down = nn.ModuleList(level(i, o) for i, o in pairs)
        self.shorten = nn.ModuleList(StackedConv1d(o, o, 3, generators, stride=2) for _, o in pairs[:-1])
        self.middle = level(channels[-1], channels[-1])
        self.up = nn.ModuleList(level(2 * o, i) for i, o in reversed(pairs[1:]))
        self.lengthen = nn.ModuleList(StackedUpsampling(i, generators) for i, _ in reversed(pairs[1:]))
        self.last = ConvBlock(channels[1], channels[1], kernel, generators)
        self.out = StackedConv1d(channels[1], in_features, 1, generators)

    def forward(self, x: Tensor, t: Tensor, trajectory: Tensor | None = None, vector: Tensor | None = None) -> Tensor:
        """x (S, B, H, D + E), t () or (S, B) -> (S, B, H, D).

        trajectory (S, B, H_c, D_c), vector (S, B, C): the conditions, where the network has them; None: the learned
        null for every row. Raises ValueError for a condition the network was not made for.
        """
        n_seeds, batch, rows, _ = x.shape
        embedding, context = self._conditions(x, t, trajectory, vector)
        h = x.permute(1, 0, 3, 2).reshape(batch, -1, rows)
        multiple = 2 ** (self.levels - 1)
        if rows % multiple:
            h = torch.cat([h, h[..., -1:].expand(-1, -1, multiple - rows % multiple)], -1)
        skips = []
        for i, level in enumerate(self.down):
            h = _level(level, h, embedding, context)
            skips.append(h)
            if i < self.levels - 1:
                h = self.shorten[i](h)
        h = _level(self.middle, h, embedding, context)
        for level, lengthen in zip(self.up, self.lengthen, strict=True):
            h = lengthen(_level(level, _joined(h, skips.pop(), n_seeds), embedding, context))
        m: Tensor = self.out(self.last(h))[..., :rows]
        return m.view(batch, n_seeds, self.in_features, rows).permute(1, 0, 3, 2)

    def _conditions(
        self, x: Tensor, t: Tensor, trajectory: Tensor | None, vector: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """mish of the embedding of time and vector (S, 1 or B, E), and the context (S, B, H_c, E)."""
        embedding: Tensor = self.time(t)
        if self.vector is not None:
            embedding = embedding + self.vector(self.null_vector if vector is None else vector)
        elif vector is not None:
            raise ValueError("this network has no condition vector: make it with vector_features")
        context = None
        if self.context is not None:
            if trajectory is None:
                assert self.null_trajectory is not None
                trajectory = self.null_trajectory.expand(-1, x.shape[1], -1, -1)
            context = self.context(trajectory.flatten(1, 2)).unflatten(1, trajectory.shape[1:3])
        elif trajectory is not None:
            raise ValueError("this network has no condition trajectory: make it with trajectory_features")
        return mish(embedding), context


class TemporalValue(nn.Module):
    """A value of trajectories, for S seeds: x (S, B, H, D) and time labels t, () or (S, B) -> (S, B).

    The way down of a `TemporalUNet` with one residual block a level, the rows halved after each; then their mean and
    the time embedding go through an MLP of one hidden layer. H is any number of rows >= 1. in_features: D; the other
    arguments are as there.
    """

    def __init__(
        self,
        in_features: int,
        generators: Sequence[torch.Generator],
        *,
        width: int = 32,
        multipliers: Sequence[int] = (1, 4, 8),
        kernel: int = 5,
    ) -> None:
        super().__init__()
        self.n_seeds = len(generators)
        channels = [in_features, *(width * m for m in multipliers)]
        self.time = TimeEmbedding(self.n_seeds, width, generators)
        pairs = list(itertools.pairwise(channels))
        self.down = nn.ModuleList(ResidualBlock(i, o, kernel, width, generators) for i, o in pairs)
        self.shorten = nn.ModuleList(StackedConv1d(o, o, 3, generators, stride=2) for _, o in pairs)
        size = channels[-1] + width
        self.head = MLP((self.n_seeds,), size, 1, generators, width=channels[-1], layers=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x (S, B, H, D), t () or (S, B) -> (S, B)."""
        _, batch, rows, _ = x.shape
        embedding = mish(self.time(t))
        h = x.permute(1, 0, 3, 2).reshape(batch, -1, rows)
        for block, shorten in zip(self.down, self.shorten, strict=True):
            h = shorten(block(h, embedding))
        mean = h.mean(-1).view(batch, self.n_seeds, -1).transpose(0, 1)
        values: Tensor = self.head(torch.cat([mean, embedding.expand(-1, batch, -1)], -1))
        return values.squeeze(-1)


def _level(level: nn.Module, h: Tensor, embedding: Tensor, context: Tensor | None) -> Tensor:
    """A level's two blocks, and its attention where it has one."""
    assert isinstance(level, nn.ModuleDict)
    out: Tensor = level["second"](level["first"](h, embedding), embedding)
    if context is not None:
        out = level["attention"](out, context)
    return out


def _joined(h: Tensor, skip: Tensor, n_seeds: int) -> Tensor:
    """The channels of h and of a skip (B, S C, H), side by side in each seed: (B, S 2 C, H)."""
    both = [v.view(len(v), n_seeds, -1, v.shape[-1]) for v in (h, skip)]
    return torch.cat(both, 2).flatten(1, 2)
