"""Reflow on Gaussians, where couplings, flows and their measures have closed forms, and on a small trained mixture."""

import math
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from diffusion_cases import F64, PROCESSES, close, gaussian
from torch import Tensor, nn

from diffrl.diffusion import (
    VP,
    Denoise,
    GaussianMixture,
    Prediction,
    Process,
    RectifiedFlow,
    couple,
    curvature,
    denoising_loss,
    distillation_loss,
    half_from,
    sample,
    straightness,
    uniform_times,
)
from diffrl.diffusion.diagnostics import sliced_w2
from diffrl.nets import MLP, TimeEmbedding, seed_generator

RF = RectifiedFlow()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def line(n: int) -> Tensor:
    return torch.linspace(1, 0, n + 1, dtype=F64)


def straight(x: Tensor, t: Tensor) -> Tensor:
    """D of the exact 2-RF of the Gaussian: x_t = ((1 - t) std + t) x_1 + (1 - t) mean, so x_1 is known, and x_0 is."""
    data = gaussian()
    t = t.reshape(t.shape + (1,) * (x.ndim - t.ndim)) if t.ndim else t
    x_1 = (x - (1 - t) * data.mean) / ((1 - t) * data.std + t)
    return data.mean + data.std * x_1


def exact_pairs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The coupling by the Gaussian's exact 1-RF: x_0 = mean + std x_1."""
    x_1 = torch.randn(*shape, 2, dtype=F64)
    return gaussian().flow(RF, x_1, torch.tensor(1.0, dtype=F64), torch.tensor(0.0, dtype=F64)), x_1


# --- couplings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [8, 1, 3])
def test_half_of_all_times_are_the_start(n: int) -> None:
    """Of an even batch exactly; of an odd one by lot, each row in half of the batches: 400 fair coins, 5 deviations."""
    generator, start = torch.Generator().manual_seed(0), torch.tensor(9.0)
    begun = torch.stack([half_from(start, torch.rand(2, n, generator=generator), generator) for _ in range(400)]) == 9
    if n % 2 == 0:
        assert (begun.sum(-1) == n // 2).all()
    else:
        assert ((begun[:, 0].float().mean(0) - 0.5).abs() <= 5 * 0.5 / 400**0.5).all()
        assert ((begun.sum(-1) - n / 2).abs() == 0.5).all()


def test_the_coupling_is_the_flow() -> None:
    """Of second order with Heun: by 256 steps the pairs are the exact ones."""
    x_0, x_1 = exact_pairs((50,))
    errors = []
    for n in (128, 256):
        ours, noise = couple(RF, gaussian().denoiser(RF), x_1, line(n), "heun")
        close(noise, x_1, atol=0)
        errors.append((ours - x_0).abs().max().item())
    assert errors[1] < 2e-3
    assert errors[0] / errors[1] > 2.5


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_a_coupling_is_sampling_from_the_noise(process: Process) -> None:
    """On any process: from sigma x_1 at times[0]; no gradient, whatever the denoiser holds."""
    times, x_1 = process.grid(5, 0.05, 50.0, dtype=F64), torch.randn(2, 7, 2, dtype=F64)
    weight = torch.tensor(0.5, dtype=F64, requires_grad=True)
    D: Denoise = lambda x, t: torch.tanh(weight * x)  # noqa: E731
    x_0, _ = couple(process, D, x_1, times, "dpmpp2m")
    close(x_0, sample(process, D, process.sigma(times[0]) * x_1, times, "dpmpp2m").detach())
    assert not x_0.requires_grad


@pytest.mark.parametrize("event_dims", [1, 2, 3])
def test_chunks_are_rows_of_the_batch_axis(event_dims: int) -> None:
    """x (3, 4, 5, 2): chunks of 2 along the axis before the event, reported one by one, and the pairs of one piece."""
    x_1 = torch.randn(3, 4, 5, 2, dtype=F64)
    axis = 3 - event_dims
    shapes, told = [], []

    def D(x: Tensor, t: Tensor) -> Tensor:
        shapes.append(x.shape[axis])
        assert x.shape[:axis] + x.shape[axis + 1 :] == x_1.shape[:axis] + x_1.shape[axis + 1 :]
        return torch.tanh(x)

    def on_progress(done: int, total: int) -> None:
        told.append((done, total))

    chunked, _ = couple(RF, D, x_1, line(1), chunk=2, event_dims=event_dims, on_progress=on_progress)
    rows = x_1.shape[axis]
    assert shapes == [min(2, rows - i) for i in range(0, rows, 2)]
    assert told == [(min(i + 2, rows), rows) for i in range(0, rows, 2)]
    close(chunked, couple(RF, D, x_1, line(1), event_dims=event_dims)[0], atol=0)


def test_a_point_at_alpha_0_or_not_is_next_to_no_difference() -> None:
    """Started at k = 1000 in place of t = 1 the pairs agree to about a thousandth."""
    x_1 = torch.randn(20, 2, dtype=F64)
    late = couple(RF, gaussian().denoiser(RF), x_1, RF.grid(400, 1e-3, 1e3, dtype=F64), "dpm3")[0]
    assert (late - gaussian().mean - gaussian().std * x_1).abs().max() < 2e-2


# --- straightness --------------------------------------------------------------------------------------------------


def test_one_step_is_exact_once_the_flow_is_straight() -> None:
    """The exact 1-RF coupling of a Gaussian is straight: one Euler step of its flow is the pair, to rounding.

    One of 1-RF leads to the mean, whatever the start, off by std |x_1|.
    """
    x_0, x_1 = exact_pairs((3, 50))
    close(sample(RF, straight, x_1, line(1)), x_0, atol=1e-15)
    close(distillation_loss(straight, x_0, x_1), torch.zeros(3, 50, dtype=F64), atol=1e-30)
    first = distillation_loss(gaussian().denoiser(RF), x_0, x_1)
    close(first, (gaussian().std * x_1).square().mean(-1))


def test_the_straight_coupling_is_straight() -> None:
    x_0, x_1 = exact_pairs((3, 50))
    close(straightness(straight, x_0, x_1, line(16)), torch.zeros(3, 50, dtype=F64), atol=1e-27)
    chain = sample(RF, straight, x_1, line(16), return_chain=True)
    close(curvature(chain, line(16)), torch.zeros(3, 50, dtype=F64), atol=1e-27)


def signs() -> tuple[Tensor, Tensor]:
    """Four pairs whose mean of any quadratic function is its expectation over the independent coupling."""
    sign = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=F64)
    data = gaussian()
    return data.mean + data.std * sign[:, :1], sign[:, 1:].expand(4, 2).contiguous()


