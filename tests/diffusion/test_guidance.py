"""Guidance on a labelled mixture, whose classifier, conditional denoisers and moments are known."""

from typing import Any

import pytest
import torch
from diffusion_cases import F64, PROCESSES, close, network
from torch import Tensor

from diffrl.diffusion import (
    SOLVERS,
    VE,
    VP,
    Denoise,
    Gaussian,
    GaussianMixture,
    Prediction,
    Process,
    RectifiedFlow,
    TrigFlow,
    classifier_free,
    classifier_guided,
    drop_condition,
    sample,
)

process_parameter = pytest.mark.parametrize("process", PROCESSES, ids=str)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def mixture() -> GaussianMixture:
    means = torch.tensor([[1.0, -1.0], [-2.0, 0.5], [0.3, 2.0]], dtype=F64)
    stds = torch.tensor([[0.5, 0.2], [0.3, 0.3], [0.1, 0.7]], dtype=F64)
    return GaussianMixture(means, stds, torch.tensor([0.25, 0.5, 0.25], dtype=F64))


def classifier(data: GaussianMixture, process: Process, y: int):
    """log p(y | x_t)."""
    return lambda x, t: data.posterior(process, x, t)[..., y].log()


def component(data: GaussianMixture, y: int) -> Gaussian:
    return Gaussian(data.means[y], data.stds[y])


def points(process: Process, n: int = 200) -> tuple[Tensor, Tensor]:
    """Points x_t (n, 2) of unit Gaussian data, each at its own time (n,), k from 0.1 to 10."""
    t = process.time(torch.logspace(-1, 1, n, dtype=F64))
    return process.perturb(torch.randn(n, 2, dtype=F64), t, torch.randn(n, 2, dtype=F64)), t


# --- classifier guidance -------------------------------------------------------------------------------------------


@process_parameter
@pytest.mark.parametrize("y", [0, 1, 2])
def test_the_classifiers_gradient_makes_the_score_the_conditional_one(process: Process, y: int) -> None:
    """s(x) + grad log p(y | x) = s(x | y), here as D' = D(. | y): exact, at every point and time."""
    data, (x, t) = mixture(), points(process)
    guided = classifier_guided(process, data.denoiser(process), classifier(data, process, y))
    with torch.no_grad():
        conditional = component(data, y).denoiser(process)(x, t)
        close(guided(x, t), conditional, atol=1e-13)
        close(guided(x[0], t[0]), conditional[0], atol=1e-13)  # a scalar time
        assert (data.denoiser(process)(x, t) - conditional).abs().max() > 1  # which the guidance made up for


def test_guidance_is_linear_in_its_scale() -> None:
    process, data = VP(), mixture()
    x, t = points(process, 6)
    D, log_prob = data.denoiser(process), classifier(data, process, 1)
    scale = torch.linspace(-1, 3, 6, dtype=F64)
    with torch.no_grad():
        once = classifier_guided(process, D, log_prob)(x, t) - D(x, t)
        expected = D(x, t) + scale[:, None] * once
        close(classifier_guided(process, D, log_prob, scale)(x, t), expected)
        close(classifier_guided(process, D, log_prob, scale[-1])(x, t)[-1], expected[-1])
        close(classifier_guided(process, D, log_prob, -1.0)(x, t)[0], expected[0])
        close(classifier_guided(process, D, log_prob, 0.0)(x, t), D(x, t), atol=0)


@pytest.mark.parametrize(("process", "options"), [(VP(), {"solver": "dpm3"}), (RectifiedFlow(), {"eta": 1.0})], ids=str)
def test_guided_samples_have_the_conditional_moments(process: Process, options: dict) -> None:
    """The exact classifier of component 1, N((-2, .5), .3^2): 4,000 samples.

    The noise of the mean is .3 / sqrt(4000) = .005, that of the deviation .0034; 100 steps at eta = 1 inflate it by
    about .01. Unguided the mean would be (-.68, .5), the deviation of the first coordinate 1.3.
    """
    data = mixture()
    times = process.grid(100, 0.01, 50.0, dtype=F64, to_zero=True)
    guided = classifier_guided(process, data.denoiser(process), classifier(data, process, 1))
    generator = torch.Generator().manual_seed(0)
    x = process.sigma(times[0]) * torch.randn(4000, 2, dtype=F64, generator=generator)
    with torch.no_grad():
        x = sample(process, guided, x, times, generator=generator, **options)
    close(x.mean(0), data.means[1], atol=0.025)
    close(x.std(0), data.stds[1], atol=0.025)


