import math
from itertools import pairwise

import pytest
import torch
from diffusion_cases import F64, PROCESSES, close, gaussian, network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffrl.diffusion import (
    SOLVERS,
    VE,
    VP,
    Churn,
    Gaussian,
    Langevin,
    Prediction,
    Process,
    RectifiedFlow,
    Sampler,
    TrigFlow,
    consistency_sample,
    discrete_grid,
    expand,
    reverse_step,
    sample,
    solver_step,
)
from tests.rounding import assert_equal_to_rounding

process_parameter = pytest.mark.parametrize("process", PROCESSES, ids=str)
solver_parameter = pytest.mark.parametrize("solver", SOLVERS)
ORDER = {"ddim": 1, "dpm1": 1, "dpm2": 2, "dpm3": 3, "dpmpp2m": 2, "heun": 2}


def tanh_denoiser(x: Tensor, t: Tensor) -> Tensor:
    """A denoiser that is no Gaussian's: it mixes the coordinates and bends."""
    return torch.tanh(0.8 * x + 0.3 * x.roll(1, -1))


def in_y(process: Process):
    """The same denoiser on every process: a function of y = x/alpha and k alone."""
    return lambda x, t: torch.tanh(x / process.alpha(t) / (1 + process.ratio(t)) + 0.3)


# --- orders and expected figures -----------------------------------------------------------------------------------


def flow_error(process: Process, solver: str, n: int) -> float:
    """RMS error in y for starts x ~ N(0, sigma^2) at k = 20: two points give the expectation of an affine error."""
    data = gaussian()
    times = process.grid(n, 0.02, 20.0, dtype=F64)
    x = process.sigma(times[0]) * torch.tensor([[-1.0, -1.0], [1.0, 1.0]], dtype=F64)
    error = sample(process, data.denoiser(process), x, times, solver) - data.flow(process, x, times[0], times[-1])
    return ((error / process.alpha(times[-1])) ** 2).sum(-1).mean().sqrt().item()


@solver_parameter
@process_parameter
def test_solvers_converge_at_their_order(process: Process, solver: str) -> None:
    errors = [flow_error(process, solver, n) for n in (64, 128, 256)]
    for coarse, fine in pairwise(errors):
        assert abs(math.log2(coarse / fine) - ORDER[solver]) < 0.1


@pytest.mark.parametrize(
    ("solver", "figures"),
    [
        ("ddim", (2.1e-1, 5.4e-2, 1.4e-2)),
        ("dpm1", (2.1e-1, 5.4e-2, 1.4e-2)),
        ("dpm2", (2.5e-2, 1.5e-3, 9.3e-5)),
        ("dpm3", (2.7e-4, 3.3e-6, 4.8e-8)),
        ("dpmpp2m", (2.1e-2, 1.4e-3, 9.0e-5)),
        ("heun", (5.2e-2, 3.0e-3, 1.9e-4)),
    ],
)
def test_errors_are_the_expected_figures(solver: str, figures: tuple[float, ...]) -> None:
    for n, figure in zip((16, 64, 256), figures, strict=True):
        unit = 10.0 ** (math.floor(math.log10(figure)) - 1)
        assert abs(flow_error(VP(), solver, n) - figure) <= 0.6 * unit


