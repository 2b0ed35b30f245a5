"""Inpainting: samples whose known entries are given, such as a plan's first and last state.

With x_t = a x_0 + s e, known entries v and the others u: at every call of the denoiser D its answer's known entries
are replaced by v, and x_T's known entries are made a v + s e, with the e that x_T holds there. D is constant there, so
every solver carries them along exactly:

    x_t = a v + s e,    eta = 0: one e for all t;    eta > 0, churn: e's own chain, with x_t of q(x_t | x_0 = v).

So x_t needs no replacement and no noise of its own, and eta = 0 stays deterministic. What the denoiser is shown at the
known entries is one of

    "noised"   x_t itself: for a model that was trained without known entries (RePaint, Lugmayr et al. 2022, 2201.09865,
               without its resampling). D_u = E[u_0 | u_t, a v + s e] knows v only through its noise, so that u depends
               on v too little: of two standard normal entries of correlation .8 and v = 1, u has the mean .35 (eta = 0)
               or .50 (eta = 1) instead of .8, and the deviation .82 or .73 instead of .6, however many the steps.
               `reconstruction_guided` mends it: .8 and .6.
    "clean"    v: for a model that was trained with v in the known entries of x_t and its loss on the others alone
               (Diffuser, Janner et al. 2022, 2205.09991). D_u = E[u_0 | u_t, v] is the conditional denoiser, and
               sampling is exact but for the solver.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from diffrl.diffusion.prediction import Denoise
from diffrl.diffusion.process import unknown

Shown = Literal["noised", "clean"]


@dataclass(frozen=True, eq=False)
class Known:
    """Entries of a sample that are given: `mask` is true, or 1, where `values` holds.

    Both broadcast against x, and are on its device. Values elsewhere mean nothing, but are finite. shown: what the
    denoiser sees at the known entries, see the top of this file. Raises ValueError for another `shown`.

    In training a model that is shown clean values, `insert` goes around the noised x and around its answer as x_0: then
    the known entries' loss is 0.
    """

    mask: Tensor
    values: Tensor
    shown: Shown = "noised"

    def __post_init__(self) -> None:
        if self.shown not in get_args(Shown):
            raise unknown("way of showing known entries", self.shown, get_args(Shown))

    def insert(self, x: Tensor) -> Tensor:
        """x with its known entries replaced by the values: of x's shape and dtype."""
        return torch.where(self.mask.bool(), self.values.to(x.dtype), x)

    def start(self, x: Tensor, a: float) -> Tensor:
        """x at a time of alpha = a, its known entries, noise s e alone so far, made a v + s e.

        Raises ValueError where mask or values do not broadcast against x.
        """
        for name, tensor in (("mask", self.mask), ("values", self.values)):
            sizes = zip(tensor.shape[::-1], x.shape[::-1], strict=False)
            if tensor.ndim > x.ndim or any(n not in (1, m) for n, m in sizes):
                raise ValueError(
                    f"the {name} of known entries has shape {tuple(tensor.shape)}, which does not broadcast to x's "
                    f"{tuple(x.shape)}"
                )
        return torch.where(self.mask.bool(), a * self.values.to(x.dtype) + x, x)

    def seen(self, x: Tensor) -> Tensor:
        """What the denoiser sees of the state x."""
        return self.insert(x) if self.shown == "clean" else x

    def denoiser(self, denoise: Denoise) -> Denoise:
        """`denoise`, shown what it is to see, with the known entries of its answer replaced by the values."""

        def inpainted(x: Tensor, t: Tensor) -> Tensor:
            return self.insert(denoise(self.seen(x), t))

        return inpainted


def reconstruction_guided(denoise: Denoise, known: Known, *, iterations: int = 1, event_dims: int = 1) -> Denoise:
    """D'(x, t) = D + J_k (J_kk)^-1 (v - D_k): the joint denoiser D corrected to that of p(x_0 | x_t, v).

    J = dD/dx, J_k its columns of known entries, J_kk their square. By Tweedie's second formula J is
    (a/s^2) Cov[x_0 | x_t], so this is the conditional mean of a Gaussian x_0 | x_t: exact where the data are Gaussian,
    an approximation elsewhere (reconstruction guidance, Ho et al. 2022, 2204.03458, with the exact covariance of Boys
    et al. 2023, 2310.06721).

    iterations: of conjugate gradients for (J_kk)^-1, rows apart; as many as J_kk has distinct eigenvalues are exact.
        The cost is one call of `denoise` and iterations + 1 of its backward pass.
    event_dims: the last dimensions of x that are one sample, over which inner products run.

    A trained network's J is symmetric to its own error only. In pure noise J = 0, and D' = D. The answer carries no
    graph. Use it with a `Known` that is shown "noised".
    """

    def guided(x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            D = denoise(point, t)
            k = known.mask.expand(x.shape).to(D.dtype)

            def product(v: Tensor) -> Tensor:
                """J^T v."""
                return torch.autograd.grad(D, point, v, retain_graph=True)[0].to(v.dtype)

            def inner(u: Tensor, v: Tensor) -> Tensor:
                return (u * v).flatten(-event_dims).sum(-1).reshape(x.shape[: x.ndim - event_dims] + (1,) * event_dims)

            rest = k * (known.values.to(D.dtype) - D.detach())
            weights, direction, size = torch.zeros_like(rest), rest, inner(rest, rest)
            for _ in range(iterations):
                image = k * product(direction)
                curvature = inner(direction, image)
                step = torch.where(curvature > 0, size / curvature.clamp_min(torch.finfo(D.dtype).tiny), 0.0)
                weights, rest = weights + step * direction, rest - step * image
                last, size = size, inner(rest, rest)
                direction = rest + torch.where(last > 0, size / last, 0.0) * direction
            return D.detach() + product(weights)

    return guided
