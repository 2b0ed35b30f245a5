"""The denoising chain as a decision process. Everything in float64, so that what is stated holds to rounding."""

import math

import pytest
import torch
from diffusion_cases import F64, PROCESSES, close
from torch import Tensor, nn

from diffrl.diffusion import (
    VE,
    VP,
    DenoisingChain,
    Prediction,
    Process,
    RectifiedFlow,
    Rollout,
    Sampler,
    at_steps,
    discrete_grid,
    reverse_step,
    sample,
)

process_parameter = pytest.mark.parametrize("process", PROCESSES, ids=str)
FLOW_GRPO = 0.7 / math.sqrt(2)


class Denoiser(nn.Module):
    """D(x, t) with two parameters, which mixes the coordinates and depends on the time."""

    def __init__(self, w: float = 0.8, b: float = 0.1) -> None:
        super().__init__()
        self.w, self.b = (nn.Parameter(torch.tensor(v, dtype=F64)) for v in (w, b))
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        t = t.reshape(t.shape + (1,) * (x.ndim - t.ndim))
        return torch.tanh(self.w.to(x.dtype) * x + 0.3 * x.roll(1, -1)) + self.b.to(x.dtype) / (1 + t)


def made(
    process: Process,
    shape: tuple[int, ...] = (4, 3),
    *,
    n: int = 5,
    eta: float = 1.0,
    dtype: torch.dtype = F64,
    **options,
) -> tuple[DenoisingChain, Denoiser, Tensor, Tensor, Tensor]:
    """A chain whose last step goes to k = 0, a denoiser, x, the times and the noise of all steps."""
    times = process.grid(n, 0.05, 10.0, to_zero=True, dtype=F64)
    generator = torch.Generator().manual_seed(3)
    x = process.sigma(times[0]).to(dtype) * torch.randn(shape, generator=generator, dtype=dtype)
    noise = torch.randn(n, *shape, generator=generator, dtype=dtype)
    return DenoisingChain(process, times, eta, **options), Denoiser(), x, times, noise


@torch.no_grad()
def rolled(process: Process, shape: tuple[int, ...] = (4, 3), **options) -> tuple[DenoisingChain, Denoiser, Rollout]:
    chain, denoise, x, _, noise = made(process, shape, **options)
    return chain, denoise, chain.rollout(denoise, x, noise=noise)


# --- the chain is what is sampled ----------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, FLOW_GRPO, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("clip", [None, (-0.5, 0.5)])
@process_parameter
def test_a_rollout_is_a_sample_to_the_bit(process: Process, clip, dtype: torch.dtype, eta: float) -> None:
    chain, denoise, x, times, noise = made(process, eta=eta, dtype=dtype, clip=clip)
    expected = sample(process, denoise, x, times, eta=eta, noise=noise, clip=clip, return_chain=True)
    rollout = chain.rollout(denoise, x, noise=noise)
    assert torch.equal(rollout.states, expected)
    assert torch.equal(rollout.x, expected[-1])


def test_a_generator_draws_what_a_sample_draws() -> None:
    chain, denoise, x, times, _ = made(VP())
    expected = sample(VP(), denoise, x, times, eta=1.0, generator=torch.Generator().manual_seed(7))
    assert torch.equal(chain.rollout(denoise, x, torch.Generator().manual_seed(7)).x, expected)


@process_parameter
def test_transitions_are_the_reverse_step(process: Process) -> None:
    chain, denoise, rollout = rolled(process, eta=0.6)
    times = process.grid(5, 0.05, 10.0, to_zero=True, dtype=F64)
    policy = chain.transition(denoise, rollout.states)
    for i in range(chain.n_decisions):
        t, r = times[i], times[i + 1]
        mean, n = reverse_step(process, rollout.states[i], denoise(rollout.states[i], t), t, r, eta=0.6)
        close(policy.mean[i], mean, atol=1e-11)
        close(policy.std[i].squeeze(), n)


def test_pure_noise_is_a_state_too() -> None:
    """From alpha = 0, where a denoiser of x_0 can bear it: rectified flow at t = 1."""
    chain = DenoisingChain(RectifiedFlow(), torch.linspace(1, 0, 6, dtype=F64), FLOW_GRPO)
    rollout = chain.rollout(Denoiser(), torch.randn(4, 3, dtype=F64), torch.Generator().manual_seed(0))
    assert torch.isfinite(rollout.log_probs).all()


