import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusion_cases import F64, PROCESSES, close, gaussian
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from diffrl.diffusion import VE, VP, Gaussian, GaussianMixture, Process, RectifiedFlow, TrigFlow, sample
from diffrl.diffusion.diagnostics import (
    bits_per_dim,
    denoising_losses,
    discretisation_complexity,
    discretisation_error,
    divergence,
    estimate,
    from_both_starts,
    gaussian_floor,
    gaussian_kl,
    gaussian_w2,
    generalisation_gap,
    girsanov_kl,
    learning_dynamics,
    log_likelihood,
    moments,
    on_process,
    rademacher,
    sampling_floor,
    score_errors,
    sliced_w2,
    start_error,
    start_kl_bounds,
    w2,
)

process_parameter = pytest.mark.parametrize("process", PROCESSES, ids=str)


def levels(process: Process, n: int = 4, k_min: float = 0.1, k_max: float = 5.0) -> Tensor:
    """Times at increasing noise."""
    return process.grid(n - 1, k_min, k_max, dtype=F64).flip(0)


def mixture() -> GaussianMixture:
    """Three components in the plane, none of them round."""
    means = torch.tensor([[0.0, 1.0], [-1.0, -0.5], [1.0, -0.5]], dtype=F64)
    stds = torch.tensor([[0.2, 0.3], [0.4, 0.1], [0.2, 0.2]], dtype=F64)
    return GaussianMixture(means, stds, torch.tensor([0.5, 0.3, 0.2], dtype=F64))


def quadrature(data: Gaussian) -> tuple[Tensor, Tensor]:
    """Points x0 and e, (16, 2), over which means of squares are exact: +-1 deviation, each sign with each."""
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=F64)] * 4)
    return data.mean + data.std * signs[:, :2], signs[:, 2:]


# --- training ------------------------------------------------------------------------------------------------------


@process_parameter
def test_score_error_of_a_scaled_denoiser(process: Process) -> None:
    """c D in place of D errs by (c - 1)^2 E|D|^2, and a D of a Gaussian has a mean and a variance in closed form."""
    data, times, c = gaussian(), levels(process), 1.3
    x0, e = quadrature(data)
    exact = data.denoiser(process)
    a, s, k = process.alpha(times), process.sigma(times), process.ratio(times)
    variance = (a[:, None] * data.std**2) ** 2 / ((a[:, None] * data.std) ** 2 + s[:, None] ** 2)
    expected = (c - 1) ** 2 * (data.mean**2 + variance).sum(-1)
    for unit, factor in (("x0", torch.ones_like(k)), ("eps", 1 / k**2), ("score", (a / s**2) ** 2)):
        errors = score_errors(process, lambda x, t: c * exact(x, t), exact, x0, times, e, unit)
        torch.testing.assert_close(errors.mean(-1), factor * expected, rtol=1e-10, atol=0)


@process_parameter
@pytest.mark.parametrize("unit", ["x0", "eps", "score"])
def test_loss_less_the_floor_is_the_score_error(process: Process, unit: str) -> None:
    data, times = gaussian(), levels(process)
    x0, e = quadrature(data)
    exact = data.denoiser(process)

    def wrong(x: Tensor, t: Tensor) -> Tensor:
        return 0.4 * x - 0.3

    floor = gaussian_floor(process, data, times, unit)
    torch.testing.assert_close(denoising_losses(process, exact, x0, times, e, unit).mean(-1), floor)
    loss = denoising_losses(process, wrong, x0, times, e, unit).mean(-1)
    error = score_errors(process, wrong, exact, x0, times, e, unit).mean(-1)
    torch.testing.assert_close(loss - floor, error)


def test_losses_keep_rows_seeds_levels_and_models_apart(generator: torch.Generator) -> None:
    process = VP()
    x0, e = torch.randn(2, 3, 5, 2, dtype=F64, generator=generator)
    times = levels(process)
    models = [lambda x, t, c=c: c * x for c in (0.0, 0.5)]
    losses = learning_dynamics(process, iter(models), x0, times, e)
    assert losses.shape == (2, 4, 3, 5)
    alone = denoising_losses(process, models[1], x0[1, 2], times[3:], e[1, 2])
    close(losses[1, 3, 1, 2], alone[0])
    mean, error = estimate(losses)
    assert mean.shape == error.shape == (2, 4, 3)
    close(error[1, 2, 0], losses[1, 2, 0].std() / math.sqrt(5))


