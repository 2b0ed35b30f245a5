"""The algorithms' hyper-parameters: one frozen dataclass each, the paper's values as defaults. Imports no torch.

`build(...)` gives the agent itself, from the file of that algorithm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from typing_extensions import override

from agents.base_config import AgentConfig, Aggregate, CriticConfig, PolicyKind, Schedule, Solver
from agents.expectile_config import DTQL, IDQL, IFQL, IQL, QGuidance
from agents.flow_config import BFN, FQL, FlowConfig
from agents.planning_config import Diffuser
from diffrl.support.schema import (
    Batch,
    Count,
    Depth,
    Natural,
    NotNegative,
    Positive,
    Range,
    Rate,
    SamplingSteps,
    Several,
    refusal,
)

if TYPE_CHECKING:
    from agents.base import Agent


@dataclass(frozen=True)
class BC(AgentConfig):
    """Behaviour cloning: a deterministic MLP fitted to the data's actions by least squares."""

    name: ClassVar[str] = "bc"

    learning_rate: Positive = 3e-4
    """Adam's learning rate."""

    @property
    @override
    def learns_from_rewards(self) -> bool:
        """Never: it clones the data's actions."""
        return False

    @override
    def implementation(self) -> type[Agent]:
        from agents.bc import BCAgent

        return BCAgent


@dataclass(frozen=True)
class DiffusionBC(AgentConfig):
    """Behaviour cloning with a diffusion policy: Diffusion-QL's actor without its Q term."""

    name: ClassVar[str] = "diffusion_bc"
    policy_kind: ClassVar[PolicyKind] = "chain"

    learning_rate: Positive = 3e-4
    """Adam's learning rate."""
    grad_clip: NotNegative = 9.0
    """Largest gradient norm; 0: no clipping."""
    denoising_steps: SamplingSteps = 5
    """T, the steps of the diffusion policy."""
    schedule: Schedule = "vp"
    """Noise schedule of the diffusion policy."""

    @property
    @override
    def learns_from_rewards(self) -> bool:
        """Never: it clones the data's actions."""
        return False

    @override
    def implementation(self) -> type[Agent]:
        from agents.bc import DiffusionBCAgent

        return DiffusionBCAgent


@dataclass(frozen=True)
class TD3Config(CriticConfig):
    """What TD3+BC and ReBRAC share: TD3 (Fujimoto et al. 2018, arXiv 1802.09477)."""

    policy_noise: NotNegative = 0.2
    """Deviation of the noise on the target's actions, in units of the action range's half."""
    noise_clip: NotNegative = 0.5
    """Largest noise on the target's actions."""
    policy_delay: Several = 2
    """Steps of the critics for each step of the actor and of the target networks."""
    actor_lr: Positive = 3e-4
    """Adam's learning rate of the actor."""
    critic_lr: Positive = 3e-4
    """Adam's learning rate of the critics."""


@dataclass(frozen=True)
class TD3BC(TD3Config):
    """TD3+BC (Fujimoto & Gu 2021, arXiv 2106.06860): a deterministic actor, Q + behaviour cloning. As CORL runs it."""

    name: ClassVar[str] = "td3_bc"

    layers: Depth = 2
    """Number of hidden layers."""
    normalise_observations: bool = True
    """Standardise the observations by the data's mean and deviation."""
    alpha: NotNegative = 2.5
    """Weight of the Q term, normalised by the mean |Q|, beside the behaviour-cloning term."""
    actor_q: Literal["first", Aggregate] = "first"
    """What the actor climbs: the first critic as in the paper, or the critics' min, mean or lcb."""

    @override
    def implementation(self) -> type[Agent]:
        from agents.td3_bc import TD3BCAgent

        return TD3BCAgent


@dataclass(frozen=True)
class ReBRAC(TD3Config):
    """ReBRAC (Tarasov et al. 2023, arXiv 2305.09836): TD3+BC with a penalty for the actor and one for the critics."""

    name: ClassVar[str] = "rebrac"

    batch_size: Batch = 1024
    """Transitions a step: 1024 on MuJoCo, 256 elsewhere."""
    layers: Depth = 3
    """Number of hidden layers."""
    critic_layer_norm: bool = True
    """Layer normalisation in the critics."""
    actor_penalty: NotNegative = 0.01
    """Weight of |pi(s) - a|^2 in the actor's loss, beside Q divided by its mean size: beta_1, set per task."""
    critic_penalty: NotNegative = 0.01
    """Weight of |pi(s') - a'|^2, subtracted from Q in the critics' target: beta_2, set per task."""
    actor_q: Aggregate = "min"
    """What the actor climbs: the critics' min as the authors, or their mean or lcb."""
    actor_lr: Positive = 1e-3
    """Adam's learning rate of the actor: 1e-3 on MuJoCo, 3e-4 elsewhere."""
    critic_lr: Positive = 1e-3
    """Adam's learning rate of the critics."""

    @override
    def going_online(self) -> ReBRAC:
        """The settings online: without the critics' penalty, which needs the action that followed in the data."""
        return dataclasses.replace(self, critic_penalty=0.0)

    @override
    def implementation(self) -> type[Agent]:
        from agents.rebrac import ReBRACAgent

        return ReBRACAgent


