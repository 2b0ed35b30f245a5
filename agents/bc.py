"""Behaviour cloning, with a deterministic MLP and with a diffusion policy."""

from collections.abc import Sequence

import torch
from torch import Tensor

from agents.base import Agent, Metrics
from agents.config import BC, DiffusionBC
from agents.diffusion_policy import DiffusionNoise, build_policy
from diffrl.data.transitions import Batch
from diffrl.nets import MLP, Adam


class BCAgent(Agent):
    """Behaviour cloning with a = tanh(f(s)), fitted by least squares."""

    compilable = ("bc_loss",)

    def __init__(self, config: BC, observation_size: int, action_size: int, seeds: Sequence[int], device: str) -> None:
        super().__init__(config, observation_size, action_size, seeds, device)
        self.actor = MLP(
            (self.n_seeds,), observation_size, action_size, self.generators, width=config.width, layers=config.layers
        ).to(self.device)
        self.networks = {"actor": self.actor}
        self.optimisers = {"actor": Adam(self.actor, config.learning_rate)}

    def bc_loss(self, batch: Batch) -> Tensor:
        """E |a - tanh(f(s))|^2, the mean over batch and action dimensions: (S,)."""
        return (torch.tanh(self.actor(batch.observations)) - batch.actions).square().mean((-2, -1))

    def update(self, batch: Batch, generator: torch.Generator, phase: int = 0) -> Metrics:
        """One step of behaviour cloning."""
        loss = self.bc_loss(batch)
        norm = self.optimisers["actor"].step(loss)
        self.step += 1
        return {"bc_loss": loss.detach(), "actor_grad_norm": norm}

    @torch.no_grad()
    def act(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """The policy's one action a state, tanh(f(s)): (S, B, A) for observations (S, B, O)."""
        return torch.tanh(self.actor(observations))


class DiffusionBCAgent(Agent):
    """Behaviour cloning with a diffusion policy, from which actions are sampled."""

    compilable = ("bc_loss",)
    acting = ("act_from",)

    def __init__(
        self, config: DiffusionBC, observation_size: int, action_size: int, seeds: Sequence[int], device: str
    ) -> None:
        super().__init__(config, observation_size, action_size, seeds, device)
        self.actor = build_policy(self, config)
        self.networks = {"actor": self.actor}
        self.optimisers = {"actor": Adam(self.actor, config.learning_rate, config.grad_clip)}

    def bc_loss(self, batch: Batch, noise: DiffusionNoise) -> Tensor:
        """Denoising score matching on actions: (S,). noise: of the policy's `bc_noise`."""
        return self.actor.bc_loss(batch.actions, batch.observations, noise)

    def update(self, batch: Batch, generator: torch.Generator, phase: int = 0) -> Metrics:
        """One step of denoising score matching."""
        loss = self.bc_loss(batch, self.actor.bc_noise(batch.actions, generator))
        norm = self.optimisers["actor"].step(loss)
        self.step += 1
        return {"bc_loss": loss.detach(), "actor_grad_norm": norm}

    @torch.no_grad()
    def act(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """One action a state, sampled from the policy: (S, B, A) for observations (S, B, O)."""
        return self.act_from(observations, self.actor.sampling_noise(observations, generator))

    def act_from(self, observations: Tensor, noise: Tensor) -> Tensor:
        """The actions (S, B, A) of `act`, as a plain function of tensors. noise: of the policy's `sampling_noise`."""
        return self.actor.sample(observations, noise)
