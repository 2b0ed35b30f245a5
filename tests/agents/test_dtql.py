"""DTQL: the trust region against closed forms, and the agent against its equations."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from agents import DTQL
from agents.critic import CandidateNoise
from agents.dtql import DTQLAgent, LevelNoise, clamped_loss
from diffrl.data.transitions import Batch
from diffrl.diffusion import VE, Denoise, Gaussian, GaussianMixture, Network, Prediction, expand, loglogistic_times
from diffrl.support.errors import UserError
from tests.agents.agent_cases import assert_same_gradients, changed, make_batch, reached, state

SMALL = DTQL(width=16, layers=2, batch_size=8, alpha=3.0, likelihood_weight=0.5, actor_start=0, act_candidates=6)
EDM = Prediction("edm", VE(), 0.5)
F64 = torch.float64


def build(config: DTQL = SMALL, seeds: tuple[int, ...] = (0,)) -> DTQLAgent:
    agent = config.build(3, 2, seeds)
    assert isinstance(agent, DTQLAgent)
    return agent


def as_network(denoise: Denoise) -> Network:
    """The raw network that amounts to an exact denoiser, in EDM's form."""

    def network(x: Tensor, label: Tensor) -> Tensor:
        t = torch.exp(4 * label)
        x = x * expand(EDM.scale(t), x)
        return EDM.from_x0(denoise(x, t), x, t)

    return network


def test_the_trust_region_pulls_to_a_gaussians_mode_by_its_closed_form() -> None:
    """|D - a|^2 / c_out^2 with D = (s^2 x + k^2 m) / (s^2 + k^2): its slope in a, the noise averaged out, is

    2 k^4 (a - m) / (s^2 + k^2)^2 / c_out^2: 0 at the mode, and away from it the sign of a - m.
    """
    mean, std = 0.1, 0.15
    exact = Gaussian(torch.tensor([mean], dtype=F64), torch.tensor([std], dtype=F64)).denoiser(VE())
    a = torch.linspace(-0.3, 0.5, 9, dtype=F64).view(1, 9, 1).requires_grad_()  # the fifth is the mode
    for k in (0.05, 0.3, 2.0):
        t, eps = torch.full((1, 9), k, dtype=F64), torch.full((1, 9, 1), 0.7, dtype=F64)
        loss = sum(clamped_loss(EDM, as_network(exact), a, t, sign * eps) for sign in (1, -1)) / 2
        (slope,) = torch.autograd.grad(9 * loss.sum(), a)
        c_out = k * 0.5 / (k**2 + 0.25) ** 0.5
        expected = 2 * k**4 * (a - mean) / (std**2 + k**2) ** 2 / c_out**2
        torch.testing.assert_close(slope, expected.detach(), rtol=1e-9, atol=1e-12)
        assert abs(float(slope[0, 4, 0])) < 1e-12
        assert (slope[0, :4, 0] < 0).all()
        assert (slope[0, 5:, 0] > 0).all()