@process_parameter
def test_a_denoiser_moves_to_another_process(process: Process, generator: torch.Generator) -> None:
    """The exact denoiser of VP's marginals becomes that of any other process, times one a row or one for all."""
    data = mixture()
    x = torch.randn(5, 2, generator=generator, dtype=F64)
    for t in (levels(process, 5), levels(process, 5)[2]):
        moved = on_process(data.denoiser(VP()), VP(), process)
        close(moved(x, t), data.denoiser(process)(x, t))


@process_parameter
def test_girsanov_gives_the_kl_of_noised_mixtures(process: Process, generator: torch.Generator) -> None:
    """int E_p |e_p - e_q|^2 d log k = KL(p || q) at the least noise less that at the most, by the same 4,000 samples.

    Sampling noise: the two sides share their samples, and differ by 0.026 of 1.45 (a deviation, over ten seeds).
    """
    p = mixture()
    q = Gaussian(torch.tensor([0.1, 0.2], dtype=F64), torch.tensor([0.8, 0.9], dtype=F64))
    as_mixture = GaussianMixture(q.mean[None], q.std[None], torch.ones(1, dtype=F64))
    x0 = p.sample(4000, generator)
    e = torch.randn(x0.shape, generator=generator, dtype=F64)
    times = levels(process, 60, 0.05, 20.0)
    errors = score_errors(process, p.denoiser(process), q.denoiser(process), x0, times, e, "eps").mean(-1)

    def kl(t: Tensor) -> Tensor:
        x = process.perturb(x0, t, e)
        return (p.log_prob(process, x, t) - as_mixture.log_prob(process, x, t)).mean()

    expected = kl(times[0]) - kl(times[-1])
    close(girsanov_kl(process, errors, times), expected, atol=0.12)
    close(girsanov_kl(process, errors.flip(0), times.flip(0)), girsanov_kl(process, errors, times))


@process_parameter
def test_girsanov_of_two_shifted_gaussians_is_exact(process: Process) -> None:
    """By quadrature: |v|^2 / (2 (std^2 + k^2)), a difference of the ends; the trapezoid's error falls as N^-2."""
    p = gaussian()
    v = torch.tensor([0.3, -0.4], dtype=F64)
    q = Gaussian(p.mean + v, p.std)
    x0, e = quadrature(p)
    expected = sum((v**2 / (2 * (p.std**2 + k**2))).sum() * sign for k, sign in ((0.02, 1), (20.0, -1)))
    found = []
    for n in (20, 40):
        times = levels(process, n + 1, 0.02, 20.0)
        errors = score_errors(process, p.denoiser(process), q.denoiser(process), x0, times, e, "eps").mean(-1)
        found.append(abs(girsanov_kl(process, errors, times) - expected).item())
    assert found[0] < 0.01 * expected
    assert found[1] < 0.3 * found[0]


def test_a_memorising_denoiser_has_a_gap_and_the_exact_one_has_none(generator: torch.Generator) -> None:
    """The exact denoiser of the 50 training points, as against that of the mixture they are drawn from.

    Sampling noise: the gaps' own standard errors; the exact one's is 0 within 4 of them at every level.
    """
    process, data = VP(), mixture()
    train, held_out = data.sample(50, generator), data.sample(2000, generator)
    memory = GaussianMixture(train, torch.zeros(50, dtype=F64), torch.ones(50, dtype=F64))
    times = levels(process, 4, 0.05, 1.0)
    noise = [torch.randn(x.shape, generator=generator, dtype=F64) for x in (train, held_out)]

    def gap(denoise):
        return generalisation_gap(
            *(denoising_losses(process, denoise, x, times, e) for x, e in zip((train, held_out), noise, strict=True))
        )

    memorised, exact = gap(memory.denoiser(process)), gap(data.denoiser(process))
    assert (memorised.mean[:3] > 3 * memorised.error[:3]).all()
    assert (exact.mean.abs() < 4 * exact.error).all()


