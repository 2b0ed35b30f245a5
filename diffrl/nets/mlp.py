"""Multi-layer perceptrons and time embeddings on the seeds axis, and their layers: S networks are trained as one."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_NARROW = 16
_FEW_PRODUCTS = 8
_MANY_ROWS = 32
_FEW = 4096


# --- Layers with one weight a seed ----------------------------------------------------------------------------------


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
        self.weight = nn.Parameter(bound * _uniform((*self.stack[1:], in_features, out_features), generators))
        self.bias = nn.Parameter(bound * _uniform((*self.stack[1:], 1, out_features), generators))

    def forward(self, x: Tensor) -> Tensor:
        """x (*stack, B, in) -> (*stack, B, out)."""
        return affine(x, self.weight, self.bias)


def _uniform(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Numbers (S, *shape) uniform on [-1, 1), seed by seed."""
    return 2 * torch.stack([torch.rand(*shape, generator=g) for g in generators]) - 1


@torch.no_grad()
def initialise_fan_average_(module: nn.Module, generators: Sequence[torch.Generator]) -> None:
    """Draw the weights of all stacked linear layers in `module` again, from U(-b, b); biases 0.

    b = sqrt(6 / (in + out)), a variance of one over the average of the fans (Glorot & Bengio 2010): as networks
    written in flax often start, `variance_scaling(1, "fan_avg", "uniform")`. generators: one a seed, on the CPU.
    """
    for layer in module.modules():
        if isinstance(layer, StackedLinear):
            i, o = layer.weight.shape[-2:]
            layer.weight.copy_(math.sqrt(6 / (i + o)) * _uniform((*layer.stack[1:], i, o), generators))
            layer.bias.zero_()


@torch.no_grad()
def initialise_small_output_(network: "MLP", bound: float, generators: Sequence[torch.Generator]) -> None:
    """Draw the last layer's weights and biases again, from U(-bound, bound); other biases become 0.1.

    As EDAC (An et al. 2021, arXiv 2110.01548) and ReBRAC start their networks. generators: one a seed, on the CPU.
    """
    layers = [layer for layer in network.linears if isinstance(layer, StackedLinear)]
    for layer in layers:
        layer.bias.fill_(0.1)
    for parameter in (layers[-1].weight, layers[-1].bias):
        parameter.copy_(bound * _uniform(parameter.shape[1:], generators))


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W + b for a stack: x (*stack, B, in), weight (*stack, in, out), bias (*stack, 1 or B, out)
    -> (*stack, B, out).

    The products are the same however they are taken; what differs is their speed. On a CPU a product with 2 to 15
    columns takes two to three times as long as one with 16 (and a compiler fuses the bias into what follows).
    """
    out = weight.shape[-1]
    rows: Any = x.shape[-2]
    if isinstance(rows, torch.SymInt):  # a graph for any number of rows is exported: it may not branch on it
        return torch.matmul(x, weight) + bias
    if x.device.type == "cpu" and x.shape[-2] >= _MANY_ROWS:
        if out == 1:
            return (x * weight.mT).sum(-1, keepdim=True) + bias
        if out < _NARROW:
            weight = torch.nn.functional.pad(weight, (0, _NARROW - out))
            return _product(x, weight)[..., :out] + bias
    if torch.compiler.is_compiling():
        if x.device.type == "cuda" and (out <= _FEW_PRODUCTS or x.shape[-1] <= _FEW_PRODUCTS):
            return few_products(x, weight) + bias
        return _product(x, weight) + bias
    if x.ndim == 3:
        return torch.baddbmm(bias, x, weight)
    n = x.ndim - 3
    y = torch.baddbmm(bias.flatten(0, n), x.flatten(0, n), weight.flatten(0, n))
    return y.view(*x.shape[:-1], out)


def few_products(x: Tensor, weight: Tensor) -> Tensor:
    """x W for a W with few rows or few columns, written as sums of products: (*stack, B, in) -> (*stack, B, out).

    A GPU's compiler joins them with the operations beside them; a matrix product would be a kernel of its own that
    leaves the GPU idle.
    """
    if weight.shape[-1] <= x.shape[-1]:
        columns = [(x * column.unsqueeze(-2)).sum(-1) for column in weight.unbind(-1)]
        return torch.stack(columns, -1)
    rows = [x[..., i : i + 1] * weight[..., i : i + 1, :] for i in range(x.shape[-1])]
    return sum(rows[1:], start=rows[0])


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x W with all leading dimensions made one, where `torch.matmul` would expand and copy."""
    n = x.ndim - 3
    y = torch.bmm(x.flatten(0, n), weight.flatten(0, n))
    return y.view(*x.shape[:-1], weight.shape[-1])


class StackedLayerNorm(nn.Module):
    """Layer normalisation over the features of x (*stack, B, size), with a gain and a shift for each network."""

    def __init__(self, stack: Sequence[int], size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(*stack, 1, size))
        self.bias = nn.Parameter(torch.zeros(*stack, 1, size))

    def forward(self, x: Tensor) -> Tensor:
        """x (*stack, B, size) -> the same shape."""
        return torch.addcmul(self.bias, torch.nn.functional.layer_norm(x, x.shape[-1:]), self.weight)


# --- Mish -----------------------------------------------------------------------------------------------------------


def mish(x: Tensor) -> Tensor:
    """mish(x) = x tanh(softplus(x)) (Misra 2019, arXiv 1908.08681), elementwise, any shape.

    With e = exp(x) and n = e (e + 2), tanh(log(1 + e)) = n / (n + 2): one exponential instead of ATen's three
    transcendental functions. x is clamped at 20 in the exponential, where the ratio is 1 in float64 too. ATen's one
    kernel is used where starting several costs more than the functions: eagerly on a GPU, or on few numbers; and under
    the transforms of torch.func (jvp, vmap), which allow neither operations in place nor `_Mish`.
    """
    eager = not torch.compiler.is_compiling()
    if eager and (x.device.type != "cpu" or x.numel() < _FEW or torch._C._are_functorch_transforms_active()):
        return torch.nn.functional.mish(x)
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _Mish.apply(x)  # type: ignore[no-untyped-call]
        return result
    e = x.clamp(max=20.0).exp_()
    if torch.compiler.is_compiling():
        n = e * (e + 2.0)
        return x * (n / (n + 2.0))
    # In place, as everything eager here: a new tensor costs more than the arithmetic on it.
    n = e.add(2.0).mul_(e)
    return n.div_(torch.add(n, 2.0, out=e)).mul_(x)


class _Mish(torch.autograd.Function):
    """Mish with a backward pass that needs one saved tensor, n / m + 4 x e (e + 1) / m^2, with m = n + 2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        e = x.clamp(max=20.0).exp_()
        if torch.compiler.is_compiling():
            n = e * (e + 2.0)
            m = n + 2.0
            value, derivative = x * (n / m), n / m + 4.0 * x * ((n - e) / m / m)
            # The compiler would rather keep x and take the exponential again in the backward pass, which costs a CPU
            # more than reading the derivative. What it concatenates it keeps.
            if x.device.type == "cpu":
                value, derivative = torch.stack([value, derivative]).unbind()
        else:
            n = e.add(2.0).mul_(e)
            m = n.add(2.0)
            slope = torch.sub(n, e, out=e).div_(m).div_(m)
            gate = n.div_(m)
            derivative = torch.addcmul(gate, x, slope, value=4.0, out=m)
            value = gate.mul_(x)
        ctx.save_for_backward(derivative)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (derivative,) = ctx.saved_tensors
        return grad * derivative  # type: ignore[no-any-return]


# --- Networks -------------------------------------------------------------------------------------------------------


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
