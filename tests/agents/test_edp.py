"""EDP against its equations, written out plainly."""

import dataclasses

import pytest
import torch

from agents import EDP
from agents.edp import EDPAgent
from diffrl.diffusion import VP, discrete_grid, sample
from tests.agents.agent_cases import assert_same_gradients, make_batch, reached

SMALL = EDP(width=16, layers=2, batch_size=8, q_weight=0.7)


def build(config: EDP = SMALL, seeds: tuple[int, ...] = (0,)) -> EDPAgent:
    agent = config.build(3, 2, seeds)
    assert isinstance(agent, EDPAgent)
    return agent


@pytest.mark.parametrize("coin", [0.2, 0.7])
def test_one_pass_serves_cloning_and_q(coin: float) -> None:
    """L = |D - a|^2 - eta Q_i(s, clip D) / mean |Q_j|, D the network's own answer at a_t: it is called once."""
    agent, batch = build(), make_batch()
    for p in agent.actor.mlp.linears[-1].parameters():
        p.data *= 8  # some guesses outside the box
    t, eps = agent.actor.bc_noise(batch.actions, torch.Generator().manual_seed(0))
    a_t = torch.exp(-t / 2)[..., None] * batch.actions + torch.sqrt(1 - torch.exp(-t))[..., None] * eps
    guess = agent.actor(a_t, t, batch.observations)
    assert (guess.abs() > 1).any()
    q = agent.critic(batch.observations, guess.clip(-1, 1))[0]
    i = 0 if coin < 0.5 else 1
    plain = ((guess - batch.actions) ** 2).mean() - 0.7 * q[i].mean() / q[1 - i].abs().mean().detach()
    calls = []
    handle = agent.actor.mlp.linears[-1].register_forward_hook(lambda *_: calls.append(1))
    loss, metrics = agent.actor_loss(batch, t, eps, torch.tensor([[coin]]))
    handle.remove()
    assert len(calls) == 1
    assert_same_gradients(loss, plain[None], agent.actor)
    assert reached(loss, agent.networks) == {"actor"}
    torch.testing.assert_close(metrics["bc_loss"][0], ((guess - batch.actions) ** 2).mean().detach())


def test_training_times_are_the_schedules_thousand() -> None:
    agent = build()
    t, eps = agent.actor.bc_noise(torch.zeros(1, 20_000, 2), torch.Generator().manual_seed(0))
    grid = discrete_grid("linear", 1000)[:-1]
    assert set(t.unique().tolist()) <= set(grid.tolist())
    assert len(t.unique()) == 1000  # by 20,000 draws one is missed with a chance of 2e-6
    assert eps.shape == (1, 20_000, 2)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp2m", "heun"])
def test_actions_are_the_solvers_on_the_network(solver: str) -> None:
    """From the noisiest of the training's levels to the data, evenly in log-SNR, D clamped to the box."""
    agent = build(dataclasses.replace(SMALL, solver=solver, sampling_steps=6))  # type: ignore[arg-type]
    x, z = torch.randn(1, 5, 3), torch.randn(1, 15, 2)
    actions = agent.actor.sample(x, z)
    repeated, vp = x.repeat_interleave(3, 1), VP()
    k = vp.ratio(discrete_grid("linear", 1000, dtype=torch.float64)[:-1])
    low, high = float(k[-1]), float(k[0])
    times = torch.log1p(torch.tensor([high * (low / high) ** (i / 5) for i in range(6)] + [0.0]).double() ** 2)
    start = torch.sqrt(1 - torch.exp(-times[0])).float() * z
    expected = sample(vp, lambda a, t: agent.actor(a, t, repeated), start, times, solver, clip=(-1.0, 1.0))
    torch.testing.assert_close(actions, expected, rtol=1e-4, atol=1e-5)


def test_the_target_takes_the_averaged_policys_action() -> None:
    agent, other, batch = build(), build(seeds=(1,)), make_batch()
    agent.ema_actor.load_state_dict(other.actor.state_dict())
    noise = torch.randn(1, 8, 2)
    q1, q2 = agent.target_critic(batch.next_observations, other.actor.sample(batch.next_observations, noise))[0]
    expected = batch.rewards[0] + 0.99 * (1 - batch.terminals[0]) * torch.minimum(q1, q2)
    torch.testing.assert_close(agent.target(batch, noise)[0], expected.detach())
