"""What every agent is: its networks with a seeds axis, and the interface that training and evaluation use."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from agents import registry
from agents.base_config import AgentConfig
from diffrl.data.transitions import Source, Transitions
from diffrl.diffusion import Denoise, Network, Prediction, Process
from diffrl.nets import (
    MLP,
    Adam,
    RawTime,
    ResidualMLP,
    TimeEmbedding,
    affine,
    copy_state_,
    mish,
    seed_generator,
    state_of,
)
from diffrl.support.errors import UserError, joined


class ActionNetwork(nn.Module):
    """m_theta(a_t, t, s): an MLP on [a_t, time embedding, s], whose output has the action's size (arXiv 2208.06193).

    The first layer is linear in the three parts of its input, and two of them repeat: the state's part is computed
    once for all steps of a chain and all candidates of a state.

    blocks: 0 is the plain MLP; any other number is that of the blocks of a residual network with layer normalisation
    (IDQL's). time_size: size of the time embedding; 0: the network receives the time itself.
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        generators: Sequence[torch.Generator],
        *,
        width: int,
        layers: int,
        blocks: int = 0,
        time_size: int = 16,
        activation: Callable[[Tensor], Tensor] = mish,
    ) -> None:
        super().__init__()
        self.n_seeds, self.action_size = len(generators), action_size
        self.embed_time: TimeEmbedding | RawTime
        self.embed_time = TimeEmbedding(self.n_seeds, time_size, generators) if time_size else RawTime(self.n_seeds)
        self._sizes = (action_size, time_size or 1, observation_size)
        stack, size = (self.n_seeds,), sum(self._sizes)
        self.mlp: MLP | ResidualMLP
        if blocks:
            self.mlp = ResidualMLP(stack, size, action_size, generators, width=width, blocks=blocks)
        else:
            self.mlp = MLP(stack, size, action_size, generators, width=width, layers=layers, activation=activation)

    def forward(self, actions: Tensor, t: Tensor, observations: Tensor) -> Tensor:
        """m_theta(a_t, t, s): actions (S, B, A), t () or (S, B), observations (S, B, O) -> (S, B, A)."""
        return self.bound(observations)(actions, t)

    def bound(self, observations: Tensor, K: int = 1) -> Network:
        """m_theta with its observations (S, B, O) bound: a function of a (S, B K, A) and t () or (S, B K).

        The K actions of a state stand in a row; the state's part of the first layer is computed once for them.
        """
        w_a, w_t, w_s = self.first_layer()
        state_part = self.state_part(observations, w_s, K)

        def network(actions: Tensor, t: Tensor) -> Tensor:
            return self.from_parts(state_part + torch.bmm(self.embed_time(t), w_t), actions, w_a)

        return network

    def first_layer(self) -> Sequence[Tensor]:
        """The rows of the first layer's weights that take actions, time embedding and observations."""
        return torch.split(self.mlp.first.weight, list(self._sizes), dim=1)

    def state_part(self, observations: Tensor, w_s: Tensor, K: int = 1) -> Tensor:
        """What the first layer makes of observations (S, B, O), its bias included: (S, B K, width).

        w_s: of `first_layer`. K: how often each state is repeated, in a row.
        """
        part = affine(observations, w_s, self.mlp.first.bias)
        return part.repeat_interleave(K, dim=1) if K > 1 else part

    def from_parts(self, h: Tensor, actions: Tensor, w_a: Tensor, keep: Tensor | None = None) -> Tensor:
        """m_theta at actions (S, B, A), where h (S, B, width) holds the first layer's time and state parts.

        w_a: of `first_layer`. keep: the dropout of a residual network, see `ResidualMLP`.
        """
        h = affine(actions, w_a, h)
        if keep is None:
            return self.mlp.after_first(h)
        assert isinstance(self.mlp, ResidualMLP)
        return self.mlp.after_first(h, keep)


