"""Forward processes: x_t = alpha_t x_0 + sigma_t e with e ~ N(0, I), and the time grids on them.

A process is three formulas: alpha(t), sigma(t) and time(k), the inverse of the noise-to-signal ratio k = sigma/alpha.
All else follows from them in the base class; derivatives come from forward-mode differentiation.

Times are tensors of any shape; every formula acts elementwise, keeps dtype and device, and synchronises nothing.
A discrete DDPM schedule is no further process: it is VP at t_i = -log(alpha_bar_i), see `discrete_grid`.
"""

import difflib
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

PURE_NOISE = 1e6
"""The ratio k from which a time counts as alpha = 0: cos(pi/2) is 6e-17, and in float32 4e-8."""


def unknown(what: str, name: object, known: Iterable[str]) -> ValueError:
    """The error for a name that is not known: what was typed, the nearest known name, and all of them."""
    options = list(known)
    close = difflib.get_close_matches(str(name), options, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return ValueError(f"unknown {what} {name!r}.{hint} Known: {', '.join(options)}.")


def _steps(n: int) -> int:
    """A number of steps. Raises ValueError for what is none: below 1, or not whole."""
    try:
        n = operator.index(n)
    except TypeError as error:
        raise ValueError(f"the number of steps must be whole, got {n!r}") from error
    if n < 1:
        raise ValueError(f"need at least one step, got {n}")
    return n


def check_times(process: "Process", times: Tensor) -> None:
    """Raise ValueError for times (T,) that do not decrease, or at which the process has no value. They are read.

    Outside of its range alpha or sigma is negative, or no number; at its end alpha may round to either side of 0.
    """
    values: list[float] = times.tolist()
    if not all(r < t for t, r in pairwise(values)):
        raise ValueError("times must decrease strictly, from noise to data")
    for t, a, s in zip(values, process.alpha(times).tolist(), process.sigma(times).tolist(), strict=True):
        if not (a > -1 / PURE_NOISE and 0 <= s < math.inf):
            raise ValueError(
                f"the times must lie where {process} has alpha and sigma >= 0, got t = {t:.6g}, where alpha = {a:.4g} "
                f"and sigma = {s:.4g}"
            )


def expand(t: Tensor, x: Tensor) -> Tensor:
    """View `t`, a scalar () or one value a row x.shape[:t.ndim] (1 where shared), so that it broadcasts against `x`.

    A `t` of shape (S, B) beside an `x` of shape (S, B, d) becomes (S, B, 1): dimensions are added on the right.
    Raises ValueError where the shapes do not fit (broadcasting from the right might do so silently, and wrongly).
    """
    if t.ndim == 0:
        return t
    if t.ndim > x.ndim or any(n not in (1, m) for n, m in zip(t.shape, x.shape[: t.ndim], strict=True)):
        raise ValueError(
            f"times of shape {tuple(t.shape)} do not fit x of shape {tuple(x.shape)}: "
            "pass a scalar, or one value a row along the leading dimensions of x"
        )
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


class Process(ABC):
    """What all forward processes share. A subclass states `alpha`, `sigma` and `time`; t = 0 is clean data (k = 0)."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """The factor on the data, alpha_t >= 0, decreasing from 1 (or constant)."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """The factor on the noise, sigma_t >= 0, increasing from 0."""

    @abstractmethod
    def time(self, k: Tensor) -> Tensor:
        """The time at which sigma_t / alpha_t = k, for 0 <= k < inf."""

    def ratio(self, t: Tensor) -> Tensor:
        """The noise-to-signal ratio k = sigma_t / alpha_t (inf where alpha_t = 0)."""
        return self.sigma(t) / self.alpha(t).abs()  # cos(pi/2) rounds to either side of 0

    def rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The derivatives (alpha', sigma') in t, by `torch.func.jvp`."""
        t = t.contiguous()  # forward mode takes no expanded tensors
        one = torch.ones_like(t)
        d_alpha: Tensor = torch.func.jvp(self.alpha, (t,), (one,))[1]
        d_sigma: Tensor = torch.func.jvp(self.sigma, (t,), (one,))[1]
        return d_alpha, d_sigma

    def drift(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The SDE dx = f x dt + g dW with these marginals, at t > 0: (f, g).

        f = alpha'/alpha and g^2 = 2 sigma sigma' - 2 f sigma^2 (Kingma et al. 2021, arXiv 2107.00630, eq. 15).
        """
        d_alpha, d_sigma = self.rate(t)
        sigma = self.sigma(t)
        f = d_alpha / self.alpha(t)
        g_squared = 2 * sigma * d_sigma - 2 * f * sigma**2
        return f, g_squared.clamp_min(0).sqrt()

    def perturb(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Noised data x_t = alpha_t x_0 + sigma_t e; `t` a scalar or one value a row of `x0` (see `expand`)."""
        t = expand(t, x0)
        return self.alpha(t) * x0 + self.sigma(t) * noise

    def grid(
        self,
        n: int,
        k_min: float,
        k_max: float,
        rho: float = math.inf,
        *,
        to_zero: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The n + 1 decreasing times of n sampling steps, from k_max down to k_min, and with `to_zero` to 0.

        `rho` shapes the ratios: k_i = (k_max^(1/rho) + i/m (k_min^(1/rho) - k_max^(1/rho)))^rho, i = 0 ... m (EDM,
        arXiv 2206.00364, eq. 5; the paper's rho is 7); rho = inf is its limit, uniform in log k, half the log-SNR.
        Without `to_zero` m = n and the last time has k = k_min. With it m = n - 1 and the last of the n steps goes
        from k_min to k = 0: EDM's grid of n steps. Computed in float64, then cast to `dtype`. Raises ValueError for an
        n that is no number of steps, and bounds that are none.
        """
        n = _steps(n)
        if not 0 < k_min < k_max < math.inf:
            raise ValueError(f"need 0 < k_min < k_max < inf, got k_min = {k_min} and k_max = {k_max}")
        if not rho > 0:
            raise ValueError(f"need rho > 0 (inf: uniform in log-SNR), got {rho}")
        m = n - 1 if to_zero else n
        i = torch.arange(m + 1, dtype=torch.float64, device=device) / max(m, 1)
        if math.isinf(rho):
            k = k_max * (k_min / k_max) ** i
        else:
            k = (k_max ** (1 / rho) + i * (k_min ** (1 / rho) - k_max ** (1 / rho))) ** rho
        if to_zero:
            k = torch.cat([k, k.new_zeros(1)])
        return self.time(k).to(dtype)


@dataclass(frozen=True)
class VP(Process):
    """Variance preserving, with unit rate: f = -1/2, g = 1 (Song et al. 2021, arXiv 2011.13456, beta = 1)."""

    def alpha(self, t: Tensor) -> Tensor:
        """alpha_t = e^{-t/2}."""
        return torch.exp(-t / 2)

    def sigma(self, t: Tensor) -> Tensor:
        """sigma_t = sqrt(1 - e^{-t}); expm1 keeps the small times exact."""
        return torch.sqrt(-torch.expm1(-t))

    def time(self, k: Tensor) -> Tensor:
        """t = log(1 + k^2)."""
        return torch.log1p(k**2)


@dataclass(frozen=True)
class VE(Process):
    """Variance exploding in EDM's time, sigma_t = t (Karras et al. 2022, arXiv 2206.00364)."""

    def alpha(self, t: Tensor) -> Tensor:
        """alpha_t = 1."""
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """sigma_t = t."""
        return t

    def time(self, k: Tensor) -> Tensor:
        """t = k."""
        return k


@dataclass(frozen=True)
class RectifiedFlow(Process):
    """Straight lines from data to noise, 0 <= t <= 1 (Liu et al. 2023, arXiv 2209.03003, with time reversed)."""

    def alpha(self, t: Tensor) -> Tensor:
        """alpha_t = 1 - t."""
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        """sigma_t = t."""
        return t

    def time(self, k: Tensor) -> Tensor:
        """t = k / (1 + k)."""
        return k / (1 + k)


@dataclass(frozen=True)
class TrigFlow(Process):
    """A rotation from data of standard deviation c to noise, 0 <= t <= pi/2 (Lu & Song 2024, arXiv 2410.11081)."""

    data_std: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.data_std < math.inf:
            raise ValueError(f"data_std must be positive, got {self.data_std}")

    def alpha(self, t: Tensor) -> Tensor:
        """alpha_t = cos t."""
        return torch.cos(t)

    def sigma(self, t: Tensor) -> Tensor:
        """sigma_t = c sin t."""
        return self.data_std * torch.sin(t)

    def time(self, k: Tensor) -> Tensor:
        """t = atan(k / c)."""
        return torch.atan(k / self.data_std)


def _linear(n: int) -> Tensor:
    """Ho et al. 2020 (arXiv 2006.11239): beta from 1e-4 to 0.02, whatever n."""
    return torch.linspace(1e-4, 0.02, n, dtype=torch.float64)


def _cosine(n: int) -> Tensor:
    """Nichol & Dhariwal 2021 (arXiv 2102.09672, eq. 17): alpha_bar a squared cosine, offset 0.008, beta <= 0.999."""
    i = torch.arange(n + 1, dtype=torch.float64) / n
    alpha_bar = torch.cos((i + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp_max(0.999)


def _sigmoid(n: int) -> Tensor:
    """Xu et al. 2022 (GeoDiff, arXiv 2203.02923): beta a sigmoid over [-6, 6] from 1e-4 to 0.02."""
    return torch.sigmoid(torch.linspace(-6, 6, n, dtype=torch.float64)) * (0.02 - 1e-4) + 1e-4


def _vp(n: int) -> Tensor:
    """Diffusion-QL's "vp" (Xiao et al. 2022, arXiv 2112.07804): the VP SDE's beta, 0.1 to 10, integrated by steps."""
    b_min, b_max = 0.1, 10.0
    i = torch.arange(1, n + 1, dtype=torch.float64)
    return -torch.expm1(-b_min / n - (b_max - b_min) * (2 * i - 1) / (2 * n**2))


_SCHEDULES: dict[str, Callable[[int], Tensor]] = {
    "linear": _linear,
    "cosine": _cosine,
    "sigmoid": _sigmoid,
    "vp": _vp,
}


def discrete_grid(
    name: str, steps: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """A discrete DDPM schedule as a grid on `VP()`: the steps + 1 decreasing times t_T > ... > t_1 > 0.

    `name` is linear, cosine, sigmoid or vp (Diffusion-QL's); t_i = -log(alpha_bar_i), alpha_bar the running product
    of 1 - beta_i. The final 0, clean data, is appended: the grid is ready for `sample`. Computed in float64, then
    cast to `dtype`. Raises ValueError for an unknown name, and steps that are no whole number from 1 on.
    """
    if name not in _SCHEDULES:
        raise unknown("discrete schedule", name, _SCHEDULES)
    t = -torch.log1p(-_SCHEDULES[name](_steps(steps))).cumsum(0)
    return torch.cat([t.flip(0), t.new_zeros(1)]).to(device=device, dtype=dtype)
