"""IFQL: a flow cloned beside IQL's critics, which choose."""

import dataclasses

import torch
import torch.nn.functional as F

from agents import IFQL
from agents.ifql import IFQLAgent
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

SMALL = IFQL(width=16, layers=2, batch_size=8, flow_steps=4, act_candidates=7)


def build(config: IFQL = SMALL, seeds: tuple[int, ...] = (0,)) -> IFQLAgent:
    agent = config.build(3, 2, seeds)
    assert isinstance(agent, IFQLAgent)
    return agent


def test_critics_and_value_function_are_the_authors() -> None:
    """W_2 norm(gelu(W_1 norm(gelu(W_0 x)))), drawn by the average of the fans, the target the critics' copy."""
    agent, batch = build(), make_batch()
    for network in (agent.value, agent.critic.mlp, agent.actor.mlp):
        for linear in network.linears:
            assert linear.weight.abs().max() <= (6 / sum(linear.weight.shape[-2:])) ** 0.5
            assert not linear.bias.any()
    pairs = zip(agent.critic.parameters(), agent.target_critic.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    g = torch.Generator().manual_seed(0)
    for p in agent.value.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=g)
    h = batch.observations[0]
    for linear, norm in zip(agent.value.linears, [*agent.value.norms, None], strict=True):
        h = h @ linear.weight[0] + linear.bias[0]
        if norm is not None:
            h = F.layer_norm(F.gelu(h), (16,), norm.weight[0, 0], norm.bias[0, 0])
    torch.testing.assert_close(agent.value(batch.observations)[0], h, rtol=1e-4, atol=1e-5)
    assert not build(dataclasses.replace(SMALL, networks="ours")).value.norm_after


def test_value_function_and_critics_are_iqls_at_expectile_nine_tenths() -> None:
    agent, batch = build(), make_batch()
    agent.target_critic.load_state_dict(build(seeds=(1,)).critic.state_dict())
    loss, _, v_next = agent.value_loss(batch)
    q1, q2 = agent.target_critic(batch.observations, batch.actions)[0].detach()
    u = torch.minimum(q1, q2) - agent.value(batch.observations)[0, :, 0]
    assert (u < 0).any()
    assert (u > 0).any()
    plain = sum((0.1 if x < 0 else 0.9) * x**2 for x in u) / 8
    assert_same_gradients(loss, plain[None], agent.value)
    assert reached(loss, agent.networks) == {"value"}
    loss, _ = agent.critic_loss(batch, v_next)
    y = (batch.rewards + 0.99 * (1 - batch.terminals) * agent.value(batch.next_observations)[..., 0]).detach()[0]
    q1, q2 = agent.critic(batch.observations, batch.actions)[0]
    assert_same_gradients(loss, (F.mse_loss(q1, y) + F.mse_loss(q2, y))[None], agent.critic)
    assert reached(loss, agent.networks) == {"critic"}


def test_the_flow_is_matched_to_the_straight_lines() -> None:
    agent, batch, g = build(), make_batch(), torch.Generator().manual_seed(0)
    t, z = torch.rand(1, 8, generator=g), torch.randn(1, 8, 2, generator=g)
    a_t = (1 - t[..., None]) * batch.actions + t[..., None] * z
    plain = ((agent.actor(a_t, t, batch.observations) - (z - batch.actions)) ** 2).mean((-2, -1))
    loss = agent.actor_loss(batch, t, z)
    assert_same_gradients(loss, plain, agent.actor)
    assert reached(loss, agent.networks) == {"actor"}


def test_acting_takes_the_flows_best_action_by_the_smaller_online_critic() -> None:
    agent, x = build(), torch.randn(1, 5, 3)
    agent.target_critic.load_state_dict(build(seeds=(1,)).critic.state_dict())
    z = torch.randn(1, 35, 2, generator=torch.Generator().manual_seed(1))
    chosen = agent.act(x, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for i in range(5):
            states, a = x[:, i : i + 1].expand(-1, 7, -1), z[:, 7 * i : 7 * i + 7]
            for k in range(4):
                a = a - agent.actor(a, torch.full((1, 7), 1 - k / 4), states) / 4
            a = a.clip(-1, 1)
            q1, q2 = agent.critic(states, a)[0]
            expected = a[0, int(torch.minimum(q1, q2).argmax())]
            torch.testing.assert_close(chosen[0, i], expected, rtol=1e-4, atol=1e-5)


def test_a_step_moves_all_and_the_critics_do_not_touch_the_flow() -> None:
    flows = []
    for scale in (1.0, -5.0):
        agent, g = build(dataclasses.replace(SMALL, target_rate=0.3)), torch.Generator().manual_seed(0)
        batch = make_batch()
        target, before = weights(agent.target_critic), state(agent)
        agent.update(batch._replace(rewards=scale * batch.rewards), g)
        assert_moved(target, agent.target_critic, agent.critic, 0.3)
        assert changed(agent, before) == {"actor", "value", "critic", "target_critic"}
        flows.append(weights(agent.actor))
    assert all(torch.equal(a, b) for a, b in zip(*flows, strict=True))


def test_two_seeds_together_are_each_alone() -> None:
    pair, batch = build(seeds=(3, 5)), make_batch(2)
    t, z = torch.rand(2, 8), torch.randn(2, 8, 2)
    for i, seed in enumerate((3, 5)):
        alone, own, one = build(seeds=(seed,)), Batch(*(column[i : i + 1] for column in batch)), slice(i, i + 1)
        value, _, v_next = alone.value_loss(own)
        both, _, v_both = pair.value_loss(batch)
        torch.testing.assert_close(value[0], both[i])
        torch.testing.assert_close(alone.critic_loss(own, v_next)[0][0], pair.critic_loss(batch, v_both)[0][i])
        torch.testing.assert_close(alone.actor_loss(own, t[one], z[one])[0], pair.actor_loss(batch, t, z)[i])
