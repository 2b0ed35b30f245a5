"""QAM: adjoint matching against its closed form on a Gaussian, and the agent against its equations."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from agents import QAM
from agents.qam import AdjointSteps, QAMAgent
from diffrl.data.transitions import Batch
from diffrl.diffusion import Gaussian, Network, Prediction, RectifiedFlow
from tests.agents.agent_cases import assert_moved, assert_same_gradients, changed, make_batch, reached, state, weights

SMALL = QAM(width=16, layers=2, batch_size=8, flow_steps=4, n_critics=3, inverse_temperature=2.0)
LAMBDA, MEAN, STD = 1.5, 0.4, 0.6


def build(config: QAM = SMALL, seeds: tuple[int, ...] = (0,)) -> QAMAgent:
    agent = config.build(3, 2, seeds)
    assert isinstance(agent, QAMAgent)
    return agent


def gaussian_flow(mean: float, std: float) -> Network:
    """The velocity of the flow whose data are N(mean, std^2): E[z - a | x_t = x]."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        variance = (1 - t) ** 2 * std**2 + t**2
        slope = (t - (1 - t) * std**2) / variance
        return slope * (x - (1 - t) * mean) - mean

    return velocity


def test_the_plain_gaussian_flow_is_the_core_s() -> None:
    """So that what the laws below hold against is right."""
    exact = Gaussian(torch.tensor([MEAN], dtype=torch.float64), torch.tensor([STD], dtype=torch.float64))
    x, t = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None], torch.tensor(0.3, dtype=torch.float64)
    theirs = Prediction("velocity", RectifiedFlow()).from_x0(exact.denoiser(RectifiedFlow())(x, t), x, t)
    torch.testing.assert_close(gaussian_flow(MEAN, STD)(x, t), theirs)


def lean_adjoint(T: int, slope: float) -> tuple[AdjointSteps, Tensor]:
    """g (T,) along a chain, of Q(a) = slope a and the flow of N(MEAN, STD^2)."""
    torch.set_default_dtype(torch.float64)
    try:
        steps = AdjointSteps(T)
    finally:
        torch.set_default_dtype(torch.float32)
    flow, g = gaussian_flow(MEAN, STD), torch.Generator().manual_seed(0)
    states = steps.follow(flow, flow, torch.randn(T, 1, 1, generator=g, dtype=torch.float64))
    shifts = torch.zeros(T, 1, 1, dtype=torch.float64, requires_grad=True)
    end = steps.linearised(flow, states, shifts)
    torch.testing.assert_close(end, states[-1])
    (adjoint,) = torch.autograd.grad((-LAMBDA * slope * end).sum(), shifts)
    return steps, adjoint[:, 0, 0]


def test_the_regressions_minimiser_is_the_tilted_gaussians_flow_to_first_order_in_h() -> None:
    """N(m, s^2) times exp(lambda c a) is N(m + lambda c s^2, s^2), whose velocity is known. Halving h halves the error.

    The loss |2 / sigma (v - v_beta) - sigma g|^2 is least at v = v_beta + sigma^2 g / 2.
    """
    slope, errors = 0.8, []
    base, tilted = gaussian_flow(MEAN, STD), gaussian_flow(MEAN + LAMBDA * slope * STD**2, STD)
    for T in (100, 200, 400):
        steps, g = lean_adjoint(T, slope)
        at = torch.arange(2, 10) * T // 10  # t = .8, .7, ..., .1: at t = 1 sigma is infinite without the authors' + h
        x, t = torch.full((8,), 0.7, dtype=torch.float64), steps.times[at]
        learned = base(x, t) + steps.deviations[at] ** 2 / 2 * g[at]
        errors.append(float((learned - tilted(x, t)).abs().max()))
    assert errors[0] < 0.03 < float((base(x, t) - tilted(x, t)).abs().max())
    for coarse, fine in itertools.pairwise(errors):
        assert 1.85 < coarse / fine < 2.15


def test_the_chain_forgets_its_start_and_ends_in_the_flows_distribution() -> None:
    """300 steps, 20,000 paths: mean and deviation to three standard errors and the steps' own error."""
    steps, flow, g = AdjointSteps(300), gaussian_flow(MEAN, STD), torch.Generator().manual_seed(0)
    end = steps.follow(flow, flow, torch.randn(300, 20_000, 1, generator=g))[-1]
    assert abs(float(end.mean()) - MEAN) < 3 * STD / math.sqrt(20_000) + 0.01
    assert abs(float(end.std()) - STD) < 3 * STD / math.sqrt(40_000) + 0.01


def plain_chain(agent: QAMAgent, s: Tensor, noise: Tensor) -> list[Tensor]:
    """The authors' discretisation, in their time: u = -v, tau = 1 - t."""
    T, x = agent.config.flow_steps, noise[0]
    states, h = [x], 1 / agent.config.flow_steps
    for i in range(T):
        tau, t = i / T, torch.full(s.shape[:-1], 1 - i / T)
        if i < T - 1:
            sigma = math.sqrt(2 * (1 - tau + h) / (tau + h))
            x = x + h * (-2 * agent.actor(x, t, s) - x / (tau + h)) + math.sqrt(h) * sigma * noise[i + 1]
        else:
            x = x - h * agent.target_flow(x, t, s)
        states.append(x)
    return states


