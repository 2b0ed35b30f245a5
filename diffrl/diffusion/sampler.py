"""Sampling: one reverse step with noise eta in [0, 1], and the higher-order solvers as corrections to it.

From t to r < t, with (a, s) at t and (b, w) at r, D = E[x_0 | x_t], e = (x - a D)/s and z ~ N(0, I):

    x_r = b D + c e + n z + correction,      n^2 = eta^2 w^2 (1 - (a w / (b s))^2),  c = sqrt(w^2 - n^2).

Without the correction this is DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16): eta = 0 is the
probability-flow ODE to first order, eta = 1 the DDPM posterior. In y = x/a every process is the variance-exploding
one, dy/dk = e, so a solver is a rule in (y, k) whatever the process. With h = log(k_t / k_r) and e_2, e_3 the noise
found at trial points, the corrections are

    dpm1      none: DDIM
    dpm2      b (k_r - k_t) (e_2 - e)                     e_2 at k_t e^{-h/2}: the midpoint rule in log k
    dpm3      b 3/2 k_r (1 - phi(h)) (e_3 - e)            e_2 at k_t e^{-h/3}, e_3 at k_t e^{-2h/3}, where the latter's
                                                          own point is corrected by a_3 2 k_3 (1 - phi(2h/3)) (e_2 - e)
    heun      b (k_r - k_t) / 2 (e_2 - e)                 e_2 at k_r: the trapezoid in k
    dpmpp2m   b (1 - k_r/k_t) h / (2 h_last) (D - D_last) no trial point: the last step's D is at hand

with phi(h) = (e^h - 1)/h. dpm1, 2, 3: DPM-Solver (Lu et al. 2022, arXiv 2206.00927, algorithms 1, 2 with r_1 = 1/3,
r_2 = 2/3); dpmpp2m: DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2); heun: EDM (Karras et al. 2022,
arXiv 2206.00364, algorithms 1 and 2, `Churn`). Where k_t = inf (or above 1e6, pure noise but for rounding) or k_r = 0
the corrections have no value; they are left out, and the step is DDIM's, which needs none.

Between steps `Langevin` makes steps at one level of noise: the predictor-corrector of Song et al. 2021 (arXiv
2011.13456, algorithms 2 to 5).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from diffrl.diffusion.inpainting import Known
from diffrl.diffusion.prediction import Clip, Denoise, of_shape
from diffrl.diffusion.process import PURE_NOISE, Process, check_times, expand, unknown

Scalar = TypeVar("Scalar", float, Tensor)


@dataclass(frozen=True)
class Churn:
    """EDM's stochasticity (arXiv 2206.00364, algorithm 2): before a step, noise raises k to (1 + gamma) k.

    gamma = min(S_churn / N, sqrt(2) - 1) where S_tmin <= k <= S_tmax, else 0, for N steps; S_noise scales the noise.
    The levels are of k = sigma/alpha, which is sigma on VE.
    """

    S_churn: float = 0.0
    S_tmin: float = 0.0
    S_tmax: float = math.inf
    S_noise: float = 1.0

    def __post_init__(self) -> None:
        if not (self.S_churn >= 0 and 0 <= self.S_tmin <= self.S_tmax and self.S_noise >= 0):
            raise ValueError(f"need S_churn >= 0, 0 <= S_tmin <= S_tmax and S_noise >= 0, got {self}")


@dataclass(frozen=True)
class Langevin:
    """The corrector of score-based SDEs (arXiv 2011.13456, algorithms 4 and 5): after a step to r, at r, `steps` times

        x <- x + epsilon score(x, r) + sqrt(2 epsilon) z,      epsilon = 2 (snr <|z|> / <|score|>)^2.

    It leaves the density of x_r as it is to first order in epsilon and pulls towards it what is elsewhere, at the price
    of one call of the denoiser each. Not after a step to k = 0, where no noise is left.

    <.> is the mean along the batch axis, the one before the last `event_dims`, over which the norms are taken: as in
    the authors' code, each seed by itself. One row's own ratio, as the algorithms are printed, has no bound in few
    dimensions, where a score may be near 0, and depends on the point, so that the density would not stay; a batch of
    one row is that case. The factor alpha_i = 1 - beta_i of their VP corrector, 0.98 to 1 on its 1000 steps, belongs to
    a grid and to no process, and is left out: so every process is the variance-exploding one in y, here too.
    """

    steps: int = 1
    snr: float = 0.16
    event_dims: int = 1

    def __post_init__(self) -> None:
        if not (self.steps >= 1 and 0 <= self.snr < math.inf and self.event_dims >= 1):
            raise ValueError(f"need steps >= 1, a finite snr >= 0 and event_dims >= 1, got {self}")


class Trial(NamedTuple):
    """A trial point, x_j = a D + s e + weight (e_last - e) at the time t, where e_last is of the trial before."""

    t: float
    a: float
    s: float
    weight: float


class SolverStep(NamedTuple):
    """One step of a `Sampler` from t to r, in numbers; the letters are those at the top of this file."""

    t: float
    """The time of x_t; with `Churn` the raised one."""
    a: float
    """alpha(t)."""
    s: float
    """sigma(t)."""
    f: float
    """b - c a/s: without its correction the step is x_r = f D + g x_t + n z."""
    g: float
    """c/s."""
    n: float
    """Deviation of the step's noise; 0 but for eta > 0."""
    weight: float
    """The correction is weight (e_j - e), with e_j found at the last of the `trials`."""
    history: float
    """Of dpmpp2m alone: the correction is history (D - D_last)."""
    lift: float
    """Of `Churn`: x_t = lift x + spread z, with x where the last step ended. Without churn 1 and 0."""
    spread: float
    """See `lift`."""
    r: float
    """The time that the step ends at."""
    b: float
    """alpha(r)."""
    w: float
    """sigma(r)."""
    trials: tuple[Trial, ...]
    """None for a first-order step, as every step to data is."""
    to_data: bool
    """Whether k_r = 0: the step has no correction, and no `Langevin` steps follow it."""