def test_straightness_of_the_independent_coupling_of_a_gaussian() -> None:
    """integral of std^2 / ((1-t)^2 std^2 + t^2) dt = pi/2 std, summed over the dimensions; midpoints: second order."""
    errors = []
    for n in (64, 128):
        ours = straightness(gaussian().denoiser(RF), *signs(), line(n)).mean()
        errors.append((ours - math.pi / 2 * gaussian().std.sum()).item())
    assert abs(errors[1]) < 1e-3
    assert abs(errors[0] / errors[1] - 4) < 0.1


def test_straightness_is_the_flow_matching_loss() -> None:
    """At one time, |(x_1 - x_0) - v|^2 is d times `denoising_loss` of the kind velocity with the paired noise."""
    prediction = Prediction("velocity", RF)
    net = lambda x, t: torch.sin(x + 3 * t.reshape(t.shape + (1,) * (x.ndim - t.ndim)))  # noqa: E731
    x_0, x_1 = torch.randn(2, 5, 3, dtype=F64), torch.randn(2, 5, 3, dtype=F64)
    times = torch.tensor([0.7, 0.4], dtype=F64)
    loss = denoising_loss(prediction, net, x_0, times.mean(), x_1)
    close(straightness(prediction.denoiser(net), x_0, x_1, times), 0.3 * 3 * loss)


