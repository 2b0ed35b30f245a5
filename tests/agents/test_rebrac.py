"""ReBRAC against its equations, written out plainly."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from agents import ReBRAC
from agents.rebrac import ReBRACAgent
from diffrl.data.next_actions import SuccessiveBatch, SuccessiveSource
from diffrl.data.transitions import Batch, Transitions
from tests.agents.agent_cases import (
    assert_moved,
    assert_same_gradients,
    changed,
    make_batch,
    make_successive,
    reached,
    state,
    weights,
)

SMALL = ReBRAC(width=16, layers=2, batch_size=8, actor_penalty=0.3, critic_penalty=0.7, policy_noise=0.4)


def build(config: ReBRAC = SMALL, seeds: tuple[int, ...] = (0,)) -> ReBRACAgent:
    agent = config.build(3, 2, seeds)
    assert isinstance(agent, ReBRACAgent)
    return agent


def different(config: ReBRAC = SMALL) -> ReBRACAgent:
    """An agent whose target networks have other weights than its networks."""
    agent, other = build(config), build(config, (1,))
    agent.target_actor.load_state_dict(other.actor.state_dict())
    agent.target_critic.load_state_dict(other.critic.state_dict())
    agent.target_actor.linears[-1].bias.data[:] = 1.5  # actions near 0.9: the clip has work to do
    return agent


def test_the_networks_are_the_authors() -> None:
    """W_2 norm(relu(W_1 norm(relu(W_0 [s, a])))); hidden biases 0.1, the last within 0.003, the actor's 0.001."""
    agent, batch = build(), make_batch()
    for mlp, bound in ((agent.actor, 1e-3), (agent.critic.mlp, 3e-3)):
        *hidden, last = mlp.linears
        assert all((layer.bias == torch.tensor(0.1)).all() for layer in hidden)
        assert 0.5 * bound < last.weight.abs().max() <= bound
        assert last.bias.abs().max() <= bound
    assert not torch.equal(agent.critic.mlp.linears[-1].weight[:, 0], agent.critic.mlp.linears[-1].weight[:, 1])
    g = torch.Generator().manual_seed(0)
    for p in agent.critic.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=g)
    h = torch.cat([batch.observations, batch.actions], -1)[0]
    for linear, norm in zip(agent.critic.mlp.linears, [*agent.critic.mlp.norms, None], strict=True):
        h = h @ linear.weight[0, 1] + linear.bias[0, 1]
        if norm is not None:
            h = F.layer_norm(F.relu(h), (16,), norm.weight[0, 1, 0], norm.bias[0, 1, 0])
    torch.testing.assert_close(agent.critic(batch.observations, batch.actions)[0, 1], h[:, 0], rtol=1e-4, atol=1e-5)
    for ours, theirs in ((agent.actor, agent.target_actor), (build().critic, build().target_critic)):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_the_target_is_lowered_by_the_distance_from_the_datas_next_action() -> None:
    """Once for each row whose next action is known, squares summed over the action; also behind no terminal row."""
    agent, batch = different(), make_successive(size=40)
    noise = torch.randn(1, 40, 2, generator=torch.Generator().manual_seed(0))
    y = agent.target(batch, noise)
    actions = (torch.tanh(agent.target_actor(batch.next_observations)) + (0.4 * noise).clip(-0.5, 0.5)).clip(-1, 1)
    assert (actions == 1).any()
    q1, q2 = agent.target_critic(batch.next_observations, actions)[0]
    for i in range(40):
        value = torch.minimum(q1[i], q2[i])
        if batch.succeeded[0, i]:
            value = value - 0.7 * sum((actions[0, i, j] - batch.next_actions[0, i, j]) ** 2 for j in range(2))
        expected = batch.rewards[0, i] if batch.terminals[0, i] else batch.rewards[0, i] + 0.99 * value
        torch.testing.assert_close(y[0, i], expected.detach())
    assert not y.requires_grad
    plain = Batch(*batch[:7])  # as online: no next action is known
    unknown = batch._replace(succeeded=torch.zeros_like(batch.succeeded))
    torch.testing.assert_close(agent.target(plain, noise), agent.target(unknown, noise))


