"""Which of an agent's networks is the policy that fine-tuning changes."""

from copy import deepcopy

import torch

import agents
from agents.base import Agent, GenerativePolicy
from agents.diffusion_policy import DiffusionPolicy
from agents.solver_policy import SolverPolicy
from diffrl.support.errors import UserError, joined
from diffrl.tuning.config import DPPOConfig, TuningConfig

WITH_CHAIN = joined(agents.names("chain"))
WITH_LOSS = joined(agents.names("chain", "solver"))


def chain_policy(agent: Agent) -> DiffusionPolicy:
    """The agent's policy, whose sampling is a chain of random decisions. Raises UserError where it is not."""
    policy = agent.networks.get(agent.generative)
    name = agent.config.name
    if isinstance(policy, SolverPolicy):
        raise UserError(
            f"The agent {name} samples by a deterministic solver, whose steps have no probabilities for PPO to change: "
            f"expected one of {WITH_CHAIN}; from preferences (--algo dpo) {name} can be fine-tuned."
        )
    if not isinstance(policy, DiffusionPolicy):
        raise UserError(f"The agent {name} has no diffusion chain to fine-tune; those that have one are {WITH_CHAIN}.")
    return policy


def denoising_policy(agent: Agent) -> DiffusionPolicy | SolverPolicy:
    """The agent's policy, where it is trained by a denoising loss and acts itself. Raises UserError where it is not."""
    policy = agent.networks.get(agent.generative)
    if not isinstance(policy, DiffusionPolicy | SolverPolicy):
        raise UserError(
            f"The agent {agent.config.name} does not act by a diffusion policy; those that do are {WITH_LOSS}."
        )
    return policy


def prepare(agent: Agent, config: TuningConfig) -> None:
    """Give the agent's policies the networks that fine-tuning adds: DPPO's frozen copy for the earlier steps."""
    if isinstance(config, DPPOConfig) and config.tuned_steps is not None:
        for network in agent.networks.values():
            if isinstance(network, DiffusionPolicy):
                network.freeze_start(max(network.steps - config.tuned_steps, 0))


def reference(policy: GenerativePolicy) -> GenerativePolicy:
    """A copy of the policy whose weights are frozen: what fine-tuning holds the policy to."""
    return deepcopy(policy).requires_grad_(False)


@torch.no_grad()
def copy_to_averages(agent: Agent, policy: GenerativePolicy) -> None:
    """Copy the weights of the policy to its moving average in the agent or, where it is one, to what it averages."""
    for name in ("actor", "ema_actor"):
        other = agent.networks.get(name)
        if other is not None and other is not policy:
            for ours, theirs in zip(other.parameters(), policy.parameters(), strict=True):
                ours.copy_(theirs)
