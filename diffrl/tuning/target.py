"""Which of an agent's networks is the policy that fine-tuning changes."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import TypeVar

import torch
from torch import Tensor

from agents.base import Agent, GenerativePolicy
from agents.base_config import CriticConfig
from agents.critic import CriticEnsemble, aggregate
from agents.diffusion_policy import DiffusionPolicy
from agents.flow_policy import FlowPolicy
from agents.solver_policy import SolverPolicy
from diffrl.support.errors import UserError
from diffrl.tuning.config import NOT_ALONE, DPPOConfig, TuningConfig, no_chain, no_denoising, no_forward

PolicyT = TypeVar("PolicyT", bound=GenerativePolicy)
ForwardPolicy = DiffusionPolicy | SolverPolicy | FlowPolicy
"""A policy that is trained by a denoising loss."""


def chain_policy(agent: Agent) -> DiffusionPolicy:
    """The agent's policy, whose sampling is a chain of random decisions. Raises UserError where it is not."""
    policy = agent.networks.get(agent.generative)
    if not isinstance(policy, DiffusionPolicy):
        raise no_chain(agent.config.name, isinstance(policy, SolverPolicy))
    return policy


def denoising_policy(agent: Agent) -> DiffusionPolicy | SolverPolicy:
    """The agent's policy, where it is trained by a denoising loss and acts itself. Raises UserError where it is not."""
    policy = agent.networks.get(agent.generative)
    if not isinstance(policy, DiffusionPolicy | SolverPolicy):
        raise no_denoising(agent.config.name)
    return policy


def forward_policy(agent: Agent) -> ForwardPolicy:
    """The agent's policy, where it is trained by a denoising loss and acts itself, unguided. Raises UserError else."""
    policy, name = agent.networks.get(agent.generative), agent.config.name
    if not isinstance(policy, DiffusionPolicy | SolverPolicy | FlowPolicy) or name in NOT_ALONE:
        raise no_forward(name)
    return policy


def refuse_chunks(agent: Agent, what: str) -> None:
    """Raise UserError where the agent's policy gives chunks of several actions, with which `what` cannot be done."""
    if agent.config.plans:
        raise UserError(
            f"The agent {agent.config.name} has chunks of actions (--agent.chunk), and {what} is of single ones: start "
            "from a run without chunks."
        )


def training_times(policy: ForwardPolicy, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw times of the forward process, of a shape (S, ...), as the policy's own training draws them."""
    device = generator.device
    if isinstance(policy, FlowPolicy):
        return 1 - torch.rand(tuple(shape), generator=generator, device=device)
    return policy.times[torch.randint(len(policy.times), tuple(shape), generator=generator, device=device)]


def critics_of(agent: Agent) -> Callable[[Tensor, Tensor], Tensor]:
    """The agent's averaged critics as one function: observations (S, B, O), actions (S, B, A) -> values (S, B).

    Raises UserError where the agent has none.
    """
    critic, config = agent.networks.get("target_critic"), agent.config
    if not isinstance(critic, CriticEnsemble) or not isinstance(config, CriticConfig):
        raise UserError(
            f"The agent {config.name} has no critics to say which actions are better: fine-tune it in its environment "
            "(--advantages environment), or start from a run whose agent learns critics, such as diffusion_ql's."
        )

    def values(observations: Tensor, actions: Tensor) -> Tensor:
        return aggregate(critic(observations, actions), config.q_agg, config.q_spread)

    return values


def untrained_critics(agent: Agent) -> bool:
    """Whether the agent's critics are as they were made: a target is its critic's copy until the first update.

    So it is of a distilled policy whose critics are not its teacher's, of whatever is made of that, and at step 0.
    """
    critic, target = (agent.networks.get(name) for name in ("critic", "target_critic"))
    if critic is None or target is None or getattr(agent.config, "target_rate", 1) == 1:
        return False
    pairs = zip(critic.parameters(), target.parameters(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def prepare(agent: Agent, config: TuningConfig) -> None:
    """Give the agent's policies the networks that fine-tuning adds: DPPO's frozen copy for the earlier steps."""
    if isinstance(config, DPPOConfig) and config.tuned_steps is not None:
        for network in agent.networks.values():
            if isinstance(network, DiffusionPolicy):
                network.freeze_start(max(network.steps - config.tuned_steps, 0))


def reference(policy: PolicyT) -> PolicyT:
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
