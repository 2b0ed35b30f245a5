"""FQL against its equations, written out plainly."""

import dataclasses
from typing import Literal

import pytest
import torch

from agents import FQL
from agents.fql import FQLAgent
from tests.agents.agent_cases import (
    assert_moved,
    assert_same_gradients,
    changed,
    make_batch,
    reached,
    state,
    weights,
)

SMALL = FQL(width=16, layers=2, batch_size=8, alpha=3.0, flow_steps=4)


def build(config: FQL = SMALL, seeds: tuple[int, ...] = (0,)) -> FQLAgent:
    agent = config.build(3, 2, seeds)
    assert isinstance(agent, FQLAgent)
    return agent


def euler(agent: FQLAgent, observations: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """a <- a - v(a, t, s) / steps at t = 1, 1 - 1/steps, ...; clamped at the end."""
    steps, a = agent.config.flow_steps, z
    for i in range(steps):
        t = torch.full(z.shape[:-1], 1 - i / steps)
        a = a - agent.flow(a, t, observations) / steps
    return a.clip(-1, 1)


def test_the_flow_is_matched_to_the_straight_lines() -> None:
    """E |v(a_t, t, s) - (z - a)|^2 at a_t = (1 - t) a + t z."""
    agent, batch, g = build(), make_batch(), torch.Generator().manual_seed(0)
    t, z = torch.rand(1, 8, generator=g), torch.randn(1, 8, 2, generator=g)
    s, a = batch.observations, batch.actions
    a_t = (1 - t[..., None]) * a + t[..., None] * z
    plain = ((agent.flow(a_t, t, s) - (z - a)) ** 2).mean((-2, -1))
    loss = agent.flow_loss(batch, t, z)
    assert_same_gradients(loss, plain, agent.flow)
    assert reached(loss, agent.networks) == {"flow"}


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_the_flow_is_followed_by_euler_steps(steps: int) -> None:
    agent, s = build(dataclasses.replace(SMALL, flow_steps=steps)), torch.randn(1, 5, 3)
    z = torch.randn(1, 5, 2)
    torch.testing.assert_close(agent.flow.sample(s, z), euler(agent, s, z), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalise_q", [False, True])
def test_the_policy_is_distilled_from_the_flow_and_climbs_q(normalise_q: bool) -> None:
    """-mean Q(s, clip mu) + alpha |mu - flow's end|^2 from the same z; neither flow nor critics get a gradient."""
    agent, batch = build(dataclasses.replace(SMALL, normalise_q=normalise_q)), make_batch()
    for p in agent.actor.mlp.linears[-1].parameters():
        p.data *= 15  # some actions outside the box: distilled as they are, judged where they would be taken
    z = torch.randn(1, 8, 2, generator=torch.Generator().manual_seed(0))
    loss, metrics = agent.actor_loss(batch, z)
    goal = euler(agent, batch.observations, z).detach()
    actions = agent.actor.mlp(torch.cat([batch.observations, z], -1))
    assert (actions.abs() > 1).any()
    assert (actions.abs() < 1).any()
    q = agent.critic(batch.observations, actions.clip(-1, 1)).mean(1)
    q_loss = -q.mean() / (q.abs().mean().detach() if normalise_q else 1)
    distill = ((actions - goal) ** 2).mean()
    assert_same_gradients(loss, (q_loss + 3 * distill)[None], agent.actor)
    assert reached(loss, agent.networks) == {"actor"}
    torch.testing.assert_close(metrics["distill_loss"][0], distill.detach())


@pytest.mark.parametrize("q_agg", ["mean", "min"])
def test_the_target_asks_the_one_step_policy_and_takes_the_critics_mean(q_agg: Literal["mean", "min"]) -> None:
    agent, batch = build(dataclasses.replace(SMALL, q_agg=q_agg)), make_batch()
    agent.target_critic.load_state_dict(build(seeds=(1,)).critic.state_dict())
    z = 3 * torch.randn(1, 8, 2)
    actions = agent.actor(batch.next_observations, z).clip(-1, 1)
    q1, q2 = agent.target_critic(batch.next_observations, actions)[0]
    q = torch.minimum(q1, q2) if q_agg == "min" else (q1 + q2) / 2
    expected = batch.rewards[0] + 0.99 * (1 - batch.terminals[0]) * q
    torch.testing.assert_close(agent.target(batch, z)[0], expected.detach())
    loss, _ = agent.critic_loss(batch, z)
    q1, q2 = agent.critic(batch.observations, batch.actions)[0]
    y = expected.detach()
    assert_same_gradients(loss, (((q1 - y) ** 2).mean() + ((q2 - y) ** 2).mean())[None], agent.critic)
    assert reached(loss, agent.networks) == {"critic"}


def test_a_step_moves_all_and_the_target_at_its_rate() -> None:
    agent, g = build(dataclasses.replace(SMALL, target_rate=0.3)), torch.Generator().manual_seed(0)
    target, before = weights(agent.target_critic), state(agent)
    agent.update(make_batch(), g)
    assert_moved(target, agent.target_critic, agent.critic, 0.3)
    assert changed(agent, before) == {"flow", "actor", "critic", "target_critic"}


def test_the_one_step_policy_acts() -> None:
    agent, x = build(), torch.randn(1, 5, 3)
    z = torch.randn(1, 5, 2, generator=torch.Generator().manual_seed(0))
    expected = agent.actor(x, z).clip(-1, 1).detach()
    torch.testing.assert_close(agent.act(x, torch.Generator().manual_seed(0)), expected)
