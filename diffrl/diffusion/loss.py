"""The one training loss, its weightings, and the distributions of its times.

Denoising score matching (Vincent 2011; Song et al. 2021, arXiv 2011.13456) and flow matching (Lipman et al. 2023,
arXiv 2210.02747) are one loss, w(t) |m_theta(x_t, t) - m|^2 with m = p x_0 + q e: they differ in what is predicted
(`Prediction`), in the weight, and in how the time is drawn. Since D - x_0 = c_out (m_theta - m), a weight on the error
of the denoiser, as papers state it, is w = c_out^2 times that weight on the error of m.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffrl.diffusion.prediction import Network, Prediction, of_shape
from diffrl.diffusion.process import Process, expand, unknown

Weighting = Callable[[Tensor], Tensor]
"""A weight on |D - x_0|^2 as a function of the noise-to-signal ratio k."""


def edm_weight(k: Tensor, data_std: float = 1.0) -> Tensor:
    """(k^2 + c_d^2) / (k c_d)^2 on |D - x_0|^2: weight 1 on EDM's F (Karras et al. 2022, arXiv 2206.00364, table 1)."""
    return (k**2 + data_std**2) / (k * data_std) ** 2


def min_snr_weight(k: Tensor, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma) on |D - x_0|^2, SNR = 1/k^2 (Hang et al. 2023, arXiv 2303.09556, section 3.4)."""
    return (k**-2).clamp_max(gamma)


def denoising_loss(
    prediction: Prediction,
    network: Network,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    weighting: str | Weighting = "uniform",
    event_dims: int = 1,
) -> Tensor:
    """w(t) |m_theta(x_t, t) - m|^2, the mean over the last `event_dims` dimensions: shape x0.shape[:-event_dims].

    x0, noise: (S, B, d), or (B, *image*) with `event_dims` to match, 0 for the squares themselves; t: a scalar or one
    value a row, t > 0. Batch and seeds are left to the caller: `denoising_loss(...).mean(-1)` is one loss a seed.
    `weighting` is "uniform" (w = 1 on the error of m: the simple loss of DDPM, flow matching), "edm", "min_snr", or a
    function of k that weighs |D - x_0|^2. Raises ValueError for an unknown weighting, or shapes that differ.
    """
    check_shapes(x0, noise, event_dims)
    x_t = prediction.process.perturb(x0, t, noise)
    m = of_shape(network(*prediction.inputs(x_t, t)), x0, "network")
    error = (m - prediction.target(x0, noise, t)) ** 2
    if weighting != "uniform":
        error = expand(_weight(prediction, t, weighting), error) * error
    return error.flatten(-event_dims).mean(-1) if event_dims > 0 else error


def check_shapes(x0: Tensor, noise: Tensor, event_dims: int, least: int = 0) -> None:
    """Raise ValueError unless x0 and noise agree in shape and event_dims is from `least` to their dimensions."""
    if noise.shape != x0.shape:
        raise ValueError(f"noise of shape {tuple(noise.shape)} beside x0 of shape {tuple(x0.shape)}; they must agree")
    if not least <= event_dims <= x0.ndim:
        raise ValueError(f"event_dims = {event_dims} of an x0 with {x0.ndim} dimensions")


def _weight(prediction: Prediction, t: Tensor, weighting: str | Weighting) -> Tensor:
    """The weight on |m_theta - m|^2, of t's shape, that stands for `weighting` on |D - x_0|^2."""
    k = prediction.process.ratio(t)
    _, c_out = prediction.preconditioning(t)
    if callable(weighting):
        return c_out**2 * weighting(k)
    match weighting:
        case "edm":
            return c_out**2 * edm_weight(k, prediction.data_std)
        case "min_snr":
            return c_out**2 * min_snr_weight(k)
    raise unknown("weighting", weighting, ("uniform", "edm", "min_snr"))


def grid_times(times: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Times drawn uniformly from a sampling grid (as `discrete_grid` gives it), without its last, the end.

    They have the dtype of `times` and are on its device, which must be the generator's.
    """
    return times[torch.randint(len(times) - 1, tuple(shape), generator=generator, device=times.device)]


def uniform_times(
    shape: Sequence[int],
    generator: torch.Generator,
    t_min: float = 0.0,
    t_max: float = 1.0,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Times uniform in (t_min, t_max], on the generator's device: never t_min, where some targets are infinite."""
    u = torch.rand(tuple(shape), generator=generator, device=generator.device, dtype=dtype)
    return t_max - (t_max - t_min) * u


def lognormal_times(
    process: Process,
    shape: Sequence[int],
    generator: torch.Generator,
    mean: float = -1.2,
    std: float = 1.2,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Times at which log k ~ N(mean, std^2), EDM's P_mean and P_std (arXiv 2206.00364, table 1), on any process.

    The times are on the generator's device.
    """
    z = torch.randn(tuple(shape), generator=generator, device=generator.device, dtype=dtype)
    return process.time(torch.exp(mean + std * z))


def loglogistic_times(
    process: Process,
    shape: Sequence[int],
    generator: torch.Generator,
    median: float = 0.5,
    scale: float = 0.5,
    k_min: float = 0.0,
    k_max: float = math.inf,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Times at which log k is logistic about log `median` with `scale`, k cut to [k_min, k_max], on any process.

    The density of k-diffusion's and DTQL's training (arXiv 2405.19690), by its quantiles: log k = log median + scale
    log(u / (1 - u)), u uniform between the cut ends'. The times are on the generator's device.
    """
    low, high = (1 / (1 + (median / k) ** (1 / scale)) if k > 0 else 0.0 for k in (k_min, k_max))
    u = torch.rand(tuple(shape), generator=generator, device=generator.device, dtype=torch.float64)
    u = low + (high - low) * u  # in double precision: near 1 the odds u / (1 - u) need the digits
    return process.time(median * (u / (1 - u)) ** scale).to(dtype)