def test_the_gaps_error_is_that_of_independent_means() -> None:
    train, held_out = torch.tensor([1.0, 3.0], dtype=F64), torch.tensor([2.0, 4.0, 9.0], dtype=F64)
    gap = generalisation_gap(train, held_out)
    close(gap.mean, torch.tensor(3.0, dtype=F64))
    close(gap.error, torch.tensor(math.sqrt(2 / 2 + 13 / 3), dtype=F64))


# --- distances -----------------------------------------------------------------------------------------------------


def test_w2_on_the_line_is_that_of_the_optimal_plan(generator: torch.Generator) -> None:
    """Against the assignment problem, solved by trying all plans of repeated points, also where sizes differ."""
    scipy = pytest.importorskip("scipy.optimize")
    for n, m in ((6, 6), (4, 6), (6, 3), (5, 1)):
        x, y = torch.randn(n, generator=generator, dtype=F64), torch.randn(m, generator=generator, dtype=F64)
        cost = (x.repeat_interleave(m)[:, None] - y.repeat_interleave(n)[None]).square().numpy()
        rows, columns = scipy.linear_sum_assignment(cost)
        close(w2(x, y), torch.tensor(cost[rows, columns].mean()).sqrt())


def test_sliced_w2_of_a_shifted_sample_is_exact_in_the_mean_over_directions(generator: torch.Generator) -> None:
    """|v|/sqrt(d) as the number of directions grows: 10,000 of them leave 0.5% of noise."""
    x = torch.randn(3, 20, 4, generator=generator, dtype=F64)
    v = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=F64)
    found = sliced_w2(x, x + v, 10_000, generator)
    assert found.shape == (3,)
    torch.testing.assert_close(found, (v.norm() / 2).expand(3), rtol=0.02, atol=0)
    repeated = sliced_w2(x, (x + v).repeat(1, 2, 1), 10_000, torch.Generator().manual_seed(1))
    close(repeated, sliced_w2(x, x + v, 10_000, torch.Generator().manual_seed(1)))


def test_sliced_w2_of_two_shifted_gaussians(generator: torch.Generator) -> None:
    """|v|/sqrt(2) = 0.707 for v = (0.6, 0.8), by 4,000 points and 200 directions.

    Sampling noise: 0.015 (a deviation, over ten seeds); two samples of one Gaussian are 0.037 to 0.043 apart.
    """
    x, y = torch.randn(2, 4000, 2, generator=generator)
    assert abs(sliced_w2(x, y + torch.tensor([0.6, 0.8]), 200, generator) - math.sqrt(0.5)) < 0.08
    floor = sampling_floor(
        lambda: torch.randn(4000, 2, generator=generator), lambda a, b: sliced_w2(a, b, 200, generator)
    )
    assert 0.03 < floor < 0.05


def test_one_dimension_needs_no_directions() -> None:
    x, y = torch.randn(2, 7, 50, 1)
    close(sliced_w2(x, y, 1, torch.Generator()), w2(x[..., 0], y[..., 0]))


def test_gaussian_distances() -> None:
    p, q = gaussian(), Gaussian(torch.tensor([0.2, 0.4], dtype=F64), torch.tensor([1.5, 0.7], dtype=F64))
    close(gaussian_kl(p, q), kl_divergence(Normal(p.mean, p.std), Normal(q.mean, q.std)).sum())
    u = (torch.arange(20_000, dtype=F64) + 0.5) / 20_000
    by_quantiles = [
        w2(*(Normal(g.mean[i], g.std[i]).icdf(u) for g in (p, q))) for i in range(2)
    ]  # dimensions are independent: squares add
    close(gaussian_w2(p, q), torch.stack(by_quantiles).norm(), atol=2e-3)


# --- sampling ------------------------------------------------------------------------------------------------------


def rms(x: Tensor, y: Tensor) -> Tensor:
    """The distance of paired samples."""
    return (x - y).square().sum(-1).mean().sqrt()


