"""Rectified flow straightened, and distilled into one step: reflow and InstaFlow.

A rectified flow (Liu et al. 2023, arXiv 2209.03003) trained on a coupling of data x_0 and noise x_1 has the velocity
E[x_1 - x_0 | x_t] on the lines x_t = (1 - t) x_0 + t x_1 (the paper's time runs the other way). Its own paths couple
noise with data anew; trained on these pairs, the next flow is straighter, and a straight one is exact in one Euler
step. There is no loss of its own for that: it is `denoising_loss`, the noise being the one that x_0 is paired with.

    velocity = Prediction("velocity", RectifiedFlow())
    denoise = velocity.denoiser(network)                    # 1-RF, trained on data and independent noise
    for _ in range(k - 1):                                  # k-rectified flow
        x_0, x_1 = couple(RectifiedFlow(), denoise, noise, times)
        ...                                                 # train on rows of the pairs, from the last flow's weights:
        loss = denoising_loss(velocity, network, x_0[i], uniform_times(shape, generator), noise=x_1[i])
    ...                                                     # InstaFlow: k = 2, then distil
    loss = distillation_loss(denoise, x_0[i], x_1[i])

Conditions are bound to the rows of the noise before `couple`, as before sampling.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffrl.diffusion.consistency import Metric, row_distance
from diffrl.diffusion.prediction import Denoise
from diffrl.diffusion.process import Process, expand
from diffrl.diffusion.sampler import Sampler


@torch.no_grad()
def couple(
    process: Process,
    denoise: Denoise,
    noise: Tensor,
    times: Tensor,
    solver: str = "ddim",
    *,
    chunk: int | None = None,
    event_dims: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """The pairs (x_0, x_1) of a flow: x_1 = `noise`, x_0 the ODE's end from it, both of noise's shape.

    process, denoise: the flow that couples, a rectified flow or any diffusion (as InstaFlow starts from one).
    noise: standard normal, (S, B, d), or (B, *image) with `event_dims` to match. The path starts at sigma x_1 at
        times[0], which is x_1 itself on `RectifiedFlow` at t = 1; elsewhere choose times[0] with next to no signal.
    times, solver: see `Sampler`.
    chunk: so many rows at a time along the batch axis, the one before the event, so that the network's memory is
        bounded; None: all at once. A `denoise` whose conditions are bound to all rows cannot be called on some: call
        `couple` once for each set of conditions instead.
    on_progress: called with (rows done, rows in all) after each chunk.

    Raises ValueError as `Sampler` does, for noise without a batch axis, and for chunk < 1.
    """
    axis = noise.ndim - event_dims - 1
    if axis < 0:
        raise ValueError(f"noise of shape {tuple(noise.shape)} has no batch axis before event_dims = {event_dims}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"a chunk needs at least one row, got chunk = {chunk}")
    sampler = Sampler(process, times, solver)
    start = float(process.sigma(times[0]))
    rows = noise.shape[axis]
    done, parts = 0, []
    for part in torch.split(noise, chunk or max(rows, 1), axis):
        parts.append(sampler(denoise, start * part))
        done += part.shape[axis]
        if on_progress is not None:
            on_progress(done, rows)
    return torch.cat(parts, axis), noise


def half_from(start: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
    """Times t (..., B), every other one of which is `start` instead, a scalar: half of a batch begins there.

    Of an odd number the first, too, is `start` or not by lot, so that each time is with probability 1/2.
    """
    B = t.shape[-1]
    place = torch.arange(B, device=t.device)
    if B % 2:
        place = place + torch.randint(2, (1,), generator=generator, device=generator.device).to(t.device)
    return torch.where(place % 2 == 0, t, start.to(t))


def distillation_loss(
    denoise: Denoise, x_0: Tensor, x_1: Tensor, metric: str | Metric = "l2", *, event_dims: int = 1
) -> Tensor:
    """d(x_1 - v(x_1, 1), x_0): one Euler step of the student against the pair's end, shape x_0.shape[:-event_dims].

    InstaFlow (Liu et al. 2024, arXiv 2309.06380, eq. 6). denoise: the student, a `RectifiedFlow` denoiser, whose answer
    at t = 1 is that step. x_0, x_1: pairs of `couple`, (S, B, d), or (B, *image) with `event_dims` to match.
    metric: "l2", the mean square over the event; "huber", the pseudo-Huber distance; or a function of (step, x_0) that
    gives one distance a row (the paper's is LPIPS). Raises ValueError for an unknown metric, or shapes that differ.
    """
    _check_pairs(x_0, x_1)
    return row_distance(denoise(x_1, x_1.new_ones(())), x_0, metric, event_dims)


def straightness(denoise: Denoise, x_0: Tensor, x_1: Tensor, times: Tensor, *, event_dims: int = 1) -> Tensor:
    """The integral of |(x_1 - x_0) - v(x_t, t)|^2 dt along the lines x_t = (1 - t) x_0 + t x_1, summed over the event.

    Its mean over the rows is V of the coupling (arXiv 2209.03003, section 3.3) where v is the coupling's own rectified
    flow, and the flow matching loss (a sum, not a mean, over the event) anyway. It is 0 where no two lines cross, so
    that v is constant along each; for a Gaussian coupled with independent noise it is pi/2 times the sum of its
    standard deviations.

    denoise: a `RectifiedFlow` denoiser; (x_1 - x_0) - v = (D - x_0)/t. x_0, x_1: (S, B, d), or (B, *image) with
    `event_dims` to match. times: (T + 1,), decreasing, from 1 to 0 for the whole: the integral is taken by the midpoint
    rule on its intervals, which never asks for the end. Returns one value a row, x_0.shape[:-event_dims]. Call
    under no_grad. Raises ValueError for pairs or times of a wrong shape.
    """
    _check_pairs(x_0, x_1)
    _check_times(times)
    total = x_0.new_zeros(x_0.shape[: x_0.ndim - event_dims])
    for t, dt in zip(((times[:-1] + times[1:]) / 2).unbind(), (times[:-1] - times[1:]).unbind(), strict=True):
        error = (denoise((1 - t) * x_0 + t * x_1, t) - x_0) / t
        total = total + dt * _square(error, event_dims)
    return total


def curvature(chain: Tensor, times: Tensor, *, event_dims: int = 1) -> Tensor:
    """How far sampled paths are from straight: the integral of |(x_1 - x_0) - dx/dt|^2 dt, summed over the event.

    S(Z) of arXiv 2209.03003, section 2.2, of the path that runs through the states in straight pieces: 0 for a straight
    line at constant speed, (2 - pi/2) times the sum of the standard deviations for the exact rectified flow of a
    Gaussian.

    chain: (T + 1, *x.shape), as `sample(..., return_chain=True)` gives it on `RectifiedFlow`; times: its (T + 1,)
    times. Where they run from t to r other than 1 and 0, x_1 - x_0 is the chord (x_t - x_r)/(t - r). Returns one value
    a row, x.shape[:-event_dims]. Raises ValueError for shapes that do not agree.
    """
    _check_times(times)
    if chain.shape[:1] != times.shape:
        raise ValueError(f"a chain of {len(chain)} states beside {len(times)} times; each state needs its time")
    chord = (chain[0] - chain[-1]) / (times[0] - times[-1])
    dt = expand(times[:-1] - times[1:], chain[1:])
    velocities = (chain[:-1] - chain[1:]) / dt
    return _square((chord - velocities) * dt.sqrt(), event_dims).sum(0)


def _square(x: Tensor, event_dims: int) -> Tensor:
    """|x|^2 over the last `event_dims` dimensions."""
    return (x**2).flatten(-event_dims).sum(-1) if event_dims > 0 else x**2


def _check_pairs(x_0: Tensor, x_1: Tensor) -> None:
    if x_0.shape != x_1.shape:
        raise ValueError(f"x_0 of shape {tuple(x_0.shape)} beside x_1 of shape {tuple(x_1.shape)}: pairs must agree")


def _check_times(times: Tensor) -> None:
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"times must be a vector of T + 1 >= 2 decreasing values, got shape {tuple(times.shape)}")