def _scalars(process: Process, t: Tensor, r: Tensor, eta: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(a, s, b, c, n) of reverse steps from t to r, each of the shape of the times."""
    a, s, b, w = process.alpha(t), process.sigma(t), process.alpha(r), process.sigma(r)
    q = (a * w) / (b * s)  # k_r / k_t; written so, it is 0 and not nan at a = 0
    c = w * torch.sqrt((1 - eta**2) + (eta * q) ** 2)  # never the root of a negative number, as w^2 - n^2 might be
    n = eta * w * torch.sqrt(((1 - q) * (1 + q)).clamp_min(0))
    return a, s, b, c, n


def reverse_step(
    process: Process, x: Tensor, x0: Tensor, t: Tensor, r: Tensor, eta: float = 0.0
) -> tuple[Tensor, Tensor]:
    """One step from x at t to r <= t, given x0 = D(x, t): the mean, of x's shape, and standard deviation n of x_r.

    t, r: scalars or one value a row of `x`, t > 0; n broadcasts against x. x_r is mean + n z; at eta = 1 this is
    the DDPM posterior q(x_r | x_t, x_0) (Ho et al. 2020, arXiv 2006.11239, eq. 6 and 7). Raises ValueError for eta
    outside [0, 1].
    """
    _check_eta(eta)
    a, s, b, c, n = _scalars(process, expand(t, x), expand(r, x), eta)
    return b * x0 + c * (x - a * x0) / s, n


Rule = tuple[list[tuple[Tensor, Tensor]], Tensor]
"""A solver's trial points, each as (k_j, weight / a_j), and the weight over b of the correction's e_j - e."""


def _phi(h: Tensor) -> Tensor:
    return torch.expm1(h) / h


def _dpm2(k: Tensor, k_r: Tensor) -> Rule:
    return [(torch.sqrt(k * k_r), torch.zeros_like(k))], k_r - k


def _dpm3(k: Tensor, k_r: Tensor) -> Rule:
    h = torch.log(k / k_r)
    k_2, k_3 = k * torch.exp(-h / 3), k * torch.exp(-2 * h / 3)
    trials = [(k_2, torch.zeros_like(k)), (k_3, 2 * k_3 * (1 - _phi(2 * h / 3)))]
    return trials, 1.5 * k_r * (1 - _phi(h))


def _heun(k: Tensor, k_r: Tensor) -> Rule:
    return [(k_r, torch.zeros_like(k))], (k_r - k) / 2


def _first_order(k: Tensor, k_r: Tensor) -> Rule:
    return [], torch.zeros_like(k)


_SOLVERS: dict[str, Callable[[Tensor, Tensor], Rule]] = {
    "ddim": _first_order,
    "dpm1": _first_order,
    "dpm2": _dpm2,
    "dpm3": _dpm3,
    "dpmpp2m": _first_order,  # whose correction is of D, by `_history`
    "heun": _heun,
}
SOLVERS = tuple(_SOLVERS)
"""The solvers' names; the calls of the denoiser a step are 1, 1, 2, 3, 1, 2."""


class Sampler:
    """A process, a grid of times and a solver, their scalars computed once, in float64: call it as often as you like.

    times: (T + 1,), decreasing, as `Process.grid` and `discrete_grid` give them; the last may be 0, the first may have
        alpha = 0 (where the denoiser can bear it). They are read here: leave them on the CPU.
    solver: one of `SOLVERS`. eta in [0, 1] is for ddim alone; `churn` for every solver but dpmpp2m, without eta;
        `corrector` for all of them.

    `n_noise` is how many draws of x's shape a call needs: one a step for eta > 0 or churn, and `corrector.steps` more.
    Calls look at no tensor's value: they can be compiled as one graph, and captured. Raises ValueError for an unknown
    solver, eta outside [0, 1] or beside a deterministic solver, times of a wrong shape, not decreasing or where the
    process has no value (RectifiedFlow beyond 1, say); a call for a denoiser that changes the shape of x.
    """

    def __init__(
        self,
        process: Process,
        times: Tensor,
        solver: str = "ddim",
        eta: float = 0.0,
        churn: Churn | None = None,
        corrector: Langevin | None = None,
    ) -> None:
        if solver not in _SOLVERS:
            raise unknown("solver", solver, _SOLVERS)
        _check_eta(eta)
        if eta > 0 and solver != "ddim":
            raise ValueError(f"eta = {eta} needs solver 'ddim': {solver!r} is deterministic")
        if churn is not None and (eta > 0 or solver == "dpmpp2m"):
            raise ValueError(
                "churn goes with a deterministic solver of single steps: not with eta > 0, nor with 'dpmpp2m'"
            )
        if times.ndim != 1 or len(times) < 2:
            raise ValueError(f"times must be a vector of T + 1 >= 2 decreasing values, got shape {tuple(times.shape)}")
        times = times.detach().to("cpu", torch.float64)
        check_times(process, times)
        own_noise = int(eta > 0 or churn is not None)
        self.n_steps = len(times) - 1
        self.n_noise = self.n_steps * (own_noise + (0 if corrector is None else corrector.steps))
        self.draws_noise = self.n_noise > 0
        self._alpha = float(process.alpha(times[0]))
        self.plan = _plan(process, times[:-1], times[1:], solver, eta, churn)
        """The steps in their order."""
        self._ancestral = eta > 0
        self._churned = churn is not None
        self._two_step = solver == "dpmpp2m"
        self._corrector = corrector
        given = {"eta": eta or None, "churn": churn, "corrector": corrector}
        options = "".join(f", {name}={value}" for name, value in given.items() if value is not None)
        steps = "1 step" if self.n_steps == 1 else f"{self.n_steps} steps"
        self._text = f"{process}, {solver}{options}: {steps} from t = {float(times[0]):.4g} to {float(times[-1]):.4g}"

    def __repr__(self) -> str:
        return f"Sampler({self._text})"

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        generator: torch.Generator | None = None,
        *,
        noise: Tensor | None = None,
        clip: Clip | None = None,
        inpaint: Known | None = None,
        return_chain: bool = False,
    ) -> Tensor:
        """Carry `x` at times[0] down to times[-1]; see `sample` for the arguments."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = x if inpaint is None else inpaint.start(x, self._alpha)
        draws = self.n_noise
        if noise is not None and not draws and noise.shape != (0, *x.shape):
            draws = self.n_steps  # as for another eta: of that shape, and not used
        z = iter(step_noise(x, draws, generator, noise).unbind() if draws else ())

        def denoised(x: Tensor, t: float) -> Tensor:
            """D(x, t)."""
            D = of_shape(denoise(x if inpaint is None else inpaint.seen(x), x.new_full((), t)), x).to(x.dtype)
            D = D if clip is None else D.clamp(*clip)
            return D if inpaint is None else inpaint.insert(D)

        chain = [x]
        D_last: Tensor | None = None
        for step in self.plan:
            if self._churned:
                x = step.lift * x + step.spread * next(z)
            D = denoised(x, step.t)
            x_t = x
            x = step.f * D + step.g * x_t
            if self._ancestral:
                x = x + step.n * next(z)
            if self._two_step:
                x = x if D_last is None else x + step.history * (D - D_last)
                D_last = D
            elif step.trials:
                e = (x_t - step.a * D) / step.s
                x = x + step.weight * _change(denoised, D, e, step.trials)
            if self._corrector is not None and not step.to_data:
                for _ in range(self._corrector.steps):
                    score = (step.b * denoised(x, step.r) - x) / step.w**2
                    x = _langevin(self._corrector, x, score, next(z))
            chain.append(x)
        if inpaint is not None:
            x = inpaint.insert(x)
            chain = [*map(inpaint.seen, chain[:-1]), x]
        return torch.stack(chain) if return_chain else x


def sample(
    process: Process,
    denoise: Denoise,
    x: Tensor,
    times: Tensor,
    solver: str = "ddim",
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    *,
    noise: Tensor | None = None,
    clip: Clip | None = None,
    churn: Churn | None = None,
    corrector: Langevin | None = None,
    inpaint: Known | None = None,
    return_chain: bool = False,
) -> Tensor:
    """Carry `x` at times[0] down the reverse process to times[-1]: a tensor of x's shape, at least float32.

    denoise: D(x, t) = E[x_0 | x_t = x], called with `x` in the state's dtype and `t` a scalar tensor.
    x: any shape, a sample at times[0]; differentiable in `x` and in whatever `denoise` holds.
    times, solver, eta, churn, corrector: see `Sampler`, which saves recomputing what depends on these alone, and is
        what to call under torch.compile.
    generator, noise: what eta > 0, churn and a corrector need, one of them: standard normal noise, drawn in one call.
        (T, *x.shape) for eta or churn; with a corrector (T (n + corrector.steps), *x.shape), n = 1 with eta or churn
        and 0 without: step by step, its own draw and then those of its corrections (a last step to k = 0 leaves them
        unused). Under torch.compile pass the noise. Where nothing is drawn it is not used, and may be left out.
    clip: (low, high), to which D is clamped, as Diffusion-QL and DDPM do. e = (x - a D)/s follows the clamped D.
    inpaint: entries that are known (`diffusion.inpainting`): they are set at every step, behind the clip, and the
        result holds them to the bit. At them x is noise alone, s e at times[0].
    return_chain: give all states, (T + 1, *x.shape), from `x` to the result.

    Raises ValueError as `Sampler` does, and for noise that is missing or of a wrong shape.
    """
    sampler = Sampler(process, times, solver, eta, churn, corrector)
    return sampler(denoise, x, generator, noise=noise, clip=clip, inpaint=inpaint, return_chain=return_chain)


def solver_step(process: Process, denoise: Denoise, x: Tensor, t: Tensor, r: Tensor, solver: str = "ddim") -> Tensor:
    """One deterministic step of a solver from x at t to r < t, a time a row: a tensor of x's shape, at least float32.

    What `Sampler` does on the grid (t, r), for times that differ from row to row and are known to no host: t, r scalars
    or one value a row of `x`, t > 0. Differentiable in `x`, and looks at no tensor's value. Raises ValueError for an
    unknown solver, for dpmpp2m, which needs the step before and so has no single step, and for a denoiser that changes
    the shape of x.
    """
    if solver not in _SOLVERS:
        raise unknown("solver", solver, _SOLVERS)
    if solver == "dpmpp2m":
        single = ", ".join(name for name in _SOLVERS if name != solver)
        raise ValueError(f"'dpmpp2m' corrects a step by the one before: it has no single step. Use one of {single}.")
    x = x.to(torch.promote_types(x.dtype, torch.float32))

    def on_rows(scalar: Tensor) -> Tensor:
        return expand(scalar, x).to(x.dtype)

    def denoised(x: Tensor, t: Tensor) -> Tensor:
        return of_shape(denoise(x, t), x).to(x.dtype)

    a, s, b, c, _ = (on_rows(scalar) for scalar in _scalars(process, t, r, 0.0))
    points, weight = _corrections(process, solver, t, r)
    D = denoised(x, t)
    e = (x - a * D) / s
    x_r = b * D + c * e
    if points:
        trials = [(t_j, *map(on_rows, scalars)) for t_j, *scalars in points]
        x_r = x_r + on_rows(weight) * _change(denoised, D, e, trials)
    return x_r


def _change(
    denoised: Callable[[Tensor, Scalar], Tensor], D: Tensor, e: Tensor, trials: Iterable[Sequence[Scalar]]
) -> Tensor:
    """e_j - e at the last of a step's trial points (t_j, a_j, s_j, a_j weight_j): numbers, or tensors over the rows."""
    change = torch.zeros_like(e)
    for t_j, a_j, s_j, weight_j in trials:
        x_j = a_j * D + s_j * e + weight_j * change
        change = (x_j - a_j * denoised(x_j, t_j)) / s_j - e
    return change