def propagate(process: Process, data: Gaussian, times: Tensor, **options) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the result for Gaussian data, exactly: it is affine in the start and in every noise."""
    n, d = len(times) - 1, len(data.mean)
    mean, std = data.marginal(process, times[0])
    x = mean.repeat(n + 2, 1)
    x[1] += std
    noise = torch.zeros(n, n + 2, d, dtype=F64)
    noise[torch.arange(n), torch.arange(n) + 2] = 1
    x = sample(process, data.denoiser(process), x, times, noise=noise, **options)
    return x[0], ((x[1:] - x[0]) ** 2).sum(0).sqrt()


@pytest.mark.parametrize(("eta", "figure"), [(0.0, 1.3e-2), (0.5, 1.6e-2), (1.0, 2.6e-2)])
def test_noise_keeps_the_marginals_to_first_order(eta: float, figure: float) -> None:
    process, data = VP(), gaussian()

    def w2(n: int) -> float:
        times = process.grid(n, 0.02, 20.0, dtype=F64)
        mean, std = data.marginal(process, times[-1])
        m, v = propagate(process, data, times, eta=eta)
        return torch.hypot(m - mean, v - std)[0].item()

    assert abs(w2(64) - figure) < 0.06e-2
    assert abs(math.log2(w2(256) / w2(512)) - 1) < 0.05


@process_parameter
def test_churn_keeps_the_marginals(process: Process) -> None:
    """Noise added and removed again: of second order, as Heun is, and the same on every process in y."""
    data = gaussian()

    def w2(n: int) -> float:
        times = process.grid(n, 0.02, 20.0, dtype=F64)
        mean, std = data.marginal(process, times[-1])
        churn = Churn(S_churn=4.0, S_tmin=0.05, S_tmax=10.0)
        m, v = propagate(process, data, times, solver="heun", churn=churn)
        return (torch.hypot(m - mean, v - std).norm() / process.alpha(times[-1])).item()

    assert w2(128) < 2e-3
    assert w2(64) / w2(128) > 3


def test_churn_of_too_much_noise_shows() -> None:
    """S_noise scales the variance that is put in: 2 in place of 1 cannot go unnoticed."""
    times = VP().grid(64, 0.02, 20.0, dtype=F64)
    _, plain = propagate(VP(), gaussian(), times, solver="heun", churn=Churn(S_churn=4.0))
    _, noisy = propagate(VP(), gaussian(), times, solver="heun", churn=Churn(S_churn=4.0, S_noise=2.0))
    assert (noisy > 1.1 * plain).all()


# --- everything is VE in y = x/a -----------------------------------------------------------------------------------


@given(
    log_k=st.lists(st.floats(-3.5, 3.5), min_size=2, max_size=7, unique_by=lambda v: round(v, 2)),
    solver=st.sampled_from(SOLVERS),
    eta=st.floats(0, 1),
    to_zero=st.booleans(),
)
@settings(deadline=None)
def test_every_process_is_ve_in_y(log_k: list[float], solver: str, eta: float, to_zero: bool) -> None:
    k = torch.tensor(sorted(log_k, reverse=True), dtype=F64).exp()
    if to_zero:
        k = torch.cat([k, k.new_zeros(1)])
    eta = eta if solver == "ddim" else 0.0
    y = torch.tensor([[0.3, -1.2, 2.0]], dtype=F64) * k[0]
    noise = torch.randn(len(k) - 1, 1, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    results = []
    for process in PROCESSES:
        times = process.time(k)
        x = sample(process, in_y(process), process.alpha(times[0]) * y, times, solver, eta, noise=noise)
        results.append(x / process.alpha(times[-1]))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-10, atol=1e-10)


@process_parameter
def test_churn_is_the_same_in_y(process: Process) -> None:
    k = VE().grid(8, 0.05, 10.0, dtype=F64)
    y, noise = torch.randn(2, 3, dtype=F64) * k[0], torch.randn(8, 2, 3, dtype=F64)
    churn = Churn(S_churn=3.0, S_tmin=0.1, S_tmax=5.0, S_noise=1.003)
    expected = sample(VE(), in_y(VE()), y, k, "heun", churn=churn, noise=noise)
    t = process.time(k)
    x = sample(process, in_y(process), process.alpha(t[0]) * y, t, "heun", churn=churn, noise=noise)
    close(x / process.alpha(t[-1]), expected)


# --- identities ----------------------------------------------------------------------------------------------------


@process_parameter
def test_ddim_is_dpm_solver_1(process: Process) -> None:
    """DPM-Solver-1 as its paper writes it (arXiv 2206.00927, eq. 3.7): in lambda = log(a/s) and the noise."""
    times = process.grid(9, 0.02, 20.0, dtype=F64)
    x = process.sigma(times[0]) * torch.randn(4, 3, dtype=F64)
    ours = sample(process, tanh_denoiser, x, times)
    close(ours, sample(process, tanh_denoiser, x, times, "dpm1"), atol=0)
    for t, r in pairwise(times):
        a, s, b, w = process.alpha(t), process.sigma(t), process.alpha(r), process.sigma(r)
        h = torch.log(b / w) - torch.log(a / s)
        x = b / a * x - w * torch.expm1(h) * (x - a * tanh_denoiser(x, t)) / s
    close(ours, x, atol=1e-11)


def test_ddim_on_rectified_flow_is_euler_on_the_velocity() -> None:
    process = RectifiedFlow()
    velocity = Prediction("velocity", process)
    times = torch.linspace(1, 0, 8, dtype=F64)
    x = torch.randn(4, 3, dtype=F64)
    ours = sample(process, velocity.denoiser(network), x, times)
    for t, r in pairwise(times):
        x = x + (r - t) * network(x, t)
    close(ours, x)


def test_eta_1_is_the_ddpm_posterior() -> None:
    """Ho et al. 2020, eq. 6 and 7, from the betas of a schedule."""
    betas = torch.linspace(0.01, 0.4, 6, dtype=F64)
    alpha_bar = torch.cumprod(1 - betas, 0)
    t = -torch.log(alpha_bar)
    x, x0 = torch.randn(4, 3, dtype=F64), torch.randn(4, 3, dtype=F64)
    for i in range(1, 6):
        mean = (
            alpha_bar[i - 1].sqrt() * betas[i] / (1 - alpha_bar[i]) * x0
            + (1 - betas[i]).sqrt() * (1 - alpha_bar[i - 1]) / (1 - alpha_bar[i]) * x
        )
        variance = (1 - alpha_bar[i - 1]) / (1 - alpha_bar[i]) * betas[i]
        ours, n = reverse_step(VP(), x, x0, t[i], t[i - 1], eta=1.0)
        close(ours, mean)
        close(n**2, variance)


def test_dpm_solver_2_and_3_are_the_papers() -> None:
    """DPM-Solver (arXiv 2206.00927), algorithms 1 and 2, one step on VP, written in the paper's letters."""
    process = VP()
    s, t = process.time(torch.tensor([3.0, 0.8], dtype=F64))
    x = torch.randn(4, 3, dtype=F64)
    lam = lambda t: -torch.log(process.ratio(t))  # noqa: E731
    t_lam = lambda lam: process.time(torch.exp(-lam))  # noqa: E731
    alpha, sigma = process.alpha, process.sigma
    eps = lambda x, t: (x - alpha(t) * tanh_denoiser(x, t)) / sigma(t)  # noqa: E731
    h = lam(t) - lam(s)

    s_1 = t_lam(lam(s) + h / 2)
    u = alpha(s_1) / alpha(s) * x - sigma(s_1) * torch.expm1(h / 2) * eps(x, s)
    second = alpha(t) / alpha(s) * x - sigma(t) * torch.expm1(h) * eps(u, s_1)
    close(sample(process, tanh_denoiser, x, torch.stack([s, t]), "dpm2"), second)

    r_1, r_2 = 1 / 3, 2 / 3
    s_1, s_2 = t_lam(lam(s) + r_1 * h), t_lam(lam(s) + r_2 * h)
    u_1 = alpha(s_1) / alpha(s) * x - sigma(s_1) * torch.expm1(r_1 * h) * eps(x, s)
    D_1 = eps(u_1, s_1) - eps(x, s)
    u_2 = (
        alpha(s_2) / alpha(s) * x
        - sigma(s_2) * torch.expm1(r_2 * h) * eps(x, s)
        - sigma(s_2) * r_2 / r_1 * (torch.expm1(r_2 * h) / (r_2 * h) - 1) * D_1
    )
    D_2 = eps(u_2, s_2) - eps(x, s)
    third = (
        alpha(t) / alpha(s) * x
        - sigma(t) * torch.expm1(h) * eps(x, s)
        - sigma(t) / r_2 * (torch.expm1(h) / h - 1) * D_2
    )
    close(sample(process, tanh_denoiser, x, torch.stack([s, t]), "dpm3"), third)


