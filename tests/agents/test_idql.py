"""IDQL: a residual diffusion policy cloned with dropout, beside IQL's critics, which choose."""

import dataclasses
import math
from typing import Literal

import pytest
import torch

from agents import IDQL
from agents.idql import IDQLAgent
from diffrl.diffusion import discrete_grid
from diffrl.nets import ResidualMLP
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
    noise = agent.actor_noise(batch, g)
    (i, eps), keep = noise.cloning, noise.keep
    assert keep.shape == (2, 1, 8, 16)
    assert keep.unique().tolist() == pytest.approx([0, 1 / 0.6])
    t = discrete_grid("vp", 5)[:-1][i]
    a_t = torch.exp(-t / 2)[..., None] * batch.actions + torch.sqrt(1 - torch.exp(-t))[..., None] * eps
    network = agent.actor.mlp
    assert isinstance(network, ResidualMLP)
    x = torch.cat([a_t, agent.actor.embed_time(t), batch.observations], -1)
    plain = ((network(x, keep) - eps) ** 2).mean((-2, -1))
    loss = agent.actor_loss(batch, noise)
    assert_same_gradients(loss, plain, agent.actor)
    assert reached(loss, agent.networks) == {"actor"}
    assert not torch.allclose(loss, ((network(x) - eps) ** 2).mean())


def schedule(T: int) -> tuple[list[float], list[float]]:
    """1 - beta_t and its product up to t, t = 1 ... T, of the "vp" schedule with beta from .1 to 10."""
    alphas = [math.exp(-0.1 / T - 0.5 * 9.9 * (2 * t - 1) / T**2) for t in range(1, T + 1)]
    return alphas, [math.prod(alphas[: t + 1]) for t in range(T)]


@pytest.mark.parametrize("T", [1, 2, 5])
@pytest.mark.parametrize("sampler", ["posterior", "beta"])
def test_both_samplers_are_their_equations(sampler: Literal["posterior", "beta"], T: int) -> None:
    """beta: a <- clip((a - beta_t / sqrt(1 - A_t) e) / sqrt(1 - beta_t) + sqrt(beta_t) z), A_t the product of 1 - beta.

    posterior: a <- sqrt(A_{t-1}) beta_t / (1 - A_t) clip(x_0) + sqrt(1 - beta_t) (1 - A_{t-1}) / (1 - A_t) a + s z with
    x_0 = (a - sqrt(1 - A_t) e) / sqrt(A_t), s^2 = (1 - A_{t-1}) / (1 - A_t) beta_t. No noise in the last step.
    """
    agent, s = build(dataclasses.replace(SMALL, sampler=sampler, denoising_steps=T)), torch.randn(1, 40, 3)
    policy, noise = agent.actor, torch.randn(T + 1, 1, 40, 2, generator=torch.Generator().manual_seed(0))
    alphas, products = schedule(T)
    a, clipped = noise[0], False
    for z, t in zip(noise[1:], reversed(range(T)), strict=True):
        label = torch.full((1, 40), -math.log(products[t]))
        e, beta, A = policy(a, label, s), 1 - alphas[t], products[t]
        before = products[t - 1] if t else 1.0
        if sampler == "beta":
            a = (a - beta / math.sqrt(1 - A) * e) / math.sqrt(1 - beta) + (math.sqrt(beta) * z if t else 0)
            clipped |= bool((a.abs() > 1).any()) and t > 0
            a = a.clip(-1, 1)
        else:
            x_0 = ((a - math.sqrt(1 - A) * e) / math.sqrt(A)).clip(-1, 1)
            mean = math.sqrt(before) * beta / (1 - A) * x_0 + math.sqrt(1 - beta) * (1 - before) / (1 - A) * a
            a = mean + math.sqrt((1 - before) / (1 - A) * beta) * z
    assert clipped == (sampler == "beta" and T > 1)
    torch.testing.assert_close(policy.sample(s, noise), a, rtol=1e-4, atol=1e-5)


def test_the_chain_of_the_authors_sampler_is_none_for_ppo() -> None:
    with pytest.raises(ValueError, match="sampler='posterior'"):
        build().actor.chain()
    assert build(dataclasses.replace(SMALL, sampler="posterior")).actor.chain().n_decisions == 4


def relu_network(mlp: torch.nn.Module, x: torch.Tensor, *network: int) -> torch.Tensor:
    """One network of the stack `mlp` at x (B, in), with ReLU between its layers."""
    for i, linear in enumerate(mlp.linears):  # type: ignore[arg-type, union-attr]
        x = (x.relu() if i else x) @ linear.weight[network] + linear.bias[network]
    return x[:, 0]


def test_critics_and_value_function_have_relu() -> None:
    agent, batch = build(), make_batch()
    s, a = batch.observations, batch.actions
    torch.testing.assert_close(agent.value(s)[0, :, 0], relu_network(agent.value, s[0], 0), rtol=1e-4, atol=1e-6)
    for i in range(2):
        plain = relu_network(agent.critic.mlp, torch.cat([s, a], -1)[0], 0, i)
        torch.testing.assert_close(agent.critic(s, a)[0, i], plain, rtol=1e-4, atol=1e-6)


def test_only_the_policys_rate_falls_along_a_cosine_and_online_none() -> None:
    """From the fourth step on nothing of the policy moves, with lr_decay_steps = 3; the critics go on."""
    config = dataclasses.replace(SMALL, lr_decay_steps=3)
    agent, g = build(config), torch.Generator().manual_seed(0)
    for _ in range(3):
        agent.update(make_batch(), g)
    before = state(agent)
    agent.update(make_batch(), g)
    assert changed(agent, before) == {"value", "critic", "target_critic", "ema_actor"}
    assert config.going_online() == dataclasses.replace(config, lr_decay_steps=0)


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