@dataclass(frozen=True)
class QWeightedConfig(CriticConfig):
    """What Diffusion-QL and its relatives share: a generative actor on behaviour cloning + Q."""

    q_weight: NotNegative = 1.0
    """Weight of the Q term beside the behaviour-cloning loss: the paper's eta, set per task."""
    actor_q: Literal["random", "random_own", Aggregate] = "random"
    """What the actor climbs: a critic drawn at random at each step and scaled by another one's mean size (random, as
    in Diffusion-QL) or by its own (random_own, as in EDP), or the critics' min, mean or lcb, scaled by its own."""
    max_q_backup: bool = False
    """Bootstrap from the best of `backup_candidates` next actions instead of one (the paper's AntMaze settings)."""
    backup_candidates: Several = 10
    """Next actions a transition under max_q_backup."""
    actor_lr: Positive = 3e-4
    """Adam's learning rate of the actor, set per task."""
    critic_lr: Positive = 3e-4
    """Adam's learning rate of the critics."""
    grad_clip: NotNegative = 9.0
    """Largest gradient norm of actor and critics, set per task; 0: no clipping."""
    ema_rate: Rate = 0.005
    """How far the averaged actor, which gives the target's actions, moves to the actor at an update."""
    ema_every: Count = 5
    """Steps between updates of the averaged actor."""
    ema_start: Natural = 1000
    """Step of the first update of the averaged actor."""
    act_with: Literal["actor", "average"] = "actor"
    """Which network acts: the actor, as in the paper, or the averaged actor, which is untrained before `ema_start`."""
    act_candidates: Several = 50
    """Actions drawn when acting, from which the critics choose one; 1: they have no say."""
    act_critics: Literal["target", "online"] = "target"
    """Which critics choose: the target ones, as in Diffusion-QL, or the online ones, as in EDP."""
    act_temperature: NotNegative = 1.0
    """Temperature of the softmax over Q that chooses it; 0: the best."""

    @property
    @override
    def untrained_steps(self) -> int:
        return self.ema_start if self.act_with == "average" else 0


@dataclass(frozen=True)
class DiffusionQL(QWeightedConfig):
    """Diffusion-QL (Wang, Hunt & Zhou 2023, arXiv 2208.06193): a diffusion policy, behaviour cloning + Q."""

    name: ClassVar[str] = "diffusion_ql"
    policy_kind: ClassVar[PolicyKind] = "chain"

    denoising_steps: SamplingSteps = 5
    """T, the steps of the diffusion policy."""
    schedule: Schedule = "vp"
    """Noise schedule of the diffusion policy."""

    @override
    def implementation(self) -> type[Agent]:
        from agents.diffusion_ql import DiffusionQLAgent

        return DiffusionQLAgent


