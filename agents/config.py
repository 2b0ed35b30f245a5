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
from agents.planning_config import Diffuser
from diffrl.support.errors import UserError
from diffrl.support.schema import (
    Count,
    Depth,
    Natural,
    NotNegative,
    Positive,
    Range,
    Rate,
    SamplingSteps,
    Several,
    Share,
    Width,
    refusal,
)

if TYPE_CHECKING:
    from agents.base import Agent

ReverseVariance = Literal["posterior", "beta"]
"""The noise of a diffusion policy's reverse process, and what is clamped: see `IDQL.sampler`."""


@dataclass(frozen=True)
class BC(AgentConfig):
    """Behaviour cloning: a deterministic MLP fitted to the data's actions by least squares."""

    name: ClassVar[str] = "bc"

    learning_rate: Positive = 3e-4
    """Adam's learning rate."""

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

    @override
    def implementation(self) -> type[Agent]:
        from agents.bc import DiffusionBCAgent

        return DiffusionBCAgent


@dataclass(frozen=True)
class TD3BC(CriticConfig):
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

    @override
    def implementation(self) -> type[Agent]:
        from agents.td3_bc import TD3BCAgent

        return TD3BCAgent


@dataclass(frozen=True)
class ExpectileConfig(CriticConfig):
    """What agents with IQL's critics share: values by expectile regression, no action outside the data."""

    expectile: Annotated[float, Range(0, 1, "()")] = 0.7
    """Which expectile of Q over the data's actions the state's value is; 0.9 on AntMaze."""
    actor_lr: Positive = 3e-4
    """Adam's learning rate of the actor."""
    critic_lr: Positive = 3e-4
    """Adam's learning rate of critics and value function."""


@dataclass(frozen=True)
class IQL(ExpectileConfig):
    """IQL (Kostrikov et al. 2021, arXiv 2110.06169): cloning weighted by advantages. As CORL runs it."""

    name: ClassVar[str] = "iql"

    layers: Depth = 2
    """Number of hidden layers."""
    normalise_observations: bool = True
    """Standardise the observations by the data's mean and deviation."""
    beta: NotNegative = 3.0
    """Inverse temperature of the advantage weights; 10 on AntMaze."""
    max_weight: NotNegative = 100.0
    """Largest advantage weight."""
    deterministic: bool = False
    """A deterministic actor (least squares) instead of a Gaussian one (log-likelihood)."""
    lr_decay_steps: Natural = 1_000_000
    """Steps over which the actor's learning rate falls to 0 along a cosine, however long the run is; 0: it stays."""

    @override
    def going_online(self) -> IQL:
        """The settings online: without the schedule, so that the actor goes on learning at its full rate."""
        return dataclasses.replace(self, lr_decay_steps=0)

    @override
    def implementation(self) -> type[Agent]:
        from agents.iql import IQLAgent

        return IQLAgent


