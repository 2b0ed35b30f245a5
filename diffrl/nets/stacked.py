"""Linear layers with one weight a seed: S networks of one shape are trained as one."""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

_NARROW = 16
_FEW_PRODUCTS = 8
_MANY_ROWS = 32


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
    """Draw the weights of all stacked linear layers in `module` (on the CPU) again, from U(-b, b); biases 0.

    b = sqrt(6 / (in + out)), a variance of one over the average of the fans (Glorot & Bengio 2010): as networks
    written in flax often start, `variance_scaling(1, "fan_avg", "uniform")`. generators: one a seed, on the CPU.
    """
    for layer in module.modules():
        if isinstance(layer, StackedLinear):
            i, o = layer.weight.shape[-2:]
            layer.weight.copy_(math.sqrt(6 / (i + o)) * _uniform((*layer.stack[1:], i, o), generators))
            layer.bias.zero_()


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W + b for a stack: x (*stack, B, in), weight (*stack, in, out), bias (*stack, 1 or B, out)
    -> (*stack, B, out).

    The products are the same however they are taken; what differs is their speed. On a CPU a product with 2 to 15
    columns takes two to three times as long as one with 16 (and a compiler fuses the bias into what follows).
    """
    out = weight.shape[-1]
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


def frozen(module: nn.Module) -> nn.Module:
    """The same network with the same weights in the same memory, without gradients for them.

    For losses that run through a network they do not train: the compiler computes the gradient of every tensor that
    requires one, used or not.
    """
    twin = deepcopy(module).requires_grad_(False)
    for ours, theirs in zip(twin.parameters(), module.parameters(), strict=True):
        ours.data = theirs.data
    return twin


@torch.no_grad()
def copy_state_(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy each tensor of `state` into that of its name in `own`. Raises ValueError where names or shapes differ."""
    if own.keys() != state.keys():
        raise ValueError(f"names differ: {sorted(own.keys() ^ state.keys())[:3]} ...")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise ValueError(f"{name} has shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}")
        tensor.copy_(state[name])


class StackedLayerNorm(nn.Module):
    """Layer normalisation over the features of x (*stack, B, size), with a gain and a shift for each network."""

    def __init__(self, stack: Sequence[int], size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(*stack, 1, size))
        self.bias = nn.Parameter(torch.zeros(*stack, 1, size))

    def forward(self, x: Tensor) -> Tensor:
        """x (*stack, B, size) -> the same shape."""
        return torch.addcmul(self.bias, torch.nn.functional.layer_norm(x, x.shape[-1:]), self.weight)
