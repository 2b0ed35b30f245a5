"""Guidance: a denoiser bent towards a condition, by a classifier, an energy or a Q function, or by the network itself.

Since score = -(x - a D)/s^2 (Tweedie), adding a gradient to the score adds s^2/a times it to the denoiser:

    classifier guidance         D' = D + scale (s^2/a) grad_x log p(y | x_t)    (Dhariwal & Nichol 2021, 2105.05233)
    classifier-free guidance    D' = D_u + scale (D_c - D_u)                    (Ho & Salimans 2022, 2207.12598)

with D_u the unconditional and D_c the conditional denoiser of one network, whose condition was dropped now and then
in training (`drop_condition`). At scale 1 both are the denoiser of p(x | y); elsewhere neither samples
p(x) p(y | x)^scale, whose noised density has another score.

What comes out is a `Denoise`, as any other: every solver, eta, clip and loss takes it.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from diffrl.diffusion.prediction import Denoise, Network
from diffrl.diffusion.process import PURE_NOISE, Process, expand, unknown

LogProb = Callable[[Tensor, Tensor], Tensor]
"""log p(y | x) or any other function to climb: (x, t) -> one value a row, or several that are added; rows apart."""
ConditionalNetwork = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A `Network`, or a `Denoise`, that takes a condition too: (x, t, condition) -> of x's shape."""
Where = Literal["x_t", "x0"]


def classifier_guided(
    process: Process,
    denoise: Denoise,
    log_prob: LogProb,
    scale: float | Tensor = 1.0,
    *,
    at: Where = "x_t",
    steps: int = 1,
) -> Denoise:
    """D'(x, t) = D + scale (s^2/a) grad_x log p(y | x_t = x): the denoiser of p(x | y), where scale = 1.

    log_prob: differentiable, see `LogProb`. Of an energy pass its negative. A normalising constant does not matter.
        It sees the very x and t that D does: t a scalar or one value a row.
    scale: a number, or a tensor () or one value a row.
    at: "x_t", what noisy samples look like to a classifier trained on them; or "x0": log_prob sees (D(x, t), t) and the
        gradient runs back through the denoiser, for a classifier or a Q function that knows clean data alone (DPS,
        Chung et al. 2022, 2209.14687; universal guidance, Bansal et al. 2023, 2302.07121). By Tweedie's second
        formula that moves D by scale Cov[x_0 | x_t] grad log_prob(D). Where a denoiser clamps its answer it passes no
        gradient: clamp in the sampler, or behind the guidance, instead.
    steps: of gradient ascent, at "x_t" alone: D_0 = D, x_0 = x, D_{j+1} = D_j + scale (s^2/a) grad log_prob(x_j), where
        x_j = x + a (D_j - D) has the clean part D_j and the noise of x; the answer is the last D_j.

    Works under no_grad, where the answer carries no graph; with gradients enabled it is differentiable (twice through
    log_prob) in x and in whatever `denoise` and `log_prob` hold: so sample under no_grad unless that is wanted.
    At s = 0, D' = D. At a = 0, or a ratio k above 1e6, x_t says nothing of x_0, the gradient is 0 and its weight
    infinite: D' = D there too, so that a first step from pure noise goes unguided (start at a finite k to guide it).
    Raises ValueError for an unknown `at`, steps that are not at least 1, or more than 1 at "x0", or a log_prob that
    does not depend on x.
    """
    if at not in get_args(Where):
        raise unknown("place of guidance", at, get_args(Where))
    if steps < 1 or (at == "x0" and steps > 1):
        raise ValueError(f"steps of guidance must be at least 1, and at 'x0' 1, got {steps} at {at!r}")

    def ascent(value: Tensor, point: Tensor, differentiable: bool) -> Tensor:
        """The gradient at `point` of the values there."""
        if not value.requires_grad:
            raise ValueError("log_prob must be a differentiable function of x; its answer carries no gradient")
        gradient: Tensor
        (gradient,) = torch.autograd.grad(value.sum(), point, create_graph=differentiable)
        return gradient

    def guided(x: Tensor, t: Tensor) -> Tensor:
        differentiable = torch.is_grad_enabled()
        time = expand(t, x)
        factor = expand(scale, x) if isinstance(scale, Tensor) else scale
        with torch.enable_grad():
            point = x if differentiable and x.requires_grad else x.detach().requires_grad_()
            if at == "x0":
                D = denoise(point, t)
                gradient = ascent(log_prob(D, t), point, differentiable)
            else:
                gradient = ascent(log_prob(point, t), point, differentiable)
                for _ in range(steps - 1):
                    moved = point + factor * process.sigma(time) ** 2 * gradient
                    moved = moved if differentiable else moved.detach().requires_grad_()
                    gradient = gradient + ascent(log_prob(moved, t), moved, differentiable)
        if at == "x_t":
            D = denoise(x, t)
        elif not differentiable:
            D = D.detach()
        return D + factor * _weight(process, time) * gradient.to(D.dtype)

    return guided


