"""The algorithms' hyper-parameters: one frozen dataclass each, the paper's values as defaults. Imports no torch.

`build(...)` gives the agent itself, from the file of that algorithm.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from diffrl.errors import UserError, nearest

if TYPE_CHECKING:
    from agents.base import Agent

RewardTuning = Literal["no", "normalize", "cql_antmaze", "iql_antmaze"]
Schedule = Literal["linear", "cosine", "sigmoid", "vp"]


@dataclass(frozen=True)
class AgentConfig:
    """What all agents share."""

    name: ClassVar[str]
    """The name on the command line, `--agent NAME`."""

    batch_size: int = 256
    """Transitions a step."""
    width: int = 256
    """Width of the hidden layers."""
    layers: int = 3
    """Number of hidden layers."""
    normalise_observations: bool = False
    """Standardise the observations by the data's mean and deviation."""
    reward_tune: RewardTuning = "no"
    """Rewards in training: normalize (r - mean) / std, cql_antmaze 4 (r - .5), iql_antmaze r - 1."""
    discount: float = 0.99
    """Discount factor of returns."""

    def __post_init__(self) -> None:
        self._check("discount", 0 <= self.discount < 1, "in [0, 1)")
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if isinstance(value, float):
                self._check(name, math.isfinite(value), "a finite number")
            if name.endswith(("learning_rate", "_lr")):
                self._check(name, value > 0, "more than 0")
            elif name in ("target_rate", "ema_rate"):
                self._check(name, 0 < value <= 1, "in (0, 1]")
            elif name in ("grad_clip", "q_weight", "act_temperature", "ema_start"):
                self._check(name, value >= 0, "0 or more")
            elif isinstance(value, int) and not isinstance(value, bool):  # sizes, counts, intervals
                self._check(name, value >= 1, "at least 1")

    def _check(self, field: str, good: bool, expected: str) -> None:
        if not good:
            raise UserError(f"agent.{field.replace('_', '-')} is {getattr(self, field)}; expected {expected}.")

    def build(self, observation_size: int, action_size: int, seeds: Sequence[int], device: str = "cpu") -> Agent:
        """The agent, its networks initialised seed by seed."""
        raise NotImplementedError


@dataclass(frozen=True)
class BC(AgentConfig):
    """Behaviour cloning: a deterministic MLP fitted to the data's actions by least squares."""

    name: ClassVar[str] = "bc"

    learning_rate: float = 3e-4
    """Adam's learning rate."""

    def build(self, observation_size: int, action_size: int, seeds: Sequence[int], device: str = "cpu") -> Agent:
        """See `AgentConfig.build`."""
        from agents.bc import BCAgent

        return BCAgent(self, observation_size, action_size, seeds, device)


@dataclass(frozen=True)
class DiffusionBC(AgentConfig):
    """Behaviour cloning with a diffusion policy: Diffusion-QL's actor without its Q term."""

    name: ClassVar[str] = "diffusion_bc"

    learning_rate: float = 3e-4
    """Adam's learning rate."""
    grad_clip: float = 9.0
    """Largest gradient norm; 0: no clipping."""
    denoising_steps: int = 5
    """T, the steps of the diffusion policy."""
    schedule: Schedule = "vp"
    """Noise schedule of the diffusion policy."""

    def build(self, observation_size: int, action_size: int, seeds: Sequence[int], device: str = "cpu") -> Agent:
        """See `AgentConfig.build`."""
        from agents.bc import DiffusionBCAgent

        return DiffusionBCAgent(self, observation_size, action_size, seeds, device)


@dataclass(frozen=True)
class DiffusionQL(AgentConfig):
    """Diffusion-QL (Wang, Hunt & Zhou 2023, arXiv 2208.06193): a diffusion policy, behaviour cloning + Q."""

    name: ClassVar[str] = "diffusion_ql"

    q_weight: float = 1.0
    """Weight of the Q term beside the behaviour-cloning loss: the paper's eta, set per task."""
    max_q_backup: bool = False
    """Bootstrap from the best of `backup_candidates` next actions instead of one (the paper's AntMaze settings)."""
    backup_candidates: int = 10
    """Next actions a transition under max_q_backup."""
    target_rate: float = 0.005
    """tau: how far the target critics move to the critics each step."""
    actor_lr: float = 3e-4
    """Adam's learning rate of the actor, set per task."""
    critic_lr: float = 3e-4
    """Adam's learning rate of the critics."""
    grad_clip: float = 9.0
    """Largest gradient norm of actor and critics, set per task; 0: no clipping."""
    critic_layer_norm: bool = False
    """Layer normalisation in the critics: bounds what they claim of states the data lack. Not the paper's."""
    denoising_steps: int = 5
    """T, the steps of the diffusion policy."""
    schedule: Schedule = "vp"
    """Noise schedule of the diffusion policy."""
    ema_rate: float = 0.005
    """How far the averaged actor, which gives the target's actions, moves to the actor at an update."""
    ema_every: int = 5
    """Steps between updates of the averaged actor."""
    ema_start: int = 1000
    """Step of the first update of the averaged actor."""
    act_candidates: int = 50
    """Actions drawn when acting, from which the critics choose one."""
    act_temperature: float = 1.0
    """Temperature of the softmax over Q that chooses it; 0: the best."""

    def build(self, observation_size: int, action_size: int, seeds: Sequence[int], device: str = "cpu") -> Agent:
        """See `AgentConfig.build`."""
        from agents.diffusion_ql import DiffusionQLAgent

        return DiffusionQLAgent(self, observation_size, action_size, seeds, device)


AGENTS: dict[str, type[AgentConfig]] = {config.name: config for config in (BC, DiffusionBC, DiffusionQL)}
"""Every algorithm by its name."""


def get(name: str) -> type[AgentConfig]:
    """The configuration class of the algorithm called `name`. Raises UserError naming the nearest known one."""
    if name not in AGENTS:
        raise UserError(f"Unknown agent {name!r}: {nearest(name, AGENTS)}")
    return AGENTS[name]