@process_parameter
@pytest.mark.parametrize("n", [1, 2, 5])
def test_steps_of_ascent_on_a_paraboloid_shrink_the_distance_to_its_top(process: Process, n: int) -> None:
    """J = -l/2 |x - c|^2: a step makes x - c that times 1 - scale s^2 l, and D moves by the change of x over a."""
    data, (x, t) = Gaussian(torch.tensor([1.0, -1.0], dtype=F64), torch.tensor([0.5, 2.0], dtype=F64)), points(process)
    top, steepness, scale, D = torch.tensor([0.5, 3.0], dtype=F64), 0.7, 0.3, data.denoiser(process)
    guided = classifier_guided(process, D, lambda x, t: -steepness / 2 * ((x - top) ** 2).sum(-1), scale, steps=n)
    a, s = process.alpha(t)[:, None], process.sigma(t)[:, None]
    with torch.no_grad():
        moved = ((1 - scale * s**2 * steepness) ** n - 1) * (x - top)
        expected = D(x, t) + moved / a
        scale_of_rounding = float(expected.abs().max())
        close(guided(x, t), expected, atol=1e-14 * scale_of_rounding)  # some ten roundings a step
        assert (expected - D(x, t)).abs().max() > 0.1
        several = torch.full((len(x),), scale, dtype=F64)
        again = classifier_guided(process, D, lambda x, t: -steepness / 2 * ((x - top) ** 2).sum(-1), several, steps=n)
        close(again(x, t), guided(x, t), atol=1e-14 * scale_of_rounding)


@pytest.mark.parametrize("options", [*({"solver": solver} for solver in SOLVERS), {"eta": 1.0}], ids=str)
@pytest.mark.parametrize("process", [VP(), RectifiedFlow()], ids=str)
def test_a_linear_return_moves_every_solvers_samples_as_the_closed_form_says(
    process: Process, options: dict[str, Any]
) -> None:
    """N(m, std^2) times exp(scale w x) is N(m + scale std^2 w, std^2); E[w x_0 | x_t] = w D(x_t) is J at every time.

    A solver's step is linear in D, so it makes of both the same samples: to rounding, whatever its own error. And but
    for that error the samples are the data's, moved by scale std^2 w; from x_T at k = 20, which knows the data's mean a
    little, by 1 - std / sqrt(std^2 + k^2) of it along the ODE.
    """
    mean, std, w = (torch.tensor(v, dtype=F64) for v in ([1.0, -1.0], [0.5, 1.5], [2.0, -1.0]))
    scale, times = 0.3, process.grid(40, 0.02, 20.0, dtype=F64, to_zero=True)
    data, tilted = Gaussian(mean, std), Gaussian(mean + scale * std**2 * w, std)
    D = data.denoiser(process)
    guided = classifier_guided(process, D, lambda x, t: (w * D(x, t)).sum(-1), scale)
    x = process.sigma(times[0]) * torch.randn(50, 2, dtype=F64)
    noise = torch.randn(40, 50, 2, dtype=F64)

    def sampled(denoise: Denoise) -> Tensor:
        return sample(process, denoise, x, times, noise=noise, **options)

    with torch.no_grad():
        ours, exact, plain = sampled(guided), sampled(tilted.denoiser(process)), sampled(D)
    close(ours, exact, atol=1e-12)
    moved = scale * std**2 * w
    expected = moved if "eta" in options else moved * (1 - std / (std**2 + 20.0**2).sqrt())
    close((ours - plain).mean(0) / expected, torch.ones(2, dtype=F64), atol=0.02)


