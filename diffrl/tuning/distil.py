"""Distillation of a policy into one of few network calls: consistency distillation, sCM, and reflow.

The teacher is a diffusion or flow policy, taken as its probability-flow ODE: a map from noise z and a state to an
action. All of it happens in the coordinates of VE, y = a_t / alpha_t, k = sigma_t / alpha_t, where every process is the
same, and at levels k that the teacher was trained at: a chain's own T, else many. A student learns in the states of the
run's data from the teacher's own actions a_0 = teacher(z), so that also a policy that has left its data is distilled.

    consistency, cd     f(y_t, k_t) = f(y_r, k_r), y_r one step of the teacher's ODE from y_t = a_0 + k_t e to the next
                        level below (`consistency_loss`): DDIM between the levels of a chain, which are its own steps,
                        Heun between others
    consistency, scm    the limit of many levels (`scm_loss`)
    reflow              flow matching on the pairs (z, a_0), which are the teacher's and not independent
                        (`diffrl.diffusion.reflow`); at t = 1 this is one Euler step against the pair's end

What acts is a moving average of the trained student; in cd it gives the answers at the lower level, as published.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from agents.base import Agent
from agents.consistency_policy import ConsistencyPolicy
from agents.diffusion_policy import DiffusionPolicy
from agents.flow_policy import FlowPolicy
from agents.solver_policy import SolverPolicy
from diffrl.data.transitions import Batch
from diffrl.diffusion import (
    VE,
    Boundaries,
    Denoise,
    Sampler,
    consistency_loss,
    denoising_loss,
    expand,
    half_from,
    lognormal_times,
    scm_loss,
)
from diffrl.nets import Adam, average_, state_of
from diffrl.support.errors import UserError
from diffrl.tuning.distil_config import DistilConfig
from diffrl.tuning.target import ForwardPolicy, copy_to_averages

_BOTTOM = 0.01
"""The lowest level of a student of a chain, as a share of the chain's lowest: there f(y, k) is all but y."""
_LOWEST, _HIGHEST = 0.01, 20.0
"""The levels of the student of a teacher trained at all times: outside lies nothing of actions in [-1, 1]."""


_CALLS = {"dpm2": 2, "dpm3": 3, "heun": 2}
"""Network calls a step of the solvers that need more than one."""

Map = Callable[[Tensor, Tensor], Tensor]
"""Observations (S, B, O) and noise -> actions (S, B, A)."""