def test_dpm_solver_pp_2m_is_the_papers() -> None:
    """DPM-Solver++ (arXiv 2211.01095), algorithm 2."""
    process = VP()
    times = process.time(torch.tensor([5.0, 2.5, 1.5, 0.4], dtype=F64))
    lam = -torch.log(process.ratio(times))
    x = start = torch.randn(4, 3, dtype=F64)
    before = None
    for i in range(1, 4):
        h = lam[i] - lam[i - 1]
        now = tanh_denoiser(x, times[i - 1])
        D = now
        if before is not None:
            r = (lam[i - 1] - lam[i - 2]) / h
            D = (1 + 1 / (2 * r)) * now - 1 / (2 * r) * before
        before = now
        x = process.sigma(times[i]) / process.sigma(times[i - 1]) * x - process.alpha(times[i]) * torch.expm1(-h) * D
    close(sample(process, tanh_denoiser, start, times, "dpmpp2m"), x)


@pytest.mark.parametrize("S_churn", [2.0, 80.0])  # the second is cut at gamma = sqrt(2) - 1
def test_heun_with_churn_is_edms(S_churn: float) -> None:
    """Karras et al. 2022, algorithm 2, on VE, in the paper's letters."""
    N, churn = 6, Churn(S_churn=S_churn, S_tmin=0.05, S_tmax=5.0, S_noise=1.003)
    t = VE().grid(N, 0.02, 20.0, rho=7, to_zero=True, dtype=F64)
    noise = torch.randn(N, 4, 3, dtype=F64)
    x = start = 20 * torch.randn(4, 3, dtype=F64)
    calls = 0

    def D(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return tanh_denoiser(x, t)

    for i in range(N):
        gamma = min(churn.S_churn / N, math.sqrt(2) - 1) if churn.S_tmin <= t[i] <= churn.S_tmax else 0.0
        t_hat = t[i] + gamma * t[i]
        x_hat = x + (t_hat**2 - t[i] ** 2).sqrt() * churn.S_noise * noise[i]
        d = (x_hat - D(x_hat, t_hat)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_prime = (x - D(x, t[i + 1])) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d / 2 + d_prime / 2)
    assert calls == 2 * N - 1
    ours = sample(VE(), D, start, t, "heun", churn=churn, noise=noise)
    assert calls == 2 * (2 * N - 1)
    close(ours, x)


def test_diffusion_qls_sampler() -> None:
    """The published 5-step sampler written out: vp_beta_schedule, predict_start_from_noise, clamp, q_posterior."""
    T, b_max, b_min = 5, 10.0, 0.1
    t = torch.arange(1, T + 1, dtype=F64)
    betas = 1 - torch.exp(-b_min / T - 0.5 * (b_max - b_min) * (2 * t - 1) / T**2)
    alphas_cumprod = torch.cumprod(1 - betas, 0)
    alphas_cumprod_prev = torch.cat([torch.ones(1, dtype=F64), alphas_cumprod[:-1]])
    coef1 = betas * alphas_cumprod_prev.sqrt() / (1 - alphas_cumprod)
    coef2 = (1 - alphas_cumprod_prev) * (1 - betas).sqrt() / (1 - alphas_cumprod)
    variance = (betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)).clamp_min(1e-20)
    labels = discrete_grid("vp", T, dtype=F64)

    S, B, A = 2, 7, 3
    x = start = 2 * torch.randn(S, B, A, dtype=F64)
    noise = torch.randn(T, S, B, A, dtype=F64)
    clipped = 0
    for step, i in enumerate(reversed(range(T))):
        eps = 2 * network(x, labels[step])
        x_recon = torch.sqrt(1 / alphas_cumprod[i]) * x - torch.sqrt(1 / alphas_cumprod[i] - 1) * eps
        clipped += int((x_recon.abs() > 1).sum())
        x_recon = x_recon.clamp(-1, 1)
        x = coef1[i] * x_recon + coef2[i] * x + (i > 0) * variance[i].sqrt() * noise[step]

    prediction = Prediction("eps", VP())
    D = prediction.denoiser(lambda x, t: 2 * network(x, t), clip=(-1, 1))
    assert clipped > 0
    close(sample(VP(), D, start, labels, eta=1.0, noise=noise), x)
    D = prediction.denoiser(lambda x, t: 2 * network(x, t))
    close(sample(VP(), D, start, labels, eta=1.0, noise=noise, clip=(-1, 1)), x)


