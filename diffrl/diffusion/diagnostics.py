"""The theory's questions, asked of any denoiser: is it well trained, is it well sampled, how likely are data under it?

Everything acts on D(x, t) = E[x_0 | x_t = x]. Squared errors are sums over the last dimension, and come in the unit of

    x0     |D_1 - D_2|^2
    eps    |e_1 - e_2|^2 = |D_1 - D_2|^2 / k^2                 e = (x - a D) / s,  k = s/a
    score  |s_1 - s_2|^2 = a^2 |D_1 - D_2|^2 / s^4             score = -(x - a D) / s^2   (Tweedie)

In y = x/a every process is the variance-exploding one and log k its clock; so the two integrals have no schedule:

    KL(p_1 || p_2) = int E_{p_1} |e_1 - e_2|^2 d log k         of the two reverse SDEs (Girsanov)
    log p(y_min)   = log p(y_max) + int div(y - D) d log k     along the probability-flow ODE, dy / d log k = y - D

(Song et al. 2021, arXiv 2101.09258, theorem 1; Song et al. 2021, arXiv 2011.13456, eq. 39.) Images are flattened by
the caller: x is (..., d) throughout, times are scalars or vectors of them.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from diffrl.diffusion.exact import Gaussian
from diffrl.diffusion.prediction import Clip, Denoise
from diffrl.diffusion.process import Process, expand, unknown
from diffrl.diffusion.sampler import sample

Unit = Literal["x0", "eps", "score"]
Distance = Callable[[Tensor, Tensor], Tensor]
"""A distance between two samples, such as `sliced_w2` with its generator bound."""


class Estimate(NamedTuple):
    """Means and their standard errors, of one shape."""

    mean: Tensor
    error: Tensor


def estimate(values: Tensor) -> Estimate:
    """Mean and standard error over the last axis of values (..., B), B >= 2 independent rows."""
    if values.shape[-1] < 2:
        raise ValueError(f"a standard error needs at least two values, got shape {tuple(values.shape)}")
    return Estimate(values.mean(-1), values.std(-1) / math.sqrt(values.shape[-1]))


# --- training: what the denoiser gets wrong ------------------------------------------------------------------------


@torch.no_grad()
def denoising_losses(
    process: Process, denoise: Denoise, x0: Tensor, times: Tensor, noise: Tensor, unit: Unit = "eps"
) -> Tensor:
    """|D(x_t, t) - x_0|^2 in `unit`, at each of the `times` (L,): (L, ...) for x0 and noise (..., d).

    One noise for all times, and for all the models that are compared: what differs is then the models. A model that
    knows nothing of the noise, D = x/a, has d in eps; the best possible has the floor, E tr Var(x_0 | x_t).
    """
    return _squared_errors(process, denoise, lambda x, t: x0, x0, times, noise, unit)


@torch.no_grad()
def score_errors(
    process: Process,
    denoise: Denoise,
    reference: Denoise,
    x0: Tensor,
    times: Tensor,
    noise: Tensor,
    unit: Unit = "score",
) -> Tensor:
    """|D - D_reference|^2 at x_t in `unit`, at each of the `times` (L,): (L, ...) for x0 and noise (..., d).

    Against the exact denoiser its mean is the score error, which is also the loss less the floor (but with less noise).
    Between two models trained alike, apart from their seeds, half of it is what either owes to its seed; the error they
    share is not in it.
    """
    return _squared_errors(process, denoise, reference, x0, times, noise, unit)


def _squared_errors(
    process: Process, denoise: Denoise, other: Denoise, x0: Tensor, times: Tensor, noise: Tensor, unit: Unit
) -> Tensor:
    errors = []
    for t in times:
        x = process.perturb(x0, t, noise)
        errors.append((_scale(process, t, unit) * (denoise(x, t) - other(x, t))).square().sum(-1))
    return torch.stack(errors)


def _scale(process: Process, t: Tensor, unit: Unit) -> Tensor:
    """What an error of D is multiplied by in `unit`: of t's shape."""
    a, s = process.alpha(t), process.sigma(t)
    match unit:
        case "x0":
            return torch.ones_like(t)
        case "eps":
            return a / s
        case "score":
            return a / s**2
    raise unknown("unit", unit, get_args(Unit))


def gaussian_floor(process: Process, data: Gaussian, times: Tensor, unit: Unit = "eps") -> Tensor:
    """The smallest loss on Gaussian data, sum_i s^2 std_i^2 / (a^2 std_i^2 + s^2) on |D - x_0|^2, in `unit`: (L,)."""
    a, s = process.alpha(times), process.sigma(times)
    variance = (s[:, None] * data.std) ** 2 / ((a[:, None] * data.std) ** 2 + s[:, None] ** 2)
    return _scale(process, times, unit) ** 2 * variance.sum(-1)