@process_parameter
def test_at_x0_the_denoiser_moves_by_the_posterior_covariance(process: Process) -> None:
    """Gaussian data: Cov[x_0 | x_t] = s^2 std^2 / (a^2 std^2 + s^2), times the gradient at D."""
    data, (x, t) = Gaussian(torch.tensor([1.0, -1.0], dtype=F64), torch.tensor([0.5, 2.0], dtype=F64)), points(process)
    D = data.denoiser(process)
    a, s = process.alpha(t)[:, None], process.sigma(t)[:, None]
    covariance = s**2 * data.std**2 / (a**2 * data.std**2 + s**2)
    seen = []

    def q(x0: Tensor, t: Tensor) -> Tensor:
        seen.append(x0)
        return torch.sin(x0).sum(-1)

    with torch.no_grad():
        guided = classifier_guided(process, D, q, 0.7, at="x0")(x, t)
        close(guided, D(x, t) + 0.7 * covariance * torch.cos(D(x, t)))
        close(seen[0], D(x, t), atol=0)
    assert not guided.requires_grad


def test_an_energy_is_climbed_down() -> None:
    """exp(-|x_0|^2 / 2) beside N(m, std^2) data is a Gaussian again: at = "x0" moves D towards its mean, 0."""
    process, data = VP(), Gaussian(torch.ones(2, dtype=F64), torch.ones(2, dtype=F64))
    x, t = points(process)
    energy = lambda x0, t: (x0**2).sum(-1) / 2  # noqa: E731
    with torch.no_grad():
        D = data.denoiser(process)(x, t)
        guided = classifier_guided(process, data.denoiser(process), lambda x, t: -energy(x, t), at="x0")(x, t)
    assert (guided.abs() < D.abs()).all()


@pytest.mark.parametrize("at", ["x_t", "x0"])
def test_where_there_is_no_noise_or_nothing_else_the_denoiser_is_left(at: str) -> None:
    data = Gaussian(torch.zeros(2), torch.ones(2))
    log_prob = lambda x, t: -((x - 3) ** 2).sum(-1)  # noqa: E731
    x = torch.randn(5, 2)
    for process, end in [(VP(), None), (VE(), None), (RectifiedFlow(), 1.0), (TrigFlow(), torch.pi / 2)]:
        guided = classifier_guided(process, data.denoiser(process), log_prob, at=at)
        for time in (0.0, end):
            if time is not None:
                t = torch.tensor(time)
                with torch.no_grad():
                    close(guided(x, t), data.denoiser(process)(x, t), atol=1e-6)
                t.requires_grad_()
                (gradient,) = torch.autograd.grad(guided(x, t).sum(), t)
                assert torch.isfinite(gradient) or time == 0  # sqrt at 0


@pytest.mark.parametrize(("at", "steps"), [("x_t", 1), ("x_t", 2), ("x0", 1)])
def test_guidance_is_differentiable_where_gradients_are_enabled(at: Any, steps: int) -> None:
    """In x, in the denoiser and in the classifier; under no_grad nothing is kept, and the values are the same."""
    process = VP()
    t = torch.tensor(0.7, dtype=F64)

    def run(x: Tensor, v: Tensor, w: Tensor) -> Tensor:
        D: Denoise = lambda x, t: torch.tanh(v * x)  # noqa: E731
        return classifier_guided(process, D, lambda x, t: torch.sin(w * x).prod(-1), 0.3, at=at, steps=steps)(x, t)

    x = torch.randn(3, 2, dtype=F64, requires_grad=True)
    v, w = (torch.tensor(value, dtype=F64, requires_grad=True) for value in (0.8, 1.3))
    assert torch.autograd.gradcheck(run, (x, v, w))
    (alone,) = torch.autograd.grad(run(x.detach(), v, w).sum(), w)  # a leaf x that asks for nothing
    (beside,) = torch.autograd.grad(run(x, v, w).sum(), w)
    close(alone, beside)
    with torch.no_grad():
        quiet = run(x, v, w)
    assert not quiet.requires_grad
    close(quiet, run(x, v, w).detach(), atol=0)


def test_guidance_through_a_network_on_the_seeds_axis() -> None:
    """Seeds and rows do not meet: each is guided as it is alone."""
    process = VP()
    D = Prediction("eps", process).denoiser(network)
    guided = classifier_guided(process, D, lambda x, t: -(x**4).sum(-1), 0.1)
    x, t = torch.randn(2, 5, 3, dtype=F64), torch.rand(2, 5, dtype=F64) + 0.1
    with torch.no_grad():
        close(guided(x, t)[1, 3], guided(x[1, 3], t[1, 3]))