# --- noise bookkeeping ---------------------------------------------------------------------------------------------


@given(
    log_k=st.lists(st.floats(-4, 4), min_size=2, max_size=6, unique_by=lambda v: round(v, 2)),
    eta=st.floats(0, 1),
    process=st.sampled_from(PROCESSES),
)
@settings(deadline=None)
def test_a_point_mass_is_sampled_exactly(log_k: list[float], eta: float, process: Process) -> None:
    """x_t = a mu + s e throughout: eta and N change e, whose variance stays 1, and nothing else."""
    k = torch.tensor([*sorted(log_k, reverse=True), -math.inf], dtype=F64).exp()
    times = process.time(k)
    point = Gaussian(torch.tensor([1.5], dtype=F64), torch.zeros(1, dtype=F64))
    mean, std = propagate(process, point, times[:-1], eta=eta)
    close(mean, process.alpha(times[-2]) * point.mean)
    torch.testing.assert_close(std, process.sigma(times[-2])[None], rtol=1e-10, atol=1e-12)
    x = sample(process, point.denoiser(process), torch.full((1, 1), 3.0, dtype=F64), times, eta=0)
    close(x, point.mean[None])


@given(log_k=st.tuples(st.floats(-5, 5), st.floats(-5, 5)), eta=st.floats(0, 1), process=st.sampled_from(PROCESSES))
def test_noise_is_at_most_the_noise_there_is(log_k: tuple[float, float], eta: float, process: Process) -> None:
    """0 <= n^2 <= w^2, and what is left of w^2 is on e."""
    r, t = process.time(torch.tensor(sorted(log_k), dtype=F64).exp())
    one = torch.ones(1, dtype=F64)
    mean, n = reverse_step(process, process.sigma(t) * one, 0 * one, t, r, eta)  # x_0 = 0, e = 1
    w = process.sigma(r)
    assert 0 <= n <= w * (1 + 1e-12)
    torch.testing.assert_close(mean**2 + n**2, (w**2)[None], rtol=1e-12, atol=1e-300)
    q = (process.ratio(r) / process.ratio(t)) ** 2
    torch.testing.assert_close(n**2, eta**2 * w**2 * (1 - q), rtol=1e-6, atol=1e-12)


def test_steps_take_one_time_a_row() -> None:
    process = VP()
    x, x0 = torch.randn(2, 4, 3, dtype=F64), torch.randn(2, 4, 3, dtype=F64)
    t = torch.rand(2, 4, dtype=F64) + 1
    mean, n = reverse_step(process, x, x0, t, t / 2, eta=0.5)
    assert n.shape == (2, 4, 1)
    alone, n_alone = reverse_step(process, x[1, 2], x0[1, 2], t[1, 2], t[1, 2] / 2, eta=0.5)
    close(mean[1, 2], alone)
    close(n[1, 2, 0], n_alone)


def test_a_generator_is_its_noise(generator: torch.Generator) -> None:
    times = discrete_grid("vp", 5)
    x = torch.randn(3, 2)
    noise = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0))
    drawn = sample(VP(), tanh_denoiser, x, times, eta=0.7, generator=generator)
    close(drawn, sample(VP(), tanh_denoiser, x, times, eta=0.7, noise=noise), atol=0)


@solver_parameter
def test_the_chain_holds_every_state(solver: str) -> None:
    times = VP().grid(6, 0.05, 10.0, dtype=F64)
    x = torch.randn(2, 3, 4, dtype=F64)
    chain = sample(VP(), tanh_denoiser, x, times, solver, return_chain=True)
    assert chain.shape == (7, 2, 3, 4)
    close(chain[0], x, atol=0)
    close(chain[-1], sample(VP(), tanh_denoiser, x, times, solver), atol=0)
    close(chain[3], sample(VP(), tanh_denoiser, x, times[:4], solver), atol=0)


# --- the predictor-corrector ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "eta"), [("ddim", 0.7), *((s, 0.0) for s in SOLVERS if s != "dpmpp2m")])
def test_the_corrector_is_the_papers(solver: str, eta: float) -> None:
    """Song et al. 2021, algorithms 2 and 4, on VE, in the paper's letters: one row, M = 2 steps at the new level."""
    M, r = 2, 0.3
    own = int(eta > 0)
    times = VE().grid(4, 0.05, 10.0, dtype=F64)
    noise = torch.randn(4 * (own + M), 1, 3, dtype=F64)
    x = start = 10 * torch.randn(1, 3, dtype=F64)
    for i in range(4):
        z = noise[i * (own + M) :]
        x = sample(VE(), tanh_denoiser, x, times[i : i + 2], solver, eta, noise=z[:1] if own else None)
        for j in range(M):
            g = (tanh_denoiser(x, times[i + 1]) - x) / times[i + 1] ** 2
            epsilon = 2 * (r * z[own + j].norm() / g.norm()) ** 2
            x = x + epsilon * g + torch.sqrt(2 * epsilon) * z[own + j]
    ours = sample(VE(), tanh_denoiser, start, times, solver, eta, noise=noise, corrector=Langevin(M, snr=r))
    close(ours, x)