def test_the_critics_regress_on_the_target_alone() -> None:
    agent, batch, noise = different(), make_successive(), torch.randn(1, 8, 2)
    loss, _ = agent.critic_loss(batch, noise)
    q1, q2 = agent.critic(batch.observations, batch.actions)[0]
    y = agent.target(batch, noise)[0]
    assert_same_gradients(loss, (F.mse_loss(q1, y) + F.mse_loss(q2, y))[None], agent.critic)
    assert reached(loss, agent.networks) == {"critic"}


def test_the_actor_climbs_the_smaller_critic_and_is_held_to_the_data() -> None:
    """beta_1 |pi - a|^2 - min Q / mean |min Q|, whose denominator has no gradient."""
    agent, batch = different(), make_successive()
    for p in agent.actor.linears[-1].parameters():
        p.data *= 500  # actions that differ
    loss, metrics = agent.actor_loss(batch)
    actions = torch.tanh(agent.actor(batch.observations))
    q1, q2 = agent.critic(batch.observations, actions)[0]
    q = torch.minimum(q1, q2)
    distance = ((actions - batch.actions) ** 2).sum(-1).mean()
    plain = 0.3 * distance - q.mean() / q.abs().mean().detach()
    assert_same_gradients(loss, plain[None], agent.actor)
    assert reached(loss, agent.networks) == {"actor"}
    torch.testing.assert_close(metrics["bc_loss"][0], distance.detach())


def test_actor_and_targets_move_in_the_last_phase_alone() -> None:
    agent, g = build(dataclasses.replace(SMALL, target_rate=0.3)), torch.Generator().manual_seed(0)
    for step in range(4):
        before, targets = state(agent), (weights(agent.target_actor), weights(agent.target_critic))
        agent.update(make_successive(seed=step), g, step % 2)
        if step % 2 == 0:
            assert changed(agent, before) == {"critic"}
            continue
        assert changed(agent, before) == {"actor", "critic", "target_actor", "target_critic"}
        assert_moved(targets[0], agent.target_actor, agent.actor, 0.3)
        assert_moved(targets[1], agent.target_critic, agent.critic, 0.3)


def test_two_seeds_together_are_each_alone() -> None:
    pair, batch, noise = build(seeds=(3, 5)), make_successive(2), torch.randn(2, 8, 2)
    for i, seed in enumerate((3, 5)):
        alone, own = build(seeds=(seed,)), SuccessiveBatch(*(column[i : i + 1] for column in batch))
        torch.testing.assert_close(alone.critic_loss(own, noise[i : i + 1])[0][0], pair.critic_loss(batch, noise)[0][i])
        torch.testing.assert_close(alone.actor_loss(own)[0][0], pair.actor_loss(batch)[0][i])


def test_the_policy_acts_without_noise_and_online_without_the_critics_penalty() -> None:
    agent, x = build(), torch.randn(1, 5, 3)
    torch.testing.assert_close(agent.act(x, torch.Generator()), torch.tanh(agent.actor(x)).detach())
    assert SMALL.going_online() == dataclasses.replace(SMALL, critic_penalty=0.0)


@pytest.mark.parametrize("n_seeds", [1, 3])
def test_next_actions_are_those_of_the_episodes_next_rows(n_seeds: int) -> None:
    """Three episodes, of which the second one's numbers skip a step; the same rows and numbers as without them."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(9, 2 * 3 + 2 + 4, generator=g)
    rows[:, -2] = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2.0])
    rows[:, -1] = torch.tensor([0, 1, 2, 0, 1, 3, 4, 0, 1.0])
    transitions = Transitions(rows, 3, 2)
    source = build().source(transitions)
    assert isinstance(source, SuccessiveSource)
    batch = source.draw(200, n_seeds, torch.Generator().manual_seed(1))
    plain = transitions.draw(200, n_seeds, torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(batch[:7], plain, strict=True))
    follows = {0: 1, 1: 2, 3: 4, 5: 6, 7: 8}
    numbers = [int((rows[:, :3] == row).all(1).nonzero()) for row in batch.observations.flatten(0, 1)]
    assert set(numbers) == set(range(9))
    for number, action, known in zip(
        numbers, batch.next_actions.flatten(0, 1), batch.succeeded.flatten().tolist(), strict=True
    ):
        assert known == (number in follows)
        if number in follows:
            assert torch.equal(action, rows[follows[number], 3:5])