# --- log-probabilities ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [FLOW_GRPO, 1.0])
@pytest.mark.parametrize("min_std", [0.0, 0.3])
@process_parameter
def test_log_probabilities_are_torchs(process: Process, min_std: float, eta: float) -> None:
    chain, denoise, rollout = rolled(process, eta=eta, min_std=min_std)
    times = process.grid(5, 0.05, 10.0, to_zero=True, dtype=F64)
    assert chain.n_decisions == (5 if min_std else 4)
    for i in range(chain.n_decisions):
        t, r, (x, x_r) = times[i], times[i + 1], rollout.states[i : i + 2]
        mean, n = reverse_step(process, x, denoise(x, t), t, r, eta)
        expected = torch.distributions.Normal(mean, n.clamp_min(min_std)).log_prob(x_r).sum(-1)
        torch.testing.assert_close(rollout.log_probs[i], expected.detach(), rtol=1e-9, atol=1e-9)
        close(chain.log_prob(denoise, rollout.states, [i])[0], rollout.log_probs[i], atol=0)


def test_entropy_is_torchs() -> None:
    chain, denoise, rollout = rolled(VP())
    policy = chain.transition(denoise, rollout.states)
    expected = torch.distributions.Normal(policy.mean, policy.std.expand_as(policy.mean)).entropy().sum(-1)
    close(policy.entropy(), expected)


@pytest.mark.parametrize(("shape", "event_dims"), [((4, 3), 1), ((2, 4, 3), 1), ((4, 2, 5, 3), 3), ((3,), 1)])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_ratio_is_1_before_the_first_update(shape: tuple[int, ...], event_dims: int, dtype: torch.dtype) -> None:
    """To the bit, for actions, seeds of actions and images, all steps or some; to rounding with a time a row."""
    chain, denoise, rollout = rolled(RectifiedFlow(), shape, eta=FLOW_GRPO, dtype=dtype, event_dims=event_dims)
    rows = shape[: len(shape) - event_dims]
    assert rollout.log_probs.shape == (4, *rows)
    assert torch.equal(chain.log_prob(denoise, rollout.states), rollout.log_probs)
    for choice in ([2, 0], torch.tensor([3])):
        log_prob = chain.log_prob(denoise, rollout.states, choice)
        assert torch.equal((log_prob - at_steps(rollout.log_probs, choice)).exp(), torch.ones_like(log_prob))
    steps = chain.draw_steps(3, torch.Generator().manual_seed(1), rows)
    log_prob = chain.log_prob(denoise, rollout.states, steps)
    close(log_prob, at_steps(rollout.log_probs, steps), atol=1e-11 if dtype == F64 else 1e-4)


def test_images_are_their_rows_flattened() -> None:
    process = VP()
    times = process.grid(4, 0.05, 10.0, dtype=F64)
    pixels = Denoiser()
    images, rows = (DenoisingChain(process, times, event_dims=n) for n in (3, 1))
    x = torch.randn(2, 3, 4, 5, dtype=F64)
    noise = torch.randn(4, 2, 3, 4, 5, dtype=F64)
    rollout = images.rollout(pixels, x, noise=noise)

    def flat(x: Tensor, t: Tensor) -> Tensor:
        return pixels(x.unflatten(-1, (3, 4, 5)), t).flatten(-3)

    flattened = rows.rollout(flat, x.flatten(-3), noise=noise.flatten(-3))
    close(rollout.log_probs, flattened.log_probs, atol=1e-9)


def test_one_step_of_many_costs_one_call() -> None:
    chain, denoise, rollout = rolled(VP())
    denoise.calls = 0
    chain.log_prob(denoise, rollout.states, [3, 1])
    assert denoise.calls == 2


def test_float32_states_have_exact_ratios_at_stable_diffusions_size() -> None:
    """d = 16,384: a log-ratio of 6 nats from float32 states, against float64, within 1e-4 nats.

    Summed in float32 it would err by .003. The network's own rounding is left out: D is a number.
    """
    d = 16_384
    times = VP().grid(3, 0.05, 10.0, dtype=F64)
    chain = DenoisingChain(VP(), times)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, d, dtype=F64, generator=generator)
    noise = torch.randn(3, 4, d, dtype=F64, generator=generator)
    ratios = []
    for dtype in (F64, torch.float32):
        rollout = chain.rollout(lambda x, t: 0 * x, x.to(dtype), noise=noise.to(dtype))
        changed = chain.log_prob(lambda x, t: 0 * x + 2**-10, rollout.states)
        ratios.append(changed - rollout.log_probs)
    assert ratios[0].abs().max() > 5
    assert (ratios[1] - ratios[0]).abs().max() < 1e-4


