"""EDP against its equations, written out plainly."""

import dataclasses

import pytest
import torch

from agents import EDP
from agents.edp import EDPAgent, EDPNoise
from diffrl.diffusion import VP, discrete_grid, sample
from tests.agents.agent_cases import assert_same_gradients, make_batch, reached

SMALL = EDP(width=16, layers=2, batch_size=8, q_weight=0.7)
OURS = dataclasses.replace(SMALL, form="x0", actor_q="random")


def build(config: EDP = SMALL, seeds: tuple[int, ...] = (0,)) -> EDPAgent:
    agent = config.build(3, 2, seeds)
    assert isinstance(agent, EDPAgent)
    return agent


@pytest.mark.parametrize("coin", [0.2, 0.7])
@pytest.mark.parametrize("config", [SMALL, OURS], ids=lambda config: config.form)
def test_one_pass_serves_cloning_and_q(config: EDP, coin: float) -> None:
    """published: |e - eps|^2 - eta Q_i(s, clip a^) / mean |Q_i|, e the network at a_t, a^ = (a_t - sigma e) / alpha.

    x0: |a^ - a|^2 - eta Q_i(s, clip a^) / mean |Q_j|, a^ the network at a_t. It is called once in both.
    """
    agent, batch = build(config), make_batch()
    for p in agent.actor.mlp.linears[-1].parameters():
        p.data *= 8  # some guesses outside the box
    noise = agent.actor.bc_noise(batch.actions, torch.Generator().manual_seed(0))
    t, eps = noise.t, noise.eps
    alpha, sigma = torch.exp(-t / 2)[..., None], torch.sqrt(1 - torch.exp(-t))[..., None]
    a_t = alpha * batch.actions + sigma * eps
    answer = agent.actor(a_t, t, batch.observations)
    published = config.form == "published"
    guess = (a_t - sigma * answer) / alpha if published else answer
    assert (guess.abs() > 1).any()
    assert (guess.abs() < 1).any()
    q = agent.critic(batch.observations, guess.clip(-1, 1))[0]
    i = 0 if coin < 0.5 else 1
    scale = q[i if published else 1 - i].abs().mean().detach()
    cloning = ((answer - (eps if published else batch.actions)) ** 2).mean()
    plain = cloning - 0.7 * q[i].mean() / scale
    calls = []
    handle = agent.actor.mlp.linears[-1].register_forward_hook(lambda *_: calls.append(1))
    loss, metrics = agent.actor_loss(batch, EDPNoise(noise, torch.tensor([[coin]])))
    handle.remove()
    assert len(calls) == 1
    assert_same_gradients(loss, plain[None], agent.actor)
    assert reached(loss, agent.networks) == {"actor"}
    torch.testing.assert_close(metrics["bc_loss"][0], cloning.detach())


def test_training_times_are_the_schedules_thousand() -> None:
    agent = build()
    t, eps = agent.actor.bc_noise(torch.zeros(1, 20_000, 2), torch.Generator().manual_seed(0))
    grid = discrete_grid("linear", 1000)[:-1]
    assert set(t.unique().tolist()) <= set(grid.tolist())
    assert len(t.unique()) == 1000  # by 20,000 draws one is missed with a chance of 2e-6
    assert eps.shape == (1, 20_000, 2)


@pytest.mark.parametrize("config", [SMALL, OURS], ids=lambda config: config.form)
@pytest.mark.parametrize("solver", ["ddim", "dpmpp2m", "heun"])
def test_actions_are_the_solvers_on_the_network(solver: str, config: EDP) -> None:
    """From the noisiest of the training's levels to the data, evenly in log-SNR, D clamped to the box."""
    agent = build(dataclasses.replace(config, solver=solver, sampling_steps=6))  # type: ignore[arg-type]
    x, z = torch.randn(1, 5, 3), torch.randn(1, 15, 2)
    actions = agent.actor.sample(x, z)
    repeated, vp = x.repeat_interleave(3, 1), VP()
    k = vp.ratio(discrete_grid("linear", 1000, dtype=torch.float64)[:-1])
    low, high = float(k[-1]), float(k[0])
    times = torch.log1p(torch.tensor([high * (low / high) ** (i / 5) for i in range(6)] + [0.0]).double() ** 2)
    start = torch.sqrt(1 - torch.exp(-times[0])).float() * z

    def denoise(a: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        answer = agent.actor(a, t, repeated)
        if config.form == "x0":
            return answer
        return (a - torch.sqrt(1 - torch.exp(-t)) * answer) / torch.exp(-t / 2)

    expected = sample(vp, denoise, start, times, solver, clip=(-1.0, 1.0))
    torch.testing.assert_close(actions, expected, rtol=1e-4, atol=1e-5)


def test_the_target_takes_the_averaged_policys_action() -> None:
    agent, other, batch = build(), build(seeds=(1,)), make_batch()
    agent.ema_actor.load_state_dict(other.actor.state_dict())
    noise = torch.randn(1, 8, 2)
    q1, q2 = agent.target_critic(batch.next_observations, other.actor.sample(batch.next_observations, noise))[0]
    expected = batch.rewards[0] + 0.99 * (1 - batch.terminals[0]) * torch.minimum(q1, q2)
    torch.testing.assert_close(agent.target(batch, noise)[0], expected.detach())


def test_the_defaults_are_the_authors() -> None:
    """Noise, alpha 2, a critic scaled by itself, 50 candidates ranked by the online critics (see test_critics)."""
    agent = build(dataclasses.replace(SMALL, q_weight=EDP().q_weight))
    assert agent.actor.prediction.kind == "eps"
    assert (agent.config.q_weight, agent.config.actor_q) == (2.0, "random_own")
    assert (agent.config.act_critics, agent.config.act_candidates) == ("online", 50)