def _langevin(corrector: Langevin, x: Tensor, score: Tensor, z: Tensor) -> Tensor:
    """One correction of `x`, see `Langevin`; without a score, epsilon is 0."""
    event_dims = corrector.event_dims

    def size(v: Tensor) -> Tensor:
        """<|v|>, a value a seed: as many dimensions as x."""
        norms: Tensor = torch.linalg.vector_norm(v.flatten(-event_dims), dim=-1)
        mean = norms.mean(-1, keepdim=True) if norms.ndim else norms
        return mean.reshape(mean.shape + (1,) * event_dims)

    height = size(score)
    root = corrector.snr * size(z) / torch.where(height > 0, height, math.inf)
    return x + 2 * root**2 * score + 2 * root * z


def _check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1] (0: the ODE, 1: the DDPM posterior), got {eta}")


def step_noise(x: Tensor, draws: int, generator: torch.Generator | None, noise: Tensor | None) -> Tensor:
    """The standard normal noise of all steps, (draws, *x.shape): the caller's `noise`, or drawn in one call.

    Raises ValueError for neither, or a wrong shape.
    """
    shape = (draws, *x.shape)
    if noise is not None:
        if noise.shape != shape:
            raise ValueError(f"noise must have shape (draws, *x.shape) = {shape}, got {tuple(noise.shape)}")
        return noise.to(x.dtype)
    if generator is None:
        raise ValueError(
            "eta > 0, churn, correctors and a consistency function's steps draw noise: pass a generator, or the noise"
        )
    return torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype)


