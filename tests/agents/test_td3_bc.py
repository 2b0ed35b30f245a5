"""TD3+BC against its equations, written out plainly."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from agents import TD3BC
from agents.td3_bc import TD3BCAgent
from tests.agents.agent_cases import (
    assert_moved,
    assert_same_gradients,
    changed,
    make_batch,
    reached,
    state,
    weights,
)

SMALL = TD3BC(width=16, batch_size=8, policy_noise=0.4, noise_clip=0.3)


def build(config: TD3BC = SMALL, seeds: tuple[int, ...] = (0,)) -> TD3BCAgent:
    agent = config.build(3, 2, seeds)
    assert isinstance(agent, TD3BCAgent)
    return agent


def test_the_target_smooths_the_target_policy_and_takes_the_smaller_critic() -> None:
    """Noise clipped at 0.3, then actions at 1; the networks are told apart by other weights."""
    agent, other, batch = build(), build(seeds=(1,)), make_batch()
    for own, another in ((agent.target_actor, other.actor), (agent.target_critic, other.critic)):
        own.load_state_dict(another.state_dict())
    agent.target_actor.linears[-1].bias.data[:] = 1.5  # actions near 0.9: the second clip has work to do
    noise = torch.randn(1, 8, 2, generator=torch.Generator().manual_seed(0))
    y = agent.target(batch, noise)
    policy = torch.tanh(agent.target_actor(batch.next_observations))
    actions = (policy + torch.clip(0.4 * noise, -0.3, 0.3)).clip(-1, 1)
    assert ((0.4 * noise).abs() > 0.3).any()
    assert (actions == 1).any()
    assert (actions < 1).any()
    q1, q2 = agent.target_critic(batch.next_observations, actions)[0]
    expected = batch.rewards[0] + 0.99 * (1 - batch.terminals[0]) * torch.minimum(q1, q2)
    torch.testing.assert_close(y[0], expected)
    assert not y.requires_grad


def test_the_critics_regress_on_the_target_alone() -> None:
    agent, batch, noise = build(), make_batch(), torch.randn(1, 8, 2)
    loss, metrics = agent.critic_loss(batch, noise)
    q1, q2 = agent.critic(batch.observations, batch.actions)[0]
    y = agent.target(batch, noise)[0]
    assert_same_gradients(loss, (F.mse_loss(q1, y) + F.mse_loss(q2, y))[None], agent.critic)
    assert reached(loss, agent.networks) == {"critic"}
    torch.testing.assert_close(metrics["q"][0], (q1.mean() + q2.mean()) / 2)


def test_the_actor_climbs_the_first_critic_beside_cloning() -> None:
    """-lambda Q_1 + |pi - a|^2 with lambda = alpha / mean |Q_1|, which has no gradient (eq. 3 and 5)."""
    agent, batch = build(dataclasses.replace(SMALL, alpha=1.7)), make_batch()
    loss, metrics = agent.actor_loss(batch)
    actions = torch.tanh(agent.actor(batch.observations))
    q = agent.critic(batch.observations, actions)[0, 0]
    weight = 1.7 / q.abs().mean().detach()
    assert_same_gradients(loss, (-weight * q.mean() + F.mse_loss(actions, batch.actions))[None], agent.actor)
    assert reached(loss, agent.networks) == {"actor"}
    torch.testing.assert_close(metrics["bc_loss"][0], F.mse_loss(actions, batch.actions))


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_actor_and_targets_move_in_the_last_phase_alone(delay: int) -> None:
    agent, g = build(dataclasses.replace(SMALL, policy_delay=delay, target_rate=0.3)), torch.Generator().manual_seed(0)
    assert agent.period == delay
    for step in range(6):
        before = state(agent)
        targets = weights(agent.target_actor), weights(agent.target_critic)
        metrics = agent.update(make_batch(seed=step), g, step % delay)
        assert list(metrics) == ["critic_loss", "q", "critic_grad_norm", "bc_loss", "q_loss", "actor_grad_norm"]
        if step % delay == delay - 1:
            assert changed(agent, before) == {"actor", "critic", "target_actor", "target_critic"}
            assert_moved(targets[0], agent.target_actor, agent.actor, 0.3)
            assert_moved(targets[1], agent.target_critic, agent.critic, 0.3)
        else:
            assert changed(agent, before) == {"critic"}


def test_what_the_actors_steps_report_is_logged_as_the_mean_over_all_steps() -> None:
    """0 where the actor rests, `policy_delay` times the loss where it moves; nothing is kept besides the state."""
    agent, g = build(), torch.Generator().manual_seed(0)
    assert float(agent.update(make_batch(), g, 0)["bc_loss"]) == 0
    batch = make_batch(seed=1)
    loss = agent.actor_loss(batch)[1]["bc_loss"]
    torch.testing.assert_close(agent.update(batch, g, 1)["bc_loss"], 2 * loss)
    assert float(agent.update(batch, g, 0)["bc_loss"]) == 0


def test_the_policy_acts_without_noise() -> None:
    agent, x = build(), torch.randn(1, 5, 3)
    torch.testing.assert_close(agent.act(x, torch.Generator()), torch.tanh(agent.actor(x)).detach())
