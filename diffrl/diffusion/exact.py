"""Data whose denoiser and flow are known in closed form: what solvers, losses and diagnostics are measured against."""

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
