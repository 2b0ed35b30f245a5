"""The same sampler by another hand: diffusers' schedulers on the same grid, network and noise."""

from typing import Any

import pytest
import torch
from torch import Tensor

from diffrl.diffusion import VE, VP, Prediction, discrete_grid, sample
from tests.rounding import rounding

diffusers = pytest.importorskip("diffusers")


def network(x: Tensor, t: Tensor) -> Tensor:
    """No label, since theirs are indices and ours times; large enough for clipping to bite."""
    return 0.8 * torch.tanh(1.3 * x + 0.4 * x.roll(1, -1)) + 0.2


def theirs(scheduler: Any, x: Tensor, generator: torch.Generator | None = None, **options: Any) -> Tensor:
    for t in scheduler.timesteps:
        m = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(m, t, x, generator=generator, **options).prev_sample
    return x


def same(ours: Tensor, theirs: Tensor) -> None:
    """To the digits of their float32, whatever the state's size (unclipped ancestral samples reach 1,000).

    Their alpha_bar is a product of 1,000 factors in float32, and each of a step's coefficients is made of it.
    """
    tolerance = rounding(torch.float32, 4 * 1000)
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=tolerance, atol=tolerance)


def noises(n: int, x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.stack([torch.randn(x.shape, generator=generator) for _ in range(n)])


@pytest.fixture
def x() -> Tensor:
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("clip", [None, (-1.0, 1.0)])
@pytest.mark.parametrize(("name", "theirs_name"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_ddpm(x: Tensor, name: str, theirs_name: str, clip: tuple[float, float] | None) -> None:
    scheduler = diffusers.DDPMScheduler(50, beta_schedule=theirs_name, clip_sample=clip is not None)
    scheduler.set_timesteps(50)
    D = Prediction("eps", VP()).denoiser(network, clip)
    ours = sample(VP(), D, x, discrete_grid(name, 50), eta=1.0, noise=noises(50, x))
    same(ours, theirs(scheduler, x, torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("clip", [None, (-1.0, 1.0)])
@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(x: Tensor, kind: Any, eta: float, clip: tuple[float, float] | None) -> None:
    their_kind = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}[kind]
    scheduler = diffusers.DDIMScheduler(20, clip_sample=clip is not None, prediction_type=their_kind)
    scheduler.set_timesteps(20)
    D = Prediction(kind, VP()).denoiser(network)
    ours = sample(VP(), D, x, discrete_grid("linear", 20), eta=eta, noise=noises(20, x), clip=clip)
    expected = theirs(scheduler, x, torch.Generator().manual_seed(3), eta=eta, use_clipped_model_output=True)
    same(ours, expected)


@pytest.mark.parametrize("n", [5, 10, 14])
def test_dpm_solver_pp_2m(x: Tensor, n: int) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(1000, solver_order=2)
    scheduler.set_timesteps(n)
    times = VP().time(scheduler.sigmas.double())
    ours = sample(VP(), Prediction("eps", VP()).denoiser(network), x.double(), times, "dpmpp2m")
    same(ours, theirs(scheduler, x.double()))


@pytest.mark.parametrize("karras", [False, True])
def test_heun(x: Tensor, karras: bool) -> None:
    scheduler = diffusers.HeunDiscreteScheduler(1000, use_karras_sigmas=karras)
    scheduler.set_timesteps(10)
    k = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]]).double().unique().flip(0)
    assert len(k) == 11
    # Their state is y = x/a, and the network's input y / sqrt(1 + k^2) = x on VP.
    y = k[0] * x.double()
    process = VP()
    times = process.time(k)
    ours = sample(process, Prediction("eps", process).denoiser(network), process.alpha(times[0]) * y, times, "heun")
    expected = y
    for t in scheduler.timesteps:
        m = network(scheduler.scale_model_input(expected, t), t)
        expected = scheduler.step(m, t, expected).prev_sample
    same(ours, expected)


def test_edm_preconditioning_and_grid(x: Tensor) -> None:
    """Without churn: with it, theirs asks the network at x where algorithm 2 of the paper says x_hat."""
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.02, sigma_max=20.0, sigma_data=0.5, num_train_timesteps=10)
    scheduler.set_timesteps(10)
    times = VE().grid(10, 0.02, 20.0, rho=7, to_zero=True)
    same(times, scheduler.sigmas)
    ours = sample(VE(), Prediction("edm", VE(), 0.5).denoiser(network), 20 * x, times)
    same(ours, theirs(scheduler, 20 * x))
