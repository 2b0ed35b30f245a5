"""Mish with one exponential."""

from typing import Any

import torch
from torch import Tensor

_FEW = 4096


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
