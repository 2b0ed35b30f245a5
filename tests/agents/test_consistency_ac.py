"""Consistency-AC as published, written out plainly, and its other forms."""

import dataclasses
import math

import pytest
import torch

from agents import ConsistencyAC
from agents.consistency_ac import ConsistencyACAgent
from agents.consistency_policy import ConsistencyNoise, ConsistencyPolicy
from diffrl.support.errors import UserError
from tests.agents.agent_cases import assert_same_gradients, make_batch, reached

SMALL = ConsistencyAC(width=16, layers=2, batch_size=8, q_weight=0.7)
ANGULAR = dataclasses.replace(SMALL, form="angular")


def build(config: ConsistencyAC = SMALL, seeds: tuple[int, ...] = (0,)) -> ConsistencyACAgent:
    agent = config.build(3, 2, seeds)
    assert isinstance(agent, ConsistencyACAgent)
    return agent


def published(
    policy: ConsistencyPolicy, x: torch.Tensor, t: torch.Tensor, s: torch.Tensor, eps: float = 0.002
) -> torch.Tensor:
    """f = .25 / ((t - eps)^2 + .25) x + .5 (t - eps) / sqrt(t^2 + .25) F(x, t, s)."""
    network, t = policy(x, t, s), t[..., None]
    return 0.25 / ((t - eps) ** 2 + 0.25) * x + 0.5 * (t - eps) / torch.sqrt(t**2 + 0.25) * network


def test_the_published_loss() -> None:
    """100 / (t - r) |f(a + t z, t) - f'(a + r z, r)|^2, f' the averaged policy's, without gradient; then eta L_q."""
    agent, batch, g = build(), make_batch(), torch.Generator().manual_seed(0)
    agent.ema_actor.load_state_dict(build(seeds=(1,)).actor.state_dict())
    agent.step.fill_(40_000)
    noise = agent.actor_noise(batch, g)
    t, r, z = noise.cloning
    loss, metrics = agent.actor_loss(batch, noise)
    s, a = batch.observations, batch.actions
    f = published(agent.actor, a + t[..., None] * z, t, s)
    goal = published(agent.ema_actor, a + r[..., None] * z, r, s).detach()
    consistency = (100 / (t - r) * ((f - goal) ** 2).mean(-1)).mean()
    q = agent.critic(s, agent.actor.sample(s, noise.sampling))[0]
    i = 0 if noise.coin.item() < 0.5 else 1
    plain = consistency - 0.7 * q[i].mean() / q[1 - i].abs().mean().detach()
    assert_same_gradients(loss, plain[None], agent.actor)
    assert reached(loss, agent.networks) == {"actor"}
    torch.testing.assert_close(metrics["bc_loss"][0], consistency.detach())