class GenerativePolicy(ActionNetwork):
    """A policy that is a generative model of actions in [-1, 1] given the state.

    All noise is drawn beforehand and passed in, so that the losses are plain functions of tensors, which the compiler
    takes whole.
    """

    prediction: Prediction

    @abstractmethod
    def sampling_noise(self, observations: Tensor, generator: torch.Generator, K: int = 1) -> Tensor:
        """Draw the noise that `sample` needs for K actions of each of the observations (S, B, O)."""

    @abstractmethod
    def sample(self, observations: Tensor, noise: Tensor) -> Tensor:
        """Sample actions (S, B K, A), the K of a state in a row; differentiable. noise: of `sampling_noise`."""

    @abstractmethod
    def noise_levels(self) -> tuple[float, ...]:
        """Ratios k = sigma/alpha, rising, at which to diagnose the model: within its training, never 0 or infinite."""

    def denoiser(self, observations: Tensor) -> Denoise:
        """D(a_t, t) = E[a_0 | a_t, s] for a_t (S, B, A), t () or (S, B), clamped to [-1, 1]."""
        return self.prediction.denoiser(self.bound(observations), clip=(-1.0, 1.0))

    def _candidates(self, observations: Tensor, noise: Tensor) -> int:
        """K, from observations (S, B, O) and noise (..., S, B K, A)."""
        return noise.shape[-2] // observations.shape[1]


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

    def source(self, transitions: Transitions) -> Source[Any]:
        """What the agent's batches are drawn from: the transitions, if it does not learn from segments of them."""
        return transitions

    @abstractmethod
    def update(self, batch: Any, generator: torch.Generator, phase: int = 0) -> Metrics:
        """One training step on a batch (S, B, ...) of its `source`, a `Batch` if that is of transitions.

        All noise comes from `generator`.

        phase: the steps made before this one, modulo `period`. A step may branch on it and on nothing else: a compiler
        and a CUDA graph meet one static step for each phase. Every phase gives the same metrics.
        """

    @abstractmethod
    def act(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """Actions (S, B, A) in [-1, 1] for observations (S, B, O), those of the present step alone.

        Its rows are of any episodes, in any number, and nothing tells where one begins: what an agent remembers of
        earlier calls is never reset. What is to be seen of the past belongs into the observations.
        """

    def explore(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """Actions (S, B, A) to try in an environment while learning, at observations (S, B, O): those of `act`.

        An agent that is evaluated by something quieter than what it tries says here what it tries.
        """
        return self.act(observations, generator)

    @property
    def policy(self) -> GenerativePolicy:
        """The agent's generative model of actions. Raises UserError where it has none."""
        policy = self.networks.get(self.generative)
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
        optimisers = {f"optimiser.{name}": optimiser for name, optimiser in self.optimisers.items()}
        return {"step": self.step, **state_of({**self.networks, **optimisers})}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy a `state_dict` into this agent's tensors. Raises ValueError where names or shapes differ."""
        copy_state_(self.state_dict(), state)


SLACK = 0.1
"""How far beyond -1 and 1 an action may lie: a solver's last step ends near 0, and not at it."""


def refuse_actions(
    agent: Agent, actions: Tensor, observations: Tensor, gave: str = "act", *, bounds: bool = True
) -> None:
    """Raise UserError, naming the agent's class, where these are no actions (S, B, A) in [-1, 1], of finite ones.

    observations: (S, B, O) what they are for. gave: the method that they are from. Agents of other packages make them.
    bounds: look at their values too, and not at their shape alone.
    """
    what = f"{type(agent).__name__}.{gave} gave"
    expected = (*observations.shape[:2], agent.action_size)
    if not isinstance(actions, Tensor) or tuple(actions.shape) != expected:
        found = f"of shape {tuple(actions.shape)}" if isinstance(actions, Tensor) else f"as {type(actions).__name__}"
        raise UserError(f"{what} actions {found}; expected a tensor {expected}: seeds, observations, action size.")
    largest = actions.nan_to_num(0.0, 0.0, 0.0).abs().max()
    if bounds and largest > 1 + SLACK:
        raise UserError(
            f"{what} an action of {float(largest):.3g} (its absolute value); expected actions in [-1, 1], which are "
            "scaled to the environment's bounds."
        )


def seed_slice(state: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """The part of one seed in a stack's `state_dict`, as the state of a stack of one; its index is among the seeds.

    Tensors are copied; counters, of shape (), are shared by all seeds and stay as they are.
    """
    return {name: tensor if tensor.ndim == 0 else tensor[index : index + 1].clone() for name, tensor in state.items()}
