"""Consistency models: from any point of a path of the probability-flow ODE to its end, the data, in one step.

A consistency function f(x_t, t) has the type of a denoiser, and `Prediction("edm", process).denoiser(network)` is one,
on every process: there c_skip(0) = 1 and c_out(0) = 0, so that f(x, 0) = x by construction, whatever the network.
(Song et al. 2023, arXiv 2303.01469, ask for it; `KarrasBoundary` is the form of their appendix C.) What makes f
consistent is the loss:

    consistency_loss    f(x_t, t) = f(x_r, r) at neighbouring times r < t of a grid of N boundaries, where x_r shares
                        x_t's data and noise (training: CT, and iCT of Song & Dhariwal 2023, arXiv 2310.14189), or is
                        one step of a teacher from x_t (distillation: CD)
    scm_loss            the limit of many boundaries: df/dt = 0 along the ODE (sCM: Lu & Song 2024, arXiv 2410.11081)

`n_boundaries` says how N grows over training, `Boundaries` what their times are and draws neighbours among them;
`consistency_sample` samples in one step or a few. All are plain functions of tensors, noise and counters included, and
look at no tensor's value: they can be compiled as one graph, and captured.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from diffrl.diffusion.loss import Weighting, check_shapes
from diffrl.diffusion.prediction import Clip, Denoise, Network, Prediction, of_shape
from diffrl.diffusion.process import Process, check_times, expand, unknown
from diffrl.diffusion.sampler import solver_step, step_noise

GapWeighting = Callable[[Tensor, Tensor], Tensor]
"""A weight on the distance of f(x_t, t) and f(x_r, r) as a function of (k_t, k_r)."""
Metric = Callable[[Tensor, Tensor], Tensor]
"""A distance, row by row: (..., d) and (..., d) -> (...), or over the event dimensions of images."""


@dataclass(frozen=True)
class KarrasBoundary:
    """The boundary condition f(x, eps) = x as published for VE: f = c_skip x + c_out F(x, t), the label t itself.

    c_skip = c_d^2 / ((t - eps)^2 + c_d^2) and c_out = c_d (t - eps) / sqrt(t^2 + c_d^2) (arXiv 2303.01469, appendix C),
    here without c_in, as Consistency-AC has it (Ding & Jin 2023, arXiv 2309.16984). The network receives (x, t)
    unscaled; one that wants another label computes it from t. Prefer the prediction "edm" for new work.
    """

    data_std: float = 0.5
    eps: float = 0.002

    def __post_init__(self) -> None:
        if not (0 < self.data_std < math.inf and 0 <= self.eps < math.inf):
            raise ValueError(f"data_std must be positive and eps not negative, got {self}")

    def preconditioning(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(c_skip, c_out), each of t's shape."""
        variance = self.data_std**2
        gap = t - self.eps
        return variance / (gap**2 + variance), self.data_std * gap / torch.sqrt(t**2 + variance)

    def denoiser(self, network: Network, clip: Clip | None = None) -> Denoise:
        """The consistency function of a raw `network`, clamped to `clip` where given; shapes as `Prediction`'s."""

        def f(x: Tensor, t: Tensor) -> Tensor:
            m = of_shape(network(x, t), x, "network")
            c_skip, c_out = self.preconditioning(expand(t, x))
            x0 = c_skip * x + c_out * m.to(x.dtype)
            return x0 if clip is None else x0.clamp(*clip)

        return f


# --- boundaries ----------------------------------------------------------------------------------------------------


@overload
def n_boundaries(step: int, total: int, start: int = 2, end: int = 150, schedule: str = "sqrt") -> int: ...


@overload
def n_boundaries(step: Tensor, total: int, start: int = 2, end: int = 150, schedule: str = "sqrt") -> Tensor: ...