@dataclass(frozen=True)
class IDQL(ExpectileConfig):
    """IDQL (Hansen-Estruch et al. 2023, arXiv 2304.10573): a diffusion policy clones, IQL's critics pick its best."""

    name: ClassVar[str] = "idql"
    policy_kind: ClassVar[PolicyKind] = "chain"

    layers: Depth = 2
    """Number of hidden layers of critics and value function."""
    blocks: Depth = 3
    """Residual blocks of the policy's network."""
    dropout: Share = 0.1
    """Share of a block's inputs left out in training."""
    grad_clip: NotNegative = 0.0
    """Largest gradient norm; 0: no clipping."""
    lr_decay_steps: Natural = 3_000_000
    """Steps over which the policy's learning rate falls to 0 along a cosine, however long the run is; 0: it stays."""
    denoising_steps: SamplingSteps = 5
    """T, the steps of the diffusion policy."""
    schedule: Schedule = "vp"
    """Noise schedule of the diffusion policy."""
    sampler: ReverseVariance = "beta"
    """The policy's sampling: beta, the authors', with noise sqrt(beta_t) and the action clamped after each step; or
    posterior, with less noise, and the guess of the clean action clamped instead."""
    ema_rate: Rate = 0.001
    """How far the averaged policy, which acts, moves to the policy each step."""
    act_candidates: Several = 64
    """Actions drawn when acting, from which the critics choose one; the paper's sets have 16 to 256."""
    act_temperature: NotNegative = 0.0
    """Temperature of the softmax over Q that chooses it; 0: the best."""

    @override
    def going_online(self) -> IDQL:
        """The settings online: without the schedule, so that the policy goes on learning at its full rate."""
        return dataclasses.replace(self, lr_decay_steps=0)

    @classmethod
    @override
    def of_run(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a run as they are. Raises UserError where its critics had another activation than today's."""
        if "sampler" not in values:
            raise UserError(
                "This IDQL run was made when its critics had Mish for an activation; they have ReLU now, as the "
                "paper's. Train it anew."
            )
        return dict(values)

    @override
    def implementation(self) -> type[Agent]:
        from agents.idql import IDQLAgent

        return IDQLAgent


@dataclass(frozen=True)
class QGuidance(ExpectileConfig):
    """A diffusion policy clones, and is guided by Q as it denoises: QGPO's sampling (Lu et al. 2023, arXiv 2304.12824).

    The policy drawn from is mu(a | s) exp(guidance_scale Q(s, a)). QGPO learns an energy network for every noise level
    by contrast; here the energy at a noisy action is Q of the denoised one, and the critics are IQL's.
    """

    name: ClassVar[str] = "q_guidance"
    policy_kind: ClassVar[PolicyKind] = "solver"

    grad_clip: NotNegative = 9.0
    """Largest gradient norm; 0: no clipping."""
    sampling_steps: SamplingSteps = 15
    """Steps of the solver when acting."""
    solver: Solver = "dpmpp2m"
    """Solver when acting."""
    guidance_scale: NotNegative = 3.0
    """Weight of Q beside the log-likelihood of the data's policy: the paper's scale times beta; 0: cloning alone."""
    ema_rate: Rate = 0.005
    """How far the averaged policy, which acts, moves to the policy each step."""

    @override
    def implementation(self) -> type[Agent]:
        from agents.q_guidance import QGuidanceAgent

        return QGuidanceAgent


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

    @override
    def implementation(self) -> type[Agent]:
        from agents.consistency_ac import ConsistencyACAgent

        return ConsistencyACAgent


@dataclass(frozen=True)
class FQL(CriticConfig):
    """FQL (Park, Li & Levine 2025, arXiv 2502.02538): a flow clones, its one-step distillate climbs Q."""

    name: ClassVar[str] = "fql"
    policy_kind: ClassVar[PolicyKind] = "flow"

    width: Width = 512
    """Width of the hidden layers."""
    layers: Depth = 4
    """Number of hidden layers."""
    networks: Literal["published", "ours"] = "published"
    """The authors' networks, which normalise after the activation, take the time as it is and start from weights scaled
    by the average of the fans; or ours, with the layers of the other agents. See `agents.fql`."""
    alpha: NotNegative = 10.0
    """Weight of the distillation beside Q, set per task."""
    normalise_q: bool = False
    """Divide the Q term by the mean |Q|, so that alpha means the same on every scale of rewards; where an action moves
    the normalised Q little, as on maze2d, alpha has to be far smaller than the authors' .03 to 10: see `agents.fql`."""
    flow_steps: SamplingSteps = 10
    """Euler steps of the flow."""
    learning_rate: Positive = 3e-4
    """Adam's learning rate of flow, policy and critics."""
    critic_layer_norm: bool = True
    """Layer normalisation in the critics."""
    q_agg: Aggregate = "mean"
    """How the critics' values become one in their target: min, mean, or lcb, mean - q_spread times their deviation."""
    actor_q: Aggregate = "mean"
    """What the one-step policy climbs: the critics' mean as in the paper, their min or lcb."""

    @classmethod
    @override
    def of_run(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a run; one that names no networks had ours, and `pessimistic` said what `q_agg` says now."""
        fields = {"networks": "ours"} | dict(values)
        if "pessimistic" in fields:
            fields["q_agg"] = "min" if fields.pop("pessimistic") else "mean"
        return fields

    @override
    def implementation(self) -> type[Agent]:
        from agents.fql import FQLAgent

        return FQLAgent


AGENTS: dict[str, type[AgentConfig]] = {
    config.name: config
    for config in (BC, DiffusionBC, TD3BC, IQL, DiffusionQL, EDP, ConsistencyAC, IDQL, QGuidance, FQL, Diffuser)
}
"""Every algorithm of ours by its name."""