def learning_dynamics(
    process: Process,
    denoisers: Iterable[Denoise],
    x0: Tensor,
    times: Tensor,
    noise: Tensor,
    unit: Unit = "eps",
) -> Tensor:
    """`denoising_losses` of several models, such as a run's checkpoints, stacked for `estimate`: (M, L, ...).

    The denoisers may be made as they are asked for. All see the same noise, so that the error of the *difference* of
    two models, `estimate(losses[1] - losses[0])`, is far below that of either.
    """
    return torch.stack([denoising_losses(process, denoise, x0, times, noise, unit) for denoise in denoisers])


def generalisation_gap(train: Tensor, held_out: Tensor) -> Estimate:
    """The mean of `held_out` (..., B') less that of `train` (..., B), and its standard error: (...).

    train: losses of rows that the model was trained on. held_out: losses of rows of the same origin that it was not
    trained on. Rows count as independent.
    """
    seen, new = estimate(train), estimate(held_out)
    return Estimate(new.mean - seen.mean, torch.hypot(new.error, seen.error))


def on_process(denoise: Denoise, own: Process, other: Process) -> Denoise:
    """A denoiser of the process `own` as one of the process `other`: D'(x', t') = D(x, t) at the same k and x/a."""

    def carried(x: Tensor, t: Tensor) -> Tensor:
        r = own.time(other.ratio(t))
        return denoise(x * expand(own.alpha(r) / other.alpha(t), x), r)

    return carried


def girsanov_kl(process: Process, errors: Tensor, times: Tensor) -> Tensor:
    """int errors d log k by the trapezoid: (...) nats for errors (L, ...) in eps at the `times` (L,), in order.

    With the `score_errors(..., unit="eps")` of D_1 and D_2 at x_0 ~ p_1 it is the KL of the two reverse SDEs over these
    times. For exact denoisers that is KL(p_1 || p_2) at the smallest noise less that at the largest; for trained ones
    an upper bound on the KL of their samples, up to the start's.
    """
    if len(times) < 2 or len(errors) != len(times):
        raise ValueError(f"need errors at two times or more, got {len(errors)} errors at {len(times)} times")
    log_k = process.ratio(times).log().to(errors.device, errors.dtype)
    return torch.trapezoid(errors, log_k, dim=0) * (log_k[-1] - log_k[0]).sign()


# --- distances between samples -------------------------------------------------------------------------------------