def test_half_precision_networks_cost_the_log_probability_nothing() -> None:
    chain, _, x, _, noise = made(VP(), dtype=torch.bfloat16)

    def half(x: Tensor, t: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return torch.tanh(x.bfloat16())

    rollout = chain.rollout(half, x, noise=noise)
    assert rollout.states.dtype == torch.float32
    assert torch.equal(chain.log_prob(half, rollout.states), rollout.log_probs)
    close(chain.log_prob(lambda x, t: half(x, t).float(), rollout.states), rollout.log_probs, atol=0)


@process_parameter
def test_the_gradient_is_the_scores(process: Process) -> None:
    """d log pi / d theta = (x_r - m) . dm/dtheta / n^2, x_t and x_r constant."""
    chain, denoise, rollout = rolled(process)
    states = rollout.states.clone().requires_grad_()
    i = 2
    chain.log_prob(denoise, states, [i]).sum().backward()
    assert states.grad is None
    policy = chain.transition(denoise, rollout.states, [i])
    weight = ((rollout.states[i + 1] - policy.mean[0]) / policy.std[0] ** 2).detach()
    (expected,) = torch.autograd.grad((weight * policy.mean[0]).sum(), denoise.b)
    torch.testing.assert_close(denoise.b.grad, expected, rtol=1e-10, atol=1e-10)
    assert denoise.b.grad.abs() > 1e-3


def test_the_score_has_no_mean() -> None:
    """E[grad log pi] = 0: the identity a baseline rests on. 20,000 rows; noise: 5 standard errors leave room."""
    chain, denoise, rollout = rolled(VP(), (20_000, 1), n=3)
    for i in range(chain.n_decisions):
        x_t = rollout.states[i]
        t = VP().grid(3, 0.05, 10.0, to_zero=True, dtype=F64)[i]
        policy = chain.transition(denoise, rollout.states, [i])
        slope = torch.func.jvp(
            lambda b, t=t, x_t=x_t: torch.func.functional_call(denoise, {"b": b}, (x_t, t)),
            (denoise.b.detach(),),
            (torch.ones((), dtype=F64),),
        )[1]
        scores = ((rollout.states[i + 1] - policy.mean[0]) / policy.std[0] ** 2 * slope).detach().squeeze(-1)
        error = scores.std() / math.sqrt(len(scores))
        assert scores.mean().abs() < 5 * error
        # and it is what autograd makes of log_prob, whose mean over the batch is thus 0 within noise, too
        (gradient,) = torch.autograd.grad(chain.log_prob(denoise, rollout.states, [i]).mean(), denoise.b)
        f = Sampler(VP(), VP().grid(3, 0.05, 10.0, to_zero=True, dtype=F64), eta=1.0).plan[i].f
        torch.testing.assert_close(gradient, f * scores.mean(), rtol=1e-8, atol=1e-10)


# --- divergences ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("min_std", [0.0, 0.3])
@process_parameter
def test_kl_is_torchs(process: Process, min_std: float) -> None:
    chain, denoise, rollout = rolled(process, min_std=min_std)
    reference = Denoiser(0.5, -0.2)
    kl = chain.kl(denoise, reference, rollout.states)
    ours, theirs = (chain.transition(D, rollout.states) for D in (denoise, reference))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(ours.mean, ours.std.expand_as(ours.mean)),
        torch.distributions.Normal(theirs.mean, theirs.std.expand_as(theirs.mean)),
    ).sum(-1)
    torch.testing.assert_close(kl, expected, rtol=1e-10, atol=1e-10)
    assert (kl > 0).all()
    assert (chain.kl(denoise, denoise, rollout.states) == 0).all()


