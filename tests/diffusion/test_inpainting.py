"""Laws of inpainting: known entries are exact, the others are of the exact Gaussian conditional where D is.

All maps here are affine, so the distribution of samples is found from the sampler's answers to a basis, not by drawing.
"""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffrl.diffusion import (
    SOLVERS,
    VP,
    Churn,
    Denoise,
    DenoisingChain,
    Known,
    Langevin,
    Process,
    Sampler,
    TrigFlow,
    reconstruction_guided,
    sample,
)
from tests.diffusion.diffusion_cases import F64, PROCESSES, network
from tests.rounding import assert_equal_to_rounding

MEAN = torch.tensor([0.5, -1.0, 0.3, 0.1], dtype=F64)
ROOT = torch.tensor([[1, 0, 0, 0], [0.8, 0.6, 0, 0], [-0.5, 0.7, 0.9, 0], [0.3, -0.4, 0.2, 0.5]], dtype=F64)
COVARIANCE = ROOT @ ROOT.T
KNOWN = [0, 2]
OTHERS = [1, 3]
MASK = torch.tensor([1, 0, 1, 0])
VALUES = torch.tensor([1.5, 0.0, -0.7, 0.0], dtype=F64)
ROUNDINGS = 1e5  # a solve with a matrix whose entries range over k^2 = 400, in each of some 20 steps

RUNS: list[dict[str, Any]] = [
    *({"solver": solver} for solver in SOLVERS),
    {"eta": 0.5},
    {"eta": 1.0},
    {"solver": "heun", "churn": Churn(S_churn=4.0)},
    {"corrector": Langevin()},
]


def joint(process: Process, mean: Tensor = MEAN, covariance: Tensor = COVARIANCE) -> Denoise:
    """E[x_0 | x_t] = mean + a C (a^2 C + s^2 I)^-1 (x_t - a mean), of correlated data."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        a, s = process.alpha(t), process.sigma(t)
        noised = a**2 * covariance + s**2 * torch.eye(len(mean), dtype=F64)
        return mean + a * torch.linalg.solve(noised, (x - a * mean).unsqueeze(-1)).squeeze(-1) @ covariance

    return denoise


def conditional(covariance: Tensor = COVARIANCE, values: Tensor = VALUES) -> tuple[Tensor, Tensor]:
    """The mean and covariance of the other entries, the known ones given."""
    C_uk, C_kk = covariance[OTHERS][:, KNOWN], covariance[KNOWN][:, KNOWN]
    gain = C_uk @ torch.linalg.inv(C_kk)
    mean = MEAN[OTHERS] + gain @ (values[KNOWN] - MEAN[KNOWN])
    return mean, covariance[OTHERS][:, OTHERS] - gain @ C_uk.T


def conditional_denoiser(process: Process) -> Denoise:
    """The denoiser of x (..., 4) whose known entries hold clean values: E[u_0 | u_t, v]."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        mean, covariance = conditional(values=x[0])
        u = joint(process, mean, covariance)(x[..., OTHERS], t)
        return x.index_copy(-1, torch.tensor(OTHERS), u)

    return denoise


def grid(process: Process, n: int = 8) -> Tensor:
    return process.grid(n, 0.05, 20.0, to_zero=True, dtype=F64)


def start(process: Process, times: Tensor, rows: int = 3) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return process.sigma(times[0]) * torch.randn(rows, 4, generator=g, dtype=F64)


@pytest.mark.parametrize("shown", ["noised", "clean"])
@pytest.mark.parametrize("settings", RUNS, ids=str)
def test_known_entries_are_the_values_to_the_bit(settings, shown):
    process = VP()
    known = Known(MASK, VALUES, shown)
    for times in (grid(process), grid(process)[:-1]):  # to data, and to a time before
        sampler = Sampler(process, times, **settings)
        x = start(process, times)
        noise = torch.randn(sampler.n_noise, *x.shape, dtype=F64, generator=torch.Generator().manual_seed(2))
        noise = noise if sampler.draws_noise else None
        free = sampler(network, x, noise=noise, clip=(-0.5, 0.5))
        result = sampler(network, x, noise=noise, clip=(-0.5, 0.5), inpaint=known)
        assert (result[:, KNOWN] == VALUES[KNOWN]).all()
        assert (result[:, OTHERS] != free[:, OTHERS]).any()


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("solver", SOLVERS)
def test_without_noise_known_states_are_a_v_plus_s_e_with_one_e(process, solver):
    """So the ODE stays deterministic, and its known part is that of a point mass, which every solver solves exactly."""
    times = grid(process)
    x = start(process, times)
    chain = sample(process, network, x, times, solver, inpaint=Known(MASK, VALUES), return_chain=True)
    e = x / process.sigma(times[0])
    expected = process.alpha(times)[:, None, None] * VALUES + process.sigma(times)[:, None, None] * e
    # Some ten operations a step on numbers as large as x_T, and s e is found from x by division by s.
    assert_equal_to_rounding(chain[..., KNOWN], expected[..., KNOWN], 1000, float(x.abs().max()))


