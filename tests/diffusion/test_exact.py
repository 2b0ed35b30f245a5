"""The mixture of Gaussians against torch.distributions, Tweedie and its own samples."""

import math

import pytest
import torch
from diffusion_cases import F64, PROCESSES, close, gaussian
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from diffrl.diffusion import VP, GaussianMixture, Process


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


process_parameter = pytest.mark.parametrize("process", PROCESSES, ids=str)


def mixture(shared_std: bool = False) -> GaussianMixture:
    means = torch.tensor([[1.0, -1.0], [-2.0, 0.5], [0.3, 2.0]], dtype=F64)
    stds = torch.tensor([[0.5, 0.2], [0.3, 0.3], [0.1, 0.7]], dtype=F64)
    return GaussianMixture(means, stds[:, 0] if shared_std else stds, torch.tensor([1.0, 2.0, 1.0], dtype=F64))


def noised(data: GaussianMixture, process: Process, t: Tensor) -> MixtureSameFamily:
    """The distribution of x_t at a scalar time, by torch."""
    a, s = process.alpha(t), process.sigma(t)
    std = torch.sqrt(a**2 * data.stds.reshape(3, -1) ** 2 + s**2).expand(3, 2)
    return MixtureSameFamily(Categorical(data.weights), Independent(Normal(a * data.means, std), 1))


@process_parameter
@pytest.mark.parametrize("shared_std", [False, True])
def test_density_and_posterior_are_torchs(process: Process, shared_std: bool) -> None:
    data = mixture(shared_std)
    t = process.time(torch.tensor([0.02, 0.5, 3.0], dtype=F64))
    x = torch.randn(3, 7, 2, dtype=F64)
    log_prob, posterior = data.log_prob(process, x, t), data.posterior(process, x, t)
    for i in range(3):
        law = noised(data, process, t[i])
        close(log_prob[i], law.log_prob(x[i]), atol=1e-9)
        joint = law.component_distribution.log_prob(x[i][:, None]) + law.mixture_distribution.logits
        close(posterior[i], joint.softmax(-1), atol=1e-9)
        close(data.log_prob(process, x[i], t[i]), log_prob[i])


@process_parameter
def test_denoiser_is_tweedies(process: Process) -> None:
    """D = (x + s^2 grad log p_t(x)) / a."""
    data = mixture()
    t = process.time(torch.tensor([0.05, 0.5, 3.0], dtype=F64))
    x = torch.randn(3, 7, 2, dtype=F64, requires_grad=True)
    (score,) = torch.autograd.grad(data.log_prob(process, x, t).sum(), x)
    a, s = (v[:, None, None] for v in (process.alpha(t), process.sigma(t)))
    close(data.denoiser(process)(x, t), (x + s**2 * score) / a, atol=1e-11)


def test_one_component_is_the_gaussian() -> None:
    one = gaussian()
    data = GaussianMixture(one.mean[None], one.std[None], torch.ones(1, dtype=F64))
    x, t = torch.randn(5, 2, dtype=F64), torch.tensor(0.7, dtype=F64)
    close(data.denoiser(VP())(x, t), one.denoiser(VP())(x, t))


def test_samples_are_from_their_components(generator: torch.Generator) -> None:
    """Within 5 standard errors."""
    data, n = mixture(), 40_000
    x, labels = data.sample_labelled(n, generator)
    for i, weight in enumerate((0.25, 0.5, 0.25)):
        own = x[labels == i]
        assert abs(len(own) / n - weight) < 5 * math.sqrt(weight * (1 - weight) / n)
        assert ((own.mean(0) - data.means[i]).abs() < 5 * data.stds[i] / math.sqrt(len(own))).all()
        assert ((own.std(0) - data.stds[i]).abs() < 5 * data.stds[i] / math.sqrt(2 * len(own))).all()
    again = data.sample(n, torch.Generator().manual_seed(0))
    close(again, data.sample(n, torch.Generator().manual_seed(0)), atol=0)


def test_mistakes_are_named() -> None:
    means, weights = torch.zeros(3, 2), torch.ones(3)
    with pytest.raises(ValueError, match="need means"):
        GaussianMixture(means, torch.ones(2), weights)
    with pytest.raises(ValueError, match="must be positive"):
        GaussianMixture(means, torch.ones(3), torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(ValueError, match="not negative"):
        GaussianMixture(means, -torch.ones(3), weights)