@pytest.mark.parametrize("process", [VP(), RectifiedFlow()], ids=str)
def test_kl_is_the_mean_log_ratio(process: Process) -> None:
    """E_pi[log pi - log pi_ref], 20,000 roll-outs; noise: 5 standard errors leave room."""
    chain, denoise, rollout = rolled(process, (20_000, 2), n=4, eta=FLOW_GRPO)
    reference = Denoiser(0.7, 0.0)
    with torch.no_grad():
        log_ratio = rollout.log_probs - chain.log_prob(reference, rollout.states)
        kl = chain.kl(denoise, reference, rollout.states)
    difference = log_ratio - kl
    error = difference.std(-1) / math.sqrt(difference.shape[-1])
    assert (difference.mean(-1).abs() < 5 * error).all()
    assert (kl.mean(-1) > 5 * error).all()


def test_kl_moves_the_policy_alone() -> None:
    chain, denoise, rollout = rolled(VP())
    reference = Denoiser(0.5, -0.2)
    chain.kl(denoise, reference, rollout.states).sum().backward()
    assert denoise.w.grad is not None
    assert reference.w.grad is None


def test_flow_grpo_is_the_reverse_step_to_first_order() -> None:
    """Flow-GRPO (arXiv 2505.05470), eq. 9 with sigma_t = .7 sqrt(t/(1 - t)): mean and variance, |dt| among them."""
    process, t = RectifiedFlow(), torch.tensor(0.6, dtype=F64)
    x = torch.randn(5, 3, dtype=F64)
    denoise = Denoiser()
    v = Prediction("velocity", process).from_x0(denoise(x, t), x, t)
    h = 0.7 * torch.sqrt(t / (1 - t))
    errors = []
    for dt in (-0.02, -0.01):
        mean = x * (1 + h**2 * dt / (2 * t)) + (1 + h**2 * (1 - t) / (2 * t)) * v * dt
        std = h * math.sqrt(-dt)
        chain = DenoisingChain(process, torch.stack([t, t + dt]), FLOW_GRPO)
        policy = chain.transition(denoise, torch.stack([x, x]))
        other = Denoiser(0.7, 0.0)
        v_ref = Prediction("velocity", process).from_x0(other(x, t), x, t)
        kl = -dt / 2 * ((h * (1 - t) / (2 * t) + 1 / h) ** 2 * (v - v_ref) ** 2).sum(-1)
        ratio = chain.kl(denoise, other, torch.stack([x, x]))[0] / kl
        close(ratio, ratio[:1].expand(5))
        errors.append(((policy.mean[0] - mean).norm().item(), (policy.std / std - 1).max().item(), ratio[0].item() - 1))
    assert 3.6 < errors[0][0] / errors[1][0] < 4.4  # an error of dt^2 a step
    assert 1.8 < errors[0][1] / errors[1][1] < 2.2
    assert 1.8 < errors[0][2] / errors[1][2] < 2.3
    assert abs(errors[1][2]) < 0.1


# --- the clamp of the deviation, and the last step -----------------------------------------------------------------


@process_parameter
@pytest.mark.parametrize(("first", "length"), [(0, 2), (1, 3), (3, 2)])
def test_a_window_is_three_chains_one_after_the_other(process: Process, first: int, length: int) -> None:
    """Deterministic steps, the window's with noise, deterministic ones: states, log-probabilities, divergences."""
    chain, denoise, x, times, noise = made(process, eta=0.8, window=(first, length))
    whole = chain.rollout(denoise, x, noise=noise)
    last = first + length
    for a, b, eta in ((0, first, 0.0), (first, last, 0.8), (last, 5, 0.0)):
        if a == b:
            continue
        part = DenoisingChain(process, times[a : b + 1], eta)
        rollout = part.rollout(denoise, x, noise=noise[a:b])
        close(whole.states[a : b + 1], rollout.states)
        x = rollout.x
        if eta:
            assert chain.n_decisions == part.n_decisions == (length if last < 5 else length - 1)
            close(whole.log_probs, rollout.log_probs)
            other = Denoiser(0.5)
            close(chain.log_prob(other, whole.states), part.log_prob(other, rollout.states))
            close(chain.kl(other, denoise, whole.states, [0]), part.kl(other, denoise, rollout.states, [0]))


def test_a_window_beyond_the_chain_is_refused() -> None:
    for window in ((-1, 2), (0, 0), (4, 2)):
        with pytest.raises(ValueError, match="window"):
            made(VP(), window=window)
    with pytest.raises(ValueError, match="min_std"):
        made(VP(), window=(0, 1), min_std=0.1)