def test_curvature_of_a_gaussians_flow() -> None:
    """integral of (std_t')^2 dt - (1 - std)^2 = (2 - pi/2) std, summed; straight pieces: of second order from below."""
    _, ones = signs()
    ones = ones[:1] * torch.tensor([[1.0], [-1.0]], dtype=F64)  # +- 1: the expectation of x_1^2
    errors = []
    for n in (64, 128):
        chain = torch.stack([gaussian().flow(RF, ones, line(n)[0], t) for t in line(n)])
        ours = curvature(chain, line(n))
        assert ours.shape == (2,)
        errors.append(((2 - math.pi / 2) * gaussian().std.sum() - ours.mean()).item())
    assert 0 < errors[1] < 1e-3
    assert abs(errors[0] / errors[1] - 4) < 0.1


def test_curvature_is_of_time_and_shape() -> None:
    """A straight line run through at uneven speed is not straight: half the way in a quarter of the time."""
    times = torch.tensor([1.0, 0.75, 0.0], dtype=F64)
    chain = torch.tensor([0.0, 1.0, 2.0], dtype=F64).reshape(3, 1, 1)
    close(curvature(chain, times)[0], torch.tensor(0.25 * (2 - 4) ** 2 + 0.75 * (2 - 4 / 3) ** 2, dtype=F64))
    close(curvature(chain, torch.tensor([1.0, 0.5, 0.0], dtype=F64)), torch.zeros(1, dtype=F64))
    part = torch.tensor([0.8, 0.5, 0.2], dtype=F64)  # neither from 1 nor to 0: straight by its own chord
    close(curvature(chain, part), torch.zeros(1, dtype=F64))


def test_measures_have_one_value_a_row() -> None:
    x_0, x_1 = torch.randn(2, 5, 3, dtype=F64), torch.randn(2, 5, 3, dtype=F64)
    D: Denoise = lambda x, t: torch.tanh(x)  # noqa: E731
    whole = straightness(D, x_0, x_1, line(4))
    assert whole.shape == (2, 5)
    close(whole[1, 2], straightness(D, x_0[1, 2], x_1[1, 2], line(4)))
    close(straightness(D, x_0, x_1, line(4), event_dims=2), whole.sum(-1))
    chain = torch.randn(5, 2, 4, 3, dtype=F64)
    rows = curvature(chain, line(4))
    assert rows.shape == (2, 4)
    close(rows[1, 2], curvature(chain[:, 1, 2], line(4)))
    close(curvature(chain, line(4), event_dims=2), rows.sum(-1))


# --- distillation --------------------------------------------------------------------------------------------------


def test_distillations_metrics() -> None:
    """The step is D(x_1, 1) = x_1 - v(x_1, 1), and what is measured its distance to x_0."""
    prediction = Prediction("velocity", RF)
    net = lambda x, t: torch.sin(x) + t  # noqa: E731
    x_0, x_1 = torch.randn(2, 5, 3, dtype=F64), torch.randn(2, 5, 3, dtype=F64)
    D, d = prediction.denoiser(net), x_1 - (torch.sin(x_1) + 1) - x_0
    close(distillation_loss(D, x_0, x_1), d.square().mean(-1))
    c = 0.00054 * math.sqrt(3)
    close(distillation_loss(D, x_0, x_1, "huber"), (d.square().sum(-1) + c**2).sqrt() - c)
    close(distillation_loss(D, x_0, x_1, lambda a, b: (a - b).abs().amax(-1)), d.abs().amax(-1))
    close(distillation_loss(D, x_0, x_1, event_dims=2), d.square().mean((-1, -2)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: couple(RF, straight, torch.zeros(2), line(2)), "no batch axis"),
        (lambda: couple(RF, straight, torch.zeros(3, 2), line(2), chunk=0), "chunk = 0"),
        (lambda: couple(RF, straight, torch.zeros(3, 2), line(2), "huen"), "Did you mean 'heun'"),
        (lambda: distillation_loss(straight, torch.zeros(3, 2), torch.zeros(4, 2)), "pairs must agree"),
        (lambda: distillation_loss(straight, torch.zeros(3, 2), torch.zeros(3, 2), "hubre"), "Did you mean 'huber'"),
        (lambda: straightness(straight, torch.zeros(3, 2), torch.zeros(4, 2), line(2)), "pairs must agree"),
        (lambda: straightness(straight, torch.zeros(3, 2), torch.zeros(3, 2), line(2)[:1]), "times must be a vector"),
        (lambda: curvature(torch.zeros(3, 4, 2), line(3)), "each state needs its time"),
    ],
)
def test_mistakes_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# --- trained -------------------------------------------------------------------------------------------------------