def improved(policy: ConsistencyPolicy, x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """f = .25 / (t^2 + .25) x + .5 t / sqrt(t^2 + .25) F(x / sqrt(t^2 + .25), log(t) / 4, s)."""
    k = t[..., None]
    scale = torch.sqrt(k**2 + 0.25)
    return 0.25 / scale**2 * x + 0.5 * k / scale * policy(x / scale, t.log() / 4, s)


@pytest.mark.parametrize("form", ["improved", "angular"])
def test_the_loss_of_the_other_forms(form: str) -> None:
    """improved: 1 / (t - r) times the pseudo-Huber distance to the policy's own answer; angular: its mean square over
    the difference of atan(2 t) and atan(2 r).

    In float64: neighbouring answers differ by little more than float32's rounding.
    """
    agent = build(dataclasses.replace(SMALL, form=form))  # type: ignore[arg-type]
    batch, g = make_batch(), torch.Generator().manual_seed(0)
    agent.step.fill_(40_000)
    policy = agent.actor.double()
    noise = ConsistencyNoise(*(x.double() for x in agent.actor_noise(batch, g).cloning))
    t, r, z = noise
    s, a = batch.observations.double(), batch.actions.double()
    ours = policy.bc_loss(a, s, noise, agent.ema_actor)
    goal = improved(policy, a + r[..., None] * z, r, s).detach()
    square = (improved(policy, a + t[..., None] * z, t, s) - goal) ** 2
    if form == "improved":
        c = 0.00054 * math.sqrt(2)
        rows = (torch.sqrt(square.sum(-1) + c**2) - c) / (t - r)
    else:
        rows = square.mean(-1) / (torch.atan(2 * t) - torch.atan(2 * r))
    assert_same_gradients(ours, rows.mean()[None], policy)


def test_the_angular_loss_pulls_as_hard_however_many_levels_there_are() -> None:
    """Its gradient has a limit as t - r goes to 0, so that a weight of Q means the same at every N, and at every t.

    Halving a small gap (of the angle, 1e-3) moves the gradient by under a hundredth of itself; without the weight it
    would halve. But for c_out = c_d sin(theta), by which the network enters f, it is as large at each level: within a
    factor of 2 from k = 0.05 to 5, where iCT's weight 1 / (t - r) makes it (k^2 + c_d^2) / c_d times smaller, 100
    times between the two.
    """
    agent, batch = build(ANGULAR), make_batch(size=256)
    policy = agent.actor.double()
    s, a = batch.observations.double(), batch.actions.double()
    z = torch.randn(a.shape, generator=torch.Generator().manual_seed(0), dtype=a.dtype)

    def gradient(k: float, gap: float) -> torch.Tensor:
        t, r = (torch.full(a.shape[:-1], math.tan(math.atan(2 * k) - x) / 2, dtype=a.dtype) for x in (0.0, gap))
        loss = policy.bc_loss(a, s, ConsistencyNoise(t, r, z), agent.ema_actor)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss.sum(), list(policy.parameters()))])

    sizes = []
    for k in (0.05, 0.5, 5.0):
        coarse, fine = gradient(k, 1e-3), gradient(k, 5e-4)
        assert torch.linalg.vector_norm(coarse - fine) < 0.01 * torch.linalg.vector_norm(fine)
        sizes.append(torch.linalg.vector_norm(fine).item() / math.sin(math.atan(2 * k)))
    assert max(sizes) < 2 * min(sizes)


def test_other_sampling_keeps_every_answer_to_the_actions() -> None:
    """From 5 z at the levels 5, sqrt(5 * 0.02) and so on, evenly in log k; clamped after each, not only at the end."""
    agent, s = build(dataclasses.replace(ANGULAR, denoising_steps=3)), torch.randn(1, 500, 3)
    policy, noise = agent.actor, agent.actor.sampling_noise(s, torch.Generator().manual_seed(0))
    with torch.no_grad():
        policy.mlp.linears[-1].bias.fill_(3.0)  # type: ignore[union-attr,operator]  # answers beyond [-1, 1]
    x = torch.zeros(1, 500, 2)
    for i in range(3):
        k = 5 * (0.02 / 5) ** (i / 3)
        x = (x + k * noise[i]) if i else 5 * noise[0]
        x = improved(policy, x, torch.full((1, 500), k), s).clip(-1, 1)
    torch.testing.assert_close(policy.sample(s, noise), x, rtol=1e-4, atol=1e-5)


def test_the_range_of_levels_is_the_forms_unless_given() -> None:
    assert SMALL.noise_range == (0.002, 80.0)
    assert ANGULAR.noise_range == (0.02, 5.0)
    assert dataclasses.replace(SMALL, form="improved").noise_range == (0.002, 80.0)
    assert dataclasses.replace(ANGULAR, sigma_max=9.0).noise_range == (0.02, 9.0)
    with pytest.raises(UserError, match="sigma-min is 6"):
        ConsistencyAC(form="angular", sigma_min=6.0)
    with pytest.raises(UserError, match="sigma-max is 1"):
        ConsistencyAC(sigma_max=1.0)


