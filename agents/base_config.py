"""The hyper-parameters that all agents share, or all agents with critics, and what is checked of them. No torch."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from diffrl.support.errors import UserError

if TYPE_CHECKING:
    from agents.base import Agent

RewardTuning = Literal["no", "normalize", "cql_antmaze", "iql_antmaze", "iql_locomotion"]
Aggregate = Literal["min", "mean", "lcb"]
"""How the values of several critics become one, see `CriticConfig.q_agg`."""
PolicyKind = Literal["deterministic", "chain", "solver", "flow", "consistency"]
"""What an agent's policy is: one action a state ("deterministic": it explores by added noise alone), or a generative
model of actions: a chain of random denoising steps (`DiffusionPolicy`), a deterministic solver (`SolverPolicy`), a flow
(`FlowPolicy`), or a consistency function (`ConsistencyPolicy`), which alone of these has no denoiser."""

Rule = tuple[Callable[[float], bool], str]
"""Whether a number will do, and what to say where it will not."""
_POSITIVE: Rule = (lambda x: x > 0, "more than 0")
_NOT_NEGATIVE: Rule = (lambda x: x >= 0, "0 or more")
_AT_LEAST_ONE: Rule = (lambda x: x >= 1, "at least 1")
_RATE: Rule = (lambda x: 0 < x <= 1, "in (0, 1]")
_SHARE: Rule = (lambda x: 0 <= x < 1, "in [0, 1)")
_RULES: dict[str, Rule] = {
    "learning_rate": _POSITIVE,
    "actor_lr": _POSITIVE,
    "critic_lr": _POSITIVE,
    "discount": _SHARE,
    "dropout": _SHARE,
    "expectile": (lambda x: 0 < x < 1, "in (0, 1)"),
    "target_rate": _RATE,
    "ema_rate": _RATE,
    "sigma_min": _POSITIVE,
    "sigma_max": _POSITIVE,
}
"""What the fields of a name must hold. Other floats are 0 or more, other whole numbers at least 1."""
_MAY_BE_ZERO = ("ema_start", "lr_decay_steps")


@dataclass(frozen=True)
class AgentConfig(ABC):
    """The hyper-parameters that all agents share. An agent's own configuration derives from it."""

    name: ClassVar[str]
    """The name on the command line, `--agent NAME`."""
    policy_kind: ClassVar[PolicyKind] = "deterministic"
    """What the agent's policy is, which decides what can be done with it: fine-tuned by PPO ("chain"), fine-tuned from
    preferences ("chain", "solver"), diagnosed (these and "flow")."""

    batch_size: int = 256
    """Transitions a step."""
    width: int = 256
    """Width of the hidden layers."""
    layers: int = 3
    """Number of hidden layers."""
    normalise_observations: bool = False
    """Standardise the observations by the data's mean and deviation."""
    reward_tune: RewardTuning = "no"
    """Rewards in training: normalize (r - mean) / std, cql_antmaze 4 (r - .5), iql_antmaze r - 1, iql_locomotion
    1000 r / (largest - smallest return)."""
    discount: float = 0.99
    """Discount factor of returns."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if isinstance(value, float):
                self._check(name, math.isfinite(value), "a finite number")
            otherwise = _NOT_NEGATIVE if isinstance(value, float) or name in _MAY_BE_ZERO else _AT_LEAST_ONE
            good, expected = _RULES.get(name, otherwise)
            self._check(name, good(value), expected)

    def _check(self, field: str, good: bool, expected: str) -> None:
        if not good:
            raise UserError(f"agent.{field.replace('_', '-')} is {getattr(self, field)}; expected {expected}.")

    @classmethod
    def of_run(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of the agent of an old run, from those in its config.yaml.

        A field that is younger than the run gets the value that means what was done when the run was made. Raises
        UserError where no value means that.
        """
        return dict(values)

    @property
    def untrained_steps(self) -> int:
        """Number of first training steps that leave the network that acts as it was initialised."""
        return 0

    def going_online(self) -> AgentConfig:
        """The settings with which an agent trained offline goes on in the environment."""
        return self

    def build(self, observation_size: int, action_size: int, seeds: Sequence[int], device: str = "cpu") -> Agent:
        """The agent, its networks initialised seed by seed, on `device`."""
        return self.implementation()(self, observation_size, action_size, seeds, device)

    @abstractmethod
    def implementation(self) -> type[Agent]:
        """The agent's class, imported in the method: its file imports PyTorch, a configuration does not."""


@dataclass(frozen=True)
class CriticConfig(AgentConfig):
    """The hyper-parameters that agents with critics share."""

    n_critics: int = 2
    """Number of critics, an ensemble whose members differ in their initialisation alone. Two in the papers."""
    q_agg: Aggregate = "min"
    """How the critics' values become one, in their own target and in choosing between actions: min, mean, or lcb, their
    mean - q_spread times their standard deviation (a lower confidence bound; of two critics at 1, the min)."""
    q_spread: float = 1.0
    """Weight of the standard deviation under lcb."""
    target_rate: float = 0.005
    """tau: how far the target critics move to the critics each time."""
    critic_layer_norm: bool = False
    """Layer normalisation in the critics, which bounds their values at states that the data lack. Of the papers here
    only FQL has it."""