def _plan(
    process: Process, t: Tensor, r: Tensor, solver: str, eta: float, churn: Churn | None
) -> tuple[SolverStep, ...]:
    """The steps from the times t (T,) to the times r (T,)."""
    lift, spread = torch.ones_like(t), torch.zeros_like(t)
    if churn is not None:
        t, lift, spread = _churn(process, t, churn)
    a, s, b, c, n = _scalars(process, t, r, eta)
    history = _history(process, t, r) if solver == "dpmpp2m" else torch.zeros_like(t)
    points, weight = _corrections(process, solver, t, r)
    numbers = (t, a, s, b - c * a / s, c / s, n, weight, history, lift, spread, r, b, process.sigma(r))
    steps = []
    for i, row in enumerate(torch.stack(numbers, 1).tolist()):
        to_data = float(r[i]) == 0
        trials = () if to_data else tuple(Trial(*torch.stack(point)[:, i].tolist()) for point in points)
        steps.append(SolverStep._make((*row, trials, to_data)))
    return tuple(steps)


def _churn(process: Process, t: Tensor, churn: Churn) -> tuple[Tensor, Tensor, Tensor]:
    """The raised times t_hat, and the factors on x and on z in x_hat: y_hat = y + sqrt(k_hat^2 - k^2) S_noise z."""
    k = process.ratio(t)
    gamma = min(churn.S_churn / len(t), math.sqrt(2) - 1)
    raised = (k >= churn.S_tmin) & (k <= churn.S_tmax) & (k < PURE_NOISE)
    k = torch.where(raised, k, 1.0)
    k_hat = (1 + gamma) * k
    t_hat = process.time(k_hat)
    a_hat = process.alpha(t_hat)
    lift = torch.where(raised, a_hat / process.alpha(t), 1.0)
    spread = torch.where(raised, a_hat * k * math.sqrt(gamma * (2 + gamma)) * churn.S_noise, 0.0)
    return torch.where(raised, t_hat, t), lift, spread


