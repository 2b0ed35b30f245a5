"""BFN against its equations, written out plainly."""

import dataclasses
from typing import Literal

import pytest
import torch
import torch.nn.functional as F

from agents import BFN
from agents.bfn import BFNAgent, FlowNoise
from diffrl.data.transitions import Batch
from tests.agents.agent_cases import (
    assert_moved,
    assert_same_gradients,
    changed,
    make_batch,
    reached,
    state,
    weights,
)

SMALL = BFN(width=16, layers=2, batch_size=8, flow_steps=4, act_candidates=7, backup_candidates=5)


def build(config: BFN = SMALL, seeds: tuple[int, ...] = (0,)) -> BFNAgent:
    agent = config.build(3, 2, seeds)
    assert isinstance(agent, BFNAgent)
    return agent


def different(config: BFN = SMALL) -> BFNAgent:
    """An agent whose target critics have other weights than its critics."""
    agent = build(config)
    agent.target_critic.load_state_dict(build(config, (1,)).critic.state_dict())
    return agent


def euler(agent: BFNAgent, observations: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """a <- a - v(a, t, s) / steps at t = 1, 1 - 1/steps, ...; clamped at the end."""
    a = z
    for i in range(4):
        a = a - agent.actor(a, torch.full(z.shape[:-1], 1 - i / 4), observations) / 4
    return a.clip(-1, 1)


def plain_best(agent: BFNAgent, s: torch.Tensor, z: torch.Tensor, how: str) -> torch.Tensor:
    """State by state, of z (1, B K, A), by the online critics."""
    K, chosen = z.shape[1] // s.shape[1], []
    for i in range(s.shape[1]):
        states = s[:, i : i + 1].expand(-1, K, -1)
        actions = euler(agent, states, z[:, K * i : K * (i + 1)])
        q1, q2 = agent.critic(states, actions)[0]
        q = torch.minimum(q1, q2) if how == "min" else (q1 + q2) / 2
        chosen.append(actions[0, int(q.argmax())])
    return torch.stack(chosen)[None]


def test_the_networks_are_the_authors_or_those_of_the_other_agents() -> None:
    agent, ours = build(), build(dataclasses.replace(SMALL, networks="ours"))
    for network in (agent.actor, agent.critic):
        for linear in network.mlp.linears:
            assert linear.weight.abs().max() <= (6 / sum(linear.weight.shape[-2:])) ** 0.5
            assert not linear.bias.any()
    assert agent.critic.mlp.norm_after
    assert agent.critic.mlp.activation is F.gelu
    assert agent.actor.mlp.first.weight.shape[1] == 2 + 1 + 3
    assert ours.actor.mlp.first.weight.shape[1] == 2 + 16 + 3
    assert not ours.critic.mlp.norm_after


def test_the_flow_is_matched_to_the_straight_lines() -> None:
    agent, batch, g = build(), make_batch(), torch.Generator().manual_seed(0)
    t, z = torch.rand(1, 8, generator=g), torch.randn(1, 8, 2, generator=g)
    s, a = batch.observations, batch.actions
    a_t = (1 - t[..., None]) * a + t[..., None] * z
    plain = ((agent.actor(a_t, t, s) - (z - a)) ** 2).mean((-2, -1))
    loss = agent.flow_loss(batch, FlowNoise(t, z))
    assert_same_gradients(loss, plain, agent.actor)
    assert reached(loss, agent.networks) == {"actor"}


@pytest.mark.parametrize("q_agg", ["mean", "min"])
def test_the_online_critics_choose_the_targets_action_and_the_target_critics_value_it(
    q_agg: Literal["mean", "min"],
) -> None:
    agent, batch = different(dataclasses.replace(SMALL, q_agg=q_agg)), make_batch()
    z = torch.randn(1, 40, 2, generator=torch.Generator().manual_seed(0))
    actions = plain_best(agent, batch.next_observations, z, q_agg)
    q1, q2 = agent.target_critic(batch.next_observations, actions)[0]
    q = torch.minimum(q1, q2) if q_agg == "min" else (q1 + q2) / 2
    expected = (batch.rewards[0] + 0.99 * (1 - batch.terminals[0]) * q).detach()
    torch.testing.assert_close(agent.target(batch, z)[0], expected, rtol=1e-4, atol=1e-5)
    loss, _ = agent.critic_loss(batch, z)
    q1, q2 = agent.critic(batch.observations, batch.actions)[0]
    y = agent.target(batch, z)[0]
    assert_same_gradients(loss, (((q1 - y) ** 2).mean() + ((q2 - y) ** 2).mean())[None], agent.critic)
    assert reached(loss, agent.networks) == {"critic"}


def test_acting_takes_the_best_of_n_by_the_online_critics() -> None:
    agent, x = different(), torch.randn(1, 5, 3)
    z = torch.randn(1, 35, 2, generator=torch.Generator().manual_seed(1))
    chosen = agent.act(x, torch.Generator().manual_seed(1))
    torch.testing.assert_close(chosen, plain_best(agent, x, z, "mean").detach(), rtol=1e-4, atol=1e-5)


def test_a_step_moves_all_and_the_target_at_its_rate() -> None:
    agent, g = build(dataclasses.replace(SMALL, target_rate=0.3)), torch.Generator().manual_seed(0)
    target, before = weights(agent.target_critic), state(agent)
    agent.update(make_batch(), g)
    assert_moved(target, agent.target_critic, agent.critic, 0.3)
    assert changed(agent, before) == {"actor", "critic", "target_critic"}


def test_the_critics_do_not_touch_the_flow() -> None:
    """The same data with other rewards give the same flow, bit for bit."""
    flows = []
    for scale in (1.0, -5.0):
        agent, g = build(), torch.Generator().manual_seed(0)
        for step in range(3):
            batch = make_batch(seed=step)
            agent.update(batch._replace(rewards=scale * batch.rewards), g)
        flows.append((weights(agent.actor), weights(agent.critic)))
    assert all(torch.equal(a, b) for a, b in zip(flows[0][0], flows[1][0], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(flows[0][1], flows[1][1], strict=True))


def test_two_seeds_together_are_each_alone() -> None:
    pair, batch, z = build(seeds=(3, 5)), make_batch(2), torch.randn(2, 40, 2)
    t, flow_z = torch.rand(2, 8), torch.randn(2, 8, 2)
    for i, seed in enumerate((3, 5)):
        alone, own, one = build(seeds=(seed,)), Batch(*(column[i : i + 1] for column in batch)), slice(i, i + 1)
        torch.testing.assert_close(alone.critic_loss(own, z[one])[0][0], pair.critic_loss(batch, z)[0][i])
        flow = alone.flow_loss(own, FlowNoise(t[one], flow_z[one]))
        torch.testing.assert_close(flow[0], pair.flow_loss(batch, FlowNoise(t, flow_z))[i])