def test_a_correction_keeps_the_marginal_to_first_order_and_draws_to_it() -> None:
    """Exactly, for a Gaussian of mean m, variance V: epsilon common to the batch makes the correction affine.

    From mean m_x and variance v to m + (1 - epsilon/V)(m_x - m) and (1 - epsilon/V)^2 v + 2 epsilon, which is
    V + epsilon^2/V where v = V.
    """
    process, data = VP(), gaussian()
    t = process.time(torch.tensor(1.0, dtype=F64))
    times = torch.stack([t, t - 1e-13])  # a predictor that stays, but for rounding
    m, std = data.marginal(process, t)
    V = std**2
    for m_x, v in [(m, V), (m + 1, 4 * V), (m - 2, V / 4)]:
        x = torch.stack([m_x, m_x + v.sqrt(), m_x])
        noise = torch.zeros(1, 3, 2, dtype=F64)
        noise[0, 2] = 1
        x = sample(process, data.denoiser(process), x, times, noise=noise, corrector=Langevin(snr=0.3))
        root = (x[2] - x[0])[0]  # sqrt(2 epsilon)
        epsilon = root**2 / 2
        after = ((x[1:] - x[0]) ** 2).sum(0)
        assert 0.001 < epsilon < V.min()
        close(x[2] - x[0], root.expand(2))
        close(x[0], m + (1 - epsilon / V) * (m_x - m))
        close(after, (1 - epsilon / V) ** 2 * v + 2 * epsilon)
        if v is V:
            close(after, V + epsilon**2 / V)
        else:
            assert ((after - V).abs() < (v - V).abs()).all()
            assert ((x[0] - m).abs() < (m_x - m).abs()).all()


def test_corrections_make_up_for_few_steps() -> None:
    """Four steps of DDIM make the deviations 17 and 23% too small; 20 corrections a step leave +3 and -5%.

    20,000 samples, whose deviation has a noise of half a percent; three seeds were within 1% of these figures.
    """
    process, data = VP(), gaussian()
    times = process.grid(4, 0.3, 20.0, dtype=F64)
    mean, std = data.marginal(process, times[-1])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 2, dtype=F64, generator=generator)

    def error(corrector: Langevin | None) -> float:
        out = sample(process, data.denoiser(process), x, times, generator=generator, corrector=corrector)
        return torch.hypot((out.mean(0) - mean) / std, (out.std(0) - std) / std).max().item()

    assert error(None) > 0.2
    assert error(Langevin(steps=20, snr=0.16)) < 0.08


@process_parameter
def test_corrections_are_the_same_in_y(process: Process) -> None:
    k = VE().grid(8, 0.05, 10.0, dtype=F64)
    y, noise = torch.randn(2, 3, dtype=F64) * k[0], torch.randn(24, 2, 3, dtype=F64)
    options = {"eta": 0.5, "noise": noise, "corrector": Langevin(steps=2)}
    expected = sample(VE(), in_y(VE()), y, k, **options)
    t = process.time(k)
    x = sample(process, in_y(process), process.alpha(t[0]) * y, t, **options)
    close(x / process.alpha(t[-1]), expected, atol=1e-10)


@solver_parameter
@process_parameter
def test_a_corrector_of_no_size_is_none(process: Process, solver: str) -> None:
    """To the last bit, behind every solver, with churn where it goes with it."""
    times = process.grid(6, 0.02, 20.0, to_zero=True)
    x = process.sigma(times[0]) * torch.randn(2, 5, 3)
    plain = sample(process, tanh_denoiser, x, times, solver, return_chain=True)
    noise = torch.randn(6, 2, 2, 5, 3)
    options = {"corrector": Langevin(steps=2, snr=0.0), "return_chain": True}
    close(sample(process, tanh_denoiser, x, times, solver, noise=noise.flatten(0, 1), **options), plain, atol=0)
    if solver != "dpmpp2m":
        churned = sample(process, tanh_denoiser, x, times, solver, churn=Churn(2.0), noise=noise[:, 0])
        noise = torch.cat([noise, noise[:, :1]], 1).flatten(0, 1)
        options = {"churn": Churn(2.0), "corrector": Langevin(steps=2, snr=0.0)}
        close(sample(process, tanh_denoiser, x, times, solver, noise=noise, **options), churned, atol=0)


def test_the_size_of_a_correction_is_of_the_batch_and_of_no_other_seed() -> None:
    times = VP().grid(3, 0.1, 5.0, dtype=F64)
    x, noise = torch.randn(2, 4, 3, dtype=F64), torch.randn(3, 2, 4, 3, dtype=F64)
    both = sample(VP(), tanh_denoiser, x, times, noise=noise, corrector=Langevin())
    close(both[1], sample(VP(), tanh_denoiser, x[1], times, noise=noise[:, 1], corrector=Langevin()))
    half = sample(VP(), tanh_denoiser, x[:, :2], times, noise=noise[:, :, :2], corrector=Langevin())
    assert (both[:, :2] - half).abs().max() > 1e-3
    image = sample(VP(), tanh_denoiser, x, times, noise=noise, corrector=Langevin(event_dims=2))  # (B, height, width)
    flat = lambda x, t: tanh_denoiser(x.unflatten(-1, (4, 3)), t).flatten(-2)  # noqa: E731
    rows = sample(VP(), flat, x.flatten(-2), times, noise=noise.flatten(-2), corrector=Langevin())
    close(image.flatten(-2), rows)
    alone = sample(VP(), tanh_denoiser, x[0, 0], times, noise=noise[:, 0, 0], corrector=Langevin())  # no batch axis
    close(alone, sample(VP(), tanh_denoiser, x[0, :1], times, noise=noise[:, 0, :1], corrector=Langevin())[0])