def test_the_trust_region_is_least_at_the_modes_and_not_between_them() -> None:
    mixture = GaussianMixture(
        torch.tensor([[-0.5], [0.5]], dtype=F64), torch.full((2,), 0.05, dtype=F64), torch.ones(2)
    )
    g, grid = torch.Generator().manual_seed(0), torch.linspace(-0.9, 0.9, 37, dtype=F64)
    t = loglogistic_times(VE(), (1, 2000), g, k_min=0.002, k_max=80.0, dtype=F64)
    eps = torch.randn(1, 2000, 1, generator=g, dtype=F64)
    network = as_network(mixture.denoiser(VE()))
    loss = torch.cat([clamped_loss(EDM, network, a.expand(1, 2000, 1), t, eps) for a in grid])
    left, middle, right = int(loss[:18].argmin()), 18, 18 + int(loss[18:].argmin())
    assert abs(float(grid[left]) + 0.5) < 0.06
    assert abs(float(grid[right]) - 0.5) < 0.06
    assert loss[middle] > 3 * torch.maximum(loss[left], loss[right])
    start = torch.full((1, 2000, 1), 0.1, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(clamped_loss(EDM, network, start, t, eps).sum(), start)
    assert slope.sum() < 0  # down the slope is to the right, to the nearer mode


def plain_trust(agent: DTQLAgent, s: Tensor, a: Tensor, noise: LevelNoise) -> Tensor:
    """EDM's preconditioning with c_d = .5, written out; D clamped."""
    k = noise.t[..., None]
    x = a + k * noise.eps
    c = (k**2 + 0.25).sqrt()
    d = (0.25 / c**2 * x + 0.5 * k / c * agent.diffusion(x / c, k[..., 0].log() / 4, s)).clip(-1, 1)
    return (((d - a) / (0.5 * k / c)) ** 2).mean()


def test_the_diffusion_model_learns_by_edms_loss_and_the_policy_by_the_same_loss_and_q() -> None:
    agent, batch, g = build(), make_batch(), torch.Generator().manual_seed(0)
    noise = agent.level_noise(batch.actions, g)
    loss = agent.diffusion_loss(batch, noise)
    assert_same_gradients(loss, plain_trust(agent, batch.observations, batch.actions, noise)[None], agent.diffusion)
    assert reached(loss, agent.networks) == {"diffusion"}
    z, s = torch.randn(1, 8, 2, generator=g), batch.observations
    loss, metrics = agent.actor_loss(batch, z, noise)
    mu, log_std = agent.actor.mlp(s).chunk(2, -1)
    std = log_std.clip(-5, 2).exp()
    a = torch.tanh(mu + std * z)
    q1, q2 = agent.critic(s, a)[0]
    likelihood = torch.distributions.Normal(mu, std).log_prob(torch.atanh(batch.actions / 1.001)).sum(-1).mean()
    plain = 3 * plain_trust(agent, s, a, noise) - torch.minimum(q1, q2).mean() - 0.5 * likelihood
    assert_same_gradients(loss, plain[None], agent.actor)
    assert reached(loss, agent.networks) == {"actor"}
    torch.testing.assert_close(metrics["q_loss"][0], -torch.minimum(q1, q2).mean().detach())


def test_values_learn_from_the_online_critics_and_have_no_norm() -> None:
    agent, batch = build(), make_batch()
    agent.target_critic.load_state_dict(build(seeds=(1,)).critic.state_dict())
    loss, _, _ = agent.value_loss(batch)
    q1, q2 = agent.critic(batch.observations, batch.actions)[0].detach()
    u = torch.minimum(q1, q2) - agent.value(batch.observations)[0, :, 0]
    assert_same_gradients(loss, (torch.where(u < 0, 0.3, 0.7) * u**2).mean()[None], agent.value)
    assert [type(norm).__name__ for norm in agent.value.norms] == ["Identity"] * 2
    assert [type(norm).__name__ for norm in agent.critic.mlp.norms] == ["StackedLayerNorm"] * 2


def test_the_policy_begins_at_its_step_as_if_it_were_the_first() -> None:
    """Until then it does not move; then its step is that of an agent whose policy starts there, bit for bit."""
    late, soon = build(dataclasses.replace(SMALL, actor_start=3)), build()
    g, before = torch.Generator().manual_seed(0), state(late)
    for step in range(3):
        late.update(make_batch(seed=step), g)
    assert changed(late, before) == {"value", "critic", "target_critic", "diffusion"}
    soon.load_state_dict(late.state_dict())
    assert all(not t.any() for name, t in late.state_dict().items() if name.startswith("optimiser.actor"))
    h = torch.Generator()
    h.set_state(g.get_state())
    for step in (3, 4):
        late.update(make_batch(seed=step), g)
        soon.update(make_batch(seed=step), h)
    assert changed(late, before) == set(late.networks)
    assert all(torch.equal(t, soon.state_dict()[name]) for name, t in late.state_dict().items())


def test_all_rates_fall_together_from_the_policys_start_to_nothing() -> None:
    """As the authors' schedulers, which are stepped behind the first steps alone: the last step is everybody's."""
    agent, g = build(dataclasses.replace(SMALL, actor_start=4, lr_decay_steps=6)), torch.Generator().manual_seed(0)
    batch = make_batch()
    rates = []
    for _ in range(12):
        agent.update(batch, g)
        rates.append(
            {name: float(optimiser._rate) / optimiser.learning_rate for name, optimiser in agent.optimisers.items()}
        )
    cosine = [(1 + math.cos(math.pi * k / 6)) / 2 for k in range(7)]
    for name in ("value", "critic", "diffusion"):
        assert [of[name] for of in rates] == pytest.approx([1] * 4 + cosine + [0], abs=1e-6)
    assert [of["actor"] for of in rates[4:]] == pytest.approx([*cosine, 0], abs=1e-6)


def test_a_run_of_before_keeps_its_schedule() -> None:
    """Its configuration does not say that the critics' rates wait: they have fallen from the first step."""
    config = dataclasses.replace(SMALL, actor_start=4, lr_decay_steps=6)
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name != "lr_decay_waits"}
    old = DTQL(**DTQL.of_run(fields))
    assert (old.lr_decay_waits, DTQL(**DTQL.of_run(dataclasses.asdict(config))).lr_decay_waits) == (False, True)
    agent, g = build(old), torch.Generator().manual_seed(0)
    for k in range(6):
        agent.update(make_batch(), g)
        rate = float(agent.optimisers["critic"]._rate) / old.critic_lr
        assert rate == pytest.approx((1 + math.cos(math.pi * k / 6)) / 2, abs=1e-6)


def test_acting_draws_and_the_target_critics_choose() -> None:
    agent, x = build(dataclasses.replace(SMALL, act_temperature=0.0)), torch.randn(1, 5, 3)
    agent.target_critic.load_state_dict(build(seeds=(1,)).critic.state_dict())
    z = torch.randn(1, 30, 2)
    chosen = agent.act_from(x, CandidateNoise(z, torch.zeros(1, 5, 6)))
    for i in range(5):
        a = agent.actor.sample(x[:, i : i + 1], z[:, 6 * i : 6 * i + 6])
        q1, q2 = agent.target_critic(x[:, i : i + 1].expand(-1, 6, -1), a)[0]
        torch.testing.assert_close(chosen[0, i], a[0, int(torch.minimum(q1, q2).argmax())])


def test_two_seeds_together_are_each_alone() -> None:
    pair, batch = build(seeds=(3, 5)), make_batch(2)
    noise = pair.level_noise(batch.actions, torch.Generator().manual_seed(0))
    z = torch.randn(2, 8, 2)
    for i, seed in enumerate((3, 5)):
        alone, own, one = build(seeds=(seed,)), Batch(*(column[i : i + 1] for column in batch)), slice(i, i + 1)
        its = LevelNoise(*(part[one] for part in noise))
        torch.testing.assert_close(alone.diffusion_loss(own, its)[0], pair.diffusion_loss(batch, noise)[i])
        torch.testing.assert_close(alone.actor_loss(own, z[one], its)[0][0], pair.actor_loss(batch, z, noise)[0][i])


def test_noise_levels_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(UserError, match=r"--agent.sigma-min is 1.0; expected less than --agent.sigma-max, 0.5"):
        dataclasses.replace(SMALL, sigma_min=1.0, sigma_max=0.5)