def _corrections(
    process: Process, solver: str, t: Tensor, r: Tensor
) -> tuple[list[tuple[Tensor, Tensor, Tensor, Tensor]], Tensor]:
    """The trial points of a solver as (t_j, a_j, s_j, a_j weight_j), and b weight of the step's end.

    From pure noise and to k_r = 0 the trials are made at harmless points and every weight is 0.
    """
    if _SOLVERS[solver] is _first_order:
        return [], torch.zeros_like(t)
    k, k_r = process.ratio(t), process.ratio(r)
    regular = (k < PURE_NOISE) & (k_r > 0)
    trials, weight = _SOLVERS[solver](torch.where(regular, k, 2.0), torch.where(regular, k_r, 1.0))
    points = []
    for k_j, weight_j in trials:
        t_j = process.time(k_j)
        a_j = process.alpha(t_j)
        points.append((t_j, a_j, process.sigma(t_j), torch.where(regular, a_j * weight_j, 0.0)))
    return points, torch.where(regular, process.alpha(r) * weight, 0.0)


def _history(process: Process, t: Tensor, r: Tensor) -> Tensor:
    """dpmpp2m's factor on D - D_last: b (1 - k_r/k_t) h / (2 h_last); 0 at the first step and where k_r = 0."""
    k, k_r = process.ratio(t), process.ratio(r)
    regular = (k < PURE_NOISE) & (k_r > 0)
    k, k_r = torch.where(regular, k, 2.0), torch.where(regular, k_r, 1.0)
    h = torch.log(k / k_r)
    # After a start at pure noise h_last is infinite, and the second step of first order too: its D_last weighs 0.
    h_last = torch.where(regular, h, math.inf).roll(1)
    factor = torch.where(regular, process.alpha(r) * (1 - k_r / k) * h / (2 * h_last), 0.0)
    return factor * (torch.arange(len(t), device=t.device) > 0)
