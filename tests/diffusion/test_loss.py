import math

import numpy as np
import pytest
import torch
from diffusion_cases import F64, KINDS, PROCESSES, close, gaussian, network
from torch import Tensor

from diffrl.diffusion import (
    VE,
    VP,
    Prediction,
    Process,
    RectifiedFlow,
    denoising_loss,
    discrete_grid,
    edm_weight,
    grid_times,
    loglogistic_times,
    lognormal_times,
    min_snr_weight,
    uniform_times,
)


@pytest.fixture
def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x0, noise = torch.randn(2, 3, 5, 4, dtype=F64, generator=generator)
    return x0, noise


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_denoising_score_matching_is_score_error_plus_floor(process: Process) -> None:
    """E|e - e_theta|^2 = E|e_theta - e*|^2 + sum a^2 std^2/(a^2 std^2 + s^2), by quadrature, exact for polynomials."""
    data, prediction = gaussian(), Prediction("eps", process)
    t = process.time(torch.tensor(0.7, dtype=F64))
    a, s = process.alpha(t), process.sigma(t)
    nodes, weights = np.polynomial.hermite_e.hermegauss(6)
    z, w = torch.tensor(nodes, dtype=F64), torch.tensor(weights / weights.sum(), dtype=F64)
    # The coordinates are independent, so that both may use the same nodes: (node of x_0, node of e, coordinate).
    x0 = (data.mean + data.std * z[:, None])[:, None].expand(6, 6, 2)
    e = z[None, :, None].expand(6, 6, 2)
    expectation = torch.outer(w, w)

    def linear(x: Tensor, t: Tensor) -> Tensor:
        return 0.3 * x - 0.2

    def exact(x: Tensor, t: Tensor) -> Tensor:
        return prediction.from_x0(data.denoiser(process)(x, t), x, t)

    x = process.perturb(x0, t, e)
    error = ((linear(x, t) - exact(x, t)) ** 2).sum(-1)
    floor = (a**2 * data.std**2 / (a**2 * data.std**2 + s**2)).sum()
    for model, score_error in ((linear, (expectation * error).sum()), (exact, torch.zeros((), dtype=F64))):
        loss = 2 * (expectation * denoising_loss(prediction, model, x0, t, e)).sum()  # 2: a sum, not a mean
        close(loss, score_error + floor)


def test_velocity_on_rectified_flow_is_flow_matching(batch: tuple[Tensor, Tensor]) -> None:
    x0, noise = batch
    t = torch.rand(3, 5, dtype=F64)
    x = (1 - t)[..., None] * x0 + t[..., None] * noise
    expected = ((network(x, t) - (noise - x0)) ** 2).mean(-1)
    close(denoising_loss(Prediction("velocity", RectifiedFlow()), network, x0, t, noise), expected)


@pytest.mark.parametrize("weighting", ["edm", "min_snr", lambda k: 1 / (1 + k)])
@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_a_weighted_loss_depends_on_the_denoiser_alone(process: Process, weighting, batch) -> None:
    """One denoiser, said in six ways, has one loss: lambda(k) |D - x_0|^2."""
    x0, noise = batch
    k = torch.rand(3, 5, dtype=F64) * 3 + 0.1
    t = process.time(k)
    x = process.perturb(x0, t, noise)
    D = torch.tanh(x)
    weight = (
        {"edm": edm_weight(k, 0.7), "min_snr": min_snr_weight(k)}.get(weighting)
        if isinstance(weighting, str)
        else weighting(k)
    )
    expected = weight * ((D - x0) ** 2).mean(-1)
    for kind in KINDS:
        prediction = Prediction(kind, process, 0.7)
        m = prediction.from_x0(D, x, t)
        loss = denoising_loss(prediction, lambda *_, m=m: m, x0, t, noise, weighting=weighting)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)


