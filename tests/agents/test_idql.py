"""IDQL: a residual diffusion policy cloned with dropout, beside IQL's critics, which choose."""

import dataclasses

import torch

from agents import IDQL
from agents.idql import IDQLAgent
from diffrl.diffusion import discrete_grid
from diffrl.nets import ResidualMLP, dropout_mask
from tests.agents.agent_cases import (
    assert_moved,
    assert_same_gradients,
    changed,
    make_batch,
    reached,
    state,
    weights,
)

SMALL = IDQL(width=16, blocks=2, batch_size=8, dropout=0.4, act_candidates=7)


def build(config: IDQL = SMALL, seeds: tuple[int, ...] = (0,)) -> IDQLAgent:
    agent = config.build(3, 2, seeds)
    assert isinstance(agent, IDQLAgent)
    return agent


def test_the_policy_is_cloned_with_dropout() -> None:
    """E |eps - eps_theta(a_t, t, s)|^2, dropout on each block's input; no gradient but the policy's."""
    agent, batch, g = build(), make_batch(), torch.Generator().manual_seed(0)
    i, eps = agent.actor.bc_noise(batch.actions, g)
    keep = dropout_mask((2, 1, 8, 16), 0.4, g)
    t = discrete_grid("vp", 5)[:-1][i]
    a_t = torch.exp(-t / 2)[..., None] * batch.actions + torch.sqrt(1 - torch.exp(-t))[..., None] * eps
    network = agent.actor.mlp
    assert isinstance(network, ResidualMLP)
    x = torch.cat([a_t, agent.actor.embed_time(t), batch.observations], -1)
    plain = ((network(x, keep) - eps) ** 2).mean((-2, -1))
    loss = agent.actor_loss(batch, i, eps, keep)
    assert_same_gradients(loss, plain, agent.actor)
    assert reached(loss, agent.networks) == {"actor"}
    assert not torch.allclose(loss, ((network(x) - eps) ** 2).mean())


def test_a_step_moves_critics_policy_and_both_averages() -> None:
    agent, before_step = build(dataclasses.replace(SMALL, ema_rate=0.2, target_rate=0.3)), make_batch()
    policy, critic, before = weights(agent.ema_actor), weights(agent.target_critic), state(agent)
    agent.update(before_step, torch.Generator().manual_seed(0))
    assert_moved(policy, agent.ema_actor, agent.actor, 0.2)
    assert_moved(critic, agent.target_critic, agent.critic, 0.3)
    assert changed(agent, before) == {"actor", "ema_actor", "value", "critic", "target_critic"}


def test_the_critics_do_not_touch_the_policy() -> None:
    """The same data with other rewards give the same policy, bit for bit."""
    policies = []
    for scale in (1.0, -5.0):
        agent, g = build(), torch.Generator().manual_seed(0)
        for step in range(3):
            batch = make_batch(seed=step)
            agent.update(batch._replace(rewards=scale * batch.rewards), g)
        policies.append((weights(agent.actor), weights(agent.critic)))
    assert all(torch.equal(a, b) for a, b in zip(policies[0][0], policies[1][0], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(policies[0][1], policies[1][1], strict=True))


def test_acting_takes_the_averaged_policys_best_candidate() -> None:
    """By the smaller target critic, without dropout."""
    agent, other, x = build(), build(seeds=(1,)), torch.randn(1, 5, 3)
    agent.ema_actor.load_state_dict(other.actor.state_dict())
    chosen = agent.act(x, torch.Generator().manual_seed(1))
    repeated = x.repeat_interleave(7, 1)
    with torch.no_grad():
        noise = torch.randn(6, 1, 35, 2, generator=torch.Generator().manual_seed(1))
        candidates = other.actor.sample(repeated, noise)
        q = agent.target_critic(repeated, candidates)[0].amin(0)
    for i in range(5):
        best = 7 * i + int(q[7 * i : 7 * i + 7].argmax())
        torch.testing.assert_close(chosen[0, i], candidates[0, best], rtol=1e-4, atol=1e-5)
