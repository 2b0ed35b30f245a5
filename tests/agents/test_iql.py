"""IQL against its equations, written out plainly, and its critics against the expectile of a known distribution."""

import dataclasses
import math

import pytest
import torch

from agents import IQL
from agents.iql import GaussianActor, IQLAgent
from diffrl.nets import seed_generator
from tests.agents.agent_cases import (
    assert_moved,
    assert_same_gradients,
    changed,
    make_batch,
    reached,
    state,
    weights,
)

SMALL = IQL(width=16, batch_size=8, expectile=0.8)


def build(config: IQL = SMALL, seeds: tuple[int, ...] = (0,)) -> IQLAgent:
    agent = config.build(3, 2, seeds)
    assert isinstance(agent, IQLAgent)
    return agent


def test_the_value_is_regressed_on_the_smaller_target_critic_by_an_expectile() -> None:
    """L_V of eq. 5, term by term; the target critics are told apart from the critics by other weights."""
    agent, batch = build(), make_batch()
    agent.target_critic.load_state_dict(build(seeds=(1,)).critic.state_dict())
    loss, advantages, v_next = agent.value_loss(batch)
    q1, q2 = agent.target_critic(batch.observations, batch.actions)[0]
    u = torch.minimum(q1, q2) - agent.value(batch.observations)[0, :, 0]
    assert (u < 0).any()
    assert (u > 0).any()
    terms = [(0.8 if x > 0 else 0.2) * x**2 for x in u]
    assert_same_gradients(loss, (sum(terms, torch.zeros(())) / 8)[None], agent.value)
    torch.testing.assert_close(advantages[0], u.detach())
    torch.testing.assert_close(v_next, agent.value(batch.next_observations)[..., 0].detach())
    assert reached(loss, agent.networks) == {"value"}
    assert not advantages.requires_grad
    assert not v_next.requires_grad


def test_the_critics_are_regressed_on_the_reward_and_the_next_value() -> None:
    agent, batch, v_next = build(), make_batch(), torch.randn(1, 8)
    loss, _ = agent.critic_loss(batch, v_next)
    q1, q2 = agent.critic(batch.observations, batch.actions)[0]
    y = batch.rewards[0] + 0.99 * (1 - batch.terminals[0]) * v_next[0]
    assert_same_gradients(loss, (((q1 - y) ** 2).mean() + ((q2 - y) ** 2).mean())[None], agent.critic)
    assert reached(loss, agent.networks) == {"critic"}


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_actor_clones_with_clipped_advantage_weights(deterministic: bool) -> None:
    config = dataclasses.replace(SMALL, beta=2.0, max_weight=5.0, deterministic=deterministic)
    agent, batch = build(config), make_batch()
    advantages = torch.linspace(-1, 60, 8)[None]  # exp(120) is infinite in float32: clipped all the same
    loss, metrics = agent.actor_loss(batch, advantages)
    mean = agent.actor(batch.observations)[0]
    if deterministic:
        cost = ((mean - batch.actions[0]) ** 2).sum(-1)
    else:
        std = torch.exp(agent.actor.log_std[0])
        cost = -torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(batch.actions[0]).sum(-1)
    weight = torch.tensor([min(math.exp(2 * float(u)), 5.0) for u in advantages[0]])
    assert weight[0] < 0.2
    assert_same_gradients(loss, (weight * cost).mean()[None], agent.actor)
    assert reached(loss, agent.networks) == {"actor"}
    torch.testing.assert_close(metrics["advantage_weight"][0], weight.mean())
    assert agent.actor.log_std.requires_grad is not deterministic


def test_log_density_is_torchs_and_the_deviation_is_clamped() -> None:
    actor = GaussianActor(3, 2, [seed_generator(0), seed_generator(1)], width=8, layers=2)
    actor.log_std.data = torch.tensor([[[-1.0, 0.3]], [[5.0, -30.0]]])
    x, actions = torch.randn(2, 6, 3), torch.rand(2, 6, 2) * 2 - 1
    means = actor(x)
    assert means.abs().max() < 1
    std = torch.tensor([[[-1.0, 0.3]], [[2.0, -20.0]]]).exp()
    expected = torch.distributions.Normal(means, std.expand_as(means)).log_prob(actions).sum(-1)
    torch.testing.assert_close(actor.log_prob(means, actions), expected)


def test_a_step_updates_value_critics_and_actor_in_corls_order() -> None:
    """V(s') and the advantages are those of before the step; the target critics follow the new critics."""
    agent, twin, batch = build(dataclasses.replace(SMALL, target_rate=0.3)), build(), make_batch()
    target, before = weights(agent.target_critic), state(agent)
    metrics = agent.update(batch, torch.Generator())
    assert_moved(target, agent.target_critic, agent.critic, 0.3)
    assert changed(agent, before) == {"value", "critic", "target_critic", "actor"}
    _, advantages, v_next = twin.value_loss(batch)
    for name, loss in {
        "critic_loss": twin.critic_loss(batch, v_next)[0],
        "actor_loss": twin.actor_loss(batch, advantages)[0],
    }.items():
        assert torch.equal(metrics[name], loss.detach()), name


def test_the_actors_rate_falls_along_a_cosine_and_the_others_stay() -> None:
    agent = build(dataclasses.replace(SMALL, lr_decay_steps=3))
    for step in range(4):
        agent.update(make_batch(seed=step), torch.Generator())
    before = state(agent)
    agent.update(make_batch(seed=4), torch.Generator())
    assert changed(agent, before) == {"value", "critic", "target_critic"}


@pytest.mark.parametrize("tau", [0.5, 0.7, 0.9])
def test_the_value_of_a_state_is_the_expectile_of_its_returns(tau: float) -> None:
    """Q is uniform on [0, 1], one number a row: V's minimiser is m with tau (1 - m)^2 = (1 - tau) m^2.

    Of 1,001 evenly spaced numbers, whose expectile is that of the uniform to 1e-3; V is a constant of the state.
    """
    agent = build(dataclasses.replace(SMALL, expectile=tau, critic_lr=1e-2))
    n = 1001
    batch = make_batch(size=n)
    batch = batch._replace(observations=torch.zeros(1, n, 3))
    q = torch.linspace(0, 1, n)
    agent.target_critic.forward = lambda o, a: torch.stack([q, q + 1])[None]  # type: ignore[method-assign]
    for _ in range(400):
        agent.optimisers["value"].step(agent.value_loss(batch)[0])
    m = math.sqrt(tau) / (math.sqrt(tau) + math.sqrt(1 - tau))
    v = agent.value(torch.zeros(1, 1, 3)).item()
    assert abs(v - m) < 2e-3


def test_the_policy_acts_by_its_mean() -> None:
    agent, x = build(), torch.randn(1, 5, 3)
    torch.testing.assert_close(agent.act(x, torch.Generator()), torch.tanh(agent.actor.mlp(x)).detach())


def test_online_the_actor_goes_on_learning_when_its_offline_schedule_has_run_out() -> None:
    g = torch.Generator().manual_seed(0)
    for online in (False, True):
        config = IQL(width=8, layers=1, batch_size=8, lr_decay_steps=2)
        agent = (config.going_online() if online else config).build(3, 2, (0,))
        for step in range(3):
            agent.update(make_batch(seed=step), g)
        before = {name: tensor.clone() for name, tensor in agent.networks["actor"].state_dict().items()}
        agent.update(make_batch(seed=3), g)
        moved = any(not torch.equal(before[name], t) for name, t in agent.networks["actor"].state_dict().items())
        assert moved == online
