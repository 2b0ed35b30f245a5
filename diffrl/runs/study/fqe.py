"""Fitted Q evaluation: what policies are worth by the data alone (Le, Voloshin & Yue 2019, arXiv 1903.08738).

    Q <- argmin E (r + gamma (1 - terminal) Q'(s', pi(s')) - Q(s, a))^2,    V(pi) = E Q(s_0, pi(s_0)),

(s, a, r, s') of the data, actions pi of the policy that is evaluated, Q' a moving average of Q, s_0 the data's initial
states. P policies are evaluated as one stack: each has networks of its own, with the same initial weights and the same
batches, so that a policy's value does not depend on which others are evaluated beside it.

Each step moves Q' to Q by a share tau, and so the values to their fixed point by a share of about tau (1 - gamma). Of
a long horizon tau is larger, so that tau (1 - gamma) does not fall below what it is at gamma = 0.99: `target_rates`.
Values are taken to have settled where steps x tau (1 - gamma), `settled`, is 3 or more. Of an exact fit e^-3 of the way
would then be left; the error is no smaller than that of the network, which grows with the horizon, and which more steps
do not mend.

What is fitted is u = (1 - gamma) Q, the mean discounted reward a step, which compares policies of different discounts.
It lies between the smallest and the largest reward (and 0, where episodes end), and targets are clamped to that.
Observations are standardised by the data, rewards divided by the largest.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffrl.data.preprocessing import Normaliser
from diffrl.nets import MLP, Adam, average_, seed_generator
from diffrl.runs.study.config import FQEConfig
from diffrl.support.seeds import generator_at
from diffrl.support.stopping import check

LONGEST = 0.99
"""The discount up to which the target moves as the configuration says."""
_ROUNDING = 1e-6
"""Of a discount in float32."""
ENOUGH = 3.0
"""How much of `settled` there is to be."""


def target_rates(discounts: Tensor, config: FQEConfig) -> Tensor:
    """How far the targets of policies with these discounts (P,) move to their networks each step: (P,), at most 1."""
    longer = torch.where(discounts > LONGEST + _ROUNDING, (1 - LONGEST) / (1 - discounts), 1.0)
    return (config.target_rate * longer).clamp(max=1)


def settled(discounts: Tensor, config: FQEConfig) -> Tensor:
    """The steps in units of the time in which values settle, (P,): of exact fits exp(-this) of the way is left."""
    return config.steps * target_rates(discounts, config) * (1 - discounts)


class Experience(NamedTuple):
    """Transitions, and the states that episodes begin in. Actions lie in [-1, 1]."""

    observations: Tensor
    """(N, O)"""
    actions: Tensor
    """(N, A)"""
    rewards: Tensor
    """(N,)"""
    terminals: Tensor
    """(N,) 1.0 at a true end of the episode, else 0.0"""
    next_observations: Tensor
    """(N, O)"""
    starts: Tensor
    """(B, O)"""


def fitted_values(
    data: Experience,
    next_actions: Tensor,
    start_actions: Tensor,
    discounts: Tensor,
    config: FQEConfig,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> NDArray[np.float64]:
    """(1 - gamma) V(pi), the mean discounted reward a step, of P policies: (P,).

    next_actions: (P, N, A), the policies' actions at the next observations; start_actions: (P, B, A), at the starts.
    discounts: (P,). on_step hears how many steps are made, of how many.
    """
    P, N, _ = next_actions.shape
    normalise = Normaliser.standard(data.observations)
    scale = data.rewards.abs().max().clamp(min=1e-12)
    rewards = data.rewards / scale
    low, high = rewards.min(), rewards.max()
    if data.terminals.any():
        low, high = low.clamp(max=0), high.clamp(min=0)
    here = torch.cat([normalise(data.observations), data.actions], -1)
    after, starts = normalise(data.next_observations), normalise(data.starts)
    gamma = discounts[:, None]

    def values(network: MLP, observations: Tensor, actions: Tensor) -> Tensor:
        x = torch.cat([observations.expand(P, -1, -1), actions], -1)
        u: Tensor = network(x).squeeze(-1)
        return u

    def made() -> MLP:
        generators = [seed_generator(config.seed) for _ in range(P)]
        size = (data.observations.shape[1] + data.actions.shape[1], 1, generators)
        return MLP((P,), *size, width=config.width, layers=config.layers, activation=torch.relu, layer_norm=True)

    network, average = made(), made().requires_grad_(False)
    optimiser = Adam(network, config.learning_rate, decay_steps=config.steps)
    generator = generator_at(config.seed, 1)
    rates = target_rates(discounts, config)
    alike = bool((discounts <= LONGEST + _ROUNDING).all())
    for step in range(config.steps):
        check()
        rows = torch.randint(N, (config.batch_size,), generator=generator)
        with torch.no_grad():
            u = values(average, after[rows], next_actions[:, rows]).clamp(low, high)
            y = (1 - gamma) * rewards[rows] + gamma * (1 - data.terminals[rows]) * u
        q = network(here[rows].expand(P, -1, -1)).squeeze(-1)
        optimiser.step((q - y).square().mean(-1))
        if alike:
            average_(average, network, config.target_rate)
        else:
            _average_each(average, network, rates)
        on_step(step + 1, config.steps)
    with torch.no_grad():
        found = values(average, starts, start_actions).clamp(low, high).mean(-1) * scale
    result: NDArray[np.float64] = found.double().numpy()
    return result


@torch.no_grad()
def _average_each(average: MLP, network: MLP, rates: Tensor) -> None:
    """`average_` with a rate (P,) for each policy."""
    for target, source in zip(average.parameters(), network.parameters(), strict=True):
        target.lerp_(source, rates.view(-1, *[1] * (target.ndim - 1)))