@dataclass(frozen=True)
class Teacher:
    """A trained policy as a probability-flow ODE. Observations are (S, B, O), noise and actions (S, B, A)."""

    policy: ForwardPolicy
    levels: int = 40
    """How many noise levels to take, where the policy was trained at all."""

    @property
    def continuous(self) -> bool:
        """Whether the policy was trained at all times, or at so many that it makes no difference."""
        return not isinstance(self.policy, DiffusionPolicy)

    @property
    def noise_range(self) -> tuple[float, float]:
        """The least and the largest ratio k that the policy was trained at and a student starts from."""
        if isinstance(self.policy, FlowPolicy):
            return _LOWEST, _HIGHEST
        known = self.policy.noise_levels()
        if isinstance(self.policy, SolverPolicy):
            return max(known[0], _LOWEST), min(known[-1], _HIGHEST)
        return known[0], known[-1]

    def boundaries(self) -> Tensor:
        """The rising ratios k (N,) between which a student is distilled, in float64; the lowest is its boundary."""
        low, high = self.noise_range
        if isinstance(self.policy, DiffusionPolicy):
            return torch.tensor([_BOTTOM * low, *self.policy.noise_levels()], dtype=torch.float64)
        grid = Boundaries(VE(), low, high)
        return grid.times(torch.arange(self.levels), self.levels, torch.float64)

    @property
    def step(self) -> str:
        """The solver of a step between two levels."""
        return "heun" if self.continuous else "ddim"

    def denoiser(self, observations: Tensor) -> Denoise:
        """D of y (S, B, A) at the ratio k, () or (S, B), on VE; clamped to [-1, 1] where the policy's sampling is."""
        policy, process = self.policy, self.policy.prediction.process
        if isinstance(policy, FlowPolicy):
            own = policy.prediction.denoiser(policy.bound(observations))
        else:
            own = policy.denoiser(observations)

        def denoise(y: Tensor, k: Tensor) -> Tensor:
            t = process.time(k)
            return own(expand(process.alpha(t), y) * y, t)

        return denoise

    @property
    def calls(self) -> int:
        """Network calls for an action, of the policy as it samples."""
        if isinstance(self.policy, DiffusionPolicy):
            return self.policy.steps
        return sum(1 + len(step.trials) for step in self.policy.sampler.plan)

    @property
    def _calls_a_step(self) -> int:
        return _CALLS.get(self.policy.solver, 1) if isinstance(self.policy, SolverPolicy) else 1

    def sampler(self, calls: int | None = None) -> tuple[Sampler, float]:
        """The policy's ODE in at most so many calls (None: its own number) as a sampler, and sigma at its start.

        Of a chain's levels those evenly spaced are left, the largest among them.
        """
        policy, process = self.policy, self.policy.prediction.process
        n, solver = ((self.calls if calls is None else calls) - 1) // self._calls_a_step + 1, "ddim"
        if isinstance(policy, DiffusionPolicy):
            T = policy.steps
            chosen = torch.linspace(0, T - 1, T if n >= T else n + 1)[:n].round().long()
            times = policy.times.double().cpu()[chosen]
            times = torch.cat([times, times.new_zeros(1)])
        elif isinstance(policy, FlowPolicy):
            times = torch.linspace(1, 0, n + 1, dtype=torch.float64)
        else:
            known = policy.noise_levels()
            times = process.grid(n, known[0], known[-1], to_zero=True, dtype=torch.float64)
            solver = policy.solver
        return Sampler(process, times, solver), float(process.sigma(times[0]))

    def map(self, calls: int | None = None) -> Map:
        """The teacher's map, as a function of observations and noise (S, B, A): actions in [-1, 1], without a gradient.

        They are the ends of the ODE's paths in so many calls (None: the policy's own number).
        """
        sampler, start = self.sampler(calls)

        @torch.no_grad()
        def sample(observations: Tensor, noise: Tensor) -> Tensor:
            if isinstance(self.policy, FlowPolicy):
                own = self.policy.prediction.denoiser(self.policy.bound(observations))
            else:
                own = self.policy.denoiser(observations)
            return sampler(own, start * noise).clamp(-1, 1)

        return sample


def student_map(policy: ConsistencyPolicy | FlowPolicy, calls: int) -> Map:
    """A student's map in so many calls, whatever its own number: observations, noise (calls, S, B, A) -> actions.

    The first draw of the noise is the start: it leads where the same noise leads the teacher. A flow needs no other.
    """
    other = deepcopy(policy)
    if isinstance(other, FlowPolicy):
        grid = torch.linspace(1, 0, calls + 1, dtype=torch.float64)
        other.sampler = Sampler(other.prediction.process, grid)
    else:
        grid = other.prediction.process.grid(calls, other.boundaries.k_min, other.boundaries.k_max)
        other.steps, other.times = calls, grid[:-1].to(other.times)

    @torch.no_grad()
    def sample(observations: Tensor, noise: Tensor) -> Tensor:
        return other.sample(observations, noise[0] if isinstance(other, FlowPolicy) else noise)

    return sample


