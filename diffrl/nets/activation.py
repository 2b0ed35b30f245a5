"""Mish with one exponential."""

from typing import Any

import torch
from torch import Tensor


def mish(x: Tensor) -> Tensor:
    """mish(x) = x tanh(softplus(x)) (Misra 2019, arXiv 1908.08681), elementwise, any shape.

    With e = exp(x) and n = e (e + 2), tanh(log(1 + e)) = n / (n + 2): one exponential instead of ATen's three
    transcendental functions. x is clamped at 20 in the exponential, where the ratio is 1 in float64 too.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _Mish.apply(x)  # type: ignore[no-untyped-call]
        return result
    return x * _gate(x)[0]


def _gate(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """n / (n + 2), e and n + 2."""
    if torch.compiler.is_compiling():  # which fuses plain algebra, and has no use for writing in place
        e = x.clamp(max=20.0).exp()
        n = e * (e + 2.0)
        return n / (n + 2.0), e, n + 2.0
    e = x.clamp(max=20.0).exp_()
    n = e.add(2.0).mul_(e)
    m = n.add(2.0)
    return n.div_(m), e, m


class _Mish(torch.autograd.Function):
    """The backward pass needs one saved tensor, the derivative: with g the gate, g + x 4 e (e + 1) / (n + 2)^2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gate, e, m = _gate(x)
        if torch.compiler.is_compiling():
            value, derivative = x * gate, gate + 4.0 * x * ((e + 1.0) * e / m / m)
            # The compiler would rather keep x and take the exponential again in the backward pass, which costs more
            # than reading the derivative. What it concatenates it keeps.
            value, derivative = torch.stack([value, derivative]).unbind()
        else:
            slope = e.add(1.0).mul_(e).div_(m).div_(m)
            value, derivative = x * gate, torch.addcmul(gate, x, slope, value=4.0)
        ctx.save_for_backward(derivative)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (derivative,) = ctx.saved_tensors
        return grad * derivative  # type: ignore[no-any-return]