def plain_adjoint(agent: QAMAgent, s: Tensor, states: list[Tensor]) -> list[Tensor]:
    """Backwards, one vector-Jacobian product a step."""
    T, h = agent.config.flow_steps, 1 / agent.config.flow_steps
    end = states[-1].detach().requires_grad_()
    q = agent.target_critic(s, end.clip(-1, 1)).mean(1).sum()
    adjoint = -agent.config.inverse_temperature * torch.autograd.grad(q, end)[0]
    result = []
    for i in reversed(range(T)):
        x = states[i].detach().requires_grad_()
        drift = -2 * agent.target_flow(x, torch.full(s.shape[:-1], 1 - (i + 1) / T), s) - x / (i / T + h)
        adjoint = adjoint + h * torch.autograd.grad((drift * adjoint).sum(), x)[0]
        result.append(adjoint)
    return result[::-1]


def apart(agent: QAMAgent) -> QAMAgent:
    """The agent, its averages those of another, so that no test can mistake one for the other."""
    other = build(agent.config, seeds=(1,))
    agent.target_critic.load_state_dict(other.critic.state_dict())
    agent.target_flow.load_state_dict(other.flow.state_dict())
    return agent


def test_the_chain_and_the_lean_adjoint_are_the_papers_written_out() -> None:
    agent, s = apart(build()), make_batch().observations
    noise = torch.randn(4, 1, 8, 2, generator=torch.Generator().manual_seed(0))
    states = agent.chain(s, noise)
    with torch.no_grad():
        plain = plain_chain(agent, s, noise)
    torch.testing.assert_close(states, torch.stack(plain), rtol=1e-4, atol=1e-5)
    inside = (plain[-1].abs() < 1).all(-1)
    assert inside.any()
    g = agent.adjoint(s, states)
    torch.testing.assert_close(g, torch.stack(plain_adjoint(agent, s, plain)), rtol=1e-4, atol=1e-5)
    assert g.abs().max() > 1e-3
    beyond = (plain[-1].abs() > 1).all(-1)
    assert not g[:, beyond].any()  # Q knows no action there: its gradient is that of the clamped one


def test_the_fine_tuned_flow_is_regressed_on_the_adjoint() -> None:
    agent, s, g = apart(build()), make_batch().observations, torch.Generator().manual_seed(0)
    states, adjoint = (torch.randn(n, 1, 8, 2, generator=g) for n in (5, 4))
    loss, plain = agent.actor_loss(s, states, adjoint), torch.zeros(1)
    for i in range(4):
        sigma, t = math.sqrt(2 * (1 - i / 4 + 0.25) / (i / 4 + 0.25)), torch.full((1, 8), 1 - i / 4)
        difference = agent.actor(states[i], t, s) - agent.target_flow(states[i], t, s)
        plain = plain + ((2 / sigma * difference - sigma * adjoint[i]) ** 2).sum(-1).mean(-1)
    assert_same_gradients(loss, plain, agent.actor)
    assert reached(loss, agent.networks) == {"actor"}


@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_the_target_is_pessimistic_at_the_fine_tuned_flows_actions(rho: float) -> None:
    agent, batch, z = apart(build(dataclasses.replace(SMALL, q_spread=rho))), make_batch(), torch.randn(1, 8, 2)
    with torch.no_grad():
        a = z
        for i in range(4):
            a = a - agent.actor(a, torch.full((1, 8), 1 - i / 4), batch.next_observations) / 4
        q = agent.target_critic(batch.next_observations, a.clip(-1, 1))[0]
    value = q.mean(0) - rho * ((q - q.mean(0)) ** 2).mean(0).sqrt()
    y = batch.rewards[0] + 0.99 * (1 - batch.terminals[0]) * value
    loss, _ = agent.critic_loss(batch, z)
    plain = ((agent.critic(batch.observations, batch.actions)[0] - y) ** 2).mean()
    assert_same_gradients(loss, plain[None], agent.critic)
    assert reached(loss, agent.networks) == {"critic"}


def test_a_step_moves_all_on_what_was_there_before_and_the_clone_does_not_see_q() -> None:
    flows = []
    for scale in (1.0, -5.0):
        agent, g = build(dataclasses.replace(SMALL, target_rate=0.3)), torch.Generator().manual_seed(0)
        batch = make_batch()
        old = {name: weights(network) for name, network in agent.networks.items()}
        before = state(agent)
        metrics = agent.update(batch._replace(rewards=scale * batch.rewards), g)
        for name in ("critic", "flow"):
            assert_moved(old[f"target_{name}"], agent.networks[f"target_{name}"], agent.networks[name], 0.3)
        assert changed(agent, before) == set(agent.networks)
        assert all(torch.isfinite(value).all() for value in metrics.values())
        flows.append(weights(agent.flow))
    assert all(torch.equal(a, b) for a, b in zip(*flows, strict=True))


def test_two_seeds_together_are_each_alone() -> None:
    pair, batch = build(seeds=(3, 5)), make_batch(2)
    noise = torch.randn(4, 2, 8, 2)
    states = pair.chain(batch.observations, noise)
    g = pair.adjoint(batch.observations, states)
    loss = pair.actor_loss(batch.observations, states, g)
    for i, seed in enumerate((3, 5)):
        alone, own = build(seeds=(seed,)), Batch(*(column[i : i + 1] for column in batch))
        its = alone.chain(own.observations, noise[:, i : i + 1])
        torch.testing.assert_close(its[:, 0], states[:, i])
        adjoint = alone.adjoint(own.observations, its)
        torch.testing.assert_close(adjoint[:, 0], g[:, i], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone.actor_loss(own.observations, its, adjoint)[0], loss[i])