def test_mistakes_of_guidance_are_named() -> None:
    D = Gaussian(torch.zeros(2), torch.ones(2)).denoiser(VP())
    with pytest.raises(ValueError, match="Did you mean 'x0'"):
        classifier_guided(VP(), D, lambda x, t: x.sum(-1), at="x_0")  # type: ignore[arg-type]
    for steps, at in ((0, "x_t"), (2, "x0")):
        with pytest.raises(ValueError, match=f"at least 1, and at 'x0' 1, got {steps} at '{at}'"):
            classifier_guided(VP(), D, lambda x, t: x.sum(-1), at=at, steps=steps)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="differentiable"):
        classifier_guided(VP(), D, lambda x, t: torch.zeros(5))(torch.zeros(5, 2), torch.tensor(1.0))


# --- classifier-free guidance --------------------------------------------------------------------------------------


def conditional(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
    """A network that mixes x, t and the condition (..., 2), and sees all rows by themselves."""
    return torch.tanh(network(x, t) + condition @ torch.tensor([[1.0, -0.5, 0.2], [0.3, 2.0, 1.0]], dtype=x.dtype))


@pytest.fixture
def case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (S, B, d), t (S, B), condition (S, B, 2), null (2,)."""
    return (
        torch.randn(2, 5, 3, dtype=F64),
        torch.rand(2, 5, dtype=F64) + 0.1,
        torch.randn(2, 5, 2, dtype=F64),
        torch.tensor([0.5, -0.5], dtype=F64),
    )


def test_scales_0_and_1_are_the_two_networks(case: tuple[Tensor, ...]) -> None:
    """To the last bit, with one branch computed for a number, both for a tensor."""
    x, t, condition, null = case
    rows = []

    def counted(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        rows.append(x.shape[1])
        return conditional(x, t, condition)

    unconditional = conditional(x, t, null.expand_as(condition))
    close(classifier_free(counted, condition, null, 0)(x, t), unconditional, atol=0)
    close(classifier_free(counted, condition, null, 1.0)(x, t), conditional(x, t, condition), atol=0)
    mixed = classifier_free(counted, condition, null, torch.tensor([[0.0], [1.0]]))(x, t)
    assert rows == [5, 5, 10]
    close(mixed[0], unconditional[0], atol=0)
    close(mixed[1], conditional(x, t, condition)[1], atol=0)


@pytest.mark.parametrize("scalar_time", [True, False])
@pytest.mark.parametrize("w", [-0.5, 0.3, 2.0, 7.5])
def test_one_batch_is_two_and_linear_in_the_scale(case: tuple[Tensor, ...], w: float, scalar_time: bool) -> None:
    x, t, condition, null = case
    t = t[0, 0] if scalar_time else t
    m_u, m_c = conditional(x, t, null.expand_as(condition)), conditional(x, t, condition)
    expected = m_u + w * (m_c - m_u)
    close(classifier_free(conditional, condition, null, w)(x, t), expected)
    close(classifier_free(conditional, condition, null, torch.tensor(w))(x, t), expected, atol=1e-7)
    per_row = torch.full((2, 5), w, dtype=F64)
    close(classifier_free(conditional, condition, null, per_row)(x, t), expected)
    close(classifier_free(conditional, condition[0], null, w)(x[0], t if scalar_time else t[0]), expected[0])


@process_parameter
@pytest.mark.parametrize("kind", ["eps", "x0", "v", "edm"])
def test_guiding_the_network_is_guiding_the_denoiser(case: tuple[Tensor, ...], process: Process, kind) -> None:
    x, t, condition, null = case
    prediction = Prediction(kind, process)
    on_network = prediction.denoiser(classifier_free(conditional, condition, null, 3.0))

    def D(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return prediction.denoiser(lambda x, t: conditional(x, t, condition))(x, t)

    close(on_network(x, t), classifier_free(D, condition, null, 3.0)(x, t), atol=1e-11)


def test_images_and_labels() -> None:
    """x (B, *image) and one label a row, the last of which stands for none."""
    table = torch.randn(4, 3, dtype=F64)

    def labelled(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        assert label.shape == x.shape[:1] == t.shape
        return torch.sin(x + t[:, None, None, None] + table[label][:, :, None, None])

    x, t, label = torch.randn(6, 3, 4, 4, dtype=F64), torch.rand(6, dtype=F64), torch.arange(6) % 3
    m_u, m_c = labelled(x, t, torch.full((6,), 3)), labelled(x, t, label)
    guided = classifier_free(labelled, label, torch.tensor(3), 2.5, event_dims=3)
    close(guided(x, t), m_u + 2.5 * (m_c - m_u))


def test_classifier_free_guidance_samples_the_conditional() -> None:
    """With the exact network at w = 1: what the conditional denoiser samples, bit for bit."""
    process, data = VP(), mixture()
    denoisers = [component(data, y).denoiser(process) for y in range(3)] + [data.denoiser(process)]

    def D(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return torch.stack([d(x, t) for d in denoisers]).take_along_dim(label[None, :, None], 0)[0]

    label, null = torch.arange(30) % 3, torch.tensor(3)
    times, x = process.grid(8, 0.02, 20.0, dtype=F64), torch.randn(30, 2, dtype=F64)
    bound = lambda x, t: D(x, t, label)  # noqa: E731
    close(sample(process, classifier_free(D, label, null, 1), x, times), sample(process, bound, x, times), atol=0)


# --- dropping conditions -------------------------------------------------------------------------------------------


def test_conditions_are_dropped_at_the_rate_row_by_row(generator: torch.Generator) -> None:
    """10,000 rows at rate .2: the count's deviation is 40. Neighbours, and seeds, drop independently: .04, +- .002."""
    condition, null = torch.randn(2, 5_000, 3), torch.tensor([9.0, 8.0, 7.0])
    dropped = drop_condition(condition, null, 0.2, generator)
    gone = (dropped == null).all(-1)
    assert ((dropped == condition).all(-1) ^ gone).all()  # rows as a whole
    assert abs(gone.sum().item() - 2000) < 160
    assert abs((gone[0] & gone[1]).float().mean().item() - 0.04) < 0.012
    assert abs((gone[:, 1:] & gone[:, :-1]).float().mean().item() - 0.04) < 0.01


def test_given_noise_says_which_rows_are_dropped() -> None:
    noise = torch.tensor([0.0, 0.1, 0.0999, 0.9])
    label = torch.tensor([0, 1, 2, 1])
    kept = drop_condition(label, torch.tensor(5), 0.1, noise=noise, event_dims=0)
    assert kept.tolist() == [5, 1, 5, 1]
    image = torch.ones(4, 2, 3)
    assert drop_condition(image, torch.zeros(3), 0.1, noise=noise, event_dims=2).sum((1, 2)).tolist() == [0, 6, 0, 6]
    assert (drop_condition(image, torch.zeros(3), 0.0, noise=noise, event_dims=2) == 1).all()
    assert (drop_condition(image, torch.zeros(3), 1.0, noise=noise, event_dims=2) == 0).all()


def test_the_null_condition_learns_from_the_dropped_rows_alone() -> None:
    null = torch.zeros(2, requires_grad=True)
    kept = drop_condition(torch.ones(3, 2), null, 0.5, noise=torch.tensor([0.1, 0.7, 0.2]))
    close(torch.autograd.grad(kept.sum(), null)[0], torch.tensor([2.0, 2.0]), atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 1.5}, "must lie in"),
        ({"rate": float("nan")}, "must lie in"),
        ({"null": torch.zeros(4)}, "does not broadcast"),
        ({}, "pass a generator"),
        ({"noise": torch.zeros(5, 3)}, "one number a row"),
        ({"event_dims": 3}, "event_dims = 3"),
    ],
    ids=str,
)
def test_mistakes_of_dropping_are_named(options: dict, message: str) -> None:
    arguments = {"null": torch.zeros(3), "rate": 0.1, **options}
    with pytest.raises(ValueError, match=message):
        drop_condition(torch.ones(5, 3), **arguments)


def test_mistakes_of_classifier_free_guidance_are_named() -> None:
    with pytest.raises(ValueError, match="does not broadcast"):
        classifier_free(conditional, torch.zeros(5, 2), torch.zeros(3), 2.0)
    guided = classifier_free(conditional, torch.zeros(5, 2), torch.zeros(2), 2.0)
    with pytest.raises(ValueError, match="batch axis, axis 0"):
        guided(torch.zeros(6, 3), torch.tensor(1.0))
    with pytest.raises(ValueError, match="batch axis, axis -1"):
        guided(torch.zeros(3), torch.tensor(1.0))
