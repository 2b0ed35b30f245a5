"""RLPD against its equations, written out plainly."""

import dataclasses
import math

import pytest
import torch

from agents import RLPD
from agents.rlpd import RLPDAgent
from diffrl.data.transitions import Batch
from diffrl.support.errors import UserError
from tests.agents.agent_cases import assert_moved, assert_same_gradients, changed, make_batch, reached, state, weights

SMALL = RLPD(width=16, layers=2, batch_size=8, n_critics=5, actor_every=3, temperature=0.7)


def build(config: RLPD = SMALL, seeds: tuple[int, ...] = (0,)) -> RLPDAgent:
    agent = config.build(3, 2, seeds)
    assert isinstance(agent, RLPDAgent)
    return agent


def plain_draw(agent: RLPDAgent, s: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """a = tanh(u) and log pi(a | s) = log N(u) - log(1 - a^2)."""
    mu, log_std = agent.actor.mlp(s).chunk(2, -1)
    std = log_std.clip(-20, 2).exp()
    a = torch.tanh(mu + std * z)
    return a, (-0.5 * z**2 - std.log() - 0.5 * math.log(2 * math.pi) - torch.log(1 - a**2)).sum(-1)


@pytest.mark.parametrize("entropy_backup", [True, False])
@pytest.mark.parametrize("m", [1, 2, 5])
def test_the_target_is_the_least_of_a_random_subset_and_the_entropy(m: int, entropy_backup: bool) -> None:
    agent = build(dataclasses.replace(SMALL, target_critics=m, entropy_backup=entropy_backup))
    batch, g = make_batch(), torch.Generator().manual_seed(0)
    agent.target_critic.load_state_dict(build(seeds=(1,)).critic.state_dict())
    z = 0.5 * torch.randn(1, 8, 2, generator=g)
    lots = torch.tensor([[0.3, 0.9, 0.1, 0.8, 0.2]])
    subset = [1, 3, 0, 4, 2][:m]
    a, log_pi = plain_draw(agent, batch.next_observations, z)
    q = agent.target_critic(batch.next_observations, a)[0][subset].amin(0)
    value = q - 0.7 * log_pi[0] if entropy_backup else q
    y = (batch.rewards[0] + 0.99 * (1 - batch.terminals[0]) * value).detach()
    torch.testing.assert_close(agent.target(batch, z, lots)[0], y, rtol=1e-4, atol=1e-5)
    loss, _ = agent.critic_loss(batch, z, lots)
    plain = ((agent.critic(batch.observations, batch.actions)[0] - y) ** 2).mean(-1).sum()
    assert_same_gradients(loss, plain[None], agent.critic)
    assert reached(loss, agent.networks) == {"critic"}


def test_every_pair_of_critics_is_drawn_equally_often() -> None:
    """Of 5 critics 10 pairs: 2,000 drawings, to five standard errors, seed by seed and never one critic twice."""
    lots = torch.rand((2_000, 5), generator=torch.Generator().manual_seed(0))
    pairs = lots.topk(2, dim=1).indices.sort(1).values
    assert (pairs[:, 0] != pairs[:, 1]).all()
    _, counts = pairs.unique(dim=0, return_counts=True)
    assert len(counts) == 10
    assert (counts - 200).abs().max() < 5 * math.sqrt(2_000 * 0.1 * 0.9)


def test_the_policy_climbs_the_mean_of_all_critics_and_its_entropy() -> None:
    agent, s = build(), make_batch().observations
    z = 0.5 * torch.randn(1, 8, 2, generator=torch.Generator().manual_seed(0))
    loss, metrics = agent.actor_loss(s, z)
    a, log_pi = plain_draw(agent, s, z)
    assert_same_gradients(loss, (0.7 * log_pi - agent.critic(s, a).mean(1)).mean()[None], agent.actor)
    assert reached(loss, agent.networks) == {"actor"}
    torch.testing.assert_close(metrics["entropy"][0], -log_pi.mean().detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("surplus", [0.4, -0.4])
def test_the_temperature_falls_where_the_entropy_is_above_its_goal(surplus: float) -> None:
    """d/dlog tau of tau (H - H_0) is tau (H - H_0); H_0 = -A / 2 = -1."""
    agent = build()
    loss = agent.temperature_loss(torch.tensor([-1 + surplus]))
    (slope,) = torch.autograd.grad(loss.sum(), agent.temperature.log)
    torch.testing.assert_close(slope, torch.tensor([[0.7 * surplus]]))
    agent.optimisers["temperature"].step(agent.temperature_loss(torch.tensor([-1 + surplus])))
    assert (float(agent.temperature()) < 0.7) == (surplus > 0)
    assert build(dataclasses.replace(SMALL, target_entropy=-3.0)).target_entropy == -3.0


def test_critics_move_at_each_step_and_the_policy_at_the_periods_last() -> None:
    agent, g = build(dataclasses.replace(SMALL, target_rate=0.3)), torch.Generator().manual_seed(0)
    assert agent.period == 3
    for phase in range(3):
        target, before = weights(agent.target_critic), state(agent)
        metrics = agent.update(make_batch(seed=phase), g, phase)
        assert_moved(target, agent.target_critic, agent.critic, 0.3)
        moved = {"critic", "target_critic"} | ({"actor", "temperature"} if phase == 2 else set())
        assert changed(agent, before) == moved
        assert bool(metrics["entropy"].any()) == (phase == 2)
    torch.testing.assert_close(metrics["temperature"], 3 * agent.temperature())  # the mean over the period is tau


def test_it_acts_by_its_mean_and_explores_by_its_draws() -> None:
    agent, x = build(), torch.randn(1, 5, 3)
    mu, _ = agent.actor.mlp(x).chunk(2, -1)
    torch.testing.assert_close(agent.act(x, torch.Generator()), torch.tanh(mu).detach())
    z = torch.randn(1, 5, 2, generator=torch.Generator().manual_seed(4))
    drawn = agent.explore(x, torch.Generator().manual_seed(4))
    torch.testing.assert_close(drawn, plain_draw(agent, x, z)[0].detach())


def test_two_seeds_together_are_each_alone() -> None:
    pair, batch = build(seeds=(3, 5)), make_batch(2)
    g = torch.Generator().manual_seed(0)
    z, lots = torch.randn(2, 8, 2, generator=g), torch.rand(2, 5, generator=g)
    for i, seed in enumerate((3, 5)):
        alone, own, one = build(seeds=(seed,)), Batch(*(column[i : i + 1] for column in batch)), slice(i, i + 1)
        torch.testing.assert_close(
            alone.critic_loss(own, z[one], lots[one])[0][0], pair.critic_loss(batch, z, lots)[0][i]
        )
        ours, theirs = alone.actor_loss(own.observations, z[one])[0], pair.actor_loss(batch.observations, z)[0]
        torch.testing.assert_close(ours[0], theirs[i])


def test_more_critics_in_the_target_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match=r"--agent.target-critics is 6; expected at most --agent.n-critics, 5"):
        dataclasses.replace(SMALL, target_critics=6)