@pytest.mark.long
@process_parameter
@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpm2", 2), ("dpm3", 3), ("dpmpp2m", 2)])
def test_complexity_grows_as_the_inverse_root_of_delta(process: Process, solver: str, order: int) -> None:
    """A delta 4^order as small takes 4 times the steps, on a Gaussian, by quadrature; N is about 60 and 240."""
    data = gaussian()
    z = quadrature(data)[1]

    def error(n: int) -> float:
        times = process.grid(n, 0.02, 20.0, dtype=F64)
        x = process.sigma(times[0]) * z
        exact = data.flow(process, x, times[0], times[-1]) / process.alpha(times[-1])
        scaled = lambda x, y: rms(x / process.alpha(times[-1]), y)  # noqa: E731
        return discretisation_error(process, data.denoiser(process), x, exact, times, scaled, solver).item()

    delta = error(60)
    few, many = (discretisation_complexity(error, d, range(1, 500)) for d in (delta, delta / 4**order))
    assert few == 60
    assert abs(math.log(many / few, 4) - 1) < 0.05


def test_complexity_searches_lists_and_ranges_and_knows_when_it_fails() -> None:
    asked: list[int] = []

    def error(n: int) -> float:
        asked.append(n)
        return 1 / n

    for n in range(1, 40):
        assert discretisation_complexity(error, 1 / n, range(1, 50)) == n
    assert discretisation_complexity(error, 0.3, (1, 2, 4, 8, 16)) == 4
    assert discretisation_complexity(error, 0.05, (1, 2, 4, 8, 16)) is None
    assert discretisation_complexity(error, 1.0, (3,)) == 3
    asked.clear()
    assert discretisation_complexity(error, 1 / 20, range(1, 10_000)) == 20
    assert max(asked) < 40


def test_w2_to_the_truth_sees_the_solver_through_the_noise(generator: torch.Generator) -> None:
    """Sliced W2 of a mixture's samples to those of a fine grid from the same noise: below the floor of fresh noise.

    With 2,000 points, 2M at 8, 16 and 32 steps stands at 0.049, 0.014 and 0.004, the floor at 0.042 to 0.061.
    """
    process, data = VP(), mixture()
    denoise = data.denoiser(process)
    grid = lambda n: process.grid(n, 0.01, 20.0, dtype=F64)  # noqa: E731
    start = lambda: process.sigma(grid(1)[0]) * torch.randn(2000, 2, generator=generator, dtype=F64)  # noqa: E731
    distance = lambda x, y: sliced_w2(x, y, 50, torch.Generator().manual_seed(1))  # noqa: E731
    x = start()
    reference = sample(process, denoise, x, grid(128), "dpm2")
    errors = [
        discretisation_error(process, denoise, x, reference, grid(n), distance, "dpmpp2m").item() for n in (8, 16, 32)
    ]
    floor = sampling_floor(lambda: data.sample(2000, generator), distance)
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < floor / 4
    assert distance(reference, data.sample(2000, generator)) < 2.5 * floor  # the fine grid's are the truth's


@process_parameter
def test_start_error_in_closed_form(process: Process) -> None:
    """KL against torch's; W2 at the start and at the data against the exact flow, paired by its quantiles."""
    data = gaussian()
    t = process.time(torch.tensor(3.0, dtype=F64))
    mean, std = data.marginal(process, t)
    s = process.sigma(t)
    error = start_error(process, data, t)
    close(error.kl, kl_divergence(Normal(mean, std), Normal(torch.zeros(2, dtype=F64), s.expand(2))).sum())
    z = quadrature(data)[1]
    right, wrong = mean + std * z, s * z
    close(error.w2_start, rms(right, wrong))
    zero = torch.zeros((), dtype=F64)
    close(error.w2_data, rms(*(data.flow(process, x, t, zero) for x in (right, wrong))))


def test_start_error_vanishes_as_noise_grows() -> None:
    """As k^-1 in W2, for a mean that is not 0; as k^-2 in KL."""
    errors = [start_error(VE(), gaussian(), torch.tensor(k, dtype=F64)) for k in (50.0, 100.0, 200.0)]
    for first, second in pairwise(errors):
        assert abs(first.kl / second.kl - 4) < 0.05
        assert abs(first.w2_data / second.w2_data - 2) < 0.05


