"""The interface of an agent, which the training loop and the evaluation use."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from agents import registry
from agents.action_network import GenerativePolicy
from agents.base_config import AgentConfig
from diffrl.data.transitions import Batch
from diffrl.diffusion import Denoise, Process
from diffrl.nets import Adam, copy_state_, seed_generator
from diffrl.support.errors import UserError, joined

Metrics = dict[str, Tensor]
"""Quantities to log by name, each (S,), detached, left on the device."""


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """`function` as one compiled graph for tensors of fixed shapes on `device`."""
    # On a CPU the kernels are so short that calling them from C++ instead of Python is worth a fifth of a step.
    options: dict[str, Any] = {"cpp_wrapper": True}
    if device.type != "cpu":
        # Sums that stand beside each other become one kernel: 260 instead of 340 in a step of Diffusion-QL. The second
        # is PyTorch's own default in places, and fails on lists of tensors (2.11: an assertion in its scheduler).
        options = {"combo_kernels": True, "loop_ordering_after_fusion": False}
    result: Callable[..., Any] = torch.compile(function, fullgraph=True, dynamic=False, options=options)
    return result


class Agent(ABC):
    """S policies of one shape, one a seed, trained together. Actions lie in [-1, 1].

    A subclass makes its networks in `__init__` with `self.generators`, one a seed, and lists in `networks` and
    `optimisers` all that changes in training, which is then the state of a checkpoint.
    """

    compilable: ClassVar[tuple[str, ...]] = ()
    """Methods that are plain functions of tensors and take most of a training step's time: `compile` compiles them."""
    acting: ClassVar[tuple[str, ...]] = ()
    """Methods that are plain functions of tensors and take most of the time of `act`: `compile(acting=True)` compiles
    them too."""
    period: int = 1
    """Steps after which the kinds of a step repeat: 2 where every second step moves the actor too. See `update`."""
    generative: str = "actor"
    """The key, in `networks`, of the generative model of actions, where the agent has one."""
    value_metrics: ClassVar[tuple[str, ...]] = ()
    """Metrics that estimate returns: the training loop stops a seed whose estimate exceeds any possible return."""

    def __init__(
        self, config: AgentConfig, observation_size: int, action_size: int, seeds: Sequence[int], device: str
    ) -> None:
        self.config = config
        self.seeds = tuple(seeds)
        self.n_seeds = len(self.seeds)
        self.observation_size, self.action_size = observation_size, action_size
        self.device = torch.device(device)
        self.generators = [seed_generator(seed) for seed in self.seeds]
        self.networks: dict[str, nn.Module] = {}
        self.optimisers: dict[str, Adam] = {}
        self.step = torch.zeros((), dtype=torch.int64, device=self.device)

    def compile(self, acting: bool = False) -> None:
        """Compile the methods named in `compilable`, and with `acting` those in `acting`, each as one graph.

        Nothing happens before the first call of each, which then takes a while: see `diffrl.training.compilation`.
        """
        for name in (*self.compilable, *(self.acting if acting else ())):
            method = getattr(type(self), name).__get__(self)
            setattr(self, name, compiled(method, self.device))
        if self.device.type == "cuda":
            for optimiser in self.optimisers.values():
                optimiser.fuse(lambda step: compiled(step, self.device))

    def uncompile(self) -> None:
        """Undo `compile`: the methods and optimisers are the plain ones again."""
        for name in (*self.compilable, *self.acting):
            self.__dict__.pop(name, None)
        for optimiser in self.optimisers.values():
            optimiser.fuse(None)

    @abstractmethod
    def update(self, batch: Batch, generator: torch.Generator, phase: int = 0) -> Metrics:
        """One training step on a batch (S, B, ...); all noise comes from `generator`.

        phase: the steps made before this one, modulo `period`. A step may branch on it and on nothing else: a compiler
        and a CUDA graph meet one static step for each phase. Every phase gives the same metrics.
        """

    @abstractmethod
    def act(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """Actions (S, B, A) in [-1, 1] for observations (S, B, O)."""

    @property
    def policy(self) -> GenerativePolicy:
        """The agent's generative model of actions. Raises UserError where it has none."""
        policy = self.networks[self.generative]
        if not isinstance(policy, GenerativePolicy):
            raise UserError(
                f"The agent {self.config.name} has no generative model of actions to diagnose; those that have one are "
                f"{joined(registry.names('chain', 'solver', 'flow'))}."
            )
        return policy

    def generative_model(self, observations: Tensor) -> tuple[Process, Denoise]:
        """The policy as a model of actions x (S, B, A) in [-1, 1] given observations (S, B, O): process and denoiser.

        Raises UserError where the agent has no generative model of actions, or one without a denoiser.
        """
        return self.policy.prediction.process, self.policy.denoiser(observations)

    def noise_levels(self) -> tuple[float, ...]:
        """The policy's `GenerativePolicy.noise_levels`. Raises UserError where it has no generative model."""
        return self.policy.noise_levels()

    @torch.no_grad()
    def sample_actions(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """One action (S, B, A) for each observation (S, B, O), sampled from the policy without a choice by critics.

        Raises UserError where the agent has no generative model of actions.
        """
        return self.policy.sample(observations, self.policy.sampling_noise(observations, generator))

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor that training changes, by name, itself and not a copy; all but counters are (S, ...)."""
        state = {"step": self.step}
        for kind in (self.networks, self.optimisers):
            for name, part in kind.items():
                prefix = name if kind is self.networks else f"optimiser.{name}"
                state |= {f"{prefix}.{key}": value.detach() for key, value in part.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy a `state_dict` into this agent's tensors. Raises ValueError where names or shapes differ."""
        copy_state_(self.state_dict(), state)


def seed_slice(state: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """The part of one seed in a stack's `state_dict`, as the state of a stack of one; its index is among the seeds.

    Tensors are copied; counters, of shape (), are shared by all seeds and stay as they are.
    """
    return {name: tensor if tensor.ndim == 0 else tensor[index : index + 1].clone() for name, tensor in state.items()}