@dataclass(frozen=True)
class EDP(QWeightedConfig):
    """EDP (Kang et al. 2023, arXiv 2305.20081): Diffusion-QL with the action guessed in one step from a noised one."""

    name: ClassVar[str] = "edp"
    policy_kind: ClassVar[PolicyKind] = "solver"

    form: Literal["published", "x0"] = "published"
    """What the network predicts, and its cloning loss is on: the noise, as the authors have it, or the action."""
    q_weight: NotNegative = 2.0
    """Weight of the Q term beside the behaviour-cloning loss: the authors' alpha."""
    actor_q: Literal["random", "random_own", Aggregate] = "random_own"
    """What the actor climbs: a critic drawn at random and scaled by its own mean size (random_own, as in the paper) or
    by another one's (random), or the critics' min, mean or lcb, scaled by its own."""
    act_critics: Literal["target", "online"] = "online"
    """Which critics choose among the candidates: the online ones, as the authors', or the target ones."""
    schedule: Schedule = "linear"
    """Noise schedule of training, of 1,000 steps."""
    sampling_steps: SamplingSteps = 15
    """Steps of the solver, in acting and for the target's actions."""
    solver: Solver = "dpmpp2m"
    """Solver of the denoising ODE, in acting and for the target's actions."""

    @classmethod
    @override
    def of_run(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a run; one that names no form had x0, a random critic, and chose by the target critics."""
        return {"form": "x0", "actor_q": "random", "act_critics": "target"} | dict(values)

    @override
    def implementation(self) -> type[Agent]:
        from agents.edp import EDPAgent

        return EDPAgent


@dataclass(frozen=True)
class ConsistencyAC(QWeightedConfig):
    """Consistency-AC (Ding & Jin 2024, arXiv 2309.16984): Diffusion-QL with a consistency policy of T steps."""

    name: ClassVar[str] = "consistency_ac"
    policy_kind: ClassVar[PolicyKind] = "consistency"

    denoising_steps: SamplingSteps = 2
    """T, the steps of the consistency policy."""
    form: Literal["published", "improved", "angular"] = "published"
    """Consistency training as published; "improved", with iCT's loss, weights and levels on EDM's preconditioning; or
    "angular", ours, which holds against Q at every level. See `ConsistencyPolicy`."""
    q_norm: bool = False
    """Divide the critics' targets by their deviation over the batch, as the published settings of some tasks do."""
    sigma_min: Positive | None = None
    """Smallest noise level; by default 0.002, and 0.02 for angular."""
    sigma_max: Positive | None = None
    """Largest noise level; by default 80, and 5 for angular."""
    boundaries_start: Annotated[int, Range(2, 10**7)] = 2
    """Number of noise levels at the first step of training."""
    boundaries_end: Annotated[int, Range(2, 10**7)] = 150
    """Number of noise levels from step `boundaries_steps` on."""
    boundaries_steps: Count = 50_000
    """Steps over which the number of noise levels grows (the published code starts over every 50,000 steps)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.noise_range
        if self.sigma_min is not None and not low < high:
            raise refusal("--agent.sigma-min", low, f"less than --agent.sigma-max, {high:g}")
        lowest = 2.0 if self.form == "published" and self.denoising_steps > 1 else low
        if not high > lowest:
            raise refusal("--agent.sigma-max", high, f"more than {lowest:g}, the lowest level sampled at")
        if self.boundaries_start > self.boundaries_end:
            most = f"at most --agent.boundaries-end, {self.boundaries_end:,}"
            raise refusal("--agent.boundaries-start", self.boundaries_start, most)

    @property
    def noise_range(self) -> tuple[float, float]:
        """sigma_min and sigma_max, the form's own where they are not given."""
        low, high = (0.02, 5.0) if self.form == "angular" else (0.002, 80.0)
        return low if self.sigma_min is None else self.sigma_min, high if self.sigma_max is None else self.sigma_max

    @property
    @override
    def q_in_rewards(self) -> bool:
        """Not under `q_norm`, whose Q has no fixed scale."""
        return not self.q_norm

    @override
    def implementation(self) -> type[Agent]:
        from agents.consistency_ac import ConsistencyACAgent

        return ConsistencyACAgent


@dataclass(frozen=True)
class QAM(FlowConfig):
    """QAM (Li & Levine 2026, arXiv 2601.14234): a flow is fine-tuned towards exp(Q) by adjoint matching."""

    name: ClassVar[str] = "qam"

    inverse_temperature: NotNegative = 0.3
    """Weight of Q beside the log-likelihood of the data's policy, set per task: lambda; 0: cloning alone."""
    grad_clip: NotNegative = 1.0
    """Largest gradient norm of each network; 0: no clipping."""
    n_critics: Several = 10
    """Number of critics, an ensemble whose members differ in their initialisation alone."""
    q_agg: Aggregate = "lcb"
    """How the critics' values become one in their target: min, mean, or lcb, their mean - q_spread times their standard
    deviation. The flow climbs their mean."""
    q_spread: NotNegative = 0.5
    """Weight of the standard deviation under lcb: the paper's rho."""

    @override
    def implementation(self) -> type[Agent]:
        from agents.qam import QAMAgent

        return QAMAgent


@dataclass(frozen=True)
class RLPD(CriticConfig):
    """RLPD (Ball et al. 2023, arXiv 2302.02948): SAC online, half of each batch prior data, with many critics."""

    name: ClassVar[str] = "rlpd"

    layers: Depth = 2
    """Number of hidden layers; 3 on AntMaze and Adroit."""
    n_critics: Several = 10
    """Number of critics, an ensemble whose members differ in their initialisation alone."""
    critic_layer_norm: bool = True
    """Layer normalisation in the critics, before the activation."""
    target_critics: Several = 2
    """How many of the critics, drawn anew for each update, make its target; 1 on AntMaze."""
    q_agg: Aggregate = "min"
    """How their values become one in the target: min, mean, or lcb. The policy climbs the mean of all critics."""
    entropy_backup: bool = True
    """The policy's entropy counts in the target; not on AntMaze and Adroit."""
    actor_every: Several = 20
    """Steps of the critics for each of the policy and the temperature: the updates a step of the environment
    (`diffrl online --updates-per-step`), so that these move once a step."""
    temperature: Positive = 1.0
    """Where the temperature, the weight of the entropy, starts."""
    target_entropy: float | None = None
    """The entropy that the temperature keeps; by default -A/2 for A action dimensions."""
    actor_lr: Positive = 3e-4
    """Adam's learning rate of the policy."""
    critic_lr: Positive = 3e-4
    """Adam's learning rate of the critics."""
    temperature_lr: Positive = 3e-4
    """Adam's learning rate of the temperature."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_critics > self.n_critics:
            raise refusal("--agent.target-critics", self.target_critics, f"at most --agent.n-critics, {self.n_critics}")

    @override
    def implementation(self) -> type[Agent]:
        from agents.rlpd import RLPDAgent

        return RLPDAgent


AGENTS: dict[str, type[AgentConfig]] = {
    config.name: config
    for config in (
        *(BC, DiffusionBC, TD3BC, ReBRAC, IQL, DiffusionQL, EDP, ConsistencyAC, IDQL, QGuidance),
        *(IFQL, FQL, BFN, QAM, DTQL, RLPD, Diffuser),
    )
}
"""Every algorithm of ours by its name."""