def _weight(process: Process, t: Tensor) -> Tensor:
    """s^2/a, and 0 in pure noise; without a look at a value, and without infinities in the gradient."""
    a, s = process.alpha(t), process.sigma(t)
    noise = process.ratio(t) >= PURE_NOISE
    return torch.where(noise, 0.0, s**2 / torch.where(noise, 1.0, a))


def drop_condition(
    condition: Tensor,
    null: Tensor,
    rate: float,
    generator: torch.Generator | None = None,
    *,
    noise: Tensor | None = None,
    event_dims: int = 1,
) -> Tensor:
    """`condition` with each row replaced by `null` with probability `rate`, rows apart: of condition's shape.

    For the training of what `classifier_free` samples (arXiv 2207.12598, algorithm 1; rate 0.1 to 0.2 there).

    condition: (..., C), rows along all but the last `event_dims` dimensions; 0 for one label a row.
    null: broadcasts against `condition`: what stands for "no condition", a fixed or a learned vector, a further label.
    generator, noise: one of them: numbers uniform on [0, 1), one a row, condition.shape[:-event_dims], drawn in one
        call on the condition's device. Rows below `rate` are dropped.

    Raises ValueError for a rate outside [0, 1], a null that does not fit, noise that is missing or of a wrong shape.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"the rate at which conditions are dropped must lie in [0, 1], got {rate}")
    if not 0 <= event_dims <= condition.ndim:
        raise ValueError(f"event_dims = {event_dims} of a condition with {condition.ndim} dimensions")
    null = _null_like(null, condition)
    rows = condition.shape[: condition.ndim - event_dims]
    if noise is None:
        if generator is None:
            raise ValueError("dropping conditions is random: pass a generator, or uniform noise, one number a row")
        noise = torch.rand(rows, generator=generator, device=condition.device)
    elif noise.shape != rows:
        raise ValueError(f"noise must have one number a row, shape {tuple(rows)}, got {tuple(noise.shape)}")
    return torch.where(expand(noise < rate, condition), null, condition)


def classifier_free(
    network: ConditionalNetwork,
    condition: Tensor,
    null: Tensor,
    scale: float | Tensor,
    *,
    event_dims: int = 1,
) -> Network:
    """m_u + scale (m_c - m_u), both in one call of the network: the guided network, its condition bound.

    network: (x, t, condition) -> m, trained with `drop_condition` and the same `null`: a raw network, to be made a
        denoiser by `Prediction.denoiser`, or a denoiser itself. D is affine in m, so the two are the same but for a
        clip, which is thus applied once, behind the guidance, or to each branch.
    condition: one entry a row of x, along the same leading dimensions as x: beside x (S, B, d) it is (S, B, C), or
        (S, B) labels. null: broadcasts against it.
    scale: 0 and 1 as numbers are exactly the unconditional and the conditional network, and cost one branch. So are
        entries of a tensor, () or one value a row, but both branches are computed.
    event_dims: how many of the last dimensions of x are one sample. The branches, the unconditional first, are
        concatenated along the axis before these: x (S, B, d) becomes (S, 2 B, d), x (B, *image) with its event_dims
        (2 B, *image); a t of one value a row, and the condition, along that same axis, counted from the left.

    Raises ValueError for a null or a condition that does not fit; the latter when called.
    """
    null = _null_like(null, condition)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        axis = x.ndim - event_dims - 1
        if axis < 0 or condition.ndim <= axis or condition.shape[axis] != x.shape[axis]:
            raise ValueError(
                f"a condition of shape {tuple(condition.shape)} beside x of shape {tuple(x.shape)} with event_dims = "
                f"{event_dims}: both need a batch axis, axis {axis}, of one length"
            )
        if not isinstance(scale, Tensor) and scale in (0, 1):
            return network(x, t, condition if scale == 1 else null)
        t_twice = torch.cat([t, t], axis) if t.ndim > axis and t.shape[axis] > 1 else t
        m = network(torch.cat([x, x], axis), t_twice, torch.cat([null, condition], axis))
        m_u, m_c = m.chunk(2, axis)
        # lerp, unlike the formula spelt out, gives m_c itself at 1.
        return torch.lerp(m_u, m_c, expand(scale, x).to(m.dtype)) if isinstance(scale, Tensor) else m_u.lerp(m_c, scale)

    return guided


def _null_like(null: Tensor, condition: Tensor) -> Tensor:
    """`null` expanded to the shape of `condition`, in its dtype."""
    try:
        return null.to(condition.dtype).expand_as(condition)
    except RuntimeError:
        raise ValueError(
            f"null of shape {tuple(null.shape)} does not broadcast to the condition's {tuple(condition.shape)}"
        ) from None
