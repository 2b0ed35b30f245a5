"""Diffusion-QL against its equations, written out plainly, and against a bandit whose answer is known."""

import dataclasses

import pytest
import torch

from agents import AGENTS, BC, DiffusionBC, DiffusionQL
from agents.base import seed_slice
from agents.diffusion_policy import DiffusionNoise
from agents.diffusion_ql import DiffusionQLAgent, DiffusionQLNoise
from tests.agents.agent_cases import DETERMINISTIC, bandit, make_batch, make_batch_for

SMALL = DiffusionQL(width=16, layers=2, batch_size=8)


def build(config: DiffusionQL = SMALL, seeds: tuple[int, ...] = (0,)) -> DiffusionQLAgent:
    agent = config.build(3, 2, seeds)
    assert isinstance(agent, DiffusionQLAgent)
    return agent


def test_the_target_is_the_bellman_backup() -> None:
    agent, batch = build(), make_batch()
    noise = torch.randn(6, 1, 8, 2)
    y = agent.target(batch, noise)
    actions = agent.ema_actor.sample(batch.next_observations, noise)
    q1, q2 = agent.target_critic(batch.next_observations, actions)[0]
    expected = batch.rewards[0] + 0.99 * (1 - batch.terminals[0]) * torch.minimum(q1, q2)
    torch.testing.assert_close(y[0], expected)
    terminal = batch.terminals[0] == 1
    assert terminal.any()
    torch.testing.assert_close(y[0][terminal], batch.rewards[0][terminal])


def test_max_q_backup_takes_each_critics_best_candidate_then_the_minimum() -> None:
    agent, batch = build(dataclasses.replace(SMALL, max_q_backup=True, backup_candidates=4)), make_batch()
    noise = torch.randn(6, 1, 32, 2)
    y = agent.target(batch, noise)
    repeated = batch.next_observations.repeat_interleave(4, 1)
    actions = agent.ema_actor.sample(repeated, noise)
    q = agent.target_critic(repeated, actions)[0]
    for i in range(8):
        candidates = q[:, 4 * i : 4 * i + 4]
        best = min(candidates[0].max(), candidates[1].max())
        torch.testing.assert_close(y[0, i], batch.rewards[0, i] + 0.99 * (1 - batch.terminals[0, i]) * best)