@process_parameter
def test_the_sampler_from_both_starts_finds_the_start_error(process: Process) -> None:
    """By quadrature, on a fine grid, down to the little noise that is left."""
    data = gaussian()
    z = quadrature(data)[1]
    times = process.grid(400, 1e-3, 3.0, dtype=F64)
    point = Gaussian(data.mean, torch.zeros(2, dtype=F64))
    # x_T = a x_0 + s e is the pair of points of the true marginal, where x_0 is their common quantile.
    mean, std = data.marginal(process, times[0])
    a, s = process.alpha(times[0]), process.sigma(times[0])
    x0 = (mean + (std - s) * z) / a
    right, wrong = from_both_starts(process, data.denoiser(process), x0, z, times, "dpm3")
    expected = start_error(process, data, times[0]).w2_data
    assert abs(rms(right, wrong) / process.alpha(times[-1]) / expected - 1) < 1e-3
    assert start_error(process, point, times[0]).w2_data == 0  # any start becomes the point


@process_parameter
def test_start_kl_lies_within_its_bounds(process: Process, generator: torch.Generator) -> None:
    """Moments below, convexity above; of a point mass both are the truth. The mixture's KL is by 20,000 draws."""
    t = process.time(torch.tensor(0.5, dtype=F64))
    data = mixture()
    x0 = data.sample(20_000, generator)
    lower, upper = start_kl_bounds(process, x0, t)
    x = process.perturb(x0, t, torch.randn(x0.shape, generator=generator, dtype=F64))
    log_q = Normal(torch.zeros(2, dtype=F64), process.sigma(t)).log_prob(x).sum(-1)
    kl = (data.log_prob(process, x, t) - log_q).mean()
    assert lower <= kl <= upper
    point = torch.tensor([[0.4, -0.7]], dtype=F64)
    lower, upper = start_kl_bounds(process, point, t)
    close(lower, upper)


def test_moments(generator: torch.Generator) -> None:
    x = torch.randn(50, 3, generator=generator, dtype=F64)
    close(moments(x).std, torch.tensor(np.std(x.numpy(), axis=0)))
    close(moments(x).mean, x.mean(0))


# --- likelihood ----------------------------------------------------------------------------------------------------


@process_parameter
def test_log_likelihood_is_exact_on_gaussians_to_fourth_order(process: Process) -> None:
    data = gaussian()
    x = torch.tensor([[0.3, 0.2], [2.0, -4.0], [1.0, -1.0]], dtype=F64)

    def error(n: int) -> float:
        times = process.grid(n, 0.05, 20.0, dtype=F64)
        mean, std = data.marginal(process, times[-1])
        expected = Normal(mean, std).log_prob(x).sum(-1)
        found = log_likelihood(process, data.denoiser(process), x, times, prior=data)
        return (found - expected).abs().max().item()

    errors = [error(n) for n in (32, 64, 128)]
    for coarse, fine in pairwise(errors):
        assert abs(math.log2(coarse / fine) - 4) < 0.1
    assert errors[-1] < 1e-6


@pytest.mark.long
@process_parameter
def test_log_likelihood_of_a_mixture(process: Process, generator: torch.Generator) -> None:
    """Against the density in closed form; at k = 50 the start is the Gaussian of the data's moments to 1e-4 or so."""
    data = mixture()
    times = process.grid(200, 0.05, 50.0, dtype=F64)
    x = process.perturb(data.sample(20, generator), times[-1], torch.randn(20, 2, generator=generator, dtype=F64))
    prior = moments(data.sample(50_000, generator))
    found = log_likelihood(process, data.denoiser(process), x, times, prior=prior)
    close(found, data.log_prob(process, x, times[-1]), atol=2e-3)


def test_the_default_prior_is_pure_noise() -> None:
    """The density of what the exact flow makes of N(0, s^2): the carried Gaussian of `start_error`."""
    process, data = VP(), gaussian()
    times = process.grid(64, 0.05, 3.0, dtype=F64)
    x = torch.tensor([[0.3, 0.2], [2.0, -4.0]], dtype=F64)
    (m_T, std_T), (m_0, std_0) = (data.marginal(process, t) for t in (times[0], times[-1]))
    carried = Normal(m_0 - std_0 / std_T * m_T, std_0 / std_T * process.sigma(times[0]))
    found = log_likelihood(process, data.denoiser(process), x, times)
    close(found, carried.log_prob(x).sum(-1), atol=1e-5)