@process_parameter
def test_noise_keeps_the_coefficients_of_the_marginal(process: Process) -> None:
    """At any eta x_r = alpha_r x_0 + (c, n) of noise with c^2 + n^2 = sigma_r^2: no step is too noisy or too clean.

    So a few steps keep the marginals of x_0 and noise that the network was trained on, as Coefficients-Preserving
    Sampling (Wang and Yu 2025, arXiv 2509.05952) asks of the SDEs of flow models.
    """
    times = process.grid(4, 0.05, 10.0, dtype=F64)
    for eta in (0.0, 0.5, FLOW_GRPO, 1.0):
        for step in Sampler(process, times, eta=eta).plan:
            t, r = torch.tensor(step.t, dtype=F64), torch.tensor(step.r, dtype=F64)
            signal = step.f + step.g * process.alpha(t)
            noise = torch.hypot(step.g * process.sigma(t), torch.tensor(step.n, dtype=F64))
            close(signal, process.alpha(r))
            close(noise, process.sigma(r))


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_pushes_are_how_means_follow_the_network(kind) -> None:
    chain, _, x, _, noise = made(VP(), eta=0.7)
    prediction = Prediction(kind, VP())
    rollout = chain.rollout(prediction.denoiser(lambda x, t: 0.1 * x), x, noise=noise)
    each = [chain.transition(prediction.denoiser(lambda x, t, d=d: 0.1 * x + d), rollout.states).mean for d in (0, 1)]
    moved = (each[1] - each[0]).abs()
    close(moved, chain.pushes(prediction)[:, None, None].expand_as(moved), atol=1e-10)


def test_min_std_is_in_sampling_and_in_the_log_probability() -> None:
    """In both: the noise of every step is recovered from the states, and its log-probability is the clamped one's."""
    chain, denoise, x, _, noise = made(VP(), min_std=0.3)
    plain = made(VP())[0]
    assert plain.stds[-1] == 0
    assert 0 < plain.stds[-2] < 0.3 < plain.stds[0]
    assert chain.stds[0] == plain.stds[0]
    assert chain.stds[-2:] == (0.3, 0.3)
    rollout = chain.rollout(denoise, x, noise=noise)
    stds = torch.tensor(chain.stds, dtype=F64)[:, None]
    policy = chain.transition(denoise, rollout.states)
    close((rollout.states[1:] - policy.mean) / stds[..., None], noise, atol=1e-10)
    close(rollout.log_probs, torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum(-1) - 3 * stds.log(), 1e-10)


def test_the_mean_knows_no_clamp() -> None:
    clamped, denoise, rollout = rolled(VP(), min_std=0.3)
    plain = made(VP())[0]
    close(clamped.transition(denoise, rollout.states, [3]).mean, plain.transition(denoise, rollout.states, [3]).mean, 0)


@process_parameter
def test_the_last_step_to_clean_data_is_no_decision(process: Process) -> None:
    chain, denoise, rollout = rolled(process)
    assert (chain.n_steps, chain.n_decisions) == (5, 4)
    assert rollout.log_probs.shape == (4, 4)
    with pytest.raises(ValueError, match="from 0 to 3"):
        chain.log_prob(denoise, rollout.states, [4])


def test_every_step_to_noisy_data_is_a_decision() -> None:
    chain = DenoisingChain(VE(), VE().grid(5, 0.05, 10.0, dtype=F64))
    assert (chain.n_steps, chain.n_decisions) == (5, 5)


# --- differentiable sampling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("k", [0, 1, 2, 5])
def test_the_last_k_steps_are_differentiable(k: int, eta: float) -> None:
    """The gradient is that of `sample` from the state K steps before the end, and the states are the same."""
    chain, denoise, x, times, noise = made(VP(), eta=eta)
    rollout = chain.rollout(denoise, x, noise=noise, differentiable_steps=k)
    assert torch.equal(rollout.states, chain.rollout(denoise, x, noise=noise).states)
    assert not rollout.log_probs.requires_grad
    if k == 0:
        assert not rollout.states.requires_grad
        return
    gradients = torch.autograd.grad((rollout.x**2).sum(), (denoise.w, denoise.b))
    start = rollout.states[5 - k].detach()
    end = sample(VP(), denoise, start, times[5 - k :], eta=eta, noise=noise[5 - k :] if eta else None)
    for gradient, expected in zip(gradients, torch.autograd.grad((end**2).sum(), (denoise.w, denoise.b)), strict=True):
        close(gradient, expected, atol=1e-10)


