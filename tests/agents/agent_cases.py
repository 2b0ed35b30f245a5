"""What the tests of agents have in common: a batch, a bandit, and which tensors a loss or an update reaches."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import agents
from agents.base import Agent
from agents.chunks import ChunkAgent
from agents.diffuser import DiffuserAgent
from agents.rebrac import ReBRACAgent
from agents.returns import ReturnWindows
from diffrl.data.chunks import Chunks
from diffrl.data.next_actions import SuccessiveBatch
from diffrl.data.segments import Segments
from diffrl.data.transitions import Batch

DETERMINISTIC = agents.names("deterministic")
"""Agents whose policy has one action a state."""


def make_batch(n_seeds: int = 1, size: int = 8, seed: int = 0) -> Batch:
    """Observations (S, B, 3), actions (S, B, 2); some rows are terminal."""
    g = torch.Generator().manual_seed(seed)
    return Batch(
        observations=torch.randn(n_seeds, size, 3, generator=g),
        actions=torch.rand(n_seeds, size, 2, generator=g) * 2 - 1,
        rewards=torch.randn(n_seeds, size, generator=g),
        next_observations=torch.randn(n_seeds, size, 3, generator=g),
        terminals=(torch.rand(n_seeds, size, generator=g) < 0.3).float(),
        episodes=torch.zeros(n_seeds, size),
        steps=torch.zeros(n_seeds, size),
    )


def make_successive(n_seeds: int = 1, size: int = 8, seed: int = 0) -> SuccessiveBatch:
    """As `make_batch`, with next actions, which some rows have not."""
    g = torch.Generator().manual_seed(seed + 1000)
    next_actions = torch.rand(n_seeds, size, 2, generator=g) * 2 - 1
    succeeded = (torch.rand(n_seeds, size, generator=g) < 0.6).float()
    return SuccessiveBatch(*make_batch(n_seeds, size, seed), next_actions, succeeded)


def make_chunks(n_seeds: int = 1, size: int = 8, seed: int = 0, horizon: int = 3, actions: int = 3) -> Chunks:
    """As `make_batch`, of chunks that hold so many actions; some run over an end, of which some are terminal."""
    g, batch = torch.Generator().manual_seed(seed + 2000), make_batch(n_seeds, size, seed)
    lengths = torch.randint(1, horizon + 1, (n_seeds, size, 1), generator=g)
    mask = (torch.arange(horizon) < lengths).float()
    return Chunks(
        observations=batch.observations,
        actions=torch.rand(n_seeds, size, 2 * actions, generator=g) * 2 - 1,
        rewards=batch.rewards,
        next_observations=batch.next_observations,
        terminals=batch.terminals,
        valid=torch.maximum(mask[..., -1], batch.terminals),
        mask=mask,
    )


def make_batch_for(agent: Agent, n_seeds: int = 1, size: int = 8, seed: int = 0) -> Any:
    """A batch of what the agent learns from: of `make_batch`'s transitions, or of windows."""
    if isinstance(agent, ReBRACAgent):
        return make_successive(n_seeds, size, seed)
    if isinstance(agent, ChunkAgent) and not agent.config.stepwise:
        return make_chunks(n_seeds, size, seed, agent.config.steps_ahead, agent.config.chunk)
    if not isinstance(agent, DiffuserAgent):
        return make_batch(n_seeds, size, seed)
    g, shape = torch.Generator().manual_seed(seed), (n_seeds, size, agent.horizon)
    observations, actions = (torch.rand(*shape, n, generator=g) * 2 - 1 for n in (3, 2))
    if agent.config.guided:
        return ReturnWindows(observations, actions, torch.rand(shape[:2], generator=g))
    starts = torch.zeros(shape[:2], dtype=torch.int64)
    return Segments(observations, actions, torch.zeros(shape), torch.ones(shape), starts)


def bandit(size: int, seed: int) -> Batch:
    """One state; actions at +-0.5 equally often; reward 1 at +0.5, 0 at -0.5; every step terminal."""
    g = torch.Generator().manual_seed(seed)
    good = torch.rand(1, size, generator=g) < 0.5
    centre = torch.where(good, 0.5, -0.5)[..., None].expand(-1, -1, 2)
    return Batch(
        observations=torch.zeros(1, size, 3),
        actions=centre + 0.05 * torch.randn(1, size, 2, generator=g),
        rewards=good.float(),
        next_observations=torch.zeros(1, size, 3),
        terminals=torch.ones(1, size),
        episodes=torch.zeros(1, size),
        steps=torch.zeros(1, size),
    )


def weights(network: nn.Module) -> list[Tensor]:
    """Copies of a network's parameters."""
    return [p.detach().clone() for p in network.parameters()]


def reached(loss: Tensor, networks: dict[str, nn.Module]) -> set[str]:
    """The names of the networks to which the loss has a gradient."""
    names = [name for name, network in networks.items() for p in network.parameters() if p.requires_grad]
    parameters = [p for network in networks.values() for p in network.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss.sum(), parameters, allow_unused=True, retain_graph=True)
    return {name for name, gradient in zip(names, found, strict=True) if gradient is not None and gradient.any()}


def assert_same_gradients(ours: Tensor, plain: Tensor, network: nn.Module) -> None:
    """Two losses and their gradients for all of a network's trained parameters agree, to 1e-5 of the largest."""
    torch.testing.assert_close(ours, plain)
    parameters = [p for p in network.parameters() if p.requires_grad]
    pairs = zip(
        *(torch.autograd.grad(loss.sum(), parameters, retain_graph=True) for loss in (ours, plain)), strict=True
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def assert_moved(old: Iterable[Tensor], average: nn.Module, online: nn.Module, rate: float) -> None:
    """`average` is its `old` weights moved to the online ones by `rate`."""
    for before, now, goal in zip(old, average.parameters(), online.parameters(), strict=True):
        torch.testing.assert_close(now, before + rate * (goal - before))


def changed(agent: Agent, before: dict[str, Tensor]) -> set[str]:
    """The names of the networks whose parameters differ from the state `before`."""
    state = agent.state_dict()
    return {name.partition(".")[0] for name in state if not torch.equal(state[name], before[name])} & set(
        agent.networks
    )


def state(agent: Agent) -> dict[str, Tensor]:
    """A copy of an agent's state."""
    return {name: tensor.clone() for name, tensor in agent.state_dict().items()}