def w2(x: Tensor, y: Tensor) -> Tensor:
    """The Wasserstein-2 distance of samples on the line, (..., n) and (..., m): (...). Exact, also where n != m.

    Raises ValueError where the shapes do not fit, or a sample is empty.
    """
    if not x.ndim or not y.ndim or x.shape[:-1] != y.shape[:-1] or not x.shape[-1] or not y.shape[-1]:
        raise ValueError(
            f"need samples (..., n) and (..., m), n and m at least 1, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    n, m = x.shape[-1], y.shape[-1]
    x, y = x.sort(-1).values, y.sort(-1).values
    if n == m:
        return (x - y).square().mean(-1).sqrt()
    # Both quantile functions are constant between the multiples of 1/n and 1/m; all are counted in units of 1/(n m).
    ends = torch.cat([m * torch.arange(1, n + 1), n * torch.arange(1, m + 1)]).sort().values.to(x.device)
    share = ends.diff(prepend=ends.new_zeros(1)).to(x.dtype) / (n * m)
    squares: Tensor = (x[..., (ends - 1) // m] - y[..., (ends - 1) // n]).square()
    return (squares * share).sum(-1).sqrt()


def sliced_w2(x: Tensor, y: Tensor, n_projections: int, generator: torch.Generator) -> Tensor:
    """The sliced Wasserstein-2 distance of samples x (..., n, d) and y (..., m, d): (...), leading dimensions alike.

    The root of the mean of W2^2 over `n_projections` random directions, the same for all pairs; each by sorting, exact
    for unequal sizes too. A shift by v measures |v|/sqrt(d). In one dimension it is W2 itself and draws nothing.
    Raises ValueError where the shapes do not fit.
    """
    if x.ndim < 2 or y.shape[:-2] != x.shape[:-2] or y.shape[-1] != x.shape[-1]:
        raise ValueError(f"need samples (..., n, d) and (..., m, d), got {tuple(x.shape)} and {tuple(y.shape)}")
    d = x.shape[-1]
    if d == 1:
        return w2(x[..., 0], y[..., 0])
    if n_projections < 1:
        raise ValueError(f"need at least one projection, got {n_projections}")
    directions = torch.randn(d, n_projections, generator=generator, device=generator.device, dtype=x.dtype)
    directions = (directions / directions.norm(dim=0)).to(x.device)
    return w2((x @ directions).mT, (y @ directions).mT).square().mean(-1).sqrt()


def gaussian_w2(p: Gaussian, q: Gaussian) -> Tensor:
    """W2 of two Gaussians, sqrt(|m_p - m_q|^2 + |std_p - std_q|^2): ()."""
    return ((p.mean - q.mean).square().sum() + (p.std - q.std).square().sum()).sqrt()


def gaussian_kl(p: Gaussian, q: Gaussian) -> Tensor:
    """KL(p || q) in nats: ()."""
    ratio = (p.std / q.std) ** 2
    return 0.5 * (ratio - 1 - ratio.log() + ((p.mean - q.mean) / q.std) ** 2).sum()


# --- sampling: steps, and where they start -------------------------------------------------------------------------


@torch.no_grad()
def discretisation_error(
    process: Process,
    denoise: Denoise,
    x: Tensor,
    reference: Tensor,
    times: Tensor,
    distance: Distance,
    solver: str = "ddim",
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    *,
    clip: Clip | None = None,
) -> Tensor:
    """The distance to `reference` of what a solver makes of `x` (..., n, d) on the grid `times`; see `sample`.

    With a deterministic solver and a reference that a fine grid, or the exact flow, made of the same x, the sample is
    the truth's but for the solver: no sampling noise, so errors far below `sampling_floor` can be told apart. With
    noise (eta > 0), or another x, they cannot. The same sampler with the exact denoiser tells this error from the
    score's.
    """
    return distance(sample(process, denoise, x, times, solver, eta, generator, clip=clip), reference)


def discretisation_complexity(
    error: Callable[[int], float], delta: float, candidates: Sequence[int] = range(1, 1025)
) -> int | None:
    """The smallest N among the increasing `candidates` with error(N) <= delta; None if there is none.

    The error is taken to fall with N: the search doubles, then bisects, so that few and mostly small N are tried. For a
    solver of order p, N grows as delta^(-1/p).
    """
    low, high = 0, 1
    while error(candidates[high - 1]) > delta:
        if high == len(candidates):
            return None
        low, high = high, min(2 * high, len(candidates))
    return candidates[bisect_left(candidates, True, low, high - 1, key=lambda n: error(n) <= delta)]


def sampling_floor(draw: Callable[[], Tensor], distance: Distance, repeats: int = 4) -> Tensor:
    """The mean distance between two samples of one distribution, independent draws: what no comparison can go below."""
    return torch.stack([distance(draw(), draw()) for _ in range(repeats)]).mean(0)


class StartError(NamedTuple):
    """What it costs to start from N(0, s^2) instead of the true x_T, (): exact for Gaussian data and an exact score."""

    kl: Tensor
    """KL(p_T || N(0, s^2)) in nats; the KL of the results is no larger."""
    w2_start: Tensor
    """W2 between the two starts."""
    w2_data: Tensor
    """W2 between the data and what the exact probability-flow ODE makes of the wrong start."""


def start_error(process: Process, data: Gaussian, t: Tensor) -> StartError:
    """The error of the start N(0, s^2) at the scalar time t, in closed form. The ODE is affine: W2 is that of moments.

    Of other data, `moments` gives a Gaussian to ask about (see `start_kl_bounds` for what its KL then is), and
    `from_both_starts` runs the sampler.
    """
    s = process.sigma(t)
    mean, std = data.marginal(process, t)
    true, wrong = Gaussian(mean, std), Gaussian(torch.zeros_like(mean), s.expand_as(mean))
    carried = Gaussian(data.mean - data.std / std * mean, data.std / std * s)
    return StartError(gaussian_kl(true, wrong), gaussian_w2(true, wrong), gaussian_w2(data, carried))


def moments(x0: Tensor) -> Gaussian:
    """The Gaussian with the mean and, dimension by dimension, the deviation of the data x0 (n, d)."""
    return Gaussian(x0.mean(0), x0.std(0, correction=0))


def start_kl_bounds(process: Process, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds, (), on KL(p_T || N(0, s^2)) for data x0 (n, d).

    Below: the KL of p_T's moments, from which it differs by p_T's distance to a diagonal Gaussian. Above, as KL is
    convex: the mean over x_0 of KL(N(a x_0, s^2) || N(0, s^2)) = a^2 |x_0|^2 / (2 s^2).
    """
    upper = 0.5 * x0.square().sum(-1).mean() / process.ratio(t) ** 2
    return start_error(process, moments(x0), t).kl, upper


@torch.no_grad()
def from_both_starts(
    process: Process,
    denoise: Denoise,
    x0: Tensor,
    noise: Tensor,
    times: Tensor,
    solver: str = "ddim",
    *,
    clip: Clip | None = None,
) -> tuple[Tensor, Tensor]:
    """What a deterministic solver makes of the true start a x_0 + s e, and of s e: each of the shape of x0, noise.

    Their root mean square difference bounds from above the W2 that the choice of the start costs.
    """
    right = process.perturb(x0, times[0], noise)
    wrong = process.sigma(times[0]) * noise
    return (
        sample(process, denoise, right, times, solver, clip=clip),
        sample(process, denoise, wrong, times, solver, clip=clip),
    )


# --- likelihood ----------------------------------------------------------------------------------------------------


def divergence(denoise: Denoise, x: Tensor, t: Tensor, probes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """D(x, t) and the trace of its Jacobian, (..., d) and (...), for x (..., d) whose rows do not depend on each other.

    Exact by one backward pass a dimension; with probes (P, ..., d), of mean 0 and covariance I, the mean over them of
    v^T (dD/dx) v (Hutchinson 1989): P passes, unbiased. See `rademacher`.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        D = denoise(x, t)
    directions = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device) if probes is None else probes
    trace = torch.zeros_like(x[..., 0])
    for v in directions if D.requires_grad else ():
        v = v.expand_as(D)
        (row,) = torch.autograd.grad(D, x, v, retain_graph=True, allow_unused=True)
        if row is not None:  # a constant that carries gradients of its own
            trace = trace + (row * v).sum(-1)
    return D.detach(), trace if probes is None else trace / len(probes)


def rademacher(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Signs, +1 or -1: the probes of least variance, and of none where the Jacobian is diagonal."""
    return torch.randint(2, tuple(shape), generator=generator, device=generator.device).to(dtype) * 2 - 1


def log_likelihood(
    process: Process,
    denoise: Denoise,
    x: Tensor,
    times: Tensor,
    *,
    prior: Gaussian | None = None,
    probes: Tensor | None = None,
) -> Tensor:
    """log p(x) in nats under the probability-flow ODE, (...) for x (..., d): instantaneous change of variables.

    p is the density at times[-1], noise included, of what the ODE makes of the start at times[0]: N(0, s^2), or
    `prior`, a Gaussian of clean data, noised. times: as for `sample`, all with 0 < k < inf; log k is integrated from
    the last to the first by the classical Runge-Kutta method: order 4, four calls of `denoise` a step, each with the
    passes of `divergence`, to which the `probes` belong (the same along the path, as in FFJORD). Raises ValueError for
    times that do not decrease or have k = 0 or infinity. Stochastic samplers are other models.
    """
    times = times.detach().to("cpu", torch.float64)
    ratios = process.ratio(times).flip(0).tolist()
    if times.ndim != 1 or len(ratios) < 2 or not all(k < r for k, r in pairwise(ratios)):
        raise ValueError("times must be a vector of T + 1 >= 2 values that decrease strictly, from noise to data")
    if not 0 < ratios[0] < ratios[-1] < 1e6:
        raise ValueError(f"need 0 < k < inf at all times, got k from {ratios[0]:g} to {ratios[-1]:g}: see Process.grid")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    d, a_end = x.shape[-1], float(process.alpha(times[-1]))

    def slope(y: Tensor, k: float) -> tuple[Tensor, Tensor]:
        """dy / d log k and its divergence in y."""
        t = process.time(torch.tensor(k, dtype=torch.float64))
        a = float(process.alpha(t))
        D, trace = divergence(denoise, a * y, y.new_full((), float(t)), probes)
        return y - D, d - a * trace

    y = x / a_end
    log_p = torch.full_like(x[..., 0], -d * math.log(a_end))  # of the density of x, from that of y = x/a
    for k, r in pairwise(ratios):
        h, middle = math.log(r / k), math.sqrt(k * r)
        y_1, div_1 = slope(y, k)
        y_2, div_2 = slope(y + h / 2 * y_1, middle)
        y_3, div_3 = slope(y + h / 2 * y_2, middle)
        y_4, div_4 = slope(y + h * y_3, r)
        y = y + h / 6 * (y_1 + 2 * y_2 + 2 * y_3 + y_4)
        log_p = log_p + h / 6 * (div_1 + 2 * div_2 + 2 * div_3 + div_4)
    mean, variance = (0.0, ratios[-1] ** 2) if prior is None else (prior.mean, prior.std**2 + ratios[-1] ** 2)
    variance = torch.as_tensor(variance, dtype=y.dtype, device=y.device)
    return log_p - 0.5 * ((y - mean) ** 2 / variance + torch.log(2 * math.pi * variance)).sum(-1)


def bits_per_dim(log_prob: Tensor, d: int) -> Tensor:
    """Nats as bits a dimension: -log p / (d log 2)."""
    return -log_prob / (d * math.log(2))