@pytest.mark.parametrize("coin", [0.2, 0.7])
def test_the_q_term_climbs_q_and_is_scaled_by_the_other_critic(coin: float) -> None:
    """L_q = -mean Q_i / mean |Q_j|, i != j, the denominator without gradient."""
    agent, batch = build(), make_batch()
    cloning = DiffusionNoise(i=(torch.arange(8) % 5)[None], eps=torch.randn(1, 8, 2))
    noise = torch.randn(6, 1, 8, 2)
    loss, metrics = agent.actor_loss(batch, DiffusionQLNoise(cloning, noise, torch.tensor([[coin]])))
    bc = agent.actor.bc_loss(batch.actions, batch.observations, cloning)
    q = agent.critic(batch.observations, agent.actor.sample(batch.observations, noise))[0]
    i = 0 if coin < 0.5 else 1
    expected = bc - q[i].mean() / q[1 - i].abs().mean().detach()
    torch.testing.assert_close(loss, expected)
    parameter = agent.actor.mlp.linears[0].weight
    ours, theirs = (torch.autograd.grad(x.sum(), parameter)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(metrics["bc_loss"], bc.detach())


def test_the_averages_follow_at_their_rates() -> None:
    config = dataclasses.replace(SMALL, ema_start=2, ema_every=2, ema_rate=0.1, target_rate=0.5)
    agent, g = build(config), torch.Generator().manual_seed(0)
    for step in range(5):
        ema = [p.clone() for p in agent.ema_actor.parameters()]
        target = [p.clone() for p in agent.target_critic.parameters()]
        agent.update(make_batch(seed=step), g)
        rate = 0.1 if step in (2, 4) else 0.0
        for old, new, online in zip(ema, agent.ema_actor.parameters(), agent.actor.parameters(), strict=True):
            torch.testing.assert_close(new, old + rate * (online - old))
        for old, new, online in zip(target, agent.target_critic.parameters(), agent.critic.parameters(), strict=True):
            torch.testing.assert_close(new, (old + online) / 2)


def test_acting_takes_the_best_candidate_at_temperature_zero() -> None:
    agent = build(dataclasses.replace(SMALL, act_candidates=7, act_temperature=0.0))
    observations = torch.randn(1, 5, 3)
    chosen = agent.act(observations, torch.Generator().manual_seed(1))
    repeated = observations.repeat_interleave(7, 1)
    with torch.no_grad():
        candidates = agent.actor.sample(repeated, torch.randn(6, 1, 35, 2, generator=torch.Generator().manual_seed(1)))
        q = agent.target_critic(repeated, candidates)[0].amin(0)
    for i in range(5):
        best = q[7 * i : 7 * i + 7].argmax()
        torch.testing.assert_close(chosen[0, i], candidates[0, 7 * i + int(best)])


def test_acting_draws_by_the_softmax_of_q(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two fixed candidates with Q = 0 and 1: the better one is drawn with probability sigmoid(1 / temperature)."""
    agent = build(dataclasses.replace(SMALL, act_candidates=2, act_temperature=0.5))
    n = 20_000
    actions = torch.tensor([[-0.5, -0.5], [0.5, 0.5]]).repeat(n, 1)[None]
    monkeypatch.setattr(agent.actor, "sample", lambda observations, noise: actions)
    monkeypatch.setattr(agent.target_critic, "forward", lambda o, a: (a[..., 0] + 0.5).unsqueeze(1).expand(-1, 2, -1))
    drawn = agent.act(torch.zeros(1, n, 3), torch.Generator().manual_seed(0))
    share = (drawn[0, :, 0] > 0).float().mean()
    assert abs(share - torch.sigmoid(torch.tensor(2.0))) < 4 * 0.5 / n**0.5


@pytest.mark.parametrize("name", sorted(AGENTS))
def test_actions_lie_in_the_box_and_noise_comes_from_the_generator_alone(name: str) -> None:
    agent = AGENTS[name](width=16, layers=1, batch_size=8).build(3, 2, (0, 1))
    observations = 5 * torch.randn(2, 30, 3)
    first, again, other = (agent.act(observations, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert first.shape == (2, 30, 2)
    assert first.abs().max() <= 1
    assert torch.equal(first, again)
    assert name in DETERMINISTIC or not torch.equal(first, other)


@pytest.mark.parametrize("name", sorted(AGENTS))
def test_state_dict_restores_the_agent_bit_for_bit(name: str) -> None:
    config = AGENTS[name](width=16, layers=1, batch_size=8)
    agent, g = config.build(3, 2, (0, 1)), torch.Generator().manual_seed(0)
    for step in range(3):
        agent.update(make_batch_for(agent, 2, seed=step), g)
    saved, state = {k: v.clone() for k, v in agent.state_dict().items()}, g.get_state()
    twin, h = config.build(3, 2, (5, 6)), torch.Generator()
    twin.load_state_dict(saved)
    h.set_state(state)
    for step in range(3, 6):
        agent.update(make_batch_for(agent, 2, seed=step), g)
        twin.update(make_batch_for(twin, 2, seed=step), h)
    for key, value in agent.state_dict().items():
        assert torch.equal(value, twin.state_dict()[key]), key
        assert value.ndim == 0 or value.shape[0] == 2, key  # the seeds axis comes first: one seed can be exported
    alone = config.build(3, 2, (9,))
    alone.load_state_dict(seed_slice(agent.state_dict(), 1))
    if name in DETERMINISTIC:
        x = torch.randn(2, 4, 3)
        torch.testing.assert_close(alone.act(x[1:], g), agent.act(x, g)[1:])


def test_seeds_of_a_stack_do_not_touch_each_other() -> None:
    """A seed whose batch is poisoned turns to NaN; the other ends as it does beside a healthy one."""
    results = []
    for poison in (False, True):
        agent, g = build(seeds=(0, 1)), torch.Generator().manual_seed(0)
        for step in range(3):
            batch = make_batch(2, seed=step)
            if poison:
                batch.rewards[0] = float("nan")
            agent.update(batch, g)
        results.append(agent.state_dict())
    healthy, poisoned = results
    assert poisoned["critic.mlp.linears.0.weight"][0].isnan().any()
    for key, value in healthy.items():
        if value.ndim:
            assert torch.equal(value[1], poisoned[key][1]), key


@pytest.mark.long
def test_on_a_bandit_bc_keeps_both_modes_and_diffusion_ql_finds_the_good_one() -> None:
    """The paper's point (figure 1): an MLP averages the modes, a diffusion policy keeps them, Q picks the better."""
    shares, near_a_mode = {}, {}
    configs = {
        "bc": BC(width=32, layers=2, learning_rate=3e-3),
        "diffusion_bc": DiffusionBC(width=32, layers=2, learning_rate=3e-3),
        "diffusion_ql": DiffusionQL(width=32, layers=2, actor_lr=3e-3, critic_lr=3e-3, act_candidates=1),
    }
    for name, config in configs.items():
        agent, g = config.build(3, 2, (0,)), torch.Generator().manual_seed(0)
        for step in range(300 if name == "diffusion_ql" else 800):
            agent.update(bandit(128, step), g)
        actions = agent.act(torch.zeros(1, 500, 3), g)[0]
        shares[name] = float((actions.mean(-1) > 0).float().mean())
        near_a_mode[name] = float(((actions.abs() - 0.5).abs().amax(-1) < 0.25).float().mean())
    assert near_a_mode["bc"] < 0.1  # between the modes, where no data are
    assert near_a_mode["diffusion_bc"] > 0.5
    assert 0.3 < shares["diffusion_bc"] < 0.7
    assert shares["diffusion_ql"] > 0.9