def test_no_gradient_passes_the_first_differentiable_step() -> None:
    chain, denoise, x, _, noise = made(VP())
    x.requires_grad_()
    ends = [chain.rollout(denoise, x, noise=noise, differentiable_steps=k).x.sum() for k in (5, 4)]
    assert torch.autograd.grad(ends[0], x)[0].abs().sum() > 0
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(ends[1], x)


# --- subsets of steps ----------------------------------------------------------------------------------------------


def test_a_time_a_row_is_each_rows_own() -> None:
    chain, denoise, rollout = rolled(VP(), (2, 4, 3))
    steps = chain.draw_steps(2, torch.Generator().manual_seed(0), (2, 4))
    log_prob = chain.log_prob(denoise, rollout.states, steps)
    kl = chain.kl(denoise, Denoiser(0.5), rollout.states, steps)
    every = chain.kl(denoise, Denoiser(0.5), rollout.states)
    for j, s, b in [(0, 1, 2), (1, 0, 3), (1, 1, 0)]:
        close(log_prob[j, s, b], rollout.log_probs[steps[j, s, b], s, b], atol=1e-11)
        close(kl[j, s, b], every[steps[j, s, b], s, b], atol=1e-11)


def test_draws_of_steps_are_even_and_repeat_nothing() -> None:
    chain = made(VP())[0]
    steps = chain.draw_steps(4, torch.Generator().manual_seed(0), (1000,))
    assert torch.equal(steps.sort(0).values, torch.arange(4)[:, None].expand(4, 1000))
    counts = steps[0].bincount(minlength=4)
    assert (counts > 180).all()  # 250 each, deviation 14
    assert chain.draw_steps(2, torch.Generator().manual_seed(0)).shape == (2,)


# --- what is refused -----------------------------------------------------------------------------------------------


def test_mistakes_are_named() -> None:
    times = discrete_grid("vp", 5, dtype=F64)
    for options, message in [
        ({"eta": 1.5}, "eta must lie"),
        ({"min_std": -0.1}, "min_std"),
        ({"event_dims": 0}, "event_dims"),
        ({"eta": 1e-8}, "float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            DenoisingChain(VP(), times, **options)
    with pytest.raises(ValueError, match="float32"):
        DenoisingChain(VP(), torch.tensor([1.0, 0.5, 1e-14], dtype=F64))

    chain, denoise, rollout = rolled(VP())
    for steps, message in [
        ([], "steps must be integers"),
        (torch.tensor([0.5]), "steps must be integers"),
        (torch.zeros(2, 3, dtype=torch.int64), "steps must be integers"),
        ([-1], "from 0 to 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            chain.log_prob(denoise, rollout.states, steps)
    with pytest.raises(ValueError, match="states must have shape"):
        chain.log_prob(denoise, rollout.states[1:])
    with pytest.raises(ValueError, match="no policy"):
        made(VP(), eta=0.0)[0].log_prob(denoise, rollout.states)
    with pytest.raises(ValueError, match="differentiable_steps"):
        chain.rollout(denoise, rollout.states[0], differentiable_steps=6)
    with pytest.raises(ValueError, match="pass a generator"):
        chain.rollout(denoise, rollout.states[0])
    with pytest.raises(ValueError, match="decisions"):
        chain.draw_steps(5, torch.Generator())
    with pytest.raises(ValueError, match="noise must have shape"):
        made(VP(), eta=0.0)[0].rollout(denoise, rollout.states[0], noise=torch.zeros(1))
    for wrong in (lambda x, t: x[:, :1], lambda x, t: x[:1], lambda x, t: x[0]):
        with pytest.raises(ValueError, match="the denoiser maps x"):
            chain.rollout(wrong, rollout.states[0], torch.Generator())
        with pytest.raises(ValueError, match="the denoiser maps x"):
            chain.log_prob(wrong, rollout.states)


def test_a_chain_says_what_it_is() -> None:
    times = discrete_grid("vp", 5)
    chain = DenoisingChain(VP(), times, window=(1, 2), clip=(-1, 1))
    steps = f"Sampler(VP(), ddim, eta=1.0: 5 steps from t = {times[0]:.4g} to 0)"
    assert repr(chain) == f"DenoisingChain({steps}, 2 of them decisions, window=(1, 2), clip=(-1, 1))"