def test_with_noise_known_states_are_noised_values():
    """At eta = 1 each x_t is of N(a v, s^2): its deviation, by the map from all noise to the state."""
    process = VP()
    times = grid(process)
    sampler = Sampler(process, times, eta=1.0)
    n = sampler.n_noise
    known = Known(MASK, VALUES)

    def states(z: Tensor) -> Tensor:
        """The states of a known entry, (T + 1, rows), from all noise (rows, 1 + T)."""
        full = z[..., None].expand(-1, -1, 4)
        x = process.sigma(times[0]) * full[:, 0]
        return sampler(network, x, noise=full[:, 1:].transpose(0, 1), inpaint=known, return_chain=True)[..., 0]

    offset = states(torch.zeros(1, n + 1, dtype=F64))
    effects = states(torch.eye(n + 1, dtype=F64)) - offset
    assert_equal_to_rounding(offset[:, 0], process.alpha(times) * VALUES[0], 100)
    assert_equal_to_rounding(effects.square().sum(1)[:-1], process.sigma(times)[:-1] ** 2, 1000)


def test_the_chain_shows_what_the_denoiser_was_shown():
    process, seen = VP(), []
    times = grid(process)
    known = Known(MASK, VALUES, "clean")

    def watched(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return network(x, t)

    chain = sample(process, watched, start(process, times), times, inpaint=known, return_chain=True)
    assert torch.equal(chain[:-1], torch.stack(seen))
    assert (chain[..., KNOWN] == VALUES[KNOWN]).all()


@pytest.mark.parametrize("process", [VP(), TrigFlow(data_std=0.5)], ids=repr)
@pytest.mark.parametrize("settings", RUNS[:-1], ids=str)
def test_an_exact_conditional_denoiser_samples_the_conditional(process, settings):
    """With the values shown, the others go as if they were alone with their own Gaussian, to rounding, in every solver.

    (Langevin's steps are left out: their size is of the norms of all entries.)
    """
    times = grid(process)
    sampler = Sampler(process, times, **settings)
    x = start(process, times)
    noise = torch.randn(sampler.n_noise, *x.shape, dtype=F64, generator=torch.Generator().manual_seed(2))
    result = sampler(conditional_denoiser(process), x, noise=noise, inpaint=Known(MASK, VALUES, "clean"))
    alone = sampler(joint(process, *conditional()), x[:, OTHERS], noise=noise[..., OTHERS])
    assert_equal_to_rounding(result[:, OTHERS], alone, ROUNDINGS)
    guided = reconstruction_guided(joint(process), Known(MASK, VALUES), iterations=2)
    assert_equal_to_rounding(
        sampler(guided, x, noise=noise, inpaint=Known(MASK, VALUES))[:, OTHERS], alone, 100 * ROUNDINGS
    )


def moments(process: Process, denoise: Denoise, known: Known, n: int, solver: str, **settings: Any) -> Tensor:
    """The mean and covariance (3, 2) of the other entries' samples: of x_T and all noise ~ N(0, I)."""
    times = process.grid(n, 0.002, 300.0, rho=7.0, to_zero=True, dtype=F64)
    sampler = Sampler(process, times, solver, **settings)
    size = 1 + sampler.n_noise

    def result(z: Tensor) -> Tensor:
        z = z.view(-1, size, 4)
        return sampler(
            denoise,
            process.sigma(times[0]) * z[:, 0],
            noise=z[:, 1:].transpose(0, 1) if size > 1 else None,
            inpaint=known,
        )[:, OTHERS]

    mean = result(torch.zeros(1, size * 4, dtype=F64))
    effects = result(torch.eye(size * 4, dtype=F64)) - mean
    return torch.cat([mean, effects.T @ effects])


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("heun", 2), ("dpmpp2m", 2)])
def test_samples_have_the_conditional_s_mean_and_covariance_to_the_solver_s_order(solver, order):
    process = VP()
    mean, covariance = conditional()
    exact = torch.cat([mean[None], covariance])
    known = Known(MASK, VALUES)
    guided = reconstruction_guided(joint(process), known, iterations=2)
    coarse, fine = ((moments(process, guided, known, n, solver) - exact).abs().max().item() for n in (40, 80))
    assert 0.8 * 2**order < coarse / fine < 1.25 * 2**order
    assert fine < (0.05 if order == 1 else 0.005)