@pytest.mark.parametrize(
    ("step", "form"), [(0, "published"), (1, "published"), (30, "published"), (30, "improved"), (30, "angular")]
)
def test_neighbouring_levels_are_those_of_the_step(step: int, form: str) -> None:
    """N(k) = ceil(sqrt(k (150^2 - 4) / K + 4) - 1) + 1 of Karras's levels; published: each interval as likely."""
    agent = build(dataclasses.replace(SMALL, boundaries_steps=5000, form=form))  # type: ignore[arg-type]
    agent.step.fill_(step)
    n = math.ceil(math.sqrt(step * (150**2 - 4) / 5000 + 4) - 1) + 1
    assert n == {0: 2, 1: 3, 30: 12}[step]
    low, high = (x ** (1 / 7) for x in ((0.02, 5) if form == "angular" else (0.002, 80)))
    levels = torch.tensor([(low + i / (n - 1) * (high - low)) ** 7 for i in range(n)])
    rows = 20_000
    t, r, _ = agent.actor_noise(make_batch(size=rows), torch.Generator().manual_seed(0)).cloning
    upper, lower = ((x[0, :, None] - levels).abs().argmin(1) for x in (t, r))
    torch.testing.assert_close(t[0], levels[upper], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(r[0], levels[lower], rtol=1e-4, atol=1e-6)
    assert torch.equal(upper, lower + 1)
    share = torch.bincount(lower, minlength=n - 1) / rows
    if form == "published":
        assert (share - 1 / (n - 1)).abs().max() < 5 * math.sqrt(1 / (n - 1) / rows)
    else:  # that of log k's normal, cut off at the ends
        cdf = torch.distributions.Normal(*((-1.1, 2.0) if form == "improved" else (-0.5, 1.0))).cdf(levels.log())
        expected = (cdf[1:] - cdf[:-1]) / (cdf[-1] - cdf[0])
        assert (share - expected).abs().max() < 5 * math.sqrt(0.25 / rows)


@pytest.mark.parametrize("eps", [0.002, 0.7])
@pytest.mark.parametrize("T", [1, 2, 4])
def test_sampling_is_the_published_one(T: int, eps: float) -> None:
    """From 80 z through the levels linspace(2, 80, T) downwards, noised by sqrt(t^2 - eps^2); clamped at the end."""
    agent, s = build(dataclasses.replace(SMALL, denoising_steps=T, sigma_min=eps)), torch.randn(1, 5, 3)
    noise = agent.actor.sampling_noise(s, torch.Generator().manual_seed(0))
    assert noise.shape == (T, 1, 5, 2)
    levels = {1: [80.0], 2: [80.0, 2.0], 4: [80.0, 54.0, 28.0, 2.0]}[T]
    x = torch.zeros(1, 5, 2)
    for i, t in enumerate(levels):
        x = 80 * noise[0] if i == 0 else x + math.sqrt(t**2 - eps**2) * noise[i]
        x = published(agent.actor, x, torch.full((1, 5), t), s, eps)
    torch.testing.assert_close(agent.actor.sample(s, noise), x.clip(-1, 1), rtol=1e-4, atol=1e-5)


def test_q_norm_divides_the_target_by_its_deviation() -> None:
    """Seed by seed, over the batch."""
    plain, normed = (build(dataclasses.replace(SMALL, q_norm=q), seeds=(0, 1)) for q in (False, True))
    batch, noise = make_batch(2), torch.randn(2, 2, 8, 2)
    y = plain.target(batch, noise)
    torch.testing.assert_close(normed.target(batch, noise), torch.stack([row / row.std() for row in y]))


def test_there_is_no_denoiser_to_diagnose() -> None:
    with pytest.raises(UserError, match="no denoiser"):
        build().generative_model(torch.zeros(1, 1, 3))
