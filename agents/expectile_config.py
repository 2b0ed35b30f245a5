"""The hyper-parameters of agents with IQL's critics: IQL, IDQL, IFQL, Q-guidance, DTQL. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from typing_extensions import override

from agents.base_config import CriticConfig, FlowNetworks, PolicyKind, Schedule, Solver
from diffrl.support.errors import UserError
from diffrl.support.schema import (
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
class IFQL(ExpectileConfig):
    """IFQL (Park, Li & Levine 2025, arXiv 2502.02538): a flow clones, IQL's critics pick the best of its actions."""

    name: ClassVar[str] = "ifql"
    policy_kind: ClassVar[PolicyKind] = "flow"

    width: Width = 512
    """Width of the hidden layers."""
    layers: Depth = 4
    """Number of hidden layers."""
    networks: FlowNetworks = "published"
    """The authors' networks, which normalise after the activation, take the time as it is and start from weights scaled
    by the average of the fans; or ours, with the layers of the other agents. See `agents.fql`."""
    critic_layer_norm: bool = True
    """Layer normalisation in critics and value function."""
    expectile: Annotated[float, Range(0, 1, "()")] = 0.9
    """Which expectile of Q over the data's actions the state's value is."""
    flow_steps: SamplingSteps = 10
    """Euler steps of the flow."""
    act_candidates: Several = 32
    """Actions drawn when acting, N, from which the critics choose the best."""

    @override
    def implementation(self) -> type[Agent]:
        from agents.ifql import IFQLAgent

        return IFQLAgent


@dataclass(frozen=True)
class DTQL(ExpectileConfig):
    """DTQL (Chen, Wang & Zhou 2024, arXiv 2405.19690): a Gaussian climbs Q, a diffusion model's own loss holds it."""

    name: ClassVar[str] = "dtql"
    policy_kind: ClassVar[PolicyKind] = "gaussian"
    waits_by: ClassVar[str] = "actor_start"

    critic_layer_norm: bool = True
    """Layer normalisation in the critics; the value function has none."""
    alpha: NotNegative = 1.0
    """Weight of the trust-region loss beside Q, set per task: 1 to 50 on MuJoCo, 1500 on pen."""
    likelihood_weight: NotNegative = 0.0
    """Weight of the log-likelihood of the data's actions under the policy: the paper's gamma, 1 on AntMaze."""
    actor_start: Natural = 50_000
    """First steps, which train the diffusion model and the critics alone."""
    diffusion_layers: Depth = 4
    """Number of hidden layers of the diffusion model."""
    sigma_min: Positive = 0.002
    """Smallest noise level of training."""
    sigma_max: Positive = 80.0
    """Largest noise level of training."""
    lr_decay_steps: Natural = 0
    """Steps after the first `actor_start` over which all learning rates fall to 0 along a cosine; 0: they stay."""
    lr_decay_waits: bool = True
    """Whether those of critics and diffusion model wait for `actor_start` too, as the authors' do; without, they fall
    from the first step, as they did up to version 0.2.0."""
    act_candidates: Several = 1024
    """Actions drawn when acting, from which the critics choose one."""
    act_temperature: NotNegative = 1.0
    """Temperature of the softmax over Q that chooses it; 0: the best."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sigma_min < self.sigma_max:
            raise refusal("--agent.sigma-min", self.sigma_min, f"less than --agent.sigma-max, {self.sigma_max:g}")

    @property
    @override
    def untrained_steps(self) -> int:
        return self.actor_start

    @classmethod
    @override
    def of_run(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a run; of one without `lr_decay_waits` the rates have fallen from the first step."""
        return {"lr_decay_waits": False, **values}

    @override
    def going_online(self) -> DTQL:
        """The settings online: without the schedule, so that all go on learning at their full rates."""
        return dataclasses.replace(self, lr_decay_steps=0)

    @override
    def implementation(self) -> type[Agent]:
        from agents.dtql import DTQLAgent

        return DTQLAgent