def test_corrections_stop_short_of_the_data_and_are_in_the_chain() -> None:
    """T = 6 steps, the last to k = 0: 6 calls of DDIM, and 5 times 2 of its corrector."""
    count = 0

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return tanh_denoiser(x, t)

    times = VP().grid(6, 0.02, 20.0, to_zero=True, dtype=F64)
    x, noise = torch.randn(4, 3, dtype=F64), torch.randn(12, 4, 3, dtype=F64)
    chain = sample(VP(), denoise, x, times, noise=noise, corrector=Langevin(steps=2), return_chain=True)
    assert count == 6 + 10
    assert chain.shape == (7, 4, 3)
    close(chain[-1], tanh_denoiser(chain[-2], times[-2]))
    close(chain[2], sample(VP(), denoise, x, times[:3], noise=noise[:4], corrector=Langevin(steps=2)))


def test_without_a_score_nothing_is_corrected() -> None:
    """epsilon would be 1/0."""
    x = torch.zeros(3, 2)
    out = sample(VP(), lambda x, t: 0 * x, x, VP().grid(2, 0.1, 1.0), noise=torch.randn(2, 3, 2), corrector=Langevin())
    close(out, x, atol=0)


def test_a_sampler_says_how_much_noise_it_takes(generator: torch.Generator) -> None:
    times, x = discrete_grid("vp", 5), torch.randn(3, 2)
    for options, draws in [
        ({}, 0),
        ({"eta": 0.5}, 5),
        ({"corrector": Langevin(steps=3)}, 15),
        ({"eta": 0.5, "corrector": Langevin(steps=3)}, 20),
        ({"solver": "heun", "churn": Churn(1.0), "corrector": Langevin()}, 10),
    ]:
        sampler = Sampler(VP(), times, **options)
        assert sampler.n_noise == draws
        assert sampler.draws_noise == (draws > 0)
        if draws:
            drawn = sampler(tanh_denoiser, x, torch.Generator().manual_seed(3))
            noise = torch.randn(draws, 3, 2, generator=torch.Generator().manual_seed(3))
            close(drawn, sampler(tanh_denoiser, x, noise=noise), atol=0)
            with pytest.raises(ValueError, match=rf"noise must have shape .* = \({draws}, 3, 2\)"):
                sampler(tanh_denoiser, x, noise=noise[1:])


# --- edges ---------------------------------------------------------------------------------------------------------


@solver_parameter
@process_parameter
def test_the_last_step_may_end_at_zero(process: Process, solver: str) -> None:
    """Its result is D there: of first order and finite, gradients too."""
    times = process.grid(6, 0.02, 20.0, to_zero=True, dtype=F64)
    start = (process.sigma(times[0]) * torch.randn(4, 2, dtype=F64)).requires_grad_()
    chain = sample(process, tanh_denoiser, start, times, solver, return_chain=True)
    close(chain[-1], tanh_denoiser(chain[-2], times[-2]))
    (gradient,) = torch.autograd.grad(chain[-1].sum(), start)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(("solver", "calls"), [("ddim", 6), ("dpm2", 11), ("dpm3", 16), ("dpmpp2m", 6), ("heun", 11)])
def test_calls_of_the_denoiser(solver: str, calls: int) -> None:
    count = 0

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        nonlocal count
        count += 1
        assert t.shape == ()
        assert x.dtype == t.dtype == torch.float32
        return tanh_denoiser(x, t)

    sample(VP(), denoise, torch.randn(2, 3), VP().grid(6, 0.02, 20.0, to_zero=True), solver)
    assert count == calls


@solver_parameter
@pytest.mark.parametrize(("process", "end"), [(RectifiedFlow(), 1.0), (TrigFlow(), math.pi / 2)], ids=str)
def test_sampling_may_start_where_alpha_is_zero(process: Process, end: float, solver: str) -> None:
    """RF at t = 1: the first step is Euler's in x, and the rest goes on from there."""
    times = torch.linspace(end, 0, 7, dtype=F64)
    x = torch.randn(4, 2, dtype=F64)
    data = gaussian()
    chain = sample(process, data.denoiser(process), x, times, solver, return_chain=True)
    assert torch.isfinite(chain).all()
    single = sample(process, gaussian(torch.float32).denoiser(process), x.float(), times.float(), solver)
    close(single.double(), chain[-1], atol=1e-5)
    close(chain[1], process.alpha(times[1]) * data.mean + process.sigma(times[1]) * x)
    if solver != "dpmpp2m":  # which remembers the first step
        close(chain[-1], sample(process, data.denoiser(process), chain[1], times[1:], solver))
    if process == RectifiedFlow():
        noisy = sample(process, data.denoiser(process), x, times, eta=1.0, noise=torch.randn(6, 4, 2, dtype=F64))
        assert torch.isfinite(noisy).all()
        churned = sample(
            process, data.denoiser(process), x, times, "heun", churn=Churn(1.0), noise=torch.zeros(6, 4, 2)
        )
        assert torch.isfinite(churned).all()