def test_a_density_integrates_to_one() -> None:
    """Whatever the denoiser: here none that belongs to any data."""
    process = RectifiedFlow()
    times = process.grid(24, 0.1, 10.0, dtype=F64)
    axis = torch.linspace(-6, 6, 121, dtype=F64)
    grid = torch.cartesian_prod(axis, axis)
    a = process.alpha(times[-1])

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(0.8 * x + 0.3 * x.roll(1, -1)) / (1 + process.ratio(t))

    density = log_likelihood(process, denoise, a * grid, times).exp() * a**2
    close(density.sum() * (axis[1] - axis[0]) ** 2, torch.ones((), dtype=F64), atol=1e-3)


def test_the_divergence_is_the_trace(generator: torch.Generator) -> None:
    """Of D = x A, each row; the probes' mean over all 2^3 signs is exact, over one alone it is not."""
    A = torch.randn(3, 3, generator=generator, dtype=F64)
    x, t = torch.randn(2, 4, 3, generator=generator, dtype=F64), torch.tensor(1.0, dtype=F64)
    linear = lambda x, t: torch.tanh(x) @ A  # noqa: E731
    expected = ((1 - torch.tanh(x) ** 2) * A.diagonal()).sum(-1)
    D, trace = divergence(linear, x, t)
    close(D, linear(x, t))
    close(trace, expected)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=F64)] * 3)
    probes = signs[:, None, None].expand(8, 2, 4, 3)
    close(divergence(linear, x, t, probes)[1], expected)
    assert (divergence(linear, x, t, probes[:1])[1] - expected).abs().max() > 0.1
    close(divergence(lambda x, t: torch.ones_like(x), x, t)[1], torch.zeros(2, 4, dtype=F64))


def test_likelihood_by_probes(generator: torch.Generator) -> None:
    """Signs: one is exact where the Jacobian is diagonal (a Gaussian's); elsewhere (a mixture's) the mean of all is."""
    process = TrigFlow()
    times = process.grid(16, 0.1, 20.0, dtype=F64)
    x = torch.randn(10, 2, generator=generator, dtype=F64)
    one = rademacher((1, 10, 2), generator, F64)
    assert set(one.unique().tolist()) == {-1.0, 1.0}
    every = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=F64)] * 2)[:, None].expand(4, 10, 2)
    simple, bent = (data.denoiser(process) for data in (gaussian(), mixture()))
    close(log_likelihood(process, simple, x, times, probes=one), log_likelihood(process, simple, x, times), 1e-10)
    exact = log_likelihood(process, bent, x, times)
    close(log_likelihood(process, bent, x, times, probes=every), exact, 1e-10)
    assert (log_likelihood(process, bent, x, times, probes=one) - exact).abs().max() > 0.1


def test_bits_per_dim_of_a_uniform_byte() -> None:
    """Uniform over 256 values in each of 3 dimensions: 8 bits."""
    close(bits_per_dim(torch.tensor(-3 * math.log(256), dtype=F64), 3), torch.tensor(8.0, dtype=F64))


def test_mistakes_are_named(generator: torch.Generator) -> None:
    process, data = VP(), gaussian()
    x, times = torch.zeros(4, 2, dtype=F64), levels(VP())
    with pytest.raises(ValueError, match="Did you mean 'eps'"):
        denoising_losses(process, data.denoiser(process), x, times, x, "epss")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least two"):
        estimate(torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"\(\.\.\., n, d\)"):
        sliced_w2(x, x[:, :1], 10, generator)
    for empty, full in ((x[:0, 0], x[:, 0]), (x[:, 0], x[:0, 0]), (x[:0, 0], x[:0, 0])):
        with pytest.raises(ValueError, match="n and m at least 1"):
            w2(empty, full)
    with pytest.raises(ValueError, match="n and m at least 1"):
        sliced_w2(x[:0], x, 10, generator)
    with pytest.raises(ValueError, match="one projection"):
        sliced_w2(x, x, 0, generator)
    with pytest.raises(ValueError, match="two times"):
        girsanov_kl(process, torch.zeros(1), times[:1])
    with pytest.raises(ValueError, match="decrease"):
        log_likelihood(process, data.denoiser(process), x, times)
    with pytest.raises(ValueError, match="0 < k < inf"):
        log_likelihood(process, data.denoiser(process), x, process.grid(4, 0.1, 20.0, to_zero=True))
