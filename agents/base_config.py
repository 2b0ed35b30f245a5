"""The hyper-parameters that all agents share, or all agents with critics, and what is checked of them. No torch."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from diffrl.support import plugins
from diffrl.support.errors import UserError, shown
from diffrl.support.schema import Batch, Depth, NotNegative, Rate, Several, Share, Width, check

if TYPE_CHECKING:
    from agents.base import Agent
    from diffrl.data.offline import OfflineDataset

Schedule = Literal["linear", "cosine", "sigmoid", "vp"]
Solver = Literal["ddim", "dpm1", "dpm2", "dpm3", "dpmpp2m", "heun"]
RewardTuning = Literal["no", "normalize", "cql_antmaze", "iql_antmaze", "iql_locomotion"]
Aggregate = Literal["min", "mean", "lcb"]
"""How the values of several critics become one, see `CriticConfig.q_agg`."""
FlowNetworks = Literal["published", "ours"]
"""The networks of agents with a flow: FQL's authors', or with the layers of the other agents. See `agents.fql`."""
PolicyKind = Literal["deterministic", "gaussian", "chain", "solver", "flow", "consistency", "planner"]
"""What an agent's policy is: one action a state ("deterministic": it explores by added noise, or by draws that it does
not act by), a Gaussian behind tanh that is drawn from ("gaussian"), or a generative model of actions: a chain of random
denoising steps (`DiffusionPolicy`), a deterministic solver (`SolverPolicy`), a flow (`FlowPolicy`), or a consistency
function (`ConsistencyPolicy`), which alone of these has no denoiser. Or it is none of these: a planner learns from
segments, and follows what it has planned (`agents.planning.Planner`)."""


@dataclass(frozen=True)
class AgentConfig(ABC):
    """The hyper-parameters that all agents share. An agent's own configuration derives from it."""

    name: ClassVar[str]
    """The name on the command line, `--agent NAME`."""
    policy_kind: ClassVar[PolicyKind] = "deterministic"
    """What the agent's policy is, which decides what can be done with it: fine-tuned by PPO ("chain"), fine-tuned from
    preferences ("chain", "solver"), diagnosed (these and "flow")."""

    batch_size: Batch = 256
    """Transitions a step."""
    width: Width = 256
    """Width of the hidden layers."""
    layers: Depth = 3
    """Number of hidden layers."""
    normalise_observations: bool = False
    """Standardise the observations by the data's mean and deviation."""
    reward_tune: RewardTuning = "no"
    """Rewards in training: normalize (r - mean) / std, cql_antmaze 4 (r - .5), iql_antmaze r - 1, iql_locomotion
    1000 r / (largest - smallest return)."""
    discount: Share = 0.99
    """Discount factor of returns."""

    waits_by: ClassVar[str] = "ema_start"
    """The field that decides `untrained_steps`."""

    def __post_init__(self) -> None:
        check(self, "agent.")

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

    @property
    def plans(self) -> bool:
        """Whether it decides several steps at once, so that its policy has to be told where an episode begins."""
        return self.policy_kind == "planner"

    @property
    def learns_from_rewards(self) -> bool:
        """Whether the data's rewards have a part in training."""
        return True

    @property
    def stepwise(self) -> bool:
        """Whether it learns from single transitions, as an environment gives them, and not from whole segments."""
        return self.policy_kind != "planner"

    @property
    def observation_scaling(self) -> str:
        """How observations are normalised: a name that `diffrl.data.preprocessing.normaliser` knows."""
        return "standard" if self.normalise_observations else "identity"

    def episodes(self, dataset: OfflineDataset) -> OfflineDataset:
        """The data with the episodes that the agent learns from: their own, if it does not join or cut them."""
        return dataset

    def going_online(self) -> AgentConfig:
        """The settings with which an agent trained offline goes on in the environment."""
        return self

    def build(self, observation_size: int, action_size: int, seeds: Sequence[int], device: str = "cpu") -> Agent:
        """The agent, its networks initialised seed by seed, on `device`.

        Raises UserError where it is another package's, and fails or does not keep to `agents.contract`.
        """
        made = self.implemented()
        if self._ours():
            return made(self, observation_size, action_size, seeds, device)
        from agents import contract

        plugin = plugins.bringing("diffrl.agents", [type(self)], self.name)
        refuse = UserError if plugin is None else plugin.broken
        with contextlib.nullcontext() if plugin is None else plugin.blamed(f"{made.__name__}(...)"):
            agent = made(self, observation_size, action_size, seeds, device)
        try:
            contract.check(agent)
        except UserError as error:
            raise refuse(str(error)) from error
        contract.watch(agent, refuse)
        return agent

    def _ours(self) -> bool:
        """Whether the class is of this package, whose tests look at its agent."""
        return type(self).__module__.partition(".")[0] == __name__.partition(".")[0]

    def implemented(self) -> type[Agent]:
        """What `implementation` gives. Raises UserError where it is another package's, and fails or gives no agent."""
        plugin = None if self._ours() else plugins.bringing("diffrl.agents", [type(self)], self.name)
        if plugin is None:
            return self.implementation()
        from agents.base import Agent

        with plugin.blamed("implementation()"):
            made = self.implementation()
        if not (isinstance(made, type) and issubclass(made, Agent)):
            raise plugin.broken(f"implementation() gives {shown(made)}; expected a subclass of agents.base.Agent")
        return made

    @abstractmethod
    def implementation(self) -> type[Agent]:
        """The agent's class, imported in the method: its file imports PyTorch, a configuration does not."""


@dataclass(frozen=True)
class CriticConfig(AgentConfig):
    """The hyper-parameters that agents with critics share."""

    n_critics: Several = 2
    """Number of critics, an ensemble whose members differ in their initialisation alone. Two in the papers."""
    q_agg: Aggregate = "min"
    """How the critics' values become one, in their own target and in choosing between actions: min, mean, or lcb, their
    mean - q_spread times their standard deviation (a lower confidence bound; of two critics at 1, the min)."""
    q_spread: NotNegative = 1.0
    """Weight of the standard deviation under lcb."""
    target_rate: Rate = 0.005
    """tau: how far the target critics move to the critics each time."""
    critic_layer_norm: bool = False
    """Layer normalisation in the critics, which bounds their values at states that the data lack. Of the papers here
    ReBRAC's and those with flows have it."""

    @property
    def q_in_rewards(self) -> bool:
        """Whether the critics' values are in the unit of the rewards that the agent is trained on."""
        return True