@pytest.mark.parametrize(
    ("solver", "eta", "n", "order", "mean", "std"),
    [("heun", 0.0, 40, 2, 0.35, 0.82), ("ddim", 1.0, 120, 1, 0.50, 0.73)],
)
def test_without_guidance_a_joint_denoiser_heeds_known_entries_too_little(solver, eta, n, order, mean, std):
    """The figures in `diffusion.inpainting`, beside the exact .8 and .6, extrapolated to infinitely many steps."""
    process = VP()
    covariance = torch.eye(4, dtype=F64)
    covariance[0, 1] = covariance[1, 0] = 0.8
    denoise = joint(process, torch.zeros(4, dtype=F64), covariance)
    known = Known(torch.tensor([1, 0, 0, 0]), torch.ones(4, dtype=F64))
    for D, mean_D, std_D in ((denoise, mean, std), (reconstruction_guided(denoise, known), 0.8, 0.6)):
        coarse, fine = (moments(process, D, known, n, solver, eta=eta) for n in (n, 2 * n))
        found = fine + (fine - coarse) / (2**order - 1)
        assert found[0, 0].item() == pytest.approx(mean_D, abs=0.005)
        assert found[1, 0].sqrt().item() == pytest.approx(std_D, abs=0.005)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_reconstruction_guidance_is_the_conditional_denoiser_whatever_the_noise_of_known_entries(process):
    times = process.time(torch.tensor([0.1, 1.0, 10.0], dtype=F64))[:, None].expand(3, 2)
    g = torch.Generator().manual_seed(3)
    z = torch.randn(3, 2, 4, generator=g, dtype=F64)
    t = times[..., None]
    x = process.alpha(t) * torch.where(MASK.bool(), VALUES, z) + process.sigma(t) * z.flip(0)
    known = Known(MASK, VALUES)
    guided = reconstruction_guided(by_rows(joint(process)), known, iterations=2)(x, times)
    exact = by_rows(conditional_denoiser(process))(known.insert(x), times)
    assert_equal_to_rounding(guided[..., OTHERS], exact[..., OTHERS], ROUNDINGS)
    assert_equal_to_rounding(guided[..., KNOWN], VALUES[KNOWN].expand(3, 2, 2), ROUNDINGS)


def by_rows(denoise: Denoise) -> Denoise:
    """A denoiser of one time, asked row by row."""

    def answer(x: Tensor, t: Tensor) -> Tensor:
        rows = [denoise(row[None], time)[0] for row, time in zip(x.flatten(0, -2), t.flatten(), strict=True)]
        return torch.stack(rows).view_as(x)

    return answer


def test_iterations_bring_guidance_nearer_until_they_are_as_many_as_known_entries():
    process = VP()
    t = process.time(torch.tensor(1.0, dtype=F64))
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(3), dtype=F64)
    mask = torch.tensor([1, 0, 1, 1])
    values = torch.tensor([1.5, 0.0, -0.7, 2.0], dtype=F64)
    D = [reconstruction_guided(joint(process), Known(mask, values), iterations=n)(x, t) for n in range(5)]
    assert torch.equal(D[0], joint(process)(x, t))
    misses = [((D_n - values) * mask).norm(dim=-1) for D_n in D]
    for fewer, more in itertools.pairwise(misses[:4]):
        assert (more < 0.9 * fewer).all()
    assert misses[3].max() < 1e-10
    assert_equal_to_rounding(D[4], D[3], ROUNDINGS)


def test_guidance_takes_samples_of_several_dimensions_and_rows_apart():
    """Trajectories (S, B, H, D): the very same as one row each, a known entry in one place of two rows."""
    process = VP()
    t = process.time(torch.tensor(1.0, dtype=F64))
    x = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(3), dtype=F64)

    def flat(x: Tensor, t: Tensor) -> Tensor:
        return joint(process)(x.flatten(-2), t).view_as(x)

    known = Known(MASK.view(2, 2), VALUES.view(2, 2))
    guided = reconstruction_guided(flat, known, iterations=2, event_dims=2)(x, t)
    rows = reconstruction_guided(joint(process), Known(MASK, VALUES), iterations=2)(x.flatten(-2), t)
    assert_equal_to_rounding(guided.flatten(-2), rows, ROUNDINGS)


