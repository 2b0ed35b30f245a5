"""Q-guidance: a policy cloned by itself, and a sampler that tilts it by exp(w Q), against Gaussians that can be tilted.

A policy whose network says 0 is exactly N(0, 0.5^2): EDM's preconditioning is that Gaussian's denoiser. Tilted by
exp(w g a) it is N(w g / 4, 0.5^2), which the guided denoiser says exactly; tilted by exp(-w h (a - b)^2 / 2) it is a
narrower Gaussian, which it says to first order in w.
"""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from agents import QGuidance
from agents.q_guidance import QGuidanceAgent
from diffrl.diffusion import VP, Prediction, classifier_guided
from tests.agents.agent_cases import (
    assert_moved,
    assert_same_gradients,
    changed,
    make_batch,
    reached,
    state,
    weights,
)

SMALL = QGuidance(width=16, layers=2, batch_size=8)
C = 0.25
"""The variance of the policy whose network says 0."""


def build(config: QGuidance = SMALL, seeds: tuple[int, ...] = (0,)) -> QGuidanceAgent:
    agent = config.build(3, 2, seeds)
    assert isinstance(agent, QGuidanceAgent)
    return agent


def gaussian_agent(q: Callable[[Tensor], Tensor], **fields: object) -> QGuidanceAgent:
    """Its averaged policy is N(0, 0.5^2); its smaller target critic is q(a), a (..., 2) -> (...)."""
    agent = build(dataclasses.replace(SMALL, **fields))  # type: ignore[arg-type]
    for p in agent.ema_actor.mlp.linears[-1].parameters():
        p.data.zero_()
    agent.target_critic.forward = lambda o, a: torch.stack([9 - q(a), q(a)], 1)  # type: ignore[method-assign]
    return agent


def test_the_policy_is_cloned_by_denoising_score_matching() -> None:
    """E |F(c_in a_t, log(k)/4, s) - F*|^2 with EDM's F* = (a - c_skip a_t) / c_out, data of deviation 0.5."""
    agent, batch = build(), make_batch()
    noise = agent.actor.bc_noise(batch.actions, torch.Generator().manual_seed(0))
    t, eps = noise.t, noise.eps
    alpha, sigma = torch.exp(-t / 2)[..., None], torch.sqrt(-torch.expm1(-t))[..., None]
    scale = torch.sqrt(C * alpha**2 + sigma**2)
    a_t = alpha * batch.actions + sigma * eps
    answer = agent.actor(a_t / scale, (sigma / alpha)[..., 0].log() / 4, batch.observations)
    goal = (batch.actions - alpha * C / scale**2 * a_t) / (0.5 * sigma / scale)
    plain = ((answer - goal) ** 2).mean((-2, -1))
    loss = agent.actor_loss(batch, noise)
    assert_same_gradients(loss, plain, agent.actor)
    assert reached(loss, agent.networks) == {"actor"}


def test_a_step_moves_critics_policy_and_both_averages() -> None:
    agent = build(dataclasses.replace(SMALL, ema_rate=0.2, target_rate=0.3))
    policy, critic, before = weights(agent.ema_actor), weights(agent.target_critic), state(agent)
    agent.update(make_batch(), torch.Generator().manual_seed(0))
    assert_moved(policy, agent.ema_actor, agent.actor, 0.2)
    assert_moved(critic, agent.target_critic, agent.critic, 0.3)
    assert changed(agent, before) == {"actor", "ema_actor", "value", "critic", "target_critic"}


@pytest.mark.parametrize("solver", ["ddim", "dpmpp2m", "heun"])
def test_without_guidance_it_is_the_averaged_policys_plain_sampling(solver: str) -> None:
    """Bit for bit."""
    agent = build(dataclasses.replace(SMALL, guidance_scale=0.0, solver=solver))  # type: ignore[arg-type]
    agent.ema_actor.load_state_dict(build(seeds=(1,)).actor.state_dict())
    x = torch.randn(1, 5, 3)
    z = torch.randn(1, 5, 2, generator=torch.Generator().manual_seed(0))
    expected = agent.ema_actor.sample(x, z)
    assert torch.equal(agent.act(x, torch.Generator().manual_seed(0)), expected)
    assert not torch.allclose(agent.actor.sample(x, z), expected)


@pytest.mark.parametrize("g", [-0.2, 0.3])
def test_a_linear_q_moves_a_gaussian_policy_to_its_tilt(g: float) -> None:
    """Every action by w g c^2, as N(0, c^2) exp(w g a) is N(w g c^2, c^2): the map from noise is exact in the limit.

    200 steps of second order leave 1e-3; the noise is small, so that the box plays no part.
    """
    slope = torch.tensor([g, -g / 2])
    agent = gaussian_agent(lambda a: a @ slope, guidance_scale=2.0, sampling_steps=200)
    x = torch.zeros(1, 50, 3)
    z = torch.randn(1, 50, 2, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    agent.ema_actor.sampling_noise = lambda *_: z  # type: ignore[method-assign]
    actions = agent.act(x, torch.Generator())
    assert actions.abs().max() < 1
    torch.testing.assert_close(actions, (0.5 * z + 2 * C * slope), rtol=0, atol=5e-3)


@pytest.mark.parametrize("k", [0.05, 0.5, 5.0])
def test_the_guided_denoiser_is_that_of_the_tilted_gaussian(k: float) -> None:
    """D' = D + w V Q'(D), V = Cov[a_0 | a_t]; the tilt's own is D + w V / (1 + w h V) Q'(D).

    Of a linear Q (h = 0) the two are one; of a quadratic one the difference falls as w^2.
    """
    t = torch.log1p(torch.tensor(k, dtype=torch.float64) ** 2)
    prediction, x = Prediction("edm", VP(), 0.5), torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    denoise = prediction.denoiser(lambda x, t: torch.zeros_like(x))
    alpha, sigma = torch.exp(-t / 2), torch.sqrt(-torch.expm1(-t))
    V = C * sigma**2 / (C * alpha**2 + sigma**2)
    D = C * alpha / (C * alpha**2 + sigma**2) * x

    def error(w: float, h: float, b: float = 0.4) -> float:
        def q(a: Tensor, t: Tensor) -> Tensor:
            return (0.7 * a - h / 2 * (a - b) ** 2).sum(-1)

        exact = D + w * V / (1 + w * h * V) * (0.7 - h * (D - b))
        guided = classifier_guided(VP(), denoise, q, w, at="x0")
        return float((guided(x, t) - exact).detach().abs().max())

    assert error(3.0, 0.0) < 1e-12
    assert error(0.1, 1.0) > 0
    assert math.log2(error(2e-3, 1.0) / error(1e-3, 1.0)) == pytest.approx(2, abs=0.01)