@solver_parameter
@process_parameter
def test_float32_is_float64_to_rounding(process: Process, solver: str) -> None:
    times = process.grid(64, 0.02, 20.0)
    x = process.sigma(times[0]) * torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    single = sample(process, gaussian(torch.float32).denoiser(process), x, times, solver)
    double = sample(process, gaussian().denoiser(process), x.double(), times.double(), solver)
    assert single.dtype == torch.float32
    assert_equal_to_rounding(single, double, 2 * 64)  # the steps


def test_the_state_is_at_least_float32() -> None:
    x = torch.randn(3, 2, dtype=torch.bfloat16)
    out = sample(VP(), lambda x, t: tanh_denoiser(x, t).bfloat16(), x, discrete_grid("vp", 5))
    assert out.dtype == torch.float32


# --- gradients, compilation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "eta"), [("ddim", 1.0), *((solver, 0.0) for solver in SOLVERS)])
def test_gradient_through_sampling_is_the_finite_difference(solver: str, eta: float) -> None:
    times = discrete_grid("vp", 5, dtype=F64)
    noise = torch.randn(5, 1, 3, dtype=F64)
    x = torch.randn(1, 3, dtype=F64)
    weight = torch.tensor(0.7, dtype=F64)

    def run(weight: Tensor, x: Tensor) -> Tensor:
        D = Prediction("eps", VP()).denoiser(lambda x, t: torch.tanh(weight * x + 0.1 * t))
        return sample(VP(), D, x, times, solver, eta, noise=noise)

    assert torch.autograd.gradcheck(run, (weight.requires_grad_(), x.requires_grad_()))