def test_in_pure_noise_guidance_leaves_the_denoiser_as_it_is():
    def ignorant(x: Tensor, t: Tensor) -> Tensor:
        return MEAN + 0 * x

    x = torch.randn(2, 4, dtype=F64)
    guided = reconstruction_guided(ignorant, Known(MASK, VALUES), iterations=3)(x, torch.ones((), dtype=F64))
    assert torch.equal(guided, MEAN.expand(2, 4))


def test_known_entries_add_nothing_to_ratios_and_divergences_of_the_chain():
    """Two policies on one chain: what is left is the other entries' own, and no gradient comes from the known ones."""
    process, known = VP(), Known(MASK, VALUES)
    chain = DenoisingChain(process, grid(process), eta=1.0)
    weight = torch.tensor(0.9, dtype=F64, requires_grad=True)

    def policy(x: Tensor, t: Tensor) -> Tensor:
        return weight * network(x, t)

    rollout = chain.rollout(known.denoiser(network), start(process, grid(process)), torch.Generator().manual_seed(0))
    assert (rollout.x[:, KNOWN] == VALUES[KNOWN]).all()
    ratio = chain.log_prob(known.denoiser(policy), rollout.states) - rollout.log_probs
    ours = chain.transition(known.denoiser(policy), rollout.states)
    theirs = chain.transition(known.denoiser(network), rollout.states)
    others = [replace(g, mean=g.mean[..., OTHERS]) for g in (ours, theirs)]
    taken = chain.next_states(rollout.states)[..., OTHERS]
    alone = others[0].log_prob(taken) - others[1].log_prob(taken)
    assert_equal_to_rounding(ratio, alone, 1000, float(rollout.log_probs.abs().max()))
    assert_equal_to_rounding(ours.kl(theirs), others[0].kl(others[1]), 1000)
    (gradient,) = torch.autograd.grad(ratio.sum(), weight, retain_graph=True)
    (gradient_alone,) = torch.autograd.grad(alone.sum(), weight)
    assert_equal_to_rounding(gradient, gradient_alone, 1000)


def test_in_training_inserted_values_leave_the_known_entries_no_loss():
    known = Known(MASK, VALUES, "clean")
    x0 = known.insert(torch.randn(3, 4, dtype=F64))
    answer = known.denoiser(network)(x0 + torch.randn(3, 4, dtype=F64), torch.ones((), dtype=F64))
    assert ((answer - x0)[:, KNOWN] == 0).all()
    assert ((answer - x0)[:, OTHERS] != 0).all()


def test_each_row_may_have_entries_and_values_of_its_own():
    process = VP()
    x = start(process, grid(process))
    mask = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    values = torch.arange(12, dtype=F64).view(3, 4)
    together = sample(process, network, x, grid(process), inpaint=Known(mask, values))
    for i in range(3):
        alone = sample(process, network, x[i : i + 1], grid(process), inpaint=Known(mask[i], values[i]))
        assert_equal_to_rounding(together[i], alone[0], 100)
    assert torch.equal(together[2:], sample(process, network, x[2:], grid(process)))


def test_what_cannot_be_known_is_refused():
    process = VP()
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="Did you mean 'noised'"):
        Known(MASK, VALUES, "noise")  # type: ignore[arg-type]
    for mask, values, name in ((torch.ones(3), VALUES, "mask"), (MASK, torch.ones(2, 3, 4), "values")):
        with pytest.raises(ValueError, match=rf"the {name} of known entries has shape .* \(3, 4\)"):
            sample(process, network, x, grid(process), inpaint=Known(mask, values))


@pytest.mark.slow
def test_compiled_is_eager():
    process = VP()
    sampler = Sampler(process, grid(process, 3), "dpmpp2m")
    x = start(process, grid(process))

    def run(x: Tensor, mask: Tensor, values: Tensor) -> Tensor:
        return sampler(network, x, inpaint=Known(mask, values))

    compiled = torch.compile(run, fullgraph=True)(x, MASK, VALUES)
    assert_equal_to_rounding(compiled, run(x, MASK, VALUES), 1000)
