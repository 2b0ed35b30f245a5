"""The hyper-parameters of agents that plan. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from typing_extensions import override

from agents.base_config import AgentConfig, PolicyKind, Schedule, Solver
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
    from diffrl.data.offline import OfflineDataset


@dataclass(frozen=True)
class Diffuser(AgentConfig):
    """Diffuser (Janner et al. 2022, arXiv 2205.09991): plans are windows of states and actions, made by denoising."""

    name: ClassVar[str] = "diffuser"
    policy_kind: ClassVar[PolicyKind] = "planner"

    batch_size: Batch = 64
    """Windows a step."""
    width: Annotated[int, Range(4, 100_000)] = 32
    """Channels of the U-Net, times its multipliers."""
    layers: Depth = 3
    """Levels of the U-Net: so many of the `multipliers`, the first."""
    multipliers: tuple[Several, ...] = (1, 4, 8)
    """Of each level of the U-Net, the channels in units of `width`."""
    kernel: Literal[3, 5, 7] = 5
    """Rows that a convolution of the U-Net spans."""
    horizon: Annotated[int, Range(2, 100_000)] = 128
    """Rows of a window, and of a plan."""
    goal_reaching: bool = False
    """Plan to the goal of the environment, and drive from state to state by their positions and velocities (maze2d);
    else plan from the state at hand alone, and execute the plan's actions."""
    show_ends: bool = False
    """Show every row of the network the given states of the plan, the first one and with a goal the last, and its own
    place between them, in columns beside its own; else, as published, a row learns of them from its neighbours alone,
    which takes far more steps of training where plans are long."""
    replan_every: Count | None = None
    """Steps after which a new plan is made; by default one plan an episode with a goal, and one a step without."""
    denoising_steps: SamplingSteps = 64
    """T, the steps of the diffusion."""
    schedule: Schedule = "cosine"
    """Noise schedule of the diffusion."""
    solver: Literal["ddpm", Solver] = "ddpm"
    """How plans are sampled: ddpm, the paper's random chain, or a solver of the denoising ODE."""
    sampling_steps: SamplingSteps | None = None
    """Steps of the solver, at most `denoising_steps`; by default as many."""
    normalise_observations: bool = False
    """Refused: a Diffuser scales observations to [-1, 1] by the data's limits, in any case."""
    guidance: Literal["none", "return"] = "none"
    """What bends the plans as they are denoised, beside a goal: nothing, so that without a goal they clone the data; or
    return, the gradient of the return that a second network predicts of noised windows (locomotion in the paper)."""
    guidance_scale: NotNegative = 0.1
    """Weight of the return beside the plans' log-likelihood; 0: none. The data's units of reward count."""
    guidance_steps: Annotated[int, Range(1, 100)] = 2
    """Gradient steps at each call of the denoiser."""
    guidance_stop: Natural = 2
    """Last steps of the diffusion, of `denoising_steps`, that go without guidance."""
    action_weight: Positive = 1.0
    """Weight of the first action of a window, which is executed, in the loss of the diffuser (10 in the paper's code on
    locomotion)."""
    learning_rate: Positive = 2e-4
    """Adam's learning rate, also of the network that predicts returns."""
    ema_rate: Rate = 0.005
    """How far the averaged network, which plans, moves to the network at an update."""
    ema_every: Count = 10
    """Steps between updates of the averaged network."""
    ema_start: Natural = 2000
    """Step up to which the averaged network is a copy of the network."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.multipliers or len(self.multipliers) < self.layers:
            raise refusal("--agent.multipliers", list(self.multipliers), f"{self.layers} numbers, one a level (layers)")
        if self.sampling_steps is not None and self.sampling_steps > self.denoising_steps:
            most = f"at most --agent.denoising-steps, {self.denoising_steps:,}"
            raise refusal("--agent.sampling-steps", self.sampling_steps, most)
        if self.replan_every is not None and not self.goal_reaching and self.replan_every > self.horizon:
            raise refusal("--agent.replan-every", self.replan_every, f"at most --agent.horizon, {self.horizon:,}")
        if self.guidance_stop > self.denoising_steps:
            most = f"at most --agent.denoising-steps, {self.denoising_steps:,}"
            raise refusal("--agent.guidance-stop", self.guidance_stop, most)
        if self.guidance != "none" and self.goal_reaching:
            raise refusal("--agent.guidance", self.guidance, "none with --agent.goal-reaching, which plans to a goal")
        if self.normalise_observations:
            what = "nothing there: a Diffuser scales to [-1, 1] by the data's limits"
            raise refusal("--agent.normalise-observations", True, what)

    @classmethod
    @override
    def of_run(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a run; `normalise_observations` did nothing when it was still taken."""
        return {**values, "normalise_observations": False}

    @property
    def guided(self) -> bool:
        """Whether a network learns to predict returns, which bend the plans."""
        return self.guidance == "return"

    @property
    @override
    def learns_from_rewards(self) -> bool:
        """Only where returns guide its plans."""
        return self.guided

    def could_reach(self, observation_size: int, action_size: int) -> bool:
        """Whether `goal_reaching` is off, and would be taken of data of these sizes: see `DiffuserAgent`."""
        return not self.goal_reaching and not self.guided and observation_size == 2 * action_size

    @property
    def channels(self) -> tuple[int, ...]:
        """The multipliers of the U-Net's levels."""
        return self.multipliers[: self.layers]

    @property
    @override
    def observation_scaling(self) -> str:
        """To [-1, 1] by the data's limits: plans are clipped to that box."""
        return "min_max"

    @override
    def episodes(self, dataset: OfflineDataset) -> OfflineDataset:
        """Of a walk from goal to goal, with `goal_reaching`, the paths between visits to the rewarded goal."""
        if not self.goal_reaching:
            return dataset
        from diffrl.data.walks import between_visits

        return between_visits(dataset)

    @override
    def implementation(self) -> type[Agent]:
        from agents.diffuser import DiffuserAgent

        return DiffuserAgent