def test_clipped_entries_pass_no_gradient() -> None:
    times = torch.tensor([1.0, 0.0])
    x = torch.tensor([[0.1, 50.0]], requires_grad=True)
    out = sample(VP(), lambda x, t: x, x, times, clip=(-1, 1))
    close(torch.autograd.grad(out.sum(), x)[0], torch.tensor([[1.0, 0.0]]), atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("corrector", [None, Langevin(steps=1)], ids=["alone", "corrected"])
@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_sampling_is_one_graph(solver: str, corrector: Langevin | None) -> None:
    """No break and no look at a value: torch.compile with fullgraph, traced only, for want of time."""
    times = discrete_grid("vp", 3)
    eta = 1.0 if solver == "ddim" else 0.0
    D = Prediction("velocity", VP()).denoiser(network, clip=(-1, 1))

    sampler = Sampler(VP(), times, solver, eta, corrector=corrector)

    def run(x: Tensor, noise: Tensor) -> Tensor:
        return sampler(D, x, noise=noise)

    x, noise = torch.randn(4, 2), torch.randn(max(sampler.n_noise, 3), 4, 2)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    eager = sample(VP(), D, x, times, solver, eta, noise=noise, corrector=corrector)
    close(compiled(x, noise), eager, atol=1e-6)


# --- single steps by row -------------------------------------------------------------------------------------------


@process_parameter
@pytest.mark.parametrize("solver", [solver for solver in SOLVERS if solver != "dpmpp2m"])
def test_a_single_step_is_the_samplers_on_a_grid_of_two(process: Process, solver: str) -> None:
    """Row by row at its own times, also down to 0, and from pure noise."""
    k, k_r = torch.tensor([[5.0, 0.8, 0.3, 80.0, 0.05], [2.0, 0.7, 0.0, 0.002, 0.0]], dtype=F64)
    t, r = process.time(k), process.time(k_r)
    if isinstance(process, RectifiedFlow):
        t[0] = 1.0  # alpha = 0
    x = torch.randn(5, 2, 3, dtype=F64)
    by_row = solver_step(process, in_y_by_row(process), x, t, r, solver)
    for i in range(5):
        grid = torch.stack([t[i], r[i]])
        expected = sample(process, in_y_by_row(process), x[i], grid, solver)
        torch.testing.assert_close(by_row[i], expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(
            solver_step(process, in_y_by_row(process), x[i], t[i], r[i], solver), expected, rtol=1e-10, atol=1e-10
        )


def in_y_by_row(process: Process):
    """A denoiser that bends, for a scalar time or one a row."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        a, s = process.alpha(expand(t, x)), process.sigma(expand(t, x))
        return torch.tanh(0.8 * x / (a + s) + 0.3 * a + 0.1 * x.roll(1, -1))

    return denoise


def test_single_steps_name_mistakes() -> None:
    x, t = torch.zeros(3, 2), torch.tensor(1.0)
    with pytest.raises(ValueError, match="no single step"):
        solver_step(VP(), tanh_denoiser, x, t, 0.9 * t, "dpmpp2m")
    with pytest.raises(ValueError, match="Did you mean 'heun'"):
        solver_step(VP(), tanh_denoiser, x, t, 0.9 * t, "huen")
    with pytest.raises(ValueError, match="do not fit"):
        solver_step(VP(), tanh_denoiser, x, torch.ones(2), torch.zeros(2))


# --- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "ddmi"}, "Did you mean 'ddim'"),
        ({"eta": 1.1}, "eta must lie"),
        ({"eta": -0.1}, "eta must lie"),
        ({"eta": math.nan}, "eta must lie"),
        ({"solver": "heun", "eta": 0.5}, "deterministic"),
        ({"eta": 0.5}, "pass a generator"),
        ({"eta": 0.5, "noise": torch.zeros(4, 3, 2)}, "noise must have shape"),
        ({"times": torch.ones(1)}, "times must be a vector"),
        ({"times": torch.ones(2, 2)}, "times must be a vector"),
        ({"times": torch.tensor([0.0, 1.0])}, "decrease"),
        ({"times": torch.tensor([1.0, 1.0, 0.0])}, "decrease"),
        ({"solver": "dpmpp2m", "churn": Churn()}, "churn goes with"),
        ({"eta": 0.5, "churn": Churn()}, "churn goes with"),
        ({"solver": "heun", "churn": Churn()}, "pass a generator"),
        ({"corrector": Langevin()}, "pass a generator"),
        ({"noise": torch.zeros(1)}, "noise must have shape"),
        ({"noise": torch.zeros(4, 3, 2)}, "noise must have shape"),
    ],
    ids=str,
)
def test_mistakes_are_named(options: dict, message: str) -> None:
    arguments = {"times": discrete_grid("vp", 5), **options}
    with pytest.raises(ValueError, match=message):
        sample(VP(), tanh_denoiser, torch.zeros(3, 2), **arguments)


@pytest.mark.parametrize(
    ("process", "times"),
    [
        (RectifiedFlow(), torch.linspace(2, 0, 5)),
        (VP(), torch.tensor([1.0, 0.0, -1.0])),
        (VE(), torch.tensor([1.0, -0.1])),
        (VE(), torch.tensor([math.inf, 1.0])),
        (TrigFlow(), torch.linspace(3, 0, 5)),
        (TrigFlow(), torch.linspace(6, 0, 5)),  # where alpha is positive again
        (VP(), torch.tensor([math.nan, 0.0])),
    ],
    ids=str,
)
def test_times_outside_of_a_process_are_refused(process: Process, times: Tensor) -> None:
    """By whatever samples on a grid; to a function of the caller's they would be plausible numbers, or nan."""
    x = torch.ones(3, 2)
    for sampled in (sample, lambda *given: consistency_sample(given[1], given[0], *given[2:])):
        with pytest.raises(ValueError, match=r"must lie where|decrease"):
            sampled(process, tanh_denoiser, x, times)


@process_parameter
def test_noise_that_a_deterministic_sampler_does_not_draw_changes_nothing(process: Process) -> None:
    """Of the shape that another eta takes; so is none of it."""
    times, x = process.grid(4, 0.02, 20.0, dtype=F64), torch.randn(3, 2, dtype=F64)
    alone = sample(process, in_y(process), x, times)
    for noise in (torch.full((4, 3, 2), math.nan), torch.zeros(0, 3, 2)):
        assert torch.equal(sample(process, in_y(process), x, times, noise=noise), alone)


@pytest.mark.parametrize("wrong", [(..., slice(1)), slice(1), 0, None], ids=["column", "row", "one", "more"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_denoiser_of_another_shape_is_refused(solver: str, wrong: object) -> None:
    """It would broadcast; so at the trial points of a solver, at a corrector's, and in a single step."""
    x, times = torch.randn(8, 2), discrete_grid("vp", 3)
    sampler = Sampler(VP(), times, solver, corrector=Langevin())
    message = r"the denoiser maps x of shape \(8, 2\) to .*; shapes must agree"
    for right in range({"dpm2": 2, "dpm3": 3, "heun": 2}.get(solver, 1) + 1):
        made = 0

        def denoise(x: Tensor, t: Tensor, right: int = right) -> Tensor:
            nonlocal made
            made += 1
            return x if made <= right else x[wrong]

        with pytest.raises(ValueError, match=message):
            sampler(denoise, x, torch.Generator())
        assert made == right + 1
    if solver != "dpmpp2m":
        with pytest.raises(ValueError, match=message):
            solver_step(VP(), lambda x, t: x[wrong], x, times[0], times[1], solver)


def test_a_sampler_says_what_it_is() -> None:
    times = discrete_grid("vp", 5)
    assert repr(Sampler(VP(), times)) == f"Sampler(VP(), ddim: 5 steps from t = {times[0]:.4g} to 0)"
    text = repr(Sampler(VE(), torch.tensor([80.0, 0.5]), "heun", churn=Churn(2.0)))
    assert text.startswith("Sampler(VE(), heun, churn=Churn(S_churn=2.0,")
    assert text.endswith(": 1 step from t = 80 to 0.5)")
    assert "eta=0.5" in repr(Sampler(VP(), times, eta=0.5))


@pytest.mark.parametrize("bad", [{"S_churn": -1.0}, {"S_tmin": 2.0, "S_tmax": 1.0}, {"S_noise": -1.0}])
def test_churn_refuses_what_is_no_noise(bad: dict) -> None:
    with pytest.raises(ValueError, match="S_churn"):
        Churn(**bad)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"snr": -0.1}, {"snr": math.nan}, {"event_dims": 0}])
def test_a_corrector_refuses_what_is_none(bad: dict) -> None:
    with pytest.raises(ValueError, match="need steps >= 1"):
        Langevin(**bad)