def n_boundaries(
    step: int | Tensor, total: int, start: int = 2, end: int = 150, schedule: str = "sqrt"
) -> int | Tensor:
    """The number of boundaries N(k) at `step` k of `total` K: from start = N(0) to end = N(K), and `end` from then on.

    sqrt: ceil(sqrt(k/K (end^2 - start^2) + start^2) - 1) + 1 (arXiv 2303.01469, appendix C, whose s_0 is `start` and
        s_1 + 1 is `end`; Consistency-AC's 2 to 150 are the defaults).
    doubling: min(s_0 2^floor(k/K'), s_1) + 1, K' = floor(K / (log2 floor(s_1/s_0) + 1)), with s_0 = start - 1 and
        s_1 = end - 1 intervals (arXiv 2310.14189, section 3.4; its 10 and 1280 are start = 11, end = 1281).

    `step`: an int, or an integer tensor () on any device, which gives a tensor () and synchronises nothing. Raises
    ValueError for an unknown schedule, and unless 2 <= start <= end and total is at least the number of doublings.
    """
    if not 2 <= start <= end:
        raise ValueError(f"need 2 <= start <= end boundaries, got start = {start} and end = {end}")
    if total < 1:
        raise ValueError(f"need at least one step in total, got {total}")
    if not isinstance(step, Tensor):
        return int(n_boundaries(torch.tensor(step), total, start, end, schedule))
    k = step.clamp(0, total)
    match schedule:
        case "sqrt":
            growth = k.double() * (end**2 - start**2) / total + start**2
            return (torch.ceil(torch.sqrt(growth) - 1) + 1).long()
        case "doubling":
            s_0, s_1 = start - 1, end - 1
            stage = math.floor(total / (math.log2(s_1 // s_0) + 1))
            if stage < 1:
                raise ValueError(f"{total} steps are too few to double {s_0} intervals to {s_1}")
            doublings = torch.div(k, stage, rounding_mode="floor").clamp_max(math.ceil(math.log2(s_1 / s_0)))
            return (s_0 * 2**doublings).clamp_max(s_1) + 1
    raise unknown("schedule of boundaries", schedule, ("sqrt", "doubling"))


@dataclass(frozen=True)
class Boundaries:
    """N times, index i = 0 ... N - 1 from k_min up to k_max, for an N that changes as training goes on.

    k_i = (k_min^(1/rho) + i/(N-1) (k_max^(1/rho) - k_min^(1/rho)))^rho (arXiv 2303.01469, section 2; rho = inf:
    uniform in log k), whatever the process: `Process.grid(N - 1, k_min, k_max, rho)` backwards.
    """

    process: Process
    k_min: float = 0.002
    k_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not (0 < self.k_min < self.k_max < math.inf and self.rho > 0):
            raise ValueError(f"need 0 < k_min < k_max < inf and rho > 0, got {self}")

    def times(self, i: Tensor, n: int | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The times of the indices `i`, any shape, among n = N boundaries, an int or a tensor (); in `dtype`.

        Raises ValueError for fewer than two boundaries; a tensor's value is not looked at.
        """
        if not isinstance(n, Tensor) and n < 2:
            raise ValueError(f"need at least two boundaries, got {n}")
        u = i.double() / (n - 1)
        if math.isinf(self.rho):
            k = self.k_min * (self.k_max / self.k_min) ** u
        else:
            low, high = self.k_min ** (1 / self.rho), self.k_max ** (1 / self.rho)
            k = (low + u * (high - low)) ** self.rho
        return self.process.time(k).to(dtype)

    def draw_times(
        self, u: Tensor, n: int | Tensor, lognormal: tuple[float, float] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Neighbouring times (t, r), t > r, of u's shape and dtype, from u uniform in [0, 1), as `torch.rand` gives it.

        Every interval is as likely (CT), or with `lognormal` = (mean, std) as likely as log k ~ N(mean, std^2) is to
        fall into it (iCT, whose mean is -1.1 and std 2.0; arXiv 2310.14189, section 3.5). The interval is found in
        closed form: k is drawn from the normal cut off at k_min and k_max, then its index is `times` inverted. Raises
        ValueError as `times` does.
        """
        position = u.double()
        if lognormal is not None:
            mean, std = lognormal
            low, high = (self._normal_cdf((math.log(k) - mean) / std) for k in (self.k_min, self.k_max))
            log_k = mean + std * torch.special.ndtri(low + position * (high - low))
            position = self._position(log_k)
        i = torch.floor(position * (n - 1)).clamp_min(0).clamp_max(n - 2)
        return self.times(i + 1, n, u.dtype), self.times(i, n, u.dtype)

    def _position(self, log_k: Tensor) -> Tensor:
        """i / (N - 1) at which k_i = k: 0 at k_min, 1 at k_max."""
        if math.isinf(self.rho):
            low, high, value = math.log(self.k_min), math.log(self.k_max), log_k
        else:
            low, high = self.k_min ** (1 / self.rho), self.k_max ** (1 / self.rho)
            value = torch.exp(log_k / self.rho)
        position: Tensor = (value - low) / (high - low)
        return position

    @staticmethod
    def _normal_cdf(z: float) -> float:
        return 0.5 * math.erfc(-z / math.sqrt(2))


# --- losses --------------------------------------------------------------------------------------------------------


def pseudo_huber(a: Tensor, b: Tensor, c: float | None = None, event_dims: int = 1) -> Tensor:
    """sqrt(|a - b|^2 + c^2) - c, |.| over the last `event_dims` dimensions: one distance a row.

    c is 0.00054 sqrt(d) by default (arXiv 2310.14189, section 3.3).
    """
    difference = (a - b).flatten(-event_dims)
    if c is None:
        c = 0.00054 * math.sqrt(difference.shape[-1])
    return torch.sqrt((difference**2).sum(-1) + c**2) - c


def consistency_loss(
    process: Process,
    f: Denoise,
    x0: Tensor,
    t: Tensor,
    r: Tensor,
    noise: Tensor,
    *,
    target: Denoise | None = None,
    teacher: Denoise | None = None,
    solver: str = "ddim",
    weighting: str | GapWeighting = "uniform",
    metric: str | Metric = "l2",
    event_dims: int = 1,
) -> Tensor:
    """w(t, r) d(f(x_t, t), f_target(x_r, r)), row by row: shape x0.shape[:-event_dims].

    x0, noise: (S, B, d), or (B, *image*) with `event_dims` to match; t > r: scalars or one value a row, as
        `Boundaries.draw_times` gives them.
    target: the network the answer of which is the goal, f itself by default (iCT), or its average (CT, CD). No gradient
        runs through it, nor through a teacher.
    teacher: None is consistency training, x_r = perturb(x0, r, noise) (arXiv 2303.01469, algorithm 3). A denoiser is
        consistency distillation, x_r one step of `solver` from x_t (algorithm 2): any of `SOLVERS` but dpmpp2m.
    weighting: "uniform"; "gap", 1/(k_t - k_r) (iCT); or a function of (k_t, k_r).
    metric: "l2", the mean square over the event (the paper's |.|^2 is d times it); "huber", see `pseudo_huber`; or a
        function of (f(x_t, t), f_target(x_r, r)) that gives one distance a row.

    Raises ValueError for an unknown name, or shapes that differ.
    """
    check_shapes(x0, noise, event_dims, least=1)
    x_t = process.perturb(x0, t, noise)
    with torch.no_grad():
        x_r = process.perturb(x0, r, noise) if teacher is None else solver_step(process, teacher, x_t, t, r, solver)
        goal = of_shape((f if target is None else target)(x_r, r), x_r)
    distance = row_distance(of_shape(f(x_t, t), x_t), goal, metric, event_dims)
    if weighting == "uniform":
        return distance
    k_t, k_r = process.ratio(t), process.ratio(r)
    if callable(weighting):
        weight = weighting(k_t, k_r)
    elif weighting == "gap":
        weight = 1 / (k_t - k_r)
    else:
        raise unknown("weighting", weighting, ("uniform", "gap"))
    return expand(weight, distance) * distance


def row_distance(a: Tensor, b: Tensor, metric: str | Metric, event_dims: int = 1) -> Tensor:
    """A distance a row, a.shape[:-event_dims], by the `metric` "l2", "huber" or a function (see `consistency_loss`)."""
    if callable(metric):
        return metric(a, b)
    match metric:
        case "l2":
            return ((a - b) ** 2).flatten(-event_dims).mean(-1)
        case "huber":
            return pseudo_huber(a, b, event_dims=event_dims)
    raise unknown("metric", metric, ("l2", "huber"))


def consistency_tangent(f: Denoise, x: Tensor, t: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    """f(x, t) and its derivative as t runs and x moves with velocity `dx`, by `torch.func.jvp`: both of x's shape.

    With `dx` the velocity of the probability-flow ODE this is df/dt along a path, 0 for the exact f. That velocity is
    `Prediction("velocity", process).from_x0(D, x, t)`, given D = D(x, t).
    """
    t = t.contiguous()  # forward mode takes no expanded tensors
    return _jvp(f, (x.contiguous(), t), (dx.contiguous(), torch.ones_like(t)))


def _jvp(
    function: Callable[[Tensor, Tensor], Tensor], primals: tuple[Tensor, Tensor], tangents: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    value, tangent, *_ = torch.func.jvp(function, primals, tangents)
    return value, tangent


def scm_loss(
    prediction: Prediction,
    network: Network,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    teacher: Denoise | None = None,
    warmup: float | Tensor = 1.0,
    log_weight: Weighting | None = None,
    c: float | None = 0.1,
    event_dims: int = 1,
) -> Tensor:
    """Continuous-time consistency, sCM (arXiv 2410.11081, eq. 8 and algorithm 1): shape x0.shape[:-event_dims].

    The paper is written for TrigFlow, whose time is the angle theta with tan(theta) = k / c_d. Every process is that
    rotation, seen through a scale: with c^2 = a^2 c_d^2 + s^2,

        X = c_d x_t / c = cos(theta) x_0 + c_d sin(theta) e,      cos(theta) = a c_d / c,    sin(theta) = s / c,

    so the paper's equations hold on every process for X and theta, and need no derivative of the process. The network's
    answer to the edm prediction is m = -F, its input u = x_t / c = X / c_d, and what it should say is

        M = p x_0 + q e = (sin(theta) x_0 - c_d cos(theta) e) / c_d = -(dX/dtheta) / c_d,

    from the data pair (sCT), or from a teacher's D(x_t, t) in x_0's place (sCD). In these letters the paper's tangent

        g = -cos^2 (c_d F - dX/dtheta) - w cos sin (X + c_d dF/dtheta)  is  c_d [cos^2 (m - M) + w (J - cos sin u)],

    w the warm-up and J = cos sin dm/dtheta, one JVP: along the path, cos sin du/dtheta = -cos sin M, and the label,
    log(k)/4, moves by cos sin dlog(tan theta)/dtheta / 4 = 1/4. The loss, m_- the same answer without its gradient, is

        exp(v) mean((m - m_- + g / (|g| + c))^2) - v.

    x0, noise, t: as in `denoising_loss`, t > 0; the paper draws `lognormal_times(process, ..., mean=-1.0, std=1.4)`.
    teacher: None is training (sCT), a denoiser distillation (sCD).
    warmup: w, raised from 0 (where the loss's gradient is denoising score matching's) to 1 in the first steps.
    log_weight: v as a function of k, learnt with the network, so that the weighted error is 1 at every k; None: 0.
    c: of the tangent's normalisation; None leaves g as it is.

    Both the network's calls must see the same weights and give the same answer: no dropout. It must bear
    `torch.func.jvp`, as diffrl.nets do. Raises ValueError for another kind of prediction, or shapes that differ.
    """
    if prediction.kind != "edm":
        raise ValueError(f"sCM is written for the prediction 'edm', not {prediction.kind!r}")
    check_shapes(x0, noise, event_dims, least=1)
    x_t = prediction.process.perturb(x0, t, noise)
    u, label = prediction.inputs(x_t, t)
    m = of_shape(network(u, label), x0, "network")
    with torch.no_grad():
        p, q = prediction.coefficients(expand(t, x0))
        cos, sin = -q, prediction.data_std * p
        M = prediction.target(x0, noise, t) if teacher is None else prediction.from_x0(teacher(x_t, t), x_t, t)
        # Forward mode takes no expanded tensors.
        primals = u.detach().contiguous(), label.contiguous()
        _, J = _jvp(network, primals, ((-cos * sin * M).contiguous(), torch.full_like(primals[1], 0.25)))
        g = prediction.data_std * (cos**2 * (m - M) + warmup * (J - cos * sin * u))
        if c is not None:
            norm = torch.linalg.vector_norm(g.flatten(-event_dims), dim=-1)
            g = g / (expand(norm, g) + c)
    error = ((m - m.detach() + g) ** 2).flatten(-event_dims).mean(-1)
    if log_weight is None:
        return error
    v = expand(log_weight(prediction.process.ratio(t)), error)
    return torch.exp(v) * error - v


# --- sampling ------------------------------------------------------------------------------------------------------


def consistency_sample(
    f: Denoise,
    process: Process,
    x: Tensor,
    times: Tensor,
    generator: torch.Generator | None = None,
    *,
    noise: Tensor | None = None,
    clip: Clip | None = None,
    eps: float = 0.0,
    check: bool = True,
) -> Tensor:
    """Data from `x` at times[0]: f(x, t_0), then perturbed to each further t_i and taken back (algorithm 1 of CM).

    times: (T,), decreasing; one entry is one-step sampling. On x's device they can be captured.
    generator, noise: what T > 1 needs, one of them: standard normal noise (T - 1, *x.shape), drawn in one call. Under
        torch.compile pass the noise.
    clip: (low, high), to which each answer of f is clamped.
    eps: the time to which f carries, 0, or `KarrasBoundary`'s eps: x_i = (a_i/a) x_eps + sqrt(s_i^2 - (a_i s/a)^2) z.
    check: whether times on the CPU are looked at first, but for calls that are compiled or under torch.func; False
        where `check_times` has looked at them.

    A tensor of x's shape, at least float32; differentiable in `x` and in whatever `f` holds. Raises ValueError for
    times of a wrong shape, and, where they are looked at, that do not decrease or lie outside of the process; for noise
    that is missing or of a wrong shape; for an f that changes the shape of x.
    """
    if times.ndim != 1 or len(times) < 1:
        raise ValueError(f"times must be a vector of T >= 1 decreasing values, got shape {tuple(times.shape)}")
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if check and times.device.type == "cpu" and not transformed:
        check_times(process, times)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    z = step_noise(x, len(times) - 1, generator, noise).unbind() if len(times) > 1 or noise is not None else ()
    times = times.to(x.device, x.dtype)
    end = times.new_full((), eps)
    a, s = process.alpha(end), process.sigma(end)
    for i, t in enumerate(times.unbind()):
        if i > 0:
            a_i = process.alpha(t) / a
            x = a_i * x + torch.sqrt(process.sigma(t) ** 2 - (a_i * s) ** 2) * z[i - 1]
        x = of_shape(f(x, t), x).to(x.dtype)
        x = x if clip is None else x.clamp(*clip)
    return x