class Velocity(nn.Module):
    """A small velocity network of diffrl's layers."""

    def __init__(self) -> None:
        super().__init__()
        generators = [seed_generator(0)]
        self.embed = TimeEmbedding(1, 16, generators)
        self.mlp = MLP((1,), 2 + 16, 2, generators, width=64)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.mlp(torch.cat([x, self.embed(4 * t).expand(1, x.shape[1], -1)], -1))


def train(net: nn.Module, steps: int, loss: Callable[[], Tensor], rate: float = 3e-3) -> None:
    adam = torch.optim.Adam(net.parameters(), fused=True)
    for step in range(steps):
        adam.param_groups[0]["lr"] = rate * min(1.0, 2 * (1 - step / steps))
        adam.zero_grad()
        loss().mean().backward()
        adam.step()


@pytest.mark.slow
@pytest.mark.parametrize("base", [RF, VP()], ids=str)
def test_trained_on_a_mixture(base: Process) -> None:
    """1-RF, 2-RF on its pairs (or an exact diffusion's), and one step distilled from 2-RF, 600 steps each.

    One-step sliced W2 at n = 10,000, where truth against truth is .029 on average (worst of twenty .051): 1-RF .75 (it
    gives the mean), 2-RF .10 (.08 on the exact pairs), distilled .06 (.044); three seeds were within .007 of these.
    Straightness of the trained coupling falls from 2.2 to .004, curvature of the paths from .64 to .004.
    """
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor([[1.0, 0.0], [-0.6, 1.0], [-0.6, -1.0]])
    data = GaussianMixture(means, torch.tensor([0.15, 0.3, 0.2]), torch.tensor([0.3, 0.4, 0.3]))
    velocity = Prediction("velocity", RF)
    times = torch.linspace(1, 0, 33)
    rows, steps = 256, 600

    def noise(n: int) -> Tensor:
        return torch.randn(1, n, 2, generator=generator)

    first = Velocity()
    train(
        first,
        steps,
        lambda: denoising_loss(
            velocity,
            first,
            data.sample(rows, generator)[None],
            uniform_times((1, rows), generator),
            noise=noise(rows),
        ),
    )
    if base == RF:
        x_0, x_1 = couple(RF, velocity.denoiser(first), noise(20_000), times, "heun", chunk=5_000)
    else:  # another diffusion may make the pairs: the exact one
        grid = base.grid(32, 0.01, 100.0, to_zero=True)
        x_0, x_1 = couple(base, data.denoiser(base), noise(20_000), grid, "dpm3", chunk=5_000)

    def pairs() -> tuple[Tensor, Tensor]:
        i = torch.randint(x_0.shape[1], (rows,), generator=generator)
        return x_0[:, i], x_1[:, i]

    def reflow() -> Tensor:
        x_0, x_1 = pairs()
        return denoising_loss(velocity, second, x_0, uniform_times((1, rows), generator), noise=x_1)

    second = deepcopy(first)
    train(second, steps, reflow)
    student = deepcopy(second)
    train(student, steps, lambda: distillation_loss(velocity.denoiser(student), *pairs()), rate=1e-3)

    truth, start = data.sample(10_000, generator), noise(10_000)
    with torch.no_grad():
        D_1, D_2, D_s = (velocity.denoiser(net) for net in (first, second, student))
        independent = data.sample(10_000, generator)[None], start
        own = couple(RF, D_2, start, times, "heun")
        w2 = [sliced_w2(sample(RF, D, start, line(1))[0], truth, 64, generator).item() for D in (D_1, D_2, D_s)]
        V = [straightness(D_1, *independent, times).mean().item(), straightness(D_2, *own, times).mean().item()]
        chains = [sample(RF, D, start, times, "heun", return_chain=True) for D in (D_1, D_2)]
        S = [curvature(chain, times).mean().item() for chain in chains]
    assert w2[0] > 0.5
    assert w2[1] < 0.16
    assert w2[2] < 0.12
    assert w2[2] < w2[1]
    assert V[1] < V[0] / 100
    assert S[1] < S[0] / 20