class DistilLearner:
    """Distils a teacher into the policy of `agent`, as a `Learner` from the data's states.

    `agent` is the student's, whose policy is the average that acts; `teacher` the teacher's agent, whose networks are
    kept in checkpoints beside it. Its `state_dict` is the student's agent alone; see `own_state`.
    """

    period = 1

    def __init__(self, agent: Agent, teacher: Agent, config: DistilConfig) -> None:
        self.agent, self.config = agent, config
        self.n_seeds, self.seeds = agent.n_seeds, agent.seeds
        self.teacher_agent, self.teacher = teacher, teacher_of(teacher, config)
        for network in teacher.networks.values():
            network.requires_grad_(False)
        policy = agent.policy
        assert isinstance(policy, ConsistencyPolicy | FlowPolicy)
        self.policy, self._map = policy, self.teacher.map()
        self.trained = deepcopy(policy).requires_grad_(True)
        self._optimiser = Adam(self.trained, config.learning_rate, config.grad_clip)
        self._updates = torch.zeros((), device=agent.device)
        self._levels = self.teacher.boundaries().to(torch.get_default_dtype()).to(agent.device)

    def cd_loss(self, observations: Tensor, a_0: Tensor, i: Tensor, noise: Tensor) -> Tensor:
        """Consistency distillation: (S,). i: (S, B), the level, from 1 up, whose neighbour below is i - 1."""
        assert isinstance(self.trained, ConsistencyPolicy)
        assert isinstance(self.policy, ConsistencyPolicy)
        f, goal = self.trained.function(observations), self.policy.function(observations)
        given = VE(), f, a_0, self._levels[i], self._levels[i - 1], noise
        teacher = self.teacher.denoiser(observations)
        return consistency_loss(*given, target=goal, teacher=teacher, solver=self.teacher.step).mean(-1)

    def scm_loss(self, observations: Tensor, a_0: Tensor, k: Tensor, noise: Tensor, warm_up: Tensor) -> Tensor:
        """Continuous-time consistency distillation, sCM: (S,). k: (S, B); warm_up: (), from 0 to 1."""
        network, denoise = self.trained.bound(observations), self.teacher.denoiser(observations)
        given = self.trained.prediction, network, a_0, k, noise
        return scm_loss(*given, teacher=denoise, warmup=warm_up).mean(-1)

    def reflow_loss(self, observations: Tensor, a_0: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """Flow matching on the teacher's pairs (z, a_0): (S,). t: (S, B) in (0, 1]."""
        return denoising_loss(self.trained.prediction, self.trained.bound(observations), a_0, t, z).mean(-1)

    def loss(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """The loss (S,) in the states (S, B, O), with all noise drawn here."""
        config, device = self.config, observations.device
        S, B, _ = observations.shape
        z, e = torch.randn((2, S, B, self.agent.action_size), generator=generator, device=device)
        a_0 = self._map(observations, z)
        if config.to == "reflow":
            t = 1 - torch.rand((S, B), generator=generator, device=device)
            if config.calls == 1:
                t = half_from(t.new_ones(()), t, generator)
            return self.reflow_loss(observations, a_0, t, z)
        if config.loss == "scm":
            low, high = self.teacher.noise_range
            k = lognormal_times(VE(), (S, B), generator, mean=-1.0, std=1.4).clamp(low, high)
            return self.scm_loss(observations, a_0, k, e, (self._updates / max(config.warm_up, 1)).clamp_max(1))
        i = torch.randint(1, len(self._levels), (S, B), generator=generator, device=device)
        return self.cd_loss(observations, a_0, i, e)

    def update(self, batch: Batch, generator: torch.Generator, phase: int = 0) -> dict[str, Tensor]:
        """Make one step in a batch's states; metrics (S,)."""
        loss = self.loss(batch.observations, generator)
        norm = self._optimiser.step(loss)
        self._updates += 1
        average_(self.policy, self.trained, self.config.ema_rate)
        copy_to_averages(self.agent, self.policy)
        return {"distil_loss": loss.detach(), "grad_norm": norm}

    def state_dict(self) -> dict[str, Tensor]:
        """The student's agent's tensors, themselves and not copies."""
        return self.agent.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy a `state_dict` back into the agent's own tensors. Raises ValueError where it does not fit."""
        self.agent.load_state_dict(state)

    def own_state(self) -> dict[str, Tensor]:
        """The tensors that distillation adds to the agent's: the optimiser's, the trained student's, the teacher's."""
        own = {f"optimiser.{name}": tensor for name, tensor in self._optimiser.state_dict().items()}
        own |= {f"trained.{name}": tensor for name, tensor in self.trained.state_dict().items()}
        own |= {f"teacher.{name}": tensor for name, tensor in state_of(self.teacher_agent.networks).items()}
        return own | {"updates": self._updates}


def teacher_of(agent: Agent, config: DistilConfig) -> Teacher:
    """The agent's policy as a teacher. Raises UserError where it is none for the loss that is asked for."""
    policy = agent.networks.get(agent.generative)
    assert isinstance(policy, DiffusionPolicy | SolverPolicy | FlowPolicy)  # `target.forward_policy` has seen to it
    teacher = Teacher(policy, config.levels)
    if config.loss == "scm" and not teacher.continuous:
        raise UserError(
            f"--loss scm needs a teacher that was trained at all times; {agent.config.name} was trained at its "
            f"{len(policy.noise_levels())} own: take --loss cd."
        )
    return teacher


@torch.no_grad()
def keep_critics(student: Agent, teacher: Agent) -> None:
    """Copy the teacher's critics to the student's, which are networks of the same kind."""
    for name in ("critic", "target_critic"):
        student.networks[name].load_state_dict(teacher.networks[name].state_dict())
