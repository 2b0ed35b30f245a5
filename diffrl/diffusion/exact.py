"""Data whose denoiser and flow are known in closed form: what solvers, losses and diagnostics are measured against."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffrl.diffusion.prediction import Denoise
from diffrl.diffusion.process import Process, expand


@dataclass(frozen=True, eq=False)
class Gaussian:
    """N(mean, diag(std^2)), `mean` and `std` of shape (d,); std = 0 is a point mass."""

    mean: Tensor
    std: Tensor

    def marginal(self, process: Process, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of x_t at a scalar time: (a mean, sqrt(a^2 std^2 + s^2)), (d,) each."""
        a, s = process.alpha(t), process.sigma(t)
        return a * self.mean, torch.sqrt(a**2 * self.std**2 + s**2)

    def denoiser(self, process: Process) -> Denoise:
        """D(x, t) = mean + a std^2 / (a^2 std^2 + s^2) (x - a mean), for x (..., d)."""

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            t = expand(t, x)
            a, s = process.alpha(t), process.sigma(t)
            return self.mean + a * self.std**2 / (a**2 * self.std**2 + s**2) * (x - a * self.mean)

        return denoise

    def flow(self, process: Process, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """The probability-flow ODE from x at t to r, scalar times: every quantile of x_t to the same one of x_r."""
        (m_t, std_t), (m_r, std_r) = self.marginal(process, t), self.marginal(process, r)
        return m_r + std_r / std_t * (x - m_t)


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """sum_i w_i N(m_i, diag(std_i^2)): `means` (M, d), `stds` (M,) or (M, d), `weights` (M,), scaled to sum to 1.

    x is (..., d), t a scalar or one value a row. Raises ValueError for shapes that do not fit, weights that are not
    positive, deviations below 0.
    """

    means: Tensor
    stds: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.means.shape)
        vector = shape[:1]
        fits = len(shape) == 2 and tuple(self.stds.shape) in (shape, vector) and tuple(self.weights.shape) == vector
        if not fits:
            raise ValueError(
                "need means (M, d), stds (M,) or (M, d) and weights (M,); got shapes "
                f"{shape}, {tuple(self.stds.shape)} and {tuple(self.weights.shape)}"
            )
        if not bool((self.weights > 0).all()) or not bool((self.stds >= 0).all()):
            raise ValueError("the weights must be positive, and the deviations not negative")

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n points of the data, (n, d), on the device of `means`, which must be the generator's."""
        return self.sample_labelled(n, generator)[0]

    def sample_labelled(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """n points (n, d), and the component (n,) each of them is from."""
        labels = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], generator=generator, device=self.means.device, dtype=self.means.dtype)
        return self.means[labels] + self._stds()[labels] * z, labels

    def log_prob(self, process: Process, x: Tensor, t: Tensor) -> Tensor:
        """log p_t(x), the density of x_t = a x_0 + s e: (...,) for x (..., d)."""
        return self._log_joint(process, x, t).logsumexp(-1)

    def posterior(self, process: Process, x: Tensor, t: Tensor) -> Tensor:
        """p(i | x_t = x), the components' probabilities: (..., M) for x (..., d)."""
        return self._log_joint(process, x, t).softmax(-1)

    def denoiser(self, process: Process) -> Denoise:
        """D(x, t) = sum_i p(i | x) (m_i + a std_i^2 / (a^2 std_i^2 + s^2) (x - a m_i)), for x (..., d)."""

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            a, variance, difference = self._components(process, x, t)
            x0 = self.means + a * self._stds() ** 2 / variance * difference
            return (self.posterior(process, x, t).unsqueeze(-1) * x0).sum(-2)

        return denoise

    def _stds(self) -> Tensor:
        """The deviations as (M, d) or (M, 1)."""
        return self.stds.reshape(len(self.means), -1)

    def _components(self, process: Process, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """a, the variances a^2 std_i^2 + s^2 and the differences x - a m_i, which broadcast to (..., M, d)."""
        x = x.unsqueeze(-2)
        t = expand(t, x)
        a, s = process.alpha(t), process.sigma(t)
        return a, a**2 * self._stds() ** 2 + s**2, x - a * self.means

    def _log_joint(self, process: Process, x: Tensor, t: Tensor) -> Tensor:
        """log w_i p_t(x | i): (..., M)."""
        _, variance, difference = self._components(process, x, t)
        log_density = -0.5 * (difference**2 / variance + torch.log(2 * math.pi * variance)).sum(-1)
        return torch.log(self.weights / self.weights.sum()) + log_density