def test_published_weights() -> None:
    k = torch.tensor([0.1, 0.5, 2.0], dtype=F64)
    close(edm_weight(k, 0.5), (k**2 + 0.25) / (k * 0.5) ** 2)
    snr = 1 / k**2
    close(min_snr_weight(k) / snr, torch.minimum(snr, torch.tensor(5.0)) / snr)  # on eps, Hang et al., eq. 7
    # EDM's weight is 1 on its own F
    x0, noise, t = torch.randn(3, 2, dtype=F64), torch.randn(3, 2, dtype=F64), k
    edm = Prediction("edm", VE(), 0.5)
    close(
        denoising_loss(edm, network, x0, t, noise, weighting="edm"),
        denoising_loss(edm, network, x0, t, noise, weighting="uniform"),
    )


def test_loss_keeps_seeds_and_batch_apart(batch: tuple[Tensor, Tensor]) -> None:
    x0, noise = batch
    prediction = Prediction("eps", VP())
    t = torch.rand(3, 5, dtype=F64) + 0.1
    loss = denoising_loss(prediction, network, x0, t, noise, weighting="min_snr")
    assert loss.shape == (3, 5)
    close(loss[1, 2], denoising_loss(prediction, network, x0[1, 2], t[1, 2], noise[1, 2], weighting="min_snr"))
    elementwise = denoising_loss(prediction, network, x0, t, noise, weighting="min_snr", event_dims=0)
    assert elementwise.shape == x0.shape
    close(elementwise.mean(-1), loss)
    one_a_seed = denoising_loss(prediction, network, x0, t[:, 0], noise, event_dims=2)
    assert one_a_seed.shape == (3,)


def test_grid_times_are_the_grids_without_its_end(generator: torch.Generator) -> None:
    times = discrete_grid("vp", 5)
    drawn = grid_times(times, (20_000,), generator)
    values, counts = drawn.unique(return_counts=True)
    close(values, times[:-1].flip(0), atol=0)
    assert (counts - 4000).abs().max() < 5 * math.sqrt(20_000 * 0.2 * 0.8)


def test_uniform_times(generator: torch.Generator) -> None:
    t = uniform_times((20_000,), generator, 0.25, 2.0)
    assert 0.25 < t.min() < 0.26
    assert 1.99 < t.max() <= 2.0
    assert abs(t.mean() - 1.125) < 5 * 1.75 / math.sqrt(12 * 20_000)


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_loglogistic_times(process: Process, generator: torch.Generator) -> None:
    """log k is logistic about log .4, cut to [.1, 2]: its quantiles, to three standard errors of 20,000 draws."""
    k = process.ratio(loglogistic_times(process, (20_000,), generator, 0.4, 0.5, 0.1, 2.0, dtype=F64))
    assert float(k.min()) >= 0.1 - 1e-9
    assert float(k.max()) <= 2 + 1e-9
    low, high = (1 / (1 + (0.4 / end) ** 2) for end in (0.1, 2.0))
    for q in (0.1, 0.5, 0.9):
        odds = low + q * (high - low)
        expected = 0.4 * (odds / (1 - odds)) ** 0.5
        assert abs(float((k < expected).double().mean()) - q) < 3 * (q * (1 - q) / 20_000) ** 0.5


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_lognormal_times(process: Process, generator: torch.Generator) -> None:
    log_k = process.ratio(lognormal_times(process, (20_000,), generator, dtype=F64)).log()
    assert abs(log_k.mean() + 1.2) < 5 * 1.2 / math.sqrt(20_000)
    assert abs(log_k.std() - 1.2) < 5 * 1.2 / math.sqrt(40_000)


def test_mistakes_are_named(batch: tuple[Tensor, Tensor]) -> None:
    x0, noise = batch
    prediction, t = Prediction("eps", VP()), torch.tensor(1.0, dtype=F64)
    with pytest.raises(ValueError, match="Did you mean 'min_snr'"):
        denoising_loss(prediction, network, x0, t, noise, weighting="minsnr")
    with pytest.raises(ValueError, match="must agree"):
        denoising_loss(prediction, network, x0, t, noise[0])
    with pytest.raises(ValueError, match="must agree"):
        denoising_loss(prediction, lambda x, _: x[0], x0, t, noise)
    with pytest.raises(ValueError, match="event_dims"):
        denoising_loss(prediction, network, x0, t, noise, event_dims=4)
